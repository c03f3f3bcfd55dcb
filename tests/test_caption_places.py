"""Captions keep their places: whatever is missing, those of two languages correspond as they do in their cells."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from koclip.config import DataConfig, SourceConfig
from koclip.data.batches import Assembler, Precomputed, Sample
from koclip.data.loader import train_loader, training_captions
from koclip.data.order import BatchPart, CaptionChooser
from koclip.data.sources import Row, Skip, open_source, row_captions
from koclip.data.survey import survey_source
from koclip.data.transforms import digest_of
from koclip.encoders import Encoder
from koclip.evaluation.embed import Embedder, Images
from koclip.evaluation.sets import EvalSet, EvalSetConfig
from koclip.evaluation.tasks.retrieval import languages, retrieval, stress

GAPS = {"ko": ["하나", "", "셋", "넷"], "en": ["one", "two", "three", ""]}  # of the issue: (하나, one) and (셋, three)
SOURCE = SourceConfig(path="rows.jsonl", captions={"ko": "ko", "en": "en"}, languages={"ko": 1.0})
Cell = Any


class Teacher:
    """Features that tell which sentence they are of."""

    def __init__(self) -> None:
        self.asked: dict[bytes, str] = {}

    def embedding(self, digest: bytes, view: int = 0) -> Tensor:
        return torch.frombuffer(bytearray(digest), dtype=torch.uint8).float()


def taught(cells: dict[str, Cell], tokenizer: Any, source: SourceConfig = SOURCE, draws: int = 80) -> set[Any]:
    """Return the pairs of caption and sentence that a row is drawn as, or why it is left out."""
    assembler = Assembler(DataConfig(sources=[source]), tokenizer, None, Precomputed(teacher=Teacher()))
    row = Row(None, row_captions(cells, source), "row")
    outcomes: set[Any] = set()
    for number in range(draws):
        sample = assembler.sample(row, 0, (0, number, 0, 0))
        if isinstance(sample, Sample):
            assert sample.sentence is not None
            assert torch.equal(sample.teacher, Teacher().embedding(digest_of(sample.sentence.encode())))
            outcomes.add((sample.caption, sample.sentence))
        else:
            assert isinstance(sample, Skip)
            outcomes.add(sample.reason)
    return outcomes


CASES = [
    (GAPS, {("하나", "one"), ("셋", "three")}),
    ({"ko": ["하나", None, "셋"], "en": ["one", "two", "three"]}, {("하나", "one"), ("셋", "three")}),
    ({"ko": [None, "둘"], "en": ["one", "two"]}, {("둘", "two")}),
    ({"ko": ["하나", "nan"], "en": ["nan", "two"]}, {"no caption has a translation in en"}),
    ({"ko": "하나", "en": "one"}, {("하나", "one")}),
    ({"ko": ["하나"], "en": "one"}, {("하나", "one")}),
    ({"ko": ["하나", "둘"], "en": [3, "two"]}, {("둘", "two")}),
    ({"ko": ["", "둘"], "en": ["one"]}, {("둘", "one")}),  # unequal numbers: any of the row's
    ({"ko": ["하나"], "en": ["one", "", "three"]}, {("하나", "one"), ("하나", "three")}),
    ({"ko": ["하나"], "en": ["", None]}, {"no caption in en, the teacher's language"}),
    ({"ko": ["", "nan"], "en": ["one", "two"]}, {"no usable caption"}),
]


@pytest.mark.parametrize(("cells", "expected"), CASES)
def test_captions_are_taught_by_what_stands_at_their_place(cells: dict[str, Cell], expected: set, tokenizer) -> None:
    assert taught(cells, tokenizer) == expected


def test_captions_in_the_teachers_language_teach_themselves(tokenizer) -> None:
    both = SourceConfig(path="rows.jsonl", captions={"ko": "ko", "en": "en"})
    outcomes = taught(GAPS, tokenizer, both, 200)
    assert outcomes == {("하나", "one"), ("셋", "three"), ("one", "one"), ("two", "two"), ("three", "three")}


def is_text(value: Cell) -> bool:
    return isinstance(value, str) and value[-1:].isdigit()


@st.composite
def cells(draw: st.DrawFn) -> tuple[list[Cell], list[Cell]]:
    """Draw a row's cells in Korean and English: texts that name their place, and gaps; mostly equally many."""
    size, more = draw(st.integers(0, 4)), draw(st.sampled_from([0, 0, 0, 1]))
    nothing = st.sampled_from(["", None, "nan", " ", 7])
    ko, en = (
        [draw(st.one_of(st.just(f"{language} {place}"), nothing)) for place in range(count)]
        for language, count in (("ko", size), ("en", size + more))
    )
    return ko, en


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cells())
def test_pairs_taught_are_those_with_both_places_usable(tokenizer, row: tuple[list[Cell], list[Cell]]) -> None:
    ko, en = row
    outcomes = taught({"ko": ko, "en": en}, tokenizer)
    if len(ko) == len(en):
        expected = {pair for pair in zip(ko, en, strict=True) if all(map(is_text, pair))}
    else:
        expected = {pair for pair in itertools.product(ko, en) if all(map(is_text, pair))}
    assert outcomes == expected or (not expected and len(outcomes) == 1 and isinstance(outcomes.pop(), str))


class Placing(Encoder):
    """An encoder that knows where each text and each picture lies: the place of its number."""

    def __init__(self, places: dict[str, int]) -> None:
        super().__init__(torch.nn.Identity(), None, "placing")
        self._places = places
        self.read: list[str] = []

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.eye(16)[[image.getpixel((0, 0))[0] for image in images]]

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.read += texts
        return torch.eye(16)[[self._places.get(text, 15) for text in texts]]

    _image_features = _embed_images

    def unknown_share(self, texts: Sequence[str]) -> float:
        return 0.0

    def fingerprint(self) -> str:
        return self.name


def eval_set(rows: Sequence[dict[str, Cell]]) -> EvalSet:
    """Return a set of pictures of the shades 0, 1, 2 ... with the captions of these cells."""
    captions = [row_captions(row, SOURCE) for row in rows]
    pixels = [torch.full((2, 2, 3), shade, dtype=torch.uint8).numpy() for shade in range(len(rows))]
    pictures = Images([Row(*parts, key="") for parts in zip(pixels, captions, strict=True)])
    return EvalSet("rows", EvalSetConfig(source=SOURCE, tasks=["languages"]), pictures, captions, {})


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(cells(), min_size=1, max_size=4))
def test_languages_compare_pairs_with_both_places_usable(rows: list[tuple[list[Cell], list[Cell]]]) -> None:
    """Both of a pair find the same picture here, but those of two pairs do not: a pair put together wrongly shows."""
    rows = [*rows, (["ko 0", None, "ko 2"], ["en 0", "en 1", "en 2"]), (["ko 0"], ["en 0"])]  # some can be compared
    named = [
        [[f"{number} {text}" if is_text(text) else text for text in cell] for cell in row]
        for number, row in enumerate(rows)
    ]
    expected = {
        pair for ko, en in named if len(ko) == len(en) for pair in zip(ko, en, strict=True) if all(map(is_text, pair))
    }
    places = {
        f"{number} {language} {place}": (3 * number + place) % len(rows)
        for number, language, place in itertools.product(range(len(rows)), ("ko", "en"), range(5))
    }
    encoder = Placing(places)
    embedder, opened = Embedder(encoder, 8), eval_set([dict(zip(("ko", "en"), row, strict=True)) for row in named])
    metrics = languages(embedder, opened, ("ko", "en"), embedder.images(opened.images))
    assert metrics["languages/gap@1"].n == len(expected)
    assert metrics["languages/same_image"].value == 1.0
    assert set(encoder.read) == {text for pair in expected for text in pair}


def test_no_empty_place_is_embedded_shown_or_measured() -> None:
    rows = [GAPS, {"ko": [None, "다섯"], "en": "five"}, {"ko": ["여섯", ""], "en": ["", "six"]}]
    opened = eval_set(rows)
    encoder = Placing({"하나": 0, "셋": 0, "넷": 0, "다섯": 1, "여섯": 2})
    embedder = Embedder(encoder, 8)
    images = embedder.images(opened.images)
    metrics = retrieval(embedder, opened, "ko", images)
    assert (metrics["text_to_image/recall@1"].value, metrics["text_to_image/recall@1"].n) == (1.0, 5)
    assert metrics["text_to_image_first_caption/recall@1"].n == metrics["image_to_text/recall@1"].n == 3
    stress(embedder, opened, images)
    assert all(encoder.read)


def write(path: Path, rows: Sequence[dict[str, Cell]], encoded: Any) -> SourceConfig:
    records = [{"image": encoded((shade, 0, 0)), **row} for shade, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(records), path)
    return SourceConfig(path=str(path), captions={"ko": "ko", "en": "en"})


def test_a_tokenizer_is_trained_on_captions_alone(tmp_path: Path, encoded) -> None:
    source = write(tmp_path / "rows.parquet", [GAPS, GAPS], encoded)
    assert set(training_captions(DataConfig(sources=[source]))) == {"하나", "셋", "넷", "one", "two", "three"}


def test_batches_hold_no_empty_caption(tmp_path: Path, encoded, tokenizer) -> None:
    source = write(tmp_path / "rows.parquet", [GAPS] * 8, encoded)
    config = DataConfig(sources=[source], num_workers=0)
    batches = list(itertools.islice(train_loader(Assembler(config, tokenizer, None), BatchPart(4)), 6))
    empty = tokenizer("")["input_ids"]
    assert min(int(length) for batch in batches for length in batch.attention_mask.sum(1)) > len(empty)


def test_captions_are_measured_as_they_are_drawn(tmp_path: Path, encoded, tokenizer) -> None:
    """Batches are grouped by lengths that are known by place: with a teacher, too, those of the captions drawn."""
    source = write(tmp_path / "rows.parquet", [GAPS, {"ko": ["", "둘"], "en": ["one", "two"]}, {"ko": ["셋"]}], encoded)
    config = DataConfig(sources=[source], num_workers=0)
    rows = open_source(source).captions(range(3))
    lengths = survey_source(open_source(source), config, tokenizer).lengths
    chooser = CaptionChooser(config, "en")
    for number, row in itertools.product(range(40), range(3)):
        drawn = chooser.choose(rows[row], 0, (0, number, 0, row))
        assert drawn[:2] == chooser.choose(lengths.row(row), 0, (0, number, 0, row))[:2]


def test_an_index_keeps_captions_alone(tmp_path: Path, encoded) -> None:
    from koclip.config import IndexConfig
    from koclip.embeddings.store import SHARD, Shards
    from koclip.search.build import build

    source = write(tmp_path / "rows.parquet", [GAPS, GAPS], encoded)
    encoder = SimpleNamespace(fingerprint=lambda: "x", encode_images=lambda images, _: torch.eye(4)[: len(images)])
    build(IndexConfig(model="m", source=source, output_dir=str(tmp_path / "i")), encoder, tmp_path / "i")
    kept = Shards([tmp_path / "i" / SHARD.format(0)], "index")
    assert kept.entry(0).record["captions"] == {"ko": ["하나", "셋", "넷"], "en": ["one", "two", "three"]}


def test_what_does_not_correspond_to_the_teacher_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from accelerate import Accelerator
    from tiny import tiny_config, tiny_tokenizer

    from koclip.embeddings.fill import Cache, teacher_features
    from koclip.models.dual_encoder import from_scratch

    rows = [
        GAPS,
        {"ko": ["다섯"], "en": ["five", "six"]},
        {"ko": ["일곱"], "en": ["seven"]},
        {"ko": ["", ""], "en": []},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), image=None, captions={"ko": "ko", "en": "en"})
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    config = DataConfig(sources=[source], num_workers=0)
    shards = teacher_features(
        Accelerator(cpu=True), (model.eval(), processor.tokenizer), config, "en", Cache(tmp_path / "f", "fp32")
    )
    assert len(shards) == 6
    said = capsys.readouterr().out
    assert "rows: 1 rows " in said
    assert "rows: 1 captions in ko " in said


@pytest.mark.parametrize("streaming", [False, True])
def test_every_way_to_read_a_row_keeps_its_places(tmp_path: Path, streaming: bool, encoded) -> None:
    source = write(tmp_path / "rows.parquet", [GAPS, {"ko": ["", "둘"], "en": [None]}], encoded)
    opened = open_source(SourceConfig(path=source.path, captions=source.captions, streaming=streaming))
    expected = [GAPS, {"ko": ["", "둘"]}]
    assert [row.captions for row in opened.iter_rows()] == expected
    assert [row.captions for row in opened.iter_rows(images=False)] == expected
    if not streaming:
        assert opened.captions([0, 1]) == expected
