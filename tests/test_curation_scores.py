"""Pair scores: wrong pairs get a low score, the threshold is exact, and the scores do not depend on the workers."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_encoder import COLOURS, ColourEncoder
from hypothesis import given
from hypothesis import strategies as st
from peer_models import saved
from PIL import Image
from test_curation import contents, encoded, picture, settings, write_rows
from test_curation_overlap import dropped

from koclip.config import ConfigError, CurateConfig, DuplicateRules, OverlapRules, PairRules, SourceConfig
from koclip.curation import scores
from koclip.curation.pipeline import curate
from koclip.curation.scores import close_embeddings, decide_threshold, pair_scores
from koclip.encoders import load

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

import curation_scores

NAMES = list(COLOURS)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "load", lambda spec, device: ColourEncoder())


def coloured(colour: tuple[int, int, int], number: int) -> Image.Image:
    """Return a picture of a colour with a pattern of its own."""
    pattern = np.asarray(picture(number), np.float32) - 128
    return Image.fromarray((np.array(colour) + 0.3 * pattern).clip(0, 255).astype(np.uint8))


def planted(folder: Path, count: int = 40) -> tuple[SourceConfig, set[int]]:
    """Write pictures with the name of their colour; every fifth has another colour's name. Return those rows."""
    wrong = set(range(0, count, 5))
    captions = [f"{NAMES[(row + (row in wrong)) % 4]} 그림입니다 {row:02}" for row in range(count)]
    pictures = [encoded(coloured(COLOURS[NAMES[row % 4]], row)) for row in range(count)]
    return write_rows(folder / "raw.parquet", captions, pictures), wrong


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("rules", [{"drop_share": 0.2}, {"min_score": 0.85}])
def test_wrong_pairs_are_dropped_with_their_score(rules, tmp_path):
    source, wrong = planted(tmp_path)
    content = curate(settings(source, tmp_path / "clean", pairs=PairRules(model="colours", **rules)))
    lines = dropped(tmp_path / "clean")
    assert set(lines) == wrong
    assert {reason for reason, _ in lines.values()} == {"low score"}
    table = pq.read_table(sorted((tmp_path / "clean").glob("*.parquet"))[0]).to_pydict()
    assert len(table["score"]) == 40 - len(wrong)
    threshold = content["scores"]["threshold"]
    assert min(table["score"]) >= threshold > max(float(detail) for _, detail in lines.values())
    assert content["scores"]["scored"] == 40
    assert content["scores"]["without_score"] == 0


@pytest.mark.usefixtures("colours")
def test_rows_without_captions_to_score_stay_and_are_counted(tmp_path):
    images = [{"bytes": encoded(coloured(COLOURS["파랑"], row)), "path": f"{row}.png"} for row in range(6)]
    english = ["a picture that is red"] * 2 + ["a picture that is blue"] * 2 + [""] * 2
    columns = {"image": images, "ko": ["빨강 그림입니다"] * 6, "en": english}
    pq.write_table(pa.table(columns), tmp_path / "raw.parquet")
    source = SourceConfig(path=str(tmp_path / "raw.parquet"), name="raw", captions={"ko": "ko", "en": "en"})
    rules = PairRules(model="colours", languages=["en"], min_score=0.9)
    content = curate(settings(source, tmp_path / "clean", pairs=rules, duplicates=DuplicateRules(enabled=False)))
    assert set(dropped(tmp_path / "clean")) == {0, 1}
    assert content["scores"]["scored"] == 4
    assert content["scores"]["without_score"] == 2
    (table,) = [pq.read_table(path).to_pydict() for path in (tmp_path / "clean").glob("*.parquet")]
    assert [score is None for score in table["score"]] == [False, False, True, True]


@pytest.mark.usefixtures("colours")
def test_without_a_threshold_every_row_stays_with_its_score(tmp_path):
    source, _ = planted(tmp_path)
    content = curate(settings(source, tmp_path / "clean", pairs=PairRules(model="colours")))
    assert content["rows"]["kept"] == content["scores"]["scored"] == 40
    assert content["scores"]["threshold"] is None


@pytest.mark.usefixtures("colours")
def test_pictures_with_close_embeddings_are_near_duplicates(tmp_path):
    source, _ = planted(tmp_path)
    rules = DuplicateRules(max_distance=0, crops=False, min_cosine=0.999)
    evaluation = write_rows(tmp_path / "test.parquet", ["시험 그림"], [encoded(picture(99))])
    content = curate(
        settings(
            source,
            tmp_path / "clean",
            duplicates=rules,
            pairs=PairRules(model="colours"),
            overlap=OverlapRules(sources=[evaluation]),
        )
    )
    assert content["rows"]["dropped"] == {"near-duplicate": 36}  # a picture of each of four colours stays
    assert content["clusters"]["sizes"] == {"10": 4}
    without = settings(
        source, tmp_path / "other", duplicates=replace(rules, min_cosine=None), pairs=PairRules(model="colours")
    )
    assert curate(without)["rows"]["dropped"] == {}


@pytest.mark.parametrize("count", [0, 1, 7, 8, 50])
def test_tiles_of_embeddings_give_the_pairs_of_all_cosines(count, monkeypatch):
    monkeypatch.setattr(scores, "_TILE", 8)
    embeddings = np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = np.argwhere(np.triu(embeddings @ embeddings.T >= 0.6, 1))
    assert len(expected) > 20 or count < 50
    assert sorted(close_embeddings(embeddings, 0.6).tolist()) == expected.tolist()


@pytest.mark.parametrize(
    ("rules", "model"),
    [({"min_cosine": 1.5}, "any"), ({"min_cosine": 0.9}, None), ({"enabled": False, "min_cosine": 0.9}, "any")],
)
def test_a_cosine_of_near_duplicates_that_nothing_uses_is_refused(rules, model):
    with pytest.raises(ConfigError, match=r"duplicates\.min_cosine"):
        CurateConfig(sources=[SourceConfig()], duplicates=DuplicateRules(**rules), pairs=PairRules(model=model))


def test_the_score_is_the_mean_cosine_of_the_captions():
    encoder = ColourEncoder()
    images = [coloured(COLOURS[name], row) for row, name in enumerate(NAMES)]
    captions = [["빨강 하나", "초록 둘"], ["초록"], ["파랑", "파랑 셋", "노랑"], ["노랑 하나"]]
    expected = [
        float((encoder.encode_texts(texts) @ encoder.encode_images([image])[0]).mean())
        for image, texts in zip(images, captions, strict=True)
    ]
    embeddings = encoder.encode_images(images).numpy()
    np.testing.assert_allclose(pair_scores(encoder, embeddings, captions), expected, atol=1e-6)


@given(st.lists(st.lists(st.sampled_from(np.linspace(-1, 1, 9).tolist()), max_size=8), max_size=6), st.data())
def test_the_quantile_is_exact_in_any_order(parts, data):
    share = data.draw(st.sampled_from([0.1, 0.25, 0.5, 0.9]))
    config = CurateConfig(sources=[SourceConfig()], pairs=PairRules(model="any", drop_share=share))
    arrays = [np.array(part, np.float32) for part in parts]
    shuffled = data.draw(st.permutations(arrays))
    threshold = decide_threshold(arrays, config)
    assert threshold == decide_threshold(shuffled, config)
    values = np.concatenate([np.empty(0), *arrays])
    below = int((values < threshold.least).sum())
    at_most = int((values <= threshold.least).sum())
    assert below <= share * len(values) <= at_most or not len(values)


def test_workers_do_not_change_the_scores_of_a_model(tmp_path):
    model = saved("CLIP", tmp_path / "model")
    captions = [f"그림 {'긴 설명 ' * (row % 7)}{row}" for row in range(50)]
    source = write_rows(tmp_path / "raw.parquet", captions, [encoded(picture(row)) for row in range(50)])
    rules = PairRules(model=str(model), drop_share=0.1)
    for name, workers in (("a", 1), ("b", 2)):
        curate(settings(source, tmp_path / name, pairs=rules, shard_size=10, num_workers=workers))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    table = pq.read_table(sorted((tmp_path / "a").glob("*.parquet"))).to_pydict()
    encoder = load(model)
    for row in (0, 7, 31):
        image = Image.open(io.BytesIO(table["image"][row]["bytes"]))
        expected = encoder.similarity([image], table["captions_ko"][row]) / encoder.scale
        assert table["score"][row] == pytest.approx(float(expected), abs=1e-5)


def test_another_model_does_not_continue_an_old_run(tmp_path):
    config = settings(SourceConfig(), tmp_path, pairs=PairRules(model=str(saved("CLIP", tmp_path / "model"))))
    first = scores.scorer(config)
    torch.manual_seed(1)
    saved("ChineseCLIP", tmp_path / "model")
    assert scores.scorer(config) != first


@pytest.mark.parametrize(
    ("rules", "key"),
    [
        ({"drop_share": 0.1}, "pairs.model"),
        ({"min_score": 0.2}, "pairs.model"),
        ({"model": "a", "min_score": 20.0}, "pairs.min_score"),
        ({"model": "a", "drop_share": 1.0}, "pairs.drop_share"),
        ({"model": "a", "languages": ["fr"]}, "pairs.languages"),
    ],
)
def test_settings_that_cannot_work_are_refused(rules, key):
    with pytest.raises(ConfigError, match=key):
        CurateConfig(sources=[SourceConfig()], pairs=PairRules(**rules))


def test_the_benchmark_measures_wrong_pairs(monkeypatch, tmp_path, capsys):
    captions = [[f"{NAMES[row % 4]} 그림입니다 {row:02}"] for row in range(40)]
    mixed, wrong = curation_scores.exchanged(captions, 0.3, 0)
    assert wrong.sum() == 12
    assert [before != after for before, after in zip(captions, mixed, strict=True)] == wrong.tolist()
    assert sorted(mixed) == sorted(captions)
    images = [encoded(coloured(COLOURS[NAMES[row % 4]], row)) for row in range(40)]
    columns = {"image": [{"bytes": image, "path": ""} for image in images], "captions_ko": captions}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    monkeypatch.setattr(curation_scores, "load", lambda spec: ColourEncoder())
    curation_scores.main(["--model", "colours", "--data", str(tmp_path / "pairs.parquet"), "--split", "train"])
    printed = capsys.readouterr().out
    assert "40 rows, 12 with" in printed
    exact = curation_scores.measure(np.where(wrong, 0.1, 0.9).astype(np.float32), wrong)
    assert (exact.auc, exact.low, exact.high, exact.dropped) == (1, 1, 1, 1)
    mixed_up = curation_scores.measure(np.where(wrong, 0.9, 0.1).astype(np.float32), wrong)
    assert (mixed_up.auc, mixed_up.dropped) == (0, 0)
