"""Building features: what is broken is listed once, what was killed goes on, and training sees what it always saw."""

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from align_runs import write_pairs
from sources_on_disk import write_tar
from test_features import build, images_of, rewrite
from tiny import tiny_dual_encoder, tiny_tokenizer

from koclip.config import ConfigError, DataConfig, SourceConfig
from koclip.data.batches import Assembler, Batch, Precomputed
from koclip.data.loader import train_loader
from koclip.data.order import BatchPart
from koclip.data.sources import open_source
from koclip.data.transforms import MissingError, Views, digest_of
from koclip.embeddings import fill, readers
from koclip.embeddings.fill import SourceShards, embed_shard
from koclip.embeddings.readers import CaptionReader, ImageReader, ItemBatch
from koclip.embeddings.store import Shards, Store
from koclip.models.dual_encoder import encode_images

pytestmark = pytest.mark.usefixtures("small_shards")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Stands for SIGKILL, which nothing catches."""


def test_killed_while_reading_and_built_again_gives_the_same_files(
    pairs: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not made again. `test_crash_points` dies in every operation on files."""
    build(tmp_path / "whole", pairs)
    decode, calls = readers.decode, itertools.count()

    def stop_in_the_second_shard(*args: Any) -> torch.Tensor:
        if next(calls) == 11:
            raise Killed
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(readers, "decode", stop_in_the_second_shard)
        with pytest.raises(Killed):
            build(tmp_path / "killed", pairs)
    first = tmp_path / "killed" / "0-rows" / "shard-000000.safetensors"
    assert list((tmp_path / "killed").rglob("shard-*")) == [first]
    inode = first.stat().st_ino
    decoded = counted(monkeypatch, "decode")
    build(tmp_path / "killed", pairs)
    assert len(decoded) == 12  # of the shards that were missing
    assert first.stat().st_ino == inode
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Count the calls of a function that reads images from now on."""
    calls, wrapped = [], getattr(readers, name)
    monkeypatch.setattr(readers, name, lambda *args: (calls.append(1), wrapped(*args))[1])
    return calls


def test_what_is_there_is_neither_decoded_nor_embedded(
    pairs: SourceConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = build(tmp_path / "kept", pairs)
    decoded = counted(monkeypatch, "decode")
    monkeypatch.setattr(fill, "encode_images", None)
    again = build(tmp_path / "kept", pairs)
    assert decoded == []
    for image in images_of(pairs):
        assert torch.equal(first.embedding(digest_of(image)), again.embedding(digest_of(image)))


def test_worker_processes_make_the_same_files(pairs: SourceConfig, tmp_path: Path) -> None:
    build(tmp_path / "none", pairs, num_crops=2)
    build(tmp_path / "two", pairs, num_crops=2, num_workers=2)
    assert contents(tmp_path / "none") == contents(tmp_path / "two")


def test_a_pieces_views_travel_as_one_tensor(pairs: SourceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor from a worker takes a file handle: with one per image, 16 workers would use up all 1,024."""
    monkeypatch.setattr(fill, "BATCH_ROWS", 128)
    reader = ImageReader(Views(DataConfig(num_crops=2), 32), 10_000)
    piece = reader.read(open_source(pairs).rows(range(20)), wanted=lambda _: True)  # type: ignore[union-attr]
    assert piece.inputs.shape == (20, 2, 3, 32, 32)  # type: ignore[union-attr]
    assert [value for item in piece.items for value in item if isinstance(value, torch.Tensor)] == []


def test_a_picture_that_comes_twice_has_one_embedding(pairs: SourceConfig, tmp_path: Path) -> None:
    rewrite(pairs, lambda rows: [*rows[:19], rows[19] | {"image": rows[2]["image"]}])  # in another shard
    shards = build(tmp_path / "kept", pairs, num_crops=3)
    assert len({tuple(shards.embedding(digest_of(image), 2).tolist()) for image in images_of(pairs)}) == 19


def test_a_row_for_each_caption_embeds_each_image_once(
    pairs: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once per batch of rows; a broken image is listed for each of its rows."""
    monkeypatch.setattr(fill, "SHARD_ROWS", 10)
    monkeypatch.setattr(fill, "BATCH_ROWS", 10)
    rewrite(pairs, lambda rows: [row | {"image": b"no picture"} if n == 1 else row for n, row in enumerate(rows[:6])])
    plain = build(tmp_path / "plain", pairs)
    rewrite(pairs, lambda rows: [row for row in rows for _ in range(5)])
    decoded = counted(monkeypatch, "decode")
    shards = build(tmp_path / "repeated", pairs)
    assert (len(plain), len(shards)) == (5, 5)
    assert len(decoded) == 5 + 5  # and the broken image in each of its rows
    assert len(shards.left_out) == 5
    for image in images_of(pairs)[::10]:
        torch.testing.assert_close(shards.embedding(digest_of(image)), plain.embedding(digest_of(image)))


def half(pairs: SourceConfig) -> SourceConfig:
    """Return a source with some of the photos, chosen by their content."""
    return dataclasses.replace(pairs, image_range=[0.0, 0.5])


def test_features_of_a_part_of_the_data_are_copied(
    pairs: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "kept", pairs, num_crops=2)
    stored = contents(tmp_path / "kept")
    decoded = counted(monkeypatch, "decode")
    monkeypatch.setattr(fill, "encode_images", None)
    part = build(tmp_path / "kept", half(pairs), num_crops=2)
    assert 0 < len(part) < len(whole)
    assert decoded == []
    shown = [digest_of(row.image) for row in open_source(half(pairs)).iter_rows()]  # type: ignore[arg-type]
    assert len(shown) == len(part)
    for digest, number in itertools.product(shown, range(2)):
        assert torch.equal(part.embedding(digest, number), whole.embedding(digest, number))
    assert stored.items() <= contents(tmp_path / "kept").items()  # the features of all the data are as before
    assert len(build(tmp_path / "kept", pairs, num_crops=2)) == len(whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_new_items_are_embedded(
    num_workers: int, pairs: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken images, which no folder has an embedding of, are listed in each."""
    rewrite(pairs, lambda rows: [row | {"image": b"no picture"} if n == 5 else row for n, row in enumerate(rows)])
    part = build(tmp_path / "kept", half(pairs))
    embedded: list[int] = []
    encode = fill.encode_images
    monkeypatch.setattr(
        fill, "encode_images", lambda model, pixels: (embedded.append(len(pixels)), encode(model, pixels))[1]
    )
    whole = build(tmp_path / "kept", pairs, num_workers=num_workers)
    assert sum(embedded) == len(whole) - len(part) > 0
    assert len(whole.left_out) == 1
    plain = build(tmp_path / "plain", pairs)
    for image in images_of(pairs):
        if image != b"no picture":
            torch.testing.assert_close(whole.embedding(digest_of(image)), plain.embedding(digest_of(image)))


def test_a_larger_data_set_under_another_name_copies(pairs: SourceConfig, tmp_path: Path) -> None:
    """As the message about changed data says."""
    before = build(tmp_path / "kept", pairs)
    write_pairs(Path(pairs.path), 30)
    with pytest.raises(ConfigError, match=r"data\.sources\[\]\.name"):
        build(tmp_path / "kept", pairs)
    after = build(tmp_path / "kept", dataclasses.replace(pairs, name="more"))
    assert (len(before), len(after)) == (20, 30)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_two_sources_share_is_embedded_once(
    stopped: bool, pairs: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run before stopped in the first source: the files are the same."""
    sources = [pairs, dataclasses.replace(half(pairs), name="half")]
    if stopped:
        build(tmp_path / "whole", pairs, sources=sources)
        shutil.copytree(tmp_path / "whole", tmp_path / "kept")
        for path in [tmp_path / "kept" / "0-rows" / "shard-000001.safetensors", *(tmp_path / "kept").glob("1-*/*")]:
            path.unlink()
    embedded: list[int] = []
    encode = fill.encode_images
    monkeypatch.setattr(
        fill, "encode_images", lambda model, pixels: (embedded.append(len(pixels)), encode(model, pixels))[1]
    )
    shards = build(tmp_path / "kept", pairs, sources=sources)
    assert len(shards) > 20  # rows of both sources
    assert sum(embedded) == (8 if stopped else 20)
    if stopped:
        assert contents(tmp_path / "kept") == contents(tmp_path / "whole")


def test_a_broken_shard_is_not_copied(pairs: SourceConfig, tmp_path: Path) -> None:
    build(tmp_path / "kept", pairs)
    shard = tmp_path / "kept" / "0-rows" / "shard-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"align\.cache_dir: .*shard-000001\.safetensors"):
        build(tmp_path / "kept", half(pairs))


def test_captions_are_copied_too(pairs: SourceConfig, tmp_path: Path) -> None:
    embedded: list[str] = []

    def embed(batch: ItemBatch) -> torch.Tensor:
        embedded.extend(batch.inputs)
        return torch.tensor([[[float(len(text))]] for text in batch.inputs])

    for source in (half(pairs), pairs):
        work = fill.Work(CaptionReader("ko"), embed, torch.float32, "captions")
        config = DataConfig(sources=[source], num_crops=1)
        shards, _ = fill.fill(Store(tmp_path / "kept", "align.cache_dir"), {"tower": "lengths"}, config, work)
    rows = pq.read_table(pairs.path).to_pylist()
    texts = {text for row in rows for text in row["captions_ko"]}
    assert sorted(embedded) == sorted(texts)  # each once
    assert all(shards.embedding(digest_of(text.encode())) == len(text) for text in texts)


def batches(config: DataConfig, steps: int = 8, known: Precomputed | None = None) -> list[Batch]:
    loader = train_loader(Assembler(config, tiny_tokenizer(), Views(config, 32), known), BatchPart(4))
    return list(itertools.islice(loader, steps))


def embedded(batch: Batch) -> torch.Tensor:
    encoder = tiny_dual_encoder().eval()
    assert batch.pixel_values is not None
    with torch.no_grad():
        return encode_images(encoder.model, encoder.normalized(batch.pixel_values))


def assert_same(plain: list[Batch], kept: list[Batch]) -> None:
    """The same pairs, the same replacements, and embeddings of the very views that are shown otherwise."""
    for batch, other in zip(plain, kept, strict=True):
        assert (batch.keys, batch.skipped, batch.num_drawn) == (other.keys, other.skipped, other.num_drawn)
        assert torch.equal(batch.input_ids, other.input_ids)
        assert torch.equal(batch.pair_ids, other.pair_ids)
        assert other.pixel_values is None
        torch.testing.assert_close(other.image, embedded(batch), atol=1e-6, rtol=0)


def test_broken_images_are_replaced_as_without_features(
    pairs: SourceConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off, no picture, none at all, too large: the same pairs take their place, listed for the same reason."""
    whole = images_of(pairs)
    broken = {1: whole[1][:60], 8: b"no picture", 9: b"", 10: None, 11: whole[0][:50]}
    rewrite(pairs, lambda rows: [row | {"image": broken.get(place, row["image"])} for place, row in enumerate(rows)])
    monkeypatch.setattr(fill, "BATCH_ROWS", 4)  # so that no image of the third piece is whole
    config = DataConfig(sources=[pairs], num_crops=3, crop_scale=(0.3, 0.6))
    known = Precomputed(images=build(tmp_path / "kept", pairs, num_crops=3, crop_scale=(0.3, 0.6)))
    plain, kept = batches(config), batches(config, known=known)
    assert_same(plain, kept)
    skipped = {skip.key: skip.reason for batch in kept for skip in batch.skipped}
    assert set(skipped) == {f"{pairs.key}/{place}" for place in broken}
    assert skipped[f"{pairs.key}/10"] == "no image"
    build(tmp_path / "kept", pairs, num_crops=3, crop_scale=(0.3, 0.6))  # they are no reason to refuse


def test_a_source_without_one_good_image_still_says_why(pairs: SourceConfig, tmp_path: Path) -> None:
    rewrite(pairs, lambda rows: [row | {"image": b"no picture"} for row in rows])
    with pytest.raises(MissingError, match="not an image"):
        build(tmp_path / "kept", pairs).embedding(digest_of(b"no picture"))


def test_images_that_are_files(pairs: SourceConfig, tmp_path: Path) -> None:
    """A missing file has no content to be known by; once it is there, the data has changed."""
    for place, image in enumerate(images_of(pairs)):
        (tmp_path / f"{place}.jpg").write_bytes(image)
    rewrite(pairs, lambda rows: [row | {"image": f"{place}.jpg"} for place, row in enumerate(rows)])
    missing = (tmp_path / "4.jpg").rename(tmp_path / "gone")
    config = DataConfig(sources=[pairs], num_crops=1)
    assert_same(batches(config), batches(config, known=Precomputed(images=build(tmp_path / "kept", pairs))))
    missing.rename(tmp_path / "4.jpg")
    with pytest.raises(ConfigError, match=r"rows~\w+/4/4\.jpg"):
        build(tmp_path / "kept", pairs)


@pytest.fixture
def tars(pairs: SourceConfig, tmp_path: Path) -> SourceConfig:
    """Two tar shards of 10 photos, one of them broken."""
    rows = pq.read_table(pairs.path).to_pylist()
    samples = [
        {"jpg": row["image"] if place != 3 else b"junk", "txt": row["captions_ko"][0].encode()}
        for place, row in enumerate(rows)
    ]
    write_tar(tmp_path / "a-0.tar", samples[:10])
    write_tar(tmp_path / "a-1.tar", samples[10:], first=10)
    return SourceConfig(path=str(tmp_path / "a-*.tar"), image="jpg", captions={"ko": "txt"})


def test_streamed_sources(tars: SourceConfig, tmp_path: Path) -> None:
    shards: Shards = build(tmp_path / "kept", tars, num_crops=2)
    assert len(shards) == 19  # one is broken
    config = DataConfig(sources=[tars], num_crops=2, shuffle_buffer=8)
    assert_same(batches(config), batches(config, known=Precomputed(images=shards)))
    files = contents(tmp_path / "kept")
    (tmp_path / "kept" / "0-a-all" / "shard-000001.safetensors").unlink()
    build(tmp_path / "kept", tars, num_crops=2)
    assert contents(tmp_path / "kept") == files


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_processes_share_the_shards(
    kind: str,
    pairs: SourceConfig,
    tars: SourceConfig,
    tmp_path: Path,
) -> None:
    source = open_source(pairs if kind == "map" else tars)

    def digests(rank: int, world_size: int) -> Iterator[tuple[str, list[bytes]]]:
        for path, _, pieces in SourceShards(source, CaptionReader("ko"), tmp_path, rank, world_size).read(0):
            yield path.name, [item.digest for piece in pieces for item in piece.items]

    alone = dict(digests(0, 1))
    assert len(alone) == 3
    parts = [dict(digests(rank, 4)) for rank in range(4)]
    assert [len(part) for part in parts] == [1, 1, 1, 0]
    assert {name: digests_of_shard for part in parts for name, digests_of_shard in part.items()} == alone


def test_the_corresponding_sentence_teaches(pairs: SourceConfig, tmp_path: Path) -> None:
    """The English caption in the place of the Korean one that was drawn."""
    config = DataConfig(sources=[pairs], num_crops=1)
    seen: list[str] = []

    def embed(piece: ItemBatch) -> torch.Tensor:
        sentences = piece.inputs
        seen.extend(sentences)
        return torch.tensor([float(len(seen) - len(sentences) + n) for n in range(len(sentences))]).view(-1, 1, 1)

    paths = []
    for path, _, pieces in SourceShards(open_source(pairs), CaptionReader("en"), tmp_path / "en").read(0):
        embed_shard(path, pieces, embed, torch.float32)
        paths.append(path)
    known = Precomputed(teacher=Shards(paths, "align.cache_dir"))
    rows = {f"{pairs.key}/{place}": row for place, row in enumerate(pq.read_table(pairs.path).to_pylist())}
    tokenizer = tiny_tokenizer()
    for batch in batches(config, known=known):
        assert batch.teacher is not None
        for key, ids, place in zip(batch.keys, batch.input_ids, batch.teacher[:, 0].tolist(), strict=True):
            english = rows[key]["captions_en"].index(seen[int(place)])
            for language in ("captions_ko", "captions_en"):
                expected = tokenizer(rows[key][language][english])["input_ids"]
                if expected == ids[: len(expected)].tolist():
                    break
            else:
                pytest.fail(f"{key}: {seen[int(place)]} does not correspond to the caption that was drawn")


def test_a_complete_directory_is_only_read(pairs: SourceConfig, tmp_path: Path) -> None:
    """So that several runs may share it."""
    build(tmp_path / "kept", pairs)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")}
    build(tmp_path / "kept", pairs)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")} == times


def test_there_is_no_dropout_in_features(pairs: SourceConfig, tmp_path: Path) -> None:
    """A tower in training mode makes the same ones as one in evaluation mode."""
    encoder = tiny_dual_encoder()
    for layer in encoder.model.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.9
    shards = build(tmp_path / "trained", pairs, encoder=encoder.train())
    plain = build(tmp_path / "plain", pairs)
    for image in images_of(pairs):
        torch.testing.assert_close(shards.embedding(digest_of(image)), plain.embedding(digest_of(image)))
