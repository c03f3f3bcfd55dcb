"""Overlap with evaluation sets: their pictures and captions are found among raw pairs, and other rows stay."""

import json
import unicodedata
from pathlib import Path

import pytest
from test_curation import encoded, picture, settings, write_rows
from test_curation_duplicates import CHANGES

from koclip.config import ConfigError, CurateConfig, DuplicateRules, OverlapRules, SourceConfig
from koclip.curation.overlap import caption_hash, near_pairs, read_set
from koclip.curation.pipeline import curate
from koclip.curation.report import DROPPED

NUM_ROWS = 20
SET_ROWS = 12  # of the evaluation set; the first five are the pictures whose copies are among the raw pairs


def evaluation_set(folder: Path) -> SourceConfig:
    pictures = [encoded(picture(1_000 + number, 120, 100)) for number in range(SET_ROWS - 2)]
    pictures += [pictures[0], pictures[0][:60]]  # a second row of a picture, and a broken picture
    captions = [f"평가 캡션 {number}" for number in range(SET_ROWS)]
    source = write_rows(folder / "set.parquet", captions, pictures)
    return SourceConfig(path=source.path, name="held_out", captions={"ko": "caption"})


def raw_pairs(folder: Path) -> SourceConfig:
    """Write 20 pairs. Rows 0 to 4 have copies of pictures of the set, row 5 has a caption of it."""
    pictures = [encoded(picture(number, 120, 100)) for number in range(NUM_ROWS)]
    for number, change in enumerate(CHANGES.values()):
        pictures[number] = change(picture(1_000 + number, 120, 100))
    captions = [f"여러 색이 섞인 그림 {number}" for number in range(NUM_ROWS)]
    captions[5] = unicodedata.normalize("NFD", "평가  캡션 7")
    return write_rows(folder / "raw.parquet", captions, pictures)


def dropped(folder: Path) -> dict[int, tuple[str, str]]:
    """Return reason and detail of each dropped row, by its number."""
    lines = [json.loads(line) for line in (folder / DROPPED).read_text(encoding="utf-8").splitlines()]
    return {int(line["key"].split("/")[1]): (line["reason"], line["detail"]) for line in lines if line["reason"]}


@pytest.mark.parametrize("duplicates", [DuplicateRules(), DuplicateRules(enabled=False)])
def test_pictures_and_captions_of_an_evaluation_set_are_dropped(duplicates, tmp_path):
    known, source = evaluation_set(tmp_path), raw_pairs(tmp_path)
    rules = OverlapRules(sources=[known], captions=True)
    content = curate(settings(source, tmp_path / "clean", overlap=rules, duplicates=duplicates, shard_size=7))
    expected = {row: ("in evaluation set", f"picture of {known.key}/{row}/{row}.png") for row in range(5)}
    expected[5] = ("in evaluation set", f"caption of {known.key}/7/7.png")
    assert dropped(tmp_path / "clean") == expected
    numbers = content["overlap"][known.key]
    assert numbers == {"pictures": SET_ROWS - 2, "left_out": {"broken picture": 1}, "rows": 6}


def test_captions_count_only_if_asked(tmp_path):
    rules = OverlapRules(sources=[evaluation_set(tmp_path)])
    curate(settings(raw_pairs(tmp_path), tmp_path / "clean", overlap=rules))
    assert set(dropped(tmp_path / "clean")) == set(range(5))


def test_without_an_evaluation_set_its_rows_stay(tmp_path):
    content = curate(settings(raw_pairs(tmp_path), tmp_path / "clean"))
    assert content["rows"]["kept"] == NUM_ROWS
    assert "overlap" not in content


def test_small_pictures_of_a_set_and_rows_with_one_stored_picture_are_compared(tmp_path):
    images = [picture(1_000 + number, 30, 25) for number in range(3)]  # below pictures.min_side
    write_rows(tmp_path / "set.parquet", [""] * 3, [encoded(image) for image in images])
    known = SourceConfig(path=str(tmp_path / "set.parquet"), captions={"ko": "caption"})
    copy = encoded(images[1].resize((120, 100)))
    source = write_rows(
        tmp_path / "raw.parquet", ["첫째 캡션", "둘째 캡션", "셋째 캡션"], [copy, copy, encoded(picture(1))]
    )
    curate(settings(source, tmp_path / "clean", overlap=OverlapRules(sources=[known])))
    assert set(dropped(tmp_path / "clean")) == {0, 1}


def test_the_sets_can_be_compared_outside_the_pipeline(tmp_path):
    config = settings(raw_pairs(tmp_path), tmp_path / "clean", overlap=OverlapRules(sources=[evaluation_set(tmp_path)]))
    rows, known = (read_set(source, config)[0] for source in (*config.sources, *config.overlap.sources))
    assert near_pairs(rows, known, config).tolist() == [[number, number] for number in range(5)]
    assert near_pairs(known, rows, config).tolist() == [[number, number] for number in range(5)]
    empty = read_set(SourceConfig(path=known_captions(tmp_path), image=None, captions={"ko": "caption"}), config)[0]
    assert near_pairs(rows, empty, config).shape == (0, 2)


def known_captions(folder: Path) -> str:
    (folder / "captions.jsonl").write_text(json.dumps({"caption": "노는 강아지"}), encoding="utf-8")
    return str(folder / "captions.jsonl")


def test_letter_case_spaces_and_unicode_form_of_a_caption_do_not_count():
    assert caption_hash("A  DOG, 강아지 ") == caption_hash(unicodedata.normalize("NFD", "a dog, 강아지"))
    assert caption_hash("a dog") != caption_hash("a dogs")


def test_captions_without_a_set_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected overlap"):
        CurateConfig(sources=[SourceConfig()], overlap=OverlapRules(captions=True))
