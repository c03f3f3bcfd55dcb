"""Calibration of an index: thresholds by hand, whose image is left out, nothing is embedded again, and errors."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_encoder import COLOURS, ColourEncoder
from PIL import Image

from koclip.config import ConfigError, IndexConfig, SourceConfig
from koclip.search import ImageIndex, build, open_index
from koclip.search.build import build as build_index
from koclip.search.calibrate import Query, best_scores, calibrate


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", 2)  # several shards


def config(photos: Path, calibration: SourceConfig | None = None, **changes: object) -> IndexConfig:
    fixed = {"model": "colours", "images": str(photos), "calibration": calibration, "approximate": "no"}
    return IndexConfig(**{**fixed, **changes})  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of one red, one green and one blue picture."""
    folder = tmp_path / "사진"
    folder.mkdir()
    for name in ("빨강", "초록", "파랑"):
        Image.new("RGB", (8, 8), COLOURS[name]).save(folder / f"{name}.png")
    return folder


def table(path: Path, rows: Sequence[tuple[Path | None, list[str], list[str]]]) -> SourceConfig:
    """Write a calibration set of (image, Korean captions, English captions)."""
    records = [
        {"image": image.read_bytes() if image else None, "captions_ko": korean, "captions_en": english}
        for image, korean, english in rows
    ]
    pq.write_table(pa.Table.from_pylist(records), path)
    return SourceConfig(path=str(path))


@pytest.fixture
def captions(tmp_path: Path, photos: Path) -> SourceConfig:
    """Return a set of 9 pictures: the red and the green one of the index, and others; one has English captions only."""
    others = []
    for number in range(7):
        others.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (200 - number, 200, number)).save(others[-1])
    rows = [(photos / "빨강.png", ["빨강 하나", "빨강 둘"], ["red"]), (photos / "초록.png", ["초록"], ["green"])]
    rows += [(other, ["노랑 " * (number + 1)] if number else [], ["yellow"]) for number, other in enumerate(others)]
    return table(tmp_path / "captions.parquet", rows)


def test_the_best_score_leaves_out_the_images_that_have_the_caption(photos, tmp_path):
    encoder = ColourEncoder()
    build_index(config(photos), encoder, tmp_path / "index")
    index = open_index(tmp_path / "index")
    digest = {index.entry(place).record["key"].split(".")[0]: index.digests[place] for place in range(3)}
    queries = [
        Query("빨강 초록", digest["빨강"]),  # green is left
        Query("파랑", b"another"),
        Query("빨강", digest["빨강"]),  # two images have the caption 빨강: only green is left
        Query("빨강", digest["파랑"]),
    ]
    images = encoder.encode_images([photos / f"{name}.png" for name in ("빨강", "초록", "파랑")])
    scores = encoder.encode_texts([query.text for query in queries]) @ images.T
    expected = [scores[0, 1:].max(), scores[1, 2], scores[2, 1], scores[3, 1]]
    assert torch.allclose(best_scores(index, encoder, queries), torch.stack(expected), atol=4e-3)  # stored in bf16


def test_thresholds_are_kept_by_alpha_and_language(photos, captions, tmp_path):
    encoder, directory = ColourEncoder(), tmp_path / "index"
    cfg = config(photos, captions, alphas=[0.05, 0.1, 0.2])
    build_index(cfg, encoder, directory)
    calibration = calibrate(cfg, encoder, directory)
    index = open_index(directory)
    korean, english = (index.facts["calibration"]["languages"][language] for language in ("ko", "en"))
    assert (korean["queries"], korean["images"], korean["images_in_index"]) == (9, 8, 2)
    assert (english["queries"], english["images"], english["images_in_index"]) == (9, 9, 2)
    assert index.promises == {"ko": [0.2], "en": [0.1, 0.2]}
    assert len(calibration.too_small) == 3
    assert english["smallest_alpha"] == 0.1
    queries = encoder.encode_texts(["red", "green", *["yellow"] * 7])
    yellow = float(index.search(queries[2:3], 1).scores)
    assert index.threshold(0.1, "en") == pytest.approx(yellow, abs=1e-6)  # the highest of nine; red and green have none


def test_a_search_for_matches_may_be_empty(photos, captions, tmp_path):
    encoder, directory = ColourEncoder(), tmp_path / "index"
    cfg = config(photos, captions)
    build_index(cfg, encoder, directory)
    calibrate(cfg, encoder, directory)
    index = open_index(directory)
    queries = encoder.encode_texts(["yellow", "red"])
    nothing, red = index.matches(queries, 3, 0.1, "en")
    plain = index.search(queries, 3)
    assert plain.scores.shape == (2, 3)
    assert (nothing.scores.shape, nothing.places.shape) == ((0,), (0,))  # equal to the threshold is not above it
    assert [index.entry(place).record["key"] for place in red.places.tolist()] == ["빨강.png"]
    assert red.scores.tolist() == plain.scores[1, :1].tolist()


def test_calibrating_a_finished_index_embeds_no_image(photos, captions, tmp_path, monkeypatch):
    encoder, directory = ColourEncoder(), tmp_path / "index"
    build_index(config(photos), encoder, directory)
    before = {path.name: path.read_bytes() for path in directory.glob("shard-*")}
    monkeypatch.setattr(encoder, "_embed_images", None)
    cfg = config(photos, captions)
    build_index(cfg, encoder, directory)
    calibrate(cfg, encoder, directory)
    assert {path.name: path.read_bytes() for path in directory.glob("shard-*")} == before
    thresholds = open_index(directory).facts["calibration"]
    build_index(config(photos), encoder, directory)  # again, without calibration: the thresholds stay
    assert open_index(directory).facts["calibration"] == thresholds


def test_thresholds_of_other_images_are_removed(photos, captions, tmp_path, capsys):
    encoder, directory = ColourEncoder(), tmp_path / "index"
    cfg = config(photos, captions)
    build_index(cfg, encoder, directory)
    calibrate(cfg, encoder, directory)
    Image.new("RGB", (9, 9), COLOURS["노랑"]).save(photos / "파랑.png")
    build_index(config(photos), encoder, directory)
    assert open_index(directory).promises == {}
    assert "threshold" in capsys.readouterr().out


def test_a_set_without_images_has_only_queries_without_a_match(photos, tmp_path):
    encoder, directory = ColourEncoder(), tmp_path / "index"
    file = tmp_path / "queries.csv"
    file.write_text("question\n" + "\n".join(f"빨강 {number}" for number in range(12)), encoding="utf-8")
    cfg = config(photos, SourceConfig(path=str(file), image=None, captions={"ko": "question"}), alphas=[0.1])
    build_index(cfg, encoder, directory)
    facts = calibrate(cfg, encoder, directory).facts["languages"]["ko"]
    assert (facts["images"], facts["images_in_index"]) == (12, 0)
    assert open_index(directory).threshold(0.1, "ko") > 0.9  # red is in the index, and is nobody's own


def test_an_image_that_cannot_be_read_is_left_out_and_listed(photos, tmp_path):
    encoder, directory = ColourEncoder(), tmp_path / "index"
    rows: list = [(None, ["없음"], ["none"])]
    rows += [(photos / f"{name}.png", [f"{name} 그림"], [name]) for name in ("빨강", "초록")]
    cfg = config(photos, table(tmp_path / "captions.parquet", rows), alphas=[0.5])
    build_index(cfg, encoder, directory)
    calibration = calibrate(cfg, encoder, directory)
    assert len(calibration.left_out) == calibration.facts["left_out"] == 1
    assert calibration.facts["languages"]["ko"]["images"] == 2


FACTS = {"calibration": {"languages": {"ko": {"images": 9, "thresholds": {"0.05": None, "0.1": 0.3}}}}}


@pytest.mark.parametrize(
    ("facts", "alpha", "language", "words"),
    [
        ({}, 0.1, "ko", ["calibration", "--calibration.path"]),
        (FACTS, 0.1, "en", ["language", "'en'", "'ko'"]),
        (FACTS, 0.2, "ko", ["alpha", "0.2", "'0.1'"]),
        (FACTS, 0.05, "ko", ["alpha", "0.05", "0.1 ", "9 ", "19"]),
    ],
)
def test_a_promise_that_the_index_cannot_give_is_named(facts, alpha, language, words):
    index = ImageIndex.__new__(ImageIndex)
    index.facts = facts
    with pytest.raises(ConfigError) as error:
        index.threshold(alpha, language)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"alphas": [0.1, 1.0]}, "alphas"),
        ({"alphas": []}, "alphas"),
        ({"calibration": SourceConfig(captions={}, label="class")}, "calibration.captions"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(photos, changes, word):
    with pytest.raises(ConfigError, match=word):
        config(photos, **changes)


def test_a_set_without_a_caption_or_an_index_of_its_own_images_is_refused(photos, tmp_path):
    encoder, directory = ColourEncoder(), tmp_path / "index"
    build_index(config(photos), encoder, directory)
    empty = table(tmp_path / "empty.parquet", [(photos / "빨강.png", [""], [""])])
    with pytest.raises(ConfigError, match="caption"):
        calibrate(config(photos, empty), encoder, directory)
    same = table(tmp_path / "same.parquet", [(path, ["그림"], ["a picture"]) for path in sorted(photos.iterdir())])
    with pytest.raises(ConfigError, match="그림"):
        calibrate(config(photos, same), encoder, directory)
    assert "calibration" in json.loads((directory / "embeddings.json").read_text(encoding="utf-8"))
