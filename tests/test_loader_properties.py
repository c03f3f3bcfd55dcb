"""Properties of the loader: every row is used once an epoch or listed, however the batches are cut and shared out."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from loading import Pile, assert_equal, batches, config, opening, stream

from koclip.data.batches import Batch, Position
from koclip.data.order import BatchPart

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
STREAMS = settings(QUICK, max_examples=25)


def whole(pieces: Sequence[Batch]) -> dict[str, list[object]]:
    """Return what batches hold, one after the other: sample by sample, and what was left out."""
    return {
        "keys": [key for piece in pieces for key in piece.keys],
        "pixels": [pixels.tolist() for piece in pieces for pixels in piece.pixel_values],
        "captions": [
            ids[mask.bool()].tolist()
            for piece in pieces
            for ids, mask in zip(piece.input_ids, piece.attention_mask, strict=True)
        ],
        "pairs": [pair.tolist() for piece in pieces for pair in piece.pair_ids],
        "skipped": [skip for piece in pieces for skip in piece.skipped],
    }


def in_steps(batches: Sequence[Batch], steps: int) -> list[Sequence[Batch]]:
    size = len(batches) // steps
    return [batches[size * step : size * (step + 1)] for step in range(steps)]


@st.composite
def piles(draw: st.DrawFn) -> list[Pile]:
    """Up to three sources; in each, at least one row is good."""
    sources = []
    weighted = draw(st.booleans())
    for number in range(draw(st.integers(1, 3))):
        group = draw(st.sampled_from([1, 1, 2]))
        size = group * draw(st.integers(1, 6))
        broken = draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
        weight = draw(st.sampled_from([1.0, 2.0])) if weighted else None
        sources.append(Pile(f"pile{number}", size, broken, weight, group))
    return sources


def rows_per_epoch(sources: Sequence[Pile]) -> list[int]:
    """Return how many rows of each source come in one pass: all, or its share by weight, in whole groups."""
    sizes, weights = [len(source) for source in sources], [source.config.weight for source in sources]
    if weights[0] is not None:
        sizes = [sum(sizes) * weight / sum(weights) for weight in weights]
    return [max(1, round(size / source.group)) * source.group for size, source in zip(sizes, sources, strict=True)]


@QUICK
@given(data=st.data(), sources=piles(), world_size=st.integers(1, 3), batch_size=st.integers(1, 4))
def test_a_row_is_used_once_an_epoch_or_listed_and_replaced_by_one_of_its_source(
    data: st.DataObject, sources: list[Pile], world_size: int, batch_size: int, tokenizer
) -> None:
    pool = data.draw(st.integers(1, 3), "length_pool")
    expected = rows_per_epoch(sources)
    rows = math.lcm(pool * batch_size * world_size, sum(expected))  # whole pools and whole epochs
    assume(rows <= 400)
    steps, epochs = rows // (batch_size * world_size), rows // sum(expected)
    used, listed = Counter[str](), Counter[str]()
    with opening(*sources) as configs:
        for rank in range(world_size):
            shard = BatchPart(batch_size, rank, world_size, data.draw(st.integers(1, batch_size), "micro_batch_size"))
            for piece in batches(config(*configs, length_pool=pool), tokenizer, steps * len(shard.pieces), shard):
                used.update(piece.keys)
                listed.update(skip.key for skip in piece.skipped)
    for source, count in zip(sources, expected, strict=True):
        good, broken = source.good, source.broken
        assert sum(used[key] for key in good) == count * epochs
        assert not any(used[key] for key in broken)
        assert not any(listed[key] for key in good)
        if count == len(source):
            assert all(used[key] >= epochs if broken else used[key] == epochs for key in good)
            assert all(listed[key] >= epochs for key in broken)


@QUICK
@given(data=st.data(), sources=piles(), world_size=st.integers(1, 3), batch_size=st.integers(1, 4))
def test_processes_pieces_and_resumed_runs_have_the_batches_of_one_process(
    data: st.DataObject, sources: list[Pile], world_size: int, batch_size: int, tokenizer
) -> None:
    """Broken rows or not: sample by sample, replacements too."""
    steps, start = 7, data.draw(st.integers(0, 6), "start")
    options = {"length_pool": data.draw(st.integers(1, 3)), "crop_scale": (0.5, 1.0), "word_dropout": 0.2}
    with opening(*sources) as configs:
        read = config(*configs, **options)
        alone = batches(read, tokenizer, steps, BatchPart(batch_size * world_size))
        parts = []
        for rank in range(world_size):
            micro = data.draw(st.integers(1, batch_size), "micro_batch_size")
            shard = BatchPart(batch_size, rank, world_size, micro)
            count = (steps - start) * len(shard.pieces)
            parts.append(in_steps(batches(read, tokenizer, count, shard, start_step=start), steps - start))
    for batch, *pieces in zip(alone[start:], *parts, strict=True):
        assert whole([batch]) == whole([piece for part in pieces for piece in part])


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[str, list[int], set[int], float | None]]:
    """Arguments of one or two streams of four shards; the first row of each shard is good."""
    sources = []
    for number in range(draw(st.integers(1, 2))):
        sizes = draw(st.lists(st.integers(1, 5), min_size=4, max_size=4))
        starts = {sum(sizes[:place]) for place in range(4)}
        broken = draw(st.sets(st.integers(1, sum(sizes)))) - starts
        sources.append((f"stream{number}", sizes, broken, draw(st.sampled_from([None, 2.0]))))
    return sources


@STREAMS
@given(data=st.data(), sources=streams(), world_size=st.integers(1, 4), batch_size=st.sampled_from([2, 4, 6]))
def test_a_stream_uses_or_lists_every_row_in_pieces_of_any_size_and_resumed(
    data: st.DataObject, sources: list, world_size: int, batch_size: int, tokenizer
) -> None:
    """Of any reader: exactly the rows that it has read, pass after pass, at the end of a pool."""
    pool, rank = data.draw(st.integers(1, 2), "length_pool"), data.draw(st.integers(0, world_size - 1), "rank")
    steps = pool * data.draw(st.integers(2, 3), "pools")
    stop = data.draw(st.integers(1, steps - 1), "stop")
    micros = [None, *(size for size in range(1, batch_size) if batch_size % size == 0)]
    first, second = (
        BatchPart(batch_size, rank, world_size, data.draw(st.sampled_from(micros), "micro_batch_size"))
        for _ in range(2)
    )
    opened = [stream(*arguments) for arguments in sources]
    with opening(*opened) as configs:
        read = config(*configs, length_pool=pool, shuffle_buffer=3)
        alone = batches(read, tokenizer, steps, BatchPart(batch_size, rank, world_size))
        part = batches(read, tokenizer, stop * len(first.pieces), first)
        positions = [Position(reader, passes=((0, 0),) * len(sources)) for reader in range(world_size)]
        positions[rank] = part[-1].position
        count = (steps - stop) * len(second.pieces)
        rest = batches(read, tokenizer, count, second, start_step=stop, positions=positions)
    assert whole(alone) == whole([*part, *rest])
    seen = Counter(key for batch in alone for key in [*batch.keys, *(skip.key for skip in batch.skipped)])
    for source in opened:
        own = Counter({key: count for key, count in seen.items() if key.startswith(source.config.path)})
        passes = (row.key for epoch in itertools.count() for row in source.rows(epoch, 0, 3, rank, world_size))
        assert own == Counter(itertools.islice(passes, own.total()))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("micro", [(None, 4), (4, None), (2, 8), (8, 2)])
def test_a_stream_goes_on_in_pieces_of_another_size(num_workers, micro, tokenizer, tars) -> None:
    """48 pairs in batches of 8: six steps are one epoch, wherever the run stops and in whatever pieces it goes on."""
    data = config(tars, num_workers=num_workers, length_pool=3)
    whole_run = batches(data, tokenizer, 12, BatchPart(8))
    for stop in (1, 2, 5):
        before, after = (BatchPart(8, micro_batch_size=size) for size in micro)
        part = batches(data, tokenizer, stop * len(before.pieces), before)
        positions = {piece.position.reader: piece.position for piece in part}
        rest = batches(
            data,
            tokenizer,
            (12 - stop) * len(after.pieces),
            after,
            start_step=stop,
            positions=list(positions.values()),
        )
        assert whole([*part, *rest]) == whole(whole_run)
        counts = Counter(key for piece in [*part, *rest] for key in piece.keys)
        assert set(counts.values()) == {2}
        assert len(counts) == 48


def test_a_stream_goes_on_in_batches_of_another_size_where_that_is_accepted(tokenizer, tars) -> None:
    """`resume_with: [train.batch_size]`: no row is lost, none comes again."""
    data = config(tars, length_pool=3)
    part = batches(data, tokenizer, 2, BatchPart(8))
    rest = batches(data, tokenizer, 20, BatchPart(4), start_step=2, positions=[part[-1].position])
    counts = Counter(key for batch in [*part, *rest] for key in batch.keys)
    assert set(counts.values()) == {2}
    assert len(counts) == 48


@pytest.mark.parametrize("micro", [3, 5, 8])
def test_uneven_pieces_of_a_stream_make_up_its_batches(micro, tokenizer, tars) -> None:
    data = config(tars, crop_scale=(0.5, 1.0))
    shard = BatchPart(8, micro_batch_size=micro)
    pieces = in_steps(batches(data, tokenizer, 5 * len(shard.pieces), shard), 5)
    for batch, parts in zip(batches(data, tokenizer, 5, BatchPart(8)), pieces, strict=True):
        assert [len(part.keys) for part in parts] == [piece.stop - piece.start for piece in shard.pieces]
        assert whole([batch]) == whole(parts)
        assert all(part.attention_mask.sum(dim=1).max() == part.input_ids.shape[1] for part in parts)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_rows_do_not_change_how_a_run_resumes(streaming, num_workers, tokenizer, flawed) -> None:
    """At any step; a stream is not read with two workers: it is one file."""
    source = replace(flawed, streaming=streaming)
    data = config(source, num_workers=0 if streaming else num_workers, crop_scale=(0.5, 1.0))
    alone = batches(data, tokenizer, 14, BatchPart(10))
    for step in (1, 5, 9):
        positions = [alone[step - 1].position] if streaming else []
        assert_equal(
            alone[step:], batches(data, tokenizer, 14 - step, BatchPart(10), start_step=step, positions=positions)
        )


def test_two_processes_replace_broken_rows_as_one_does(tokenizer, flawed) -> None:
    data = config(flawed, crop_scale=(0.5, 1.0))
    alone = batches(data, tokenizer, 10, BatchPart(20))
    halves = [in_steps(batches(data, tokenizer, 30, BatchPart(10, rank, 2, 4)), 10) for rank in (0, 1)]
    assert sum(len(batch.skipped) for batch in alone) > 10
    for batch, *parts in zip(alone, *halves, strict=True):
        assert whole([batch]) == whole([piece for part in parts for piece in part])
        pixels = torch.cat([piece.pixel_values for part in parts for piece in part])
        assert torch.equal(batch.pixel_values, pixels)
