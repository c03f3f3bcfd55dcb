"""koclip.data.formats.webdataset: a shard gives all its samples, or is refused by name; so do its samples."""

import bz2
import functools
import gzip
import http.server
import io
import itertools
import json
import lzma
import random
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loading import batches, config
from sources_on_disk import all_rows, colour

from koclip.config import DataConfig, EvalSetConfig, SourceConfig
from koclip.data.batches import Assembler
from koclip.data.formats.files import SourceError
from koclip.data.loader import train_loader, training_captions
from koclip.data.order import BatchPart
from koclip.data.sources import open_source
from koclip.data.transforms import Views
from koclip.embeddings.fill import SourceShards
from koclip.embeddings.readers import CaptionReader, ImageReader
from koclip.evaluation.sets import open_set

BLOCK = 512
Files = list[tuple[str, bytes]]


def tar(files: Files, **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pairs(count: int, encoded, first: int = 0) -> Files:
    """Return the files of some samples. Each third picture is one of zeros, like the end of an archive."""
    numbers = range(first, first + count)
    images = [bytes(2 * BLOCK) if number % 3 == 0 else encoded((number, 0, 0)) for number in numbers]
    return [
        file
        for number, image in zip(numbers, images, strict=True)
        for file in ((f"{number:04d}.png", image), (f"{number:04d}.txt", f"{number}번".encode()))
    ]


def source_of(path: Path | str, **options) -> SourceConfig:
    return SourceConfig(**{"path": str(path), "image": "png", "captions": {"ko": "txt"}, **options})


def captions_of(path: Path | str, **options) -> list[str]:
    return [row.captions["ko"][0] for row in all_rows(open_source(source_of(path, **options)))]


def captions_or_refused(path: Path, **options) -> list[str] | None:
    """Return the captions of a shard, None if it is refused by name."""
    try:
        return captions_of(path, **options)
    except SourceError as error:
        if path.name not in str(error):
            pytest.fail(f"{path.name} is not named: {error}")
        return None


def cuts(data: bytes) -> list[int]:
    """Return places to cut at: between all blocks, and 100 others."""
    rng = random.Random(0)
    return [*range(0, len(data), BLOCK), *(rng.randrange(len(data)) for _ in range(100))]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("cut.tar", bytes), ("cut.tar.gz", gzip.compress), ("cut.tar.bz2", bz2.compress), ("cut.tar.xz", lzma.compress)],
)
def test_a_cut_shard_is_refused_by_name_or_gives_all_samples(tmp_path, encoded, name, pack) -> None:
    data = pack(tar(pairs(6, encoded)))
    everything = [f"{number}번" for number in range(6)]
    read = []
    for place in cuts(data):
        (tmp_path / name).write_bytes(data[:place])
        read.append(captions_or_refused(tmp_path / name))
    assert all(captions in (None, everything) for captions in read)
    assert read.count(None) > 50
    (tmp_path / name).write_bytes(data)
    assert captions_of(tmp_path / name) == everything


def test_a_damaged_header_is_no_end(tmp_path, encoded) -> None:
    data = tar(pairs(6, encoded))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        places = [member.offset for member in archive]
    for place in places:
        (tmp_path / "broken.tar").write_bytes(data[:place] + b"\x01" + data[place + 1 :])
        with pytest.raises(SourceError, match=r"broken\.tar"):
            captions_of(tmp_path / "broken.tar")


@pytest.mark.parametrize("options", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}])
def test_long_and_korean_names_are_headers_too(tmp_path, encoded, options) -> None:
    files = [(f"{'가' * 60}/{name}", data) for name, data in pairs(3, encoded)]
    data = tar(files, **options)
    for place in cuts(data):
        (tmp_path / "long.tar").write_bytes(data[:place])
        assert captions_or_refused(tmp_path / "long.tar") in (None, ["0번", "1번", "2번"])


@pytest.mark.parametrize(("name", "pack"), [("both.tar", bytes), ("both.tgz", gzip.compress)])
def test_archives_that_follow_one_another_are_read_to_the_last(tmp_path, encoded, name, pack) -> None:
    """`cat a.tar b.tar`: behind the first end of an archive there may be another one."""
    (tmp_path / name).write_bytes(pack(tar(pairs(3, encoded))) + pack(tar(pairs(2, encoded, first=3))))
    assert captions_of(tmp_path / name) == ["0번", "1번", "2번", "3번", "4번"]


@pytest.fixture
def cut_tars(tars, tmp_path) -> SourceConfig:
    """Return four shards; the third looks whole from both ends, but lacks the header of its seventh sample."""
    data = bytearray((tmp_path / "shard-2.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
        data[archive.getmembers()[12].offset] ^= 1
    (tmp_path / "shard-2.tar").write_bytes(data)
    return tars


def test_every_reader_of_shards_refuses_a_broken_one(cut_tars, tokenizer, tmp_path) -> None:
    views = Views(DataConfig(num_crops=1), 16)
    evaluation = EvalSetConfig(source=cut_tars)

    def features(reader):
        shards = SourceShards(open_source(cut_tars), reader, tmp_path / "f")
        return [piece for _, _, pieces in shards.read(num_workers=0) for piece in pieces]

    readers = {
        "training": lambda: batches(config(cut_tars), tokenizer, 20),
        "tokenizer": lambda: list(training_captions(config(cut_tars))),
        "evaluation": lambda: open_set(evaluation),
        "gallery": lambda: open_set(EvalSetConfig(source=SourceConfig(scenes_size=4), gallery=[cut_tars])),
        "image features": lambda: features(ImageReader(views, 10**6)),
        "sentences": lambda: features(CaptionReader("ko")),
    }
    for read in readers.values():
        with pytest.raises(SourceError, match=r"shard-2\.tar"):
            read()


def test_plain_cuts_are_refused_before_anything_is_read(tars, tokenizer, tmp_path) -> None:
    data = (tmp_path / "shard-3.tar").read_bytes()
    (tmp_path / "shard-3.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"shard-3\.tar"):
        train_loader(Assembler(config(tars), tokenizer, Views(config(tars), 16)), BatchPart(8))


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    """Serve `tmp_path` on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("name", "pack"), [("a.tar", bytes), ("a.tar.gz", gzip.compress)])
@pytest.mark.parametrize("end", ["", "?download=true"])
def test_remote_shards_are_checked_too(tmp_path, encoded, served, name, pack, end) -> None:
    data = pack(tar(pairs(4, encoded)))
    (tmp_path / name).write_bytes(data)
    assert captions_of(f"{served}/{name}{end}") == [f"{number}번" for number in range(4)]
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(SourceError, match=r"a\.tar"):
        captions_of(f"{served}/{name}{end}")


def test_remote_shards_by_a_pattern(encoded) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/bucket/shard-{number}.tar", tar(pairs(2, encoded, first=2 * number)))
    assert captions_of("memory://bucket/shard-*.tar") == [f"{number}번" for number in range(6)]
    assert open_source(source_of("memory://bucket/shard-*.tar")).num_shards == 3
    memory.pipe("/bucket/shard-1.tar", tar(pairs(2, encoded, first=2))[: 3 * BLOCK])
    with pytest.raises(SourceError, match=r"shard-1\.tar"):
        captions_of("memory://bucket/shard-*.tar")


def test_shards_of_a_data_set_in_the_hubs_layout_are_checked_too(tmp_path, encoded) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar(pairs(4, encoded)))
    assert captions_of(tmp_path, format="hub", streaming=True) == [f"{number}번" for number in range(4)]
    data = tar(pairs(8, encoded))
    (tmp_path / "train-0.tar").write_bytes(data[: data.index(b"0006.png")])
    with pytest.raises(SourceError, match=r"train-0\.tar"):
        captions_of(tmp_path, format="hub", streaming=True)


def test_shards_that_mix_kinds_of_pictures(tmp_path, encoded) -> None:
    """open_clip's users write jpg;png;jpeg;webp. Letter case does not matter, as for webdataset."""
    kinds = {"jpg": "JPEG", "PNG": "PNG", "jpeg": "JPEG", "webp": "WEBP", "Jpg": "JPEG"}
    for shard in range(2):
        files = [
            file
            for number, (ending, kind) in enumerate(kinds.items())
            for file in ((f"{number}.{ending}", encoded((200, 200, 200), kind=kind)), (f"{number}.txt", b"a"))
        ]
        order = (
            list(itertools.batched(files, 2))
            if hasattr(itertools, "batched")
            else [files[n : n + 2] for n in range(0, 10, 2)]
        )
        (tmp_path / f"{shard}.tar").write_bytes(
            tar([file for sample in (order, order[::-1])[shard] for file in sample])
        )
    rows = all_rows(open_source(source_of(tmp_path / "*.tar", image=["jpg", "png", "jpeg", "webp"])))
    assert len(rows) == 10
    assert all(min(colour(row)) > 190 for row in rows)
    only = all_rows(open_source(source_of(tmp_path / "*.tar", image="png")))
    assert sum(row.image is not None for row in only) == 2
    with pytest.raises(SourceError, match=r"\['gif', 'tif'\].*\['__key__'"):
        open_source(source_of(tmp_path / "*.tar", image=["gif", "tif"]))


letters = st.text(alphabet="a가.", min_size=1, max_size=4).filter(lambda name: not name.startswith("."))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(letters, min_size=1, max_size=6, unique=True), json_captions=st.booleans())
@example(names=["a", "a.a"], json_captions=False)
def test_names_with_dots_mix_no_samples(tmp_path, names, json_captions) -> None:
    """Samples whose names have dots are refused, never merged or lost."""
    ending, column = ("json", "json.ko") if json_captions else ("txt", "txt")
    texts = [json.dumps({"ko": name}).encode() if json_captions else name.encode() for name in names]
    files = [
        file
        for name, text in zip(names, texts, strict=True)
        for file in ((f"{name}.png", name.encode()), (f"{name}.{ending}", text))
    ]
    (tmp_path / "dots.tar").write_bytes(tar(files))
    read = captions_or_refused(tmp_path / "dots.tar", captions={"ko": column})
    assert read == names or (read is None and any("." in name for name in names))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.png", "a.txt", "a.b.png", "a.b.txt"], r"'a' has the files .*first dot"),
        (["a.1.png", "a.1.txt", "a.2.png", "a.2.txt"], r"'a' has the files .*first dot"),
        (["a.png", "b.png", "a.txt", "b.txt"], r"sample 'a': its files"),
        (["a.png", "a.txt", "b.png", "b.txt", "a.png", "a.txt"], r"sample 'a': its files"),
        (["a.png", "a.txt", "a.PNG"], r"'a' has two files 'png'"),
        ([f"a.{number}.png" for number in range(1_001)], r"sample 'a' has over 1000"),
    ],
)
def test_samples_that_cannot_be_told_apart_are_refused(tmp_path, files, message) -> None:
    (tmp_path / "mixed.tar").write_bytes(tar([(name, b"1") for name in files]))
    with pytest.raises(SourceError, match=rf"mixed\.tar.*{message}"):
        captions_of(tmp_path / "mixed.tar")


def test_other_files_of_a_sample_and_between_samples_do_not_matter(tmp_path) -> None:
    files = ["README", "a.png", "a.small.png", "a.txt", "a.en.txt", ".a.png", "._a.png", "x/y.z/b.png", "x/y.z/b.txt"]
    (tmp_path / "more.tar").write_bytes(tar([(name, name.encode()) for name in files]))
    rows = all_rows(open_source(source_of(tmp_path / "more.tar")))
    assert [(row.image, row.captions["ko"]) for row in rows] == [
        (b"a.png", ["a.txt"]),
        (b"x/y.z/b.png", ["x/y.z/b.txt"]),
    ]


def test_a_link_in_a_shard_is_refused(tmp_path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("a.png", tarfile.REGTYPE), ("a.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png" if kind == tarfile.LNKTYPE else ""
            archive.addfile(info)
    (tmp_path / "links.tar").write_bytes(buffer.getvalue())
    with pytest.raises(SourceError, match=r"links\.tar.*a\.txt"):
        captions_of(tmp_path / "links.tar")


def test_texts_stay_what_they_are(tmp_path) -> None:
    """Captions and labels of later samples may be of another kind than the first ones'."""
    cells = [{"ko": "가"}, {"ko": None, "more": 1}, *[{"ko": "가"}] * 4, {"ko": ["나", "다"]}, {}]
    files = [
        file
        for number, cell in enumerate(cells)
        for file in (
            (f"{number}.json", json.dumps(cell).encode()),
            (f"{number}.cls", b"007\n"),
            (f"{number}.png", b"1"),
        )
    ]
    (tmp_path / "cells.tar").write_bytes(tar(files))
    rows = all_rows(open_source(source_of(tmp_path / "cells.tar", captions={"ko": "json.ko"}, label="cls")))
    assert [row.captions for row in rows] == [{"ko": ["가"]}, {}, *[{"ko": ["가"]}] * 4, {"ko": ["나", "다"]}, {}]
    assert {row.label for row in rows} == {"007"}
    kept = source_of(tmp_path / "cells.tar", captions={"ko": "json.ko"}, where={"cls": ["007"], "json.more": ["1"]})
    assert len(all_rows(open_source(kept))) == 1


@pytest.mark.parametrize("data", [b"{", b"\xb0\xa1\xb0"])
def test_a_text_that_cannot_be_read_is_named(tmp_path, data) -> None:
    files = [("a.json", b'{"ko": "a"}'), ("a.png", b"1"), ("b.json", data), ("b.png", b"1")]
    (tmp_path / "texts.tar").write_bytes(tar(files))
    with pytest.raises(SourceError, match=r"texts\.tar.*b"):
        captions_of(tmp_path / "texts.tar", captions={"ko": "json.ko"})


def test_a_part_of_a_split_cannot_be_streamed(tars) -> None:
    with pytest.raises(SourceError, match=r"train\[:5\]"):
        open_source(replace(tars, split="train[:5]"))


def test_workers_read_shards(tars, tokenizer) -> None:
    keys = [key for batch in batches(config(tars, num_workers=2, length_pool=1), tokenizer, 6) for key in batch.keys]
    assert len(set(keys)) == 48
