"""A Space that runs for tests: a tiny model, pictures whose file names are hostile captions."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from align_runs import write_source
from PIL import Image

from koclip.config import IndexConfig, SourceConfig
from koclip.encoders import load
from koclip.search.build import build
from koclip.search.calibrate import calibrate

ROOT = Path(__file__).parents[1]
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1<\\script>"  # a file name has no slash

QUERIES = [f"{number}번째 검색어" for number in range(20)]  # without a match; they calibrate the index


class Space(NamedTuple):
    url: str
    folder: Path  # that holds the model, the index, the pictures and the log
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")


@contextmanager
def running(folder: Path) -> Iterator[Space]:
    """Start `python space/app.py` on a tiny model's run in this folder, with an index of pictures."""
    write_source(folder / "runs" / "tiny" / "model")
    (folder / "photos").mkdir()
    for number in range(30):
        name = f"{number:02d} {HOSTILE}.png" if number < 2 else f"{number:02d}번 사진.png"
        Image.new("RGB", (60, 40), (8 * number, 255 - 8 * number, 60)).save(folder / "photos" / name)
    (folder / "queries.csv").write_text(
        "ko,en\n" + "\n".join(f"{query},{query}" for query in QUERIES), encoding="utf-8"
    )
    queries = SourceConfig(path=str(folder / "queries.csv"), image=None, captions={"ko": "ko", "en": "en"})
    config = IndexConfig(model="tiny", images=str(folder / "photos"), calibration=queries)
    encoder = load(str(folder / "runs" / "tiny" / "model"), "cpu")
    build(config, encoder, folder / "index")
    calibrate(config, encoder, folder / "index")
    with serving(folder, ROOT / "space" / "app.py", "--index", "index", "--device", "cpu") as space:
        yield space


@contextmanager
def serving(folder: Path, app: Path, *options: str, **environment: str) -> Iterator[Space]:
    """Start an app in a folder, wait until it answers, and stop it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(app), "--port", str(port), *options]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **settings, **environment}, stdout=log, stderr=log
        )
    space = Space(f"http://127.0.0.1:{port}", folder, process)
    _wait(space)
    yield space
    process.terminate()
    process.wait(timeout=30)


def _wait(space: Space) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert space.process.poll() is None, space.log
        try:
            urllib.request.urlopen(space.url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(space.log)
