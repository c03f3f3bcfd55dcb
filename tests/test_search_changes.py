"""An index is made again where pictures or captions have changed, and lists every file that it leaves out."""

import io
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_encoder import COLOURS, ColourEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from koclip.config import ConfigError, IndexConfig, SourceConfig
from koclip.search import build, open_index

NAMES = [f"{number}.bmp" for number in range(7)]  # BMPs of equal form have equal sizes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", 3)


def paint(path: Path, colour: str) -> None:
    Image.new("RGB", (12, 8), COLOURS[colour]).save(path)


def folder(root: Path) -> Path:
    (root / "photos").mkdir()
    for name in NAMES:
        paint(root / "photos" / name, "빨강")
    return root / "photos"


def config(images: Path, **changes: object) -> IndexConfig:
    return IndexConfig(model="colours", images=str(images), batch_size=2, **changes)


def table(photos: Path, kind: str) -> SourceConfig:
    """Write a data set of a folder's pictures: paths, or the pictures themselves."""
    path = photos.parent / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"image": {"bytes": (photos / name).read_bytes()}, "captions_ko": f"사진 {name}"} for name in NAMES]
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [f"{photos / name},사진 {name}" for name in NAMES]
        path.write_text("\n".join(["image,captions_ko", *lines]) + "\n", encoding="utf-8")
    return SourceConfig(path=str(path), captions={"ko": "captions_ko"})


def nearest(directory: Path, colour: str) -> list[str]:
    """Return the names of the pictures whose embedding and thumbnail have this colour."""
    index = open_index(directory)
    scores = index.exact(ColourEncoder().encode_texts([colour]), len(index))
    places = {int(place) for place, score in zip(scores.places[0], scores.scores[0], strict=True) if score > 0.99}
    shown = set()
    for place in range(len(index)):
        entry = index.entry(place)
        with Image.open(io.BytesIO(entry.thumbnail)) as thumbnail:
            pixel = torch.tensor(thumbnail.getpixel((5, 5))).float()
        if torch.linalg.vector_norm(pixel - torch.tensor(COLOURS[colour]).float()) < 60:
            shown.add(place)
    assert places == shown
    return sorted(Path(index.entry(place).record["key"]).name for place in places)


def keep_times(path: Path, change) -> None:
    """Change a file and set its time stamp back, as `cp -p`, rsync and tar do."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("behind", ["a folder", "a CSV"])
@pytest.mark.parametrize("stamped", [False, True], ids=["new time stamp", "old time stamp"])
def test_a_picture_replaced_by_one_of_the_same_size_is_embedded_anew(behind, stamped, tmp_path):
    photos = folder(tmp_path)
    cfg = config(photos) if behind == "a folder" else config(photos, source=table(photos, "csv"))
    build.build(cfg, ColourEncoder(), tmp_path / "index")
    assert nearest(tmp_path / "index", "파랑") == []
    time.sleep(0.02)  # a tick of the file system's clock
    change = photos / "4.bmp"
    if stamped:
        keep_times(change, lambda: paint(change, "파랑"))
    else:
        paint(change, "파랑")
    encoder = ColourEncoder()
    count, skipped = build.build(cfg, encoder, tmp_path / "index")
    assert (count, skipped) == (len(NAMES), [])
    assert nearest(tmp_path / "index", "파랑") == ["4.bmp"]
    assert len(nearest(tmp_path / "index", "빨강")) == len(NAMES) - 1
    assert encoder.calls == 2  # the shard of three that it is in, two at a time


def test_pictures_in_a_table_are_told_apart_by_their_content(tmp_path, monkeypatch):
    """Even where neither the table's name, nor its size, nor the number of its rows tells."""
    monkeypatch.setattr(build, "stored_files", lambda _: [])
    photos = folder(tmp_path)
    cfg = config(photos, source=table(photos, "parquet"))
    build.build(cfg, ColourEncoder(), tmp_path / "index")
    paint(photos / "0.bmp", "초록")
    table(photos, "parquet")
    build.build(cfg, ColourEncoder(), tmp_path / "index")
    assert len(nearest(tmp_path / "index", "초록")) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_another_caption_is_kept(streaming, tmp_path, monkeypatch):
    photos, target = folder(tmp_path), tmp_path / "index"
    source = replace(table(photos, "csv"), streaming=streaming)
    build.build(config(photos, source=source), ColourEncoder(), target)
    path = Path(source.path)
    path.write_text(path.read_text(encoding="utf-8").replace("사진 6", "그림 6"), encoding="utf-8")  # of the same size
    encoder = ColourEncoder()
    build.build(config(photos, source=source), encoder, target)
    assert open_index(target).entry(6).record["captions"] == {"ko": ["그림 6.bmp"]}
    assert encoder.calls == 1


def test_a_picture_that_was_broken_and_is_mended_is_taken(tmp_path):
    photos, target = folder(tmp_path), tmp_path / "index"
    whole = (photos / "2.bmp").read_bytes()
    (photos / "2.bmp").write_bytes(bytes(len(whole)))
    assert build.build(config(photos), ColourEncoder(), target)[0] == len(NAMES) - 1
    (photos / "2.bmp").write_bytes(whole)
    assert build.build(config(photos), ColourEncoder(), target) == (len(NAMES), [])
    (photos / "2.bmp").write_bytes(b"")
    count, skipped = build.build(config(photos), ColourEncoder(), target)
    assert (count, [skip.key for skip in skipped]) == (len(NAMES) - 1, ["2.bmp"])


def test_what_has_not_changed_is_not_embedded_again(tmp_path):
    photos, target = folder(tmp_path), tmp_path / "index"
    build.build(config(photos), ColourEncoder(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    shutil.rmtree(photos)
    shutil.copytree(copy, photos)  # other time stamps, equal content
    encoder = ColourEncoder()
    build.build(config(photos), encoder, target)
    assert encoder.calls == 0
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@settings(max_examples=15, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["파랑", "초록", "빨강"]), max_size=4),
    stamped=st.booleans(),
)
def test_an_index_after_changes_is_the_index_that_is_made_anew(changes, stamped, tmp_path_factory):
    root = tmp_path_factory.mktemp("changes")
    photos = folder(root)
    build.build(config(photos), ColourEncoder(), root / "index")
    time.sleep(0.02)
    for name, colour in changes.items():
        change = photos / name
        if stamped:
            keep_times(change, lambda change=change, colour=colour: paint(change, colour))
        else:
            paint(change, colour)
    build.build(config(photos), ColourEncoder(), root / "index")
    build.build(config(photos), ColourEncoder(), root / "anew")
    ours, anew = open_index(root / "index"), open_index(root / "anew")
    assert [ours.entry(place) for place in range(len(ours))] == [anew.entry(place) for place in range(len(anew))]
    every = torch.arange(len(ours))
    assert torch.equal(ours._shards.gather(every), anew._shards.gather(every))


def test_a_changed_picture_in_a_broken_shard_is_named(tmp_path):
    photos, target = folder(tmp_path), tmp_path / "index"
    build.build(config(photos), ColourEncoder(), target)
    (target / "shard-000001.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"shard-000001\.safetensors"):
        build.build(config(photos), ColourEncoder(), target)


def test_every_file_of_a_folder_is_in_the_index_or_listed(tmp_path):
    photos = folder(tmp_path)
    good = photos / "0.bmp"
    used = ["a.jfif", "b.jpe", "c.JPG", "d.apng", "e.tiff", "no suffix", "deep/한글.J2K"]
    for name in used:
        (photos / name).parent.mkdir(exist_ok=True)
        Image.open(good).save(photos / name, "PNG")  # whatever its name says, it is read by its content
    listed = ["IMG_1.heic", "clip.mp4", "labels.csv", "a.jpg_large", "LICENSE", ".DS_Store", "deep/broken.png"]
    for name in listed:
        (photos / name).write_bytes(b"something else")
    (photos / "gone.png").symlink_to(photos / "nothing")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(good, tmp_path / "elsewhere" / "x.bmp")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(photos / "pipe.jpg")
    count, skipped = build.build(config(photos), ColourEncoder(), tmp_path / "index")
    keys = [open_index(tmp_path / "index").entry(place).record["key"] for place in range(count)]
    assert sorted(keys) == sorted([*NAMES, *used])
    assert sorted(skip.key for skip in skipped) == sorted([*listed, "gone.png", "linked", "pipe.jpg"])
    assert {skip.source for skip in skipped} == {str(photos)}
    reasons = {skip.key: skip.reason for skip in skipped}
    assert "JPEG" in reasons["IMG_1.heic"]
    assert ".heic" in reasons["IMG_1.heic"]
    json.dumps(skipped)


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    photos, scan = folder(tmp_path), os.scandir
    (photos / "closed").mkdir()

    def refuse(path):
        if Path(path).name == "closed":  # root, as which tests may run, reads every folder
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    count, skipped = build.build(config(photos), ColourEncoder(), tmp_path / "index")
    assert (count, [skip.key for skip in skipped]) == (len(NAMES), ["closed"])
