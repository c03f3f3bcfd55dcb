"""A program that a warm Python forks does what a new Python does with the same words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import warm_python

LIBRARIES = ("json",)
FACTS = "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('A'), __name__, sys.path[0])"


@pytest.mark.parametrize(
    "command",
    [
        ["-c", FACTS, "one", "two words"],
        ["program.py", "one"],
        ["-m", "program", "one"],
        ["-c", "raise SystemExit"],
        ["-c", "raise SystemExit(3)"],
        ["-c", "import sys; print('out'); sys.exit('a message')"],
        ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
        ["-c", "import atexit; atexit.register(print, 'at the end'); print('é가')"],
        ["-c", "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()"],
        ["-c", "import sys; print(repr(sys.stdin.read()))"],
    ],
    ids=str,
)
def test_a_program_answers_as_in_a_new_python(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(FACTS)
    environment = {**os.environ, "A": "a value"}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment}
    warm = warm_python.run(command, libraries=LIBRARIES, **options)
    plain = subprocess.run(
        [sys.executable, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options
    )
    assert (warm.returncode, warm.stdout, warm.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_an_error_is_a_traceback_and_exit_status_1() -> None:
    ran = warm_python.run(["-c", "raise ValueError('this')"], libraries=LIBRARIES)
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (1, "ValueError: this")


def test_what_libraries_read_when_imported_is_the_programs_own() -> None:
    """Programs with other variables of this kind have a server of their own."""
    for home in ("a", "b"):
        environment = {**os.environ, "HF_HOME": home}
        code = "from huggingface_hub import constants; print(constants.HF_HOME)"
        ran = warm_python.run(["-c", code], env=environment, libraries=("huggingface_hub.constants",))
        assert ran.stdout == f"{home}\n"


def test_a_killed_program_takes_its_children_with_it(tmp_path: Path) -> None:
    code = "import os, time\nif not os.fork():\n    open('child', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    program = warm_python.start(["-c", code], cwd=tmp_path, libraries=LIBRARIES)
    end = time.monotonic() + 30
    while not (tmp_path / "child").is_file() or not (tmp_path / "child").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    program.kill()
    assert program.wait(timeout=30) == -signal.SIGKILL
    child = Path("/proc") / (tmp_path / "child").read_text() / "cmdline"
    while child.exists() and child.read_bytes():  # nothing to read: it has ended
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_program_that_runs_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        warm_python.run(["-c", "import time; time.sleep(60)"], timeout=0.5, libraries=LIBRARIES)


def test_processes_find_each_other(tmp_path: Path) -> None:
    facts = "import os; open(os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'] + os.environ['MASTER_ADDR'])"
    (tmp_path / "program.py").write_text(f"import os; os.chdir({str(tmp_path)!r}); {facts}")
    warm_python.run_in_processes([str(tmp_path / "program.py")], 3)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["3127.0.0.1"] * 3
    with pytest.raises(AssertionError, match="exit statuses"):
        warm_python.run_in_processes(["-c", "import os, time; time.sleep(60 * int(os.environ['RANK'])); 1 / 0"], 2)
