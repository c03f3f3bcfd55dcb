"""Engines: do the work of many units, in this process, in several processes, or on a Ray cluster.

The work writes files, and yields the number of rows of each finished block. An engine yields these numbers, in any
order. Units do not depend on the engine, so every engine writes the same bytes.

Ray gets units, not pictures, as tasks. `ray.data` would read the tables itself and cut them into blocks by their size
in memory: the rows of a shard would depend on the cluster. It also does not know the other sources of koclip.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from koclip.config import ConfigError

_INTERVAL = 0.5  # seconds between two looks at the processes
_MEMORY = 100 * 2**20  # bytes of a local Ray's object store: it holds numbers of rows only


class Unit(NamedTuple):
    """Rows of a source: a range of a map source, or (with `stop` -1) the file number `start` of a stream."""

    number: int
    source: int
    start: int
    stop: int


Work = Callable[[Unit], Iterator[int]]  # yields the number of rows of each finished block
Engine = Callable[
    [str, Work, Sequence[Unit], int], Iterator[int]
]  # a title, the work, the units, the number of workers

_counter: Any = None  # in a worker: the number of rows that all workers have finished


def on_one_machine(title: str, work: Work, units: Sequence[Unit], num_workers: int) -> Iterator[int]:
    """Do the work in this process, or in several."""
    if min(num_workers, len(units)) <= 1:
        for unit in units:
            yield from work(unit)
        return
    counter = multiprocessing.Value("q", 0)
    pool = ProcessPoolExecutor(min(num_workers, len(units)), initializer=_start, initargs=(counter,))
    try:
        waiting, before = {pool.submit(_count, work, unit) for unit in units}, 0
        while waiting:
            finished, waiting = wait(waiting, _INTERVAL, "FIRST_COMPLETED")
            for future in finished:
                future.result()  # raises what the work raised, or that a process died
            after = counter.value
            yield after - before
            before = after
    finally:
        pool.shutdown(cancel_futures=True)


def _start(counter: Any) -> None:
    """Prepare a worker: it ends with the process that started it, also if that was killed."""
    global _counter
    _counter = counter
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _count(work: Work, unit: Unit) -> None:
    for num_rows in work(unit):
        with _counter.get_lock():
            _counter.value += num_rows


def on_ray(title: str, work: Work, units: Sequence[Unit], num_workers: int) -> Iterator[int]:
    """Do the work in tasks of Ray, one for each unit; Ray repeats the tasks of a machine that fails.

    The cluster is that of the variable RAY_ADDRESS. Without it, a local Ray with `num_workers` CPUs starts; it ends
    with this process. A Ray that this process has started before is used as it is. Sources and results must be under
    the same path on all machines.

    Raises:
        ConfigError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a local Ray sends statistics to its makers
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"engine: ray is not installed ({error}): pip install 'koclip[ray]'") from error
    cluster: Any = ray  # it has types for a part of its functions
    if not cluster.is_initialized():
        local = {"address": "local", "num_cpus": num_workers, "object_store_memory": _MEMORY}
        local |= {"include_dashboard": False}
        cluster.init(log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else local))
    task = cluster.remote(num_returns="streaming", max_retries=3)(_in_folder).options(name=title)
    waiting = iter(units)
    limit = 2 * max(1, int(cluster.cluster_resources().get("CPU", 1)))  # tasks at a time: some run, some wait
    running = [task.remote(work, unit, Path.cwd()) for unit in islice(waiting, limit)]
    while running:
        ready, running = cluster.wait(running)
        for blocks in ready:
            try:
                num_rows = cluster.get(next(blocks))
            except StopIteration:
                running += [task.remote(work, unit, Path.cwd()) for unit in islice(waiting, 1)]
                continue
            except cluster.exceptions.RayTaskError as error:
                raise error.cause from error
            running.append(blocks)
            yield num_rows


def _in_folder(work: Work, unit: Unit, folder: Path) -> Iterator[int]:
    os.chdir(folder)  # paths in the settings may be relative
    yield from work(unit)


ENGINES: dict[str, Engine] = {"local": on_one_machine, "ray": on_ray}
