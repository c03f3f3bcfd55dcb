"""Python programs that start fast: a server has imported the libraries, and forks a process for each program.

To import torch and transformers takes longer than most programs that tests start. A forked program has the arguments,
variables, folder and streams that it is given, a process group of its own, and the imported modules of the server. Its
strings have the same hashes as those of the server's other programs. Tests of what depends on these hashes, and tests
of what is imported, start Python themselves.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

LIBRARIES = ("torch._dynamo", "peft", "koclip.training", "koclip.evaluation.report", "koclip.runs.session")
_READ_WHEN_IMPORTED = ("HF_", "HUGGING_FACE_", "OMP_", "PYTHON", "TRANSFORMERS_")
_READ_LATER = ("HF_TOKEN", "PYTHONPATH")
_MOST_BYTES = 1 << 17  # of a job


class Program:
    """A program that a server has started, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, reply: socket.socket) -> None:
        self._reply = reply.makefile("rb", buffering=0)  # without a buffer, `select` sees all that was not read
        self.pid = int(self._reply.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None if the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; of a killed program, minus the number of the signal."""
        if self.returncode is None:
            if not select.select([self._reply], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"program {self.pid}", timeout or 0)
            self.returncode = int(self._reply.readline())
        return self.returncode

    def kill(self) -> None:
        """Kill the program and the processes that it started."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class _Server:
    def __init__(self, environment: Mapping[str, str], libraries: Sequence[str]) -> None:
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(other.fileno()), *libraries]
        self._process = subprocess.Popen(command, env=dict(environment), pass_fds=[other.fileno()])
        other.close()

    def start(self, job: Mapping[str, Any], streams: Sequence[int]) -> Program:
        reply, other = socket.socketpair()
        socket.send_fds(self._channel, [json.dumps(job).encode()], [*streams, other.fileno()])
        other.close()
        return Program(reply)


@functools.cache
def _server(variables: frozenset[tuple[str, str]], libraries: tuple[str, ...]) -> _Server:
    others = {name: value for name, value in os.environ.items() if not name.startswith(_READ_WHEN_IMPORTED)}
    return _Server(others | dict(variables), libraries)


def start(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    streams: Sequence[IO[Any] | int] = (0, 1, 2),
    libraries: Sequence[str] = LIBRARIES,
) -> Program:
    """Start a script or `-m` module with its arguments, or `-c` code, as `[sys.executable, *command]` would.

    `streams` are the input, the output and the errors of the program. The server has imported `libraries`.
    """
    environment = dict(os.environ if env is None else env)
    once = {name: value for name, value in environment.items() if name.startswith(_READ_WHEN_IMPORTED)}
    for name in _READ_LATER:
        once.pop(name, None)
    job = {"command": list(map(str, command)), "environment": environment, "folder": str(cwd or Path.cwd())}
    numbers = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
    return _server(frozenset(once.items()), tuple(libraries)).start(job, numbers)


def run(command: Sequence[str], timeout: float = 540, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end; return its exit status, output and errors. Options as for `start`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, Path(os.devnull).open() as nothing:
        program = start(command, streams=(nothing, output, errors), **options)
        try:
            status = program.wait(timeout)
        finally:
            program.kill()
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode().replace("\r\n", "\n"))
    return subprocess.CompletedProcess(list(command), status, *texts)


def free_port() -> int:
    """Return a port of this machine that no program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start_in_processes(command: Sequence[str], count: int, log: IO[Any], cwd: Path | None = None) -> list[Program]:
    """Start a program in `count` processes on the CPU, one thread each.

    Several find each other as those of torchrun do; a single process is started as without torchrun.
    """
    common = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meeting |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)] if count > 1 else [{}]
    with Path(os.devnull).open() as nothing:
        return [start(command, common | rank, cwd, (nothing, log, log)) for rank in ranks]


def run_in_processes(command: Sequence[str], count: int, timeout: float = 540) -> None:
    """Run a program in `count` processes to its end, and check that each succeeds."""
    with tempfile.TemporaryFile() as log:
        programs = start_in_processes(command, count, log)
        states = wait(programs, timeout)
        log.seek(0)
        assert states == [0] * count, f"exit statuses {states}\n{log.read().decode()[-5000:]}"


def wait(programs: Sequence[Program], timeout: float) -> list[int | None]:
    """Wait until all programs have ended or one has failed; kill those that run then. Return the exit statuses."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(program.poll() is None for program in programs):
        if any(program.poll() for program in programs):
            break  # the others would wait for the one that failed
        time.sleep(0.02)
    states = [program.poll() for program in programs]
    for program in programs:
        program.kill()
    return states


def _next_job(channel: socket.socket) -> list[str]:
    """Wait for jobs; return the command of a job in a process that was forked for it."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, 4)
        if not message:
            raise SystemExit  # the tests are over
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    channel.close()
    *streams, reply = descriptors
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():  # this process waits for the program
        for descriptor in streams:
            os.close(descriptor)
        os.write(reply, f"{child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            os.write(reply, f"{status}\n".encode())
        os._exit(0)
    os.close(reply)
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    job = json.loads(message)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    command: list[str] = job["command"]
    return command


def _run(command: list[str]) -> None:
    """Run a command line of Python without its first word."""
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], str(Path.cwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    for library in sys.argv[2:]:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # programs leave the server's objects alone, so that their memory stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # processes that wait for a program leave nothing behind
    _run(_next_job(socket.socket(fileno=int(sys.argv[1]))))
