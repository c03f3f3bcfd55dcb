"""koclip.data.loader: streamed sources split among readers, and unusable rows in the middle of the good ones."""

import itertools
from dataclasses import replace

import pytest
from loading import assert_equal, batches, config

from koclip.config import SourceConfig
from koclip.data.batches import Position
from koclip.data.formats.files import SourceError
from koclip.data.loader import MixedRows
from koclip.data.order import BatchPart
from koclip.data.sources import open_source


@pytest.mark.parametrize("name", ["shards", "tars"])
@pytest.mark.parametrize("num_readers", [1, 2, 3, 4])
def test_readers_of_a_stream_see_every_row_once_per_epoch(name, num_readers, request) -> None:
    source = open_source(request.getfixturevalue(name))
    passes = [
        [row.key for reader in range(num_readers) for row in source.rows(epoch, 0, 6, reader, num_readers)]
        for epoch in range(3)
    ]
    assert all(len(keys) == len(set(keys)) == 48 for keys in passes)
    assert passes[0] != passes[1] != passes[2]
    parts = [{row.key for row in source.rows(0, 0, 6, reader, num_readers)} for reader in range(num_readers)]
    assert all(parts)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_streams_through_the_loader_lose_no_row(num_workers, world_size, tokenizer, tars) -> None:
    data = config(tars, num_workers=num_workers, length_pool=1)
    count = 48 // 4 // world_size
    keys = [
        key
        for rank in range(world_size)
        for batch in batches(data, tokenizer, count, BatchPart(4, rank, world_size))
        for key in batch.keys
    ]
    assert len(set(keys)) == len(keys) == 48


def test_too_few_shards_for_the_readers_is_an_error(tokenizer, tars, table) -> None:
    with pytest.raises(SourceError, match=r"shard-\*\.tar.* 4 shards.* 6 "):
        batches(config(tars, num_workers=3), tokenizer, 1, BatchPart(8, 0, 2))
    with pytest.raises(SourceError, match=r"data\.sources"):
        batches(config(tars, table), tokenizer, 1)


def test_a_shard_that_breaks_off_is_a_clear_error(tokenizer, tars, tmp_path) -> None:
    whole = (tmp_path / "shard-2.tar").read_bytes()
    (tmp_path / "shard-2.tar").write_bytes(whole[: len(whole) // 2 - 300] + bytes(512))
    message = r"shard-\*\.tar.* row \d+ .*shard-2\.tar"
    with pytest.raises(SourceError, match=message):
        batches(config(tars, shuffle_buffer=1), tokenizer, 20)


def test_resuming_a_stream_with_other_readers_is_an_error(tokenizer, tars) -> None:
    positions = [batch.position for batch in batches(config(tars, num_workers=2), tokenizer, 2)]
    with pytest.raises(SourceError, match=r"checkpoint.* 2 readers.* 1;"):
        batches(config(tars), tokenizer, 1, start_step=2, positions=positions)


def test_resuming_a_stream_reads_no_finished_epoch_again(tars, monkeypatch) -> None:
    source = open_source(tars)
    position = MixedRows([source], config(tars), Position(0), 1)
    list(itertools.islice(position, 100))
    epochs = []
    rows = source.rows
    monkeypatch.setattr(source, "rows", lambda epoch, *rest: epochs.append(epoch) or rows(epoch, *rest))
    again = MixedRows([source], config(tars), position.position(), 1)
    assert [next(again).row.key for _ in range(60)] == [next(position).row.key for _ in range(60)]
    assert epochs == [2, 3, 3]  # the third and fourth pass, the fourth by both


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_rows_are_replaced_and_listed(streaming, tokenizer, flawed) -> None:
    source = replace(flawed, streaming=streaming)
    drawn = batches(config(source), tokenizer, 30, BatchPart(10))
    assert all(len(batch.keys) == len(batch.pixel_values) == len(batch.input_ids) == 10 for batch in drawn)
    assert all(batch.num_drawn == 10 + len(batch.skipped) for batch in drawn)
    numbers = {key.rsplit("/", 1)[1][:3] for batch in drawn for key in batch.keys}
    skipped = {skip.key.rsplit("/", 1)[1][:3]: skip for batch in drawn for skip in batch.skipped}
    unusable = {f"{number:03d}" for number in (*range(0, 100, 10), *range(101, 200, 10))}
    assert set(skipped) == unusable
    assert numbers.isdisjoint(unusable)
    assert {skipped[number].reason for number in unusable if number > "100"} == {"no usable caption"}
    assert "FileNotFoundError" in skipped["020"].reason
    assert "not an image" in skipped["010"].reason
    assert {skip.source for skip in skipped.values()} == {flawed.path}
    assert_equal(drawn, batches(config(source), tokenizer, 30, BatchPart(10)))


def test_a_source_of_nothing_usable_is_an_error(tokenizer, write_table) -> None:
    path = write_table("rows.parquet", 4, none=[None] * 4)
    with pytest.raises(SourceError, match=r"rows\.parquet.* 1000 .*rows~\w+/\d/000\d"):
        batches(config(SourceConfig(path=path, captions={"ko": "none"})), tokenizer, 1)
