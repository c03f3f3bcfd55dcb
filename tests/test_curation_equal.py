"""`koclip curate` writes equal bytes with every engine, of every kind of source, and after it was killed."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dying_curations
import psutil
import pytest
from dying_curations import MOMENTS
from helpers import warm_python
from sources_on_disk import write_tar
from test_curation import contents, planted, settings

from koclip.config import ConfigError, SourceConfig, dump
from koclip.curation.engines import Unit, on_one_machine, on_ray
from koclip.curation.pipeline import curate
from koclip.data.sources import open_source


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    """The same rows as a table and as tar shards."""
    folder = tmp_path_factory.mktemp("raw")
    table = planted(folder / "raw.parquet")[0]
    rows = list(open_source(table).iter_rows())
    for shard in range(3):
        samples: Any = [{"png": row.image, "txt": row.captions["ko"][0].encode()} for row in rows[70 * shard :][:70]]
        write_tar(folder / f"{shard}.tar", samples, first=70 * shard)
    tars = SourceConfig(path=f"{folder}/*.tar", name="raw", image=["png"], captions={"ko": "txt"})
    return {"table": table, "tars": tars}


@pytest.fixture(scope="module", params=["table", "tars"])
def plain(request, sources, tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceConfig, dict[str, bytes]]:
    """A source, and its result of one undisturbed process."""
    folder = tmp_path_factory.mktemp("plain") / "clean"
    curate(settings(sources[request.param], folder))
    return sources[request.param], contents(folder)


def test_two_processes_write_the_bytes_of_one(plain, tmp_path):
    curate(settings(plain[0], tmp_path / "clean", num_workers=2))
    assert contents(tmp_path / "clean") == plain[1]


# Slow: Ray takes up to a minute to start.
@pytest.mark.slow
def test_ray_writes_the_bytes_of_one_process(sources, tmp_path, tmp_path_factory, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
    monkeypatch.chdir(tmp_path)  # relative paths are those of this process
    temporary = Path("/tmp") / f"ray-{os.getpid()}"  # the path of a socket has at most 107 bytes
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": 2,
        "include_dashboard": False,
        "object_store_memory": 100 * 2**20,
    }
    ray.init(**options, log_to_driver=False, _temp_dir=str(temporary))
    try:
        for name, source in sources.items():
            curate(settings(source, Path(name)))
            curate(settings(source, Path(f"{name}_ray"), engine="ray"))
            assert contents(tmp_path / name) == contents(tmp_path / f"{name}_ray")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes do not see this folder
        with pytest.raises(ConfigError, match="unit 1"):
            list(on_ray("check", failing, units(3), 2))
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def units(count: int) -> list[Unit]:
    return [Unit(number, 0, number, number + 1) for number in range(count)]


def failing(unit: Unit) -> Iterator[int]:
    if unit.number == 1:
        raise ConfigError(f"unit {unit.number}")
    yield 1


def test_an_error_in_a_process_is_raised(tmp_path):
    with pytest.raises(ConfigError, match="unit 1"):
        list(on_one_machine("check", failing, units(3), 2))


def blocks(unit: Unit) -> Iterator[int]:
    yield from range(unit.number)


@pytest.mark.parametrize("num_workers", [1, 2, 9])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_engines_count_the_rows_of_all_units(num_workers, count):
    assert sum(on_one_machine("check", blocks, units(count), num_workers)) == sum(sum(range(n)) for n in range(count))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_continues_and_writes_the_same_bytes(moment, plain, tmp_path):
    source, expected = plain
    config = settings(source, tmp_path / "clean")
    dump(config, tmp_path / "config.yaml")
    ended = warm_python.run([dying_curations.__file__, moment, "--config", str(tmp_path / "config.yaml")])
    (tmp_path / "config.yaml").unlink()
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    if moment == "after the rename":
        assert contents(tmp_path / "clean") == expected
    else:
        assert not (tmp_path / "clean").exists()
    curate(config)
    assert contents(tmp_path / "clean") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]


def endless(unit: Unit) -> Iterator[int]:
    while True:
        time.sleep(0.05)
        yield 1


def start_two(marker: Path) -> None:
    for _ in on_one_machine("check", endless, units(2), 2):
        marker.write_text(" ".join(str(child.pid) for child in psutil.Process().children()), encoding="utf-8")


def test_processes_end_with_a_killed_parent(tmp_path):
    code = "import pathlib, sys, test_curation_equal as t; t.start_two(pathlib.Path(sys.argv[1]))"
    program = warm_python.start(["-c", code, str(tmp_path / "children")], cwd=Path(__file__).parent)
    while not (tmp_path / "children").is_file() or not (tmp_path / "children").read_text(encoding="utf-8"):
        time.sleep(0.1)
        assert program.poll() is None
    numbers = [int(number) for number in (tmp_path / "children").read_text(encoding="utf-8").split()]
    children = [psutil.Process(number) for number in numbers]
    assert len(children) == 2
    os.kill(program.pid, signal.SIGKILL)
    assert program.wait(timeout=60) == -signal.SIGKILL
    assert psutil.wait_procs(children, timeout=60)[1] == []
