"""Fixtures that several rooms' tests share. Nothing here or in any default test reaches beyond this machine."""

import io
import json
import os
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.skips import unexpected_skips

from koclip.config import SourceConfig

# Data that may not be published, for development, by the places where `koclip data` puts them.
SHARED = Path(os.environ.get("KOCLIP_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
LINKS = {
    "emoji/emoji.parquet": "emoji_dev.parquet",
    "emoji/names.jsonl": "emoji_names.jsonl",
    "flickr8k_ko/train.parquet": "flickr8k_ko_train.parquet",
    "flickr8k_ko/val.parquet": "flickr8k_ko_val.parquet",
    "tiny_imagenet_ko/train.parquet": "tiny_imagenet_train.parquet",
    "tiny_imagenet_ko/val.parquet": "tiny_imagenet_val.parquet",
    "cifar10/test.parquet": "cifar10_test.parquet",
    "text": "text",
}


def pytest_configure(config: pytest.Config) -> None:
    """Keep Hugging Face libraries, which read this when they are imported, off the network and out of the home."""
    if config.option.markexpr != "hub":
        os.environ["HF_HUB_OFFLINE"] = "1"
    cache = tempfile.TemporaryDirectory(prefix="koclip-tests-")
    os.environ["HF_DATASETS_CACHE"] = cache.name
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    config.add_cleanup(cache.cleanup)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were skipped without a reason that is known, or more often than is known."""
    for problem in unexpected_skips(terminalreporter):
        terminalreporter.write_line(f"ERROR: {problem}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a session with such a skip fail."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if isinstance(reporter, pytest.TerminalReporter) and unexpected_skips(reporter) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines, but in tests marked `hub`; skip those where there is no Hub."""
    if request.node.get_closest_marker("hub"):
        try:
            socket.create_connection(("huggingface.co", 443), timeout=10).close()
        except OSError:
            pytest.skip("huggingface.co cannot be reached")
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = str(address[0]) if isinstance(address, tuple) else "localhost"
        if self.family != socket.AF_UNIX and host not in ("localhost", "::1") and not host.startswith("127."):
            raise AssertionError(f"a test tried to reach {host}; mark it `hub`, or take the network out of it")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def new_accelerator() -> None:
    """Let every test choose its own precision: accelerate keeps the first choice for good."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what benchmarks set for the whole process: threads and the device. One thread is enough for tiny sizes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder `data` as `koclip data` would write it, with links to data that are at hand for development."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not there: data that may not be published (data_cards/README.md)")
    data = tmp_path_factory.mktemp("shared") / "data"
    for link, file in LINKS.items():
        (data / link).parent.mkdir(parents=True, exist_ok=True)
        (data / link).symlink_to(SHARED / file)
    return data


@pytest.fixture(scope="session")
def captions() -> list[str]:
    """Return the captions that `tokenizer` is trained on."""
    return ["빨간 원이 파란 별 위에 있다", "초록색 사각형 두 개", "a red circle above a blue star", "two green squares"]


@pytest.fixture(scope="session")
def tokenizer(captions):
    """Return a tiny tokenizer for captions of at most 16 tokens."""
    from koclip.text.tokenizers import train_bpe

    return train_bpe(captions, vocab_size=600, max_tokens=16)


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """Return a function that encodes a small picture of one colour."""
    from PIL import Image

    def encode(colour: object = (200, 30, 40), mode: str = "RGB", kind: str = "PNG", size=(8, 6), **options) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, colour).save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def records(encoded) -> list[dict[str, object]]:
    """Return the three rows that `sources_on_disk` writes."""
    from sources_on_disk import EXPECTED

    return [
        {"image": encoded(colour), "captions_ko": captions["ko"], "caption_en": captions["en"][0]}
        for colour, captions in EXPECTED
    ]


@pytest.fixture
def write_table(tmp_path, encoded) -> Callable[..., str]:
    """Return a function that writes pairs to a Parquet file and returns its path.

    Image, captions and id of a row all tell its number; some captions are longer than others.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str, count: int, first: int = 0, **columns) -> str:
        rows = [
            {
                "image": encoded((number % 256, number // 256, 0)),
                "ko": f"{number}번 " + "사진 " * (number % 7),
                "en": f"picture {number}",
                "id": f"{number:04d}",
                **{name: values[number - first] for name, values in columns.items()},
            }
            for number in range(first, first + count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def table(write_table) -> SourceConfig:
    """Return a map-style source of 50 pairs."""
    return SourceConfig(path=write_table("rows.parquet", 50), captions={"ko": "ko", "en": "en"})


@pytest.fixture
def colours(tmp_path: Path, encoded: Callable[..., bytes]) -> Callable[..., Any]:
    """Return a function that opens 24 pictures of four colours with their classes."""
    from fake_encoder import CLASSES, write_colours

    from koclip.config import EvalSetConfig
    from koclip.evaluation.sets import open_set

    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    file = write_colours(tmp_path / "colours.parquet", encoded)

    def opened(label: str | None = "key", captions: dict[str, str] | None = None, **changes: object) -> Any:
        source = SourceConfig(path=str(changes.pop("path", file)), label=label, captions=captions or {})
        settings = {"classes": str(tmp_path / "classes.yaml") if label else None, "tasks": ["zero_shot"], **changes}
        return open_set(EvalSetConfig(source=source, **settings))  # type: ignore[arg-type]

    return opened


@pytest.fixture
def pairs(tmp_path: Path) -> SourceConfig:
    """Return 20 photos with captions in two languages."""
    from align_runs import write_pairs

    return SourceConfig(path=str(write_pairs(tmp_path / "rows.parquet", 20)))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep features in shards of 8 rows, embedded 3 at a time."""
    from koclip.embeddings import fill

    monkeypatch.setattr(fill, "SHARD_ROWS", 8)
    monkeypatch.setattr(fill, "BATCH_ROWS", 3)


@pytest.fixture
def shards(tmp_path, write_table) -> SourceConfig:
    """Return four streamed Parquet files of 12 pairs."""
    for number in range(4):
        write_table(f"part-{number}.parquet", 12, first=12 * number)
    return SourceConfig(path=str(tmp_path / "part-*.parquet"), captions={"ko": "ko", "en": "en"}, streaming=True)


@pytest.fixture
def tars(tmp_path, encoded) -> SourceConfig:
    """Return four tar shards of 12 pairs."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for number in range(12 * shard, 12 * shard + 12):
                for kind, data in (("png", encoded((number, 0, 0))), ("txt", f"{number}번".encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return SourceConfig(path=str(tmp_path / "shard-*.tar"), image="png", captions={"ko": "txt"})


@pytest.fixture
def flawed(tmp_path, encoded) -> SourceConfig:
    """Return a source of 200 rows; 10 broken or missing images, 10 without a usable caption."""
    images = [encoded((number, 0, 0)) for number in range(200)]
    texts: list[object] = [f"{number}번 사진" for number in range(200)]
    for place, data in zip(range(0, 100, 10), [b"", b"junk", None, *[images[5][:40]] * 7], strict=True):
        images[place] = data
    for place, cell in zip(
        range(101, 200, 10), ["", "  ", None, "nan", 3, 2.5, [], [None], {"a": 1}, ["", 5]], strict=True
    ):
        texts[place] = cell
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number, (data, text) in enumerate(zip(images, texts, strict=True)):
        if data is not None:
            (folder / f"{number:03d}.png").write_bytes(data)
        lines.append(json.dumps({"image": f"pictures/{number:03d}.png", "text": text}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(path=str(tmp_path / "rows.jsonl"), captions={"ko": "text"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that can be published."""
    from runs_to_publish import pretrained

    return pretrained(tmp_path_factory.mktemp("trained") / "run").parent
