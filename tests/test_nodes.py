"""Two nodes on one machine, started by the command in recipes/accelerate/two_nodes.yaml; one of them is killed."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.warm_python import free_port
from test_crash import NUM_STEPS, RECIPE, Kind, finish, sources, start, trained, words

__all__ = ["sources"]  # a fixture

ROOT = RECIPE.parents[1]
LAUNCH = ROOT / "recipes" / "accelerate" / "two_nodes.yaml"
TWO = Kind("parquet", 2)


def documented(rank: int, port: int) -> list[str]:
    """Return the launcher's part of the command in the header, for one process on each of two nodes."""
    header = LAUNCH.read_text(encoding="utf-8").split("compute_environment")[0].replace("\\\n#", " ")
    line = next(line for line in header.splitlines() if re.match(r"#\s+accelerate launch", line))
    launcher = line.split("recipes/pretrain.py")[0].removeprefix("#")
    launcher = launcher.replace("RANK", str(rank)).replace("FIRST_MACHINE", "127.0.0.1")
    return [*shlex.split(launcher)[2:], "--num_processes", "2", "--main_process_port", str(port)]


def launch(run: Path, options: list[str]) -> list["subprocess.Popen[bytes]"]:
    """Start both nodes."""
    port = free_port()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    nodes = []
    for rank in (0, 1):
        command = [sys.executable, "-m", "accelerate.commands.launch", *documented(rank, port), str(RECIPE), *options]
        with (run.parent / f"node{rank}.log").open("a") as log:
            nodes.append(
                subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True)
            )
    return nodes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_dies_ends_the_run_and_both_go_on_from_the_checkpoint(
    sources: dict[str, str], tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    expected = finish(start(TWO, sources, undisturbed, 0), undisturbed)
    run = tmp_path / "killed"
    options = [*words(TWO, sources, run, 0), "--train.num_processes", "2"]
    nodes = launch(run, options)
    give_up = time.time() + 240
    while trained(run) < NUM_STEPS // 3 and time.time() < give_up and nodes[0].poll() is None:
        time.sleep(0.01)
    launcher = psutil.Process(nodes[1].pid)
    for process in (launcher, *launcher.children(recursive=True)):  # as if the machine had lost its power
        process.kill()
    assert nodes[0].wait(timeout=240) != 0
    assert nodes[1].wait(timeout=60) != 0
    assert NUM_STEPS // 3 <= trained(run) < NUM_STEPS, (tmp_path / "node0.log").read_text()[-3000:]
    assert not (run / "model").exists()
    for node in launch(run, options):
        assert node.wait(timeout=240) == 0, (tmp_path / "node0.log").read_text()[-3000:]
    assert (run / "model" / "model.safetensors").read_bytes() == expected
    assert trained(run) == NUM_STEPS
