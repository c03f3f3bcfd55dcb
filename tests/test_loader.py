"""koclip.data.loader and order: which pairs come when, resumed and over several processes."""

import json
import os
from collections import Counter

import pytest
import torch
from loading import SCENES, assert_equal, batches, config

from koclip.config import ConfigError, DataConfig, SourceConfig
from koclip.data.batches import Position
from koclip.data.loader import training_captions
from koclip.data.order import BatchPart, CaptionChooser, MapOrder
from koclip.data.sources import open_source
from koclip.data.survey import survey_source


def test_a_batch_has_the_shapes_it_tells(tokenizer, table) -> None:
    (batch,) = batches(config(table), tokenizer, 1)
    length = batch.input_ids.shape[1]
    assert batch.pixel_values.shape == (8, 3, 16, 16)
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.input_ids.shape == batch.attention_mask.shape == (8, length)
    assert batch.attention_mask.sum(dim=1).max() == length  # padded to the longest, no further
    assert batch.padding_share == pytest.approx(1 - batch.attention_mask.float().mean().item())
    assert (batch.input_ids == tokenizer.eos_token_id).any(dim=1).all()
    assert (len(batch.keys), batch.num_drawn, batch.skipped, batch.position) == (8, 8, [], None)
    assert batch.pair_ids.dtype == torch.int64


def test_duplicates_have_equal_ids(tokenizer, write_table) -> None:
    path = write_table("rows.parquet", 8, same=["원", "별"] * 4)
    (batch,) = batches(config(SourceConfig(path=path, captions={"ko": "same"})), tokenizer, 1)
    words = tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
    assert [words.index(word) for word in words] == [
        batch.pair_ids[:, 0].tolist().index(number) for number in batch.pair_ids[:, 0].tolist()
    ]
    assert len(set(batch.pair_ids[:, 0].tolist())) == 2


def test_every_row_comes_once_per_epoch_in_another_order(tokenizer, table) -> None:
    keys = [key for batch in batches(config(table, length_pool=1), tokenizer, 25, BatchPart(4)) for key in batch.keys]
    first, second = keys[:50], keys[50:100]
    assert sorted(first) == sorted(second) == sorted(set(keys))
    assert len(set(keys)) == 50
    assert first != second != sorted(second)
    pooled = [key for batch in batches(config(table), tokenizer, 75, BatchPart(4)) for key in batch.keys]
    assert set(Counter(pooled).values()) == {6}


def test_the_order_is_a_function_of_the_seed(tokenizer, table) -> None:
    assert_equal(batches(config(table), tokenizer, 8), batches(config(table), tokenizer, 8))
    first, other = (batches(config(table, seed=seed), tokenizer, 1)[0] for seed in (0, 1))
    assert first.keys != other.keys


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["scenes", "table", "shards", "tars", "two streams"])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_resumed_equals_uninterrupted(source, step, num_workers, tokenizer, request) -> None:
    names = {"two streams": ["shards", "tars"], "scenes": []}.get(source, [source])
    sources = [request.getfixturevalue(name) for name in names] or [SCENES]
    data = config(*sources, num_workers=num_workers, crop_scale=(0.5, 1.0), word_dropout=0.1)
    whole = batches(data, tokenizer, 14)
    seen = {batch.position.reader: batch.position for batch in whole[:step] if batch.position}
    saved = [Position(*json.loads(json.dumps(position))) for position in seen.values()]
    resumed = batches(data, tokenizer, 14 - step, start_step=step, positions=saved)
    assert_equal(whole[step:], resumed)
    assert [batch.position and batch.position.rows for batch in whole[step:]] == [
        batch.position and batch.position.rows for batch in resumed
    ]


def test_workers_do_not_change_map_style_batches(tokenizer, table) -> None:
    alone = batches(config(table, SCENES), tokenizer, 9)
    assert_equal(alone, batches(config(table, SCENES, num_workers=2), tokenizer, 9))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_leaves_pytorchs_generator_alone(tokenizer, table, num_workers) -> None:
    before = torch.get_rng_state()
    batches(config(table, num_workers=num_workers), tokenizer, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_share_one_processs_batches(tokenizer, table) -> None:
    data = config(table, SCENES)
    whole = batches(data, tokenizer, 7, BatchPart(8))
    halves = [batches(data, tokenizer, 7, BatchPart(4, rank, 2)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert batch.keys == [key for part in parts for key in part.keys]
        assert torch.equal(batch.pixel_values, torch.cat([part.pixel_values for part in parts]))
        assert torch.equal(batch.pair_ids, torch.cat([part.pair_ids for part in parts]))


def test_pieces_make_up_the_batches(tokenizer, table) -> None:
    """Uneven ones too; each is padded to its own longest caption, and nothing is dropped at an epoch's end."""
    data = config(table, crop_scale=(0.5, 1.0))
    whole = batches(data, tokenizer, 13)
    pieces = batches(data, tokenizer, 3 * 13, BatchPart(8, micro_batch_size=3))
    assert [len(piece.keys) for piece in pieces] == [3, 3, 2] * 13
    for number, batch in enumerate(whole):
        parts = pieces[3 * number : 3 * number + 3]
        assert batch.keys == [key for part in parts for key in part.keys]
        assert torch.equal(batch.pixel_values, torch.cat([part.pixel_values for part in parts]))
        assert torch.equal(batch.pair_ids, torch.cat([part.pair_ids for part in parts]))
        assert max(part.input_ids.shape[1] for part in parts) == batch.input_ids.shape[1]
    resumed = batches(data, tokenizer, 6, BatchPart(8, micro_batch_size=3), start_step=11)
    assert_equal(pieces[33:], resumed)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_pieces_of_a_stream_equal_uninterrupted_ones(tokenizer, tars, num_workers) -> None:
    data, shard = config(tars, num_workers=num_workers), BatchPart(9, micro_batch_size=3)
    whole = batches(data, tokenizer, 30, shard)
    assert {len(piece.keys) for piece in whole} == {3}
    seen = {piece.position.reader: piece.position for piece in whole[:12] if piece.position}
    resumed = batches(data, tokenizer, 18, shard, start_step=4, positions=list(seen.values()))
    assert_equal(whole[12:], resumed)


def test_twins_stay_together(tokenizer) -> None:
    for batch in batches(config(SourceConfig(scenes_size=62)), tokenizer, 20):
        numbers = sorted(int(key.rsplit("/", 1)[1]) for key in batch.keys)
        assert {number ^ 1 for number in numbers} == set(numbers)


def test_crops_change_from_epoch_to_epoch(tokenizer) -> None:
    drawn = batches(config(SourceConfig(scenes_size=8), length_pool=1, crop_scale=(0.3, 1.0)), tokenizer, 2)
    first, second = (dict(zip(batch.keys, batch.pixel_values, strict=True)) for batch in drawn)
    assert set(first) == set(second)
    assert not any(torch.equal(first[key], second[key]) for key in first)


def test_length_pools_lower_the_padding_and_keep_the_pairs(tokenizer, table) -> None:
    shares, keys = {}, {}
    for pool in (1, 6):
        drawn = batches(config(table, length_pool=pool), tokenizer, 24)
        shares[pool] = sum(batch.padding_share for batch in drawn) / len(drawn)
        keys[pool] = Counter(key for batch in drawn for key in batch.keys)
    assert shares[6] < 0.6 * shares[1]
    lengths = [batch.input_ids.shape[1] for batch in batches(config(table, length_pool=6), tokenizer, 6)]
    assert lengths != sorted(lengths)  # grouped, not sorted
    assert max(keys[6].values()) - min(keys[6].values()) <= 1


def test_sources_are_mixed_by_weight(tokenizer, write_table) -> None:
    small = write_table("small.parquet", 10)
    large = write_table("large.parquet", 40, first=100)

    def shares(*weights: float | None, **options) -> Counter[str]:
        sources = [
            SourceConfig(path=path, captions={"ko": "ko"}, weight=weight, **options)
            for path, weight in zip((small, large), weights, strict=True)
        ]
        drawn = batches(config(*sources), tokenizer, 50)
        return Counter(key.split("~")[0] for batch in drawn for key in batch.keys)

    assert shares(None, None)["small"] == pytest.approx(80, abs=4)
    assert shares(1.0, 1.0)["small"] == pytest.approx(200, abs=4)
    assert shares(3.0, 1.0)["small"] == pytest.approx(304, abs=4)  # 38 of the 50 rows of an epoch
    streamed = shares(3.0, 1.0, streaming=True)
    assert 0.7 < streamed["small"] / 400 < 0.8


def test_a_source_of_little_weight_still_shows_all_its_rows(tokenizer, write_table) -> None:
    small, large = write_table("small.parquet", 10), write_table("large.parquet", 40, first=100)
    sources = [
        SourceConfig(path=path, captions={"ko": "ko"}, weight=weight) for path, weight in ((small, 9.0), (large, 1.0))
    ]
    drawn = batches(config(*sources), tokenizer, 250)  # 40 epochs of 5 rows each
    assert len({key for batch in drawn for key in batch.keys if key.startswith("large")}) > 30


def test_languages_are_drawn_by_weight(tokenizer, table) -> None:
    def share_of_korean(languages: dict[str, float] | None) -> float:
        source = SourceConfig(path=table.path, captions=table.captions, languages=languages)
        drawn = batches(config(source), tokenizer, 50)
        texts = [text for batch in drawn for text in tokenizer.batch_decode(batch.input_ids)]
        return sum("번" in text for text in texts) / len(texts)

    assert 0.42 < share_of_korean(None) < 0.58
    assert 0.68 < share_of_korean({"ko": 3.0, "en": 1.0}) < 0.82
    assert share_of_korean({"ko": 0.0, "en": 1.0}) == 0


def test_a_row_without_one_language_gives_the_other(tokenizer) -> None:
    chooser = CaptionChooser(DataConfig())
    assert {chooser.caption({"en": ["a star"]}, 0, (0, n)) for n in range(20)} == {("en", 0, "a star")}
    both = {("ko", 0, "별"), ("ko", 1, "원")}
    assert {chooser.caption({"ko": ["별", "원"]}, 0, (0, n)) for n in range(20)} == both
    assert chooser.caption({}, 0, (0,)) is None


def test_captions_change_from_epoch_to_epoch(tokenizer, table) -> None:
    drawn = batches(config(table, length_pool=1), tokenizer, 100, BatchPart(5))
    captions: dict[str, set[int]] = {}
    for batch in drawn:
        for key, number in zip(batch.keys, batch.pair_ids[:, 0].tolist(), strict=True):
            captions.setdefault(key, set()).add(number)
    assert all(len(numbers) == 2 for numbers in captions.values())


def test_word_dropout_leaves_words_out_but_never_all(tokenizer) -> None:
    chooser = CaptionChooser(DataConfig(word_dropout=0.5))
    captions = {chooser.caption({"ko": ["하나 둘 셋"]}, 0, (0, n)) for n in range(200)}
    assert len(captions) == 7  # every way to keep at least one of three words, in order


def test_training_captions_come_from_all_sources_in_turn(table, tars) -> None:
    captions = list(training_captions(config(table, tars)))
    assert captions[:3] == ["0번", "picture 0", "0번"]
    assert Counter(captions)["47번"] == 1
    assert len(captions) == 50 * 2 + 48


def test_the_order_of_many_rows_is_cheap(tokenizer) -> None:
    source, data = open_source(SCENES), config(SCENES)
    lengths = [survey_source(source, data, tokenizer).lengths]
    order = MapOrder([source], CaptionChooser(data), BatchPart(8), 10**6, lengths)
    assert order.epoch_size == 80
    assert len(next(iter(order))) == 8


@pytest.mark.parametrize("kind", ["flickr8k_ko/val", "emoji/emoji"])
def test_shared_data_load(kind, shared_data, tokenizer) -> None:
    captions = {"ko": "captions_ko"} if kind.startswith("flickr") else {"ko": "name_ko", "en": "name_en"}
    where = {"vendor": ["noto"]} if kind == "emoji/emoji" else None
    source = SourceConfig(path=str(shared_data / f"{kind}.parquet"), captions=captions, where=where)
    drawn = batches(config(source), tokenizer, 10, BatchPart(16))
    assert sum(len(batch.skipped) for batch in drawn) == 0
    assert len({key for batch in drawn for key in batch.keys}) == 160


def test_bad_data_configs_name_the_key() -> None:
    for options, key in [
        ({"sources": []}, "sources"),
        ({"length_pool": 0}, "length_pool"),
        ({"num_workers": -1}, "num"),
    ]:
        with pytest.raises(ConfigError, match=rf"^data\.{key}"):
            DataConfig(**options)


def test_workers_are_told_not_to_use_tokenizer_threads(tokenizer, table, monkeypatch, capfd) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    batches(config(table, num_workers=2), tokenizer, 2)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert "forked" not in capfd.readouterr().err
