"""One row per caption is the same data as one row per picture: equal pictures are one, with all their captions."""

import csv
import io
import itertools
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from koclip import metrics
from koclip.config import ConfigError, DataConfig, EvalSetConfig, SourceConfig
from koclip.data.batches import Assembler
from koclip.data.loader import train_loader
from koclip.data.order import BatchPart
from koclip.data.transforms import Views
from koclip.encoders import Encoder
from koclip.evaluation.embed import Embedder
from koclip.evaluation.run import evaluate
from koclip.evaluation.sets import EvalSet, open_set

PICTURES, PER_PICTURE = 12, 5
FILES = itertools.count()  # `datasets` keeps what it has read, by name


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (20 * number, 255 - 20 * number, 128)).save(buffer, "PNG")
    return buffer.getvalue()


class Knowing(Encoder):
    """An encoder that knows every answer: it sees a picture's number in its colour, and reads it in a caption."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), None, type(self).__name__.lower())

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        return self._of([image.getpixel((0, 0))[0] // 20 for image in images])

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        digits = [re.match(r"\d+", text) for text in texts]  # a rewrite may leave none
        return self._of([int(digit[0]) if digit else 0 for digit in digits])

    _image_features = _embed_images

    def unknown_share(self, _: Sequence[str]) -> float:
        return 0.0

    def fingerprint(self) -> str:
        return self.name

    @staticmethod
    def _of(numbers: Sequence[int]) -> Tensor:
        return F.one_hot(torch.tensor(numbers), PICTURES).float()


class Guessing(Knowing):
    """An encoder that is right about as often as not; everything of a text decides where it lies."""

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        noise = [torch.randn(PICTURES, generator=torch.Generator().manual_seed(hash_of(text))) for text in texts]
        return F.normalize(super()._embed_texts(texts) + 0.7 * torch.stack(noise), dim=-1)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little") % (2**31)


Pair = tuple[int, str]  # a picture's number, a caption of it


def pairs() -> list[Pair]:
    return [(number, f"{number} 번 {place}") for number in range(PICTURES) for place in range(PER_PICTURE)]


def csv_of_files(folder: Path, rows: list[Pair], format: str = "auto", suffix: str = "csv") -> SourceConfig:
    """Write Flickr8k's captions.txt: a picture's file stands in the rows of all its captions."""
    for number in range(PICTURES):
        (folder / f"{number}.png").write_bytes(picture(number))
    with (folder / f"captions.{suffix}").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{number}.png", text) for number, text in rows)])
    return SourceConfig(path=str(folder / f"captions.{suffix}"), format=format, captions={"ko": "caption"})


def captions_txt(folder: Path, rows: list[Pair]) -> SourceConfig:
    return csv_of_files(folder, rows, format="csv", suffix="txt")


def one_file_per_row(folder: Path, rows: list[Pair]) -> SourceConfig:
    for place, (number, _) in enumerate(rows):
        (folder / f"{place}.png").write_bytes(picture(number))
    lines = [json.dumps({"image": f"{place}.png", "caption": text}) for place, (_, text) in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(path=str(folder / "rows.jsonl"), captions={"ko": "caption"})


def parquet_of_bytes(folder: Path, rows: list[Pair]) -> SourceConfig:
    table = pa.Table.from_pylist([{"image": picture(number), "caption": text} for number, text in rows])
    pq.write_table(table, folder / "rows.parquet")
    return SourceConfig(path=str(folder / "rows.parquet"), captions={"ko": "caption"})


def tar_shard(folder: Path, rows: list[Pair]) -> SourceConfig:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for place, (number, text) in enumerate(rows):
            for suffix, data in (("png", picture(number)), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{place:05}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return SourceConfig(path=str(folder / "rows.tar"), image="png", captions={"ko": "txt"})


ORDERS: dict[str, Callable[[list[Pair]], list[Pair]]] = {
    "as it is": list,
    "first captions first": lambda rows: sorted(rows, key=lambda row: row[1][-1]),  # as in COCO, flattened
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("write", [csv_of_files, captions_txt, one_file_per_row, parquet_of_bytes, tar_shard])
def test_a_model_that_knows_every_answer_finds_everything(write: Callable, order: str, tmp_path: Path) -> None:
    eval_set = open_set(EvalSetConfig(source=write(tmp_path, ORDERS[order](pairs()))))
    numbers = evaluate(Embedder(Knowing(), 8), [eval_set])
    name = f"{eval_set.name}/ko"
    for task, n in (("text_to_image", PICTURES * PER_PICTURE), ("image_to_text", PICTURES)):
        assert (numbers[f"{name}/{task}/recall@1"].value, numbers[f"{name}/{task}/recall@1"].n) == (1.0, n)
    assert numbers[f"{name}/text_to_image_first_caption/recall@1"].n == PICTURES
    assert len(eval_set.images) == PICTURES


# What a picture has: whether it can be decoded, and its rows, each with a caption in Korean, in English, or neither.
Cells = list[tuple[str | None, str | None]]
Drawn = list[tuple[bool, Cells]]


@st.composite
def drawn_rows(draw: st.DrawFn) -> tuple[Drawn, list[int]]:
    """Draw pictures with their captions, and whose the rows are, in any order."""
    count = draw(st.integers(3, 6))
    pictures: Drawn = []
    for number in range(count):
        said = st.one_of(st.none(), st.integers(0, 3).map(lambda place, number=number: f"{number} 사진 {place}"))
        cells = draw(st.lists(st.tuples(said, said), min_size=1, max_size=3))
        if number < 2:  # there is something to rank
            cells = [*cells, (f"{number} 마지막", f"{number} the last")]
        pictures.append((number < 2 or draw(st.integers(0, 4)) > 0, cells))
    owners = [number for number, (_, cells) in enumerate(pictures) for _ in cells]
    return pictures, draw(st.permutations(owners))


def both_layouts(folder: Path, pictures: Drawn, owners: list[int]) -> list[Path]:
    """Write one row per caption, in the order of `owners`, and one row per picture, in that of their first rows."""
    left = {number: list(cells) for number, (_, cells) in enumerate(pictures)}
    flat = [(number, *left[number].pop(0)) for number in owners]
    grouped = [(number, *map(list, zip(*pictures[number][1], strict=True))) for number in dict.fromkeys(owners)]
    data = {number: picture(number)[: None if whole else 40] for number, (whole, _) in enumerate(pictures)}
    text = pa.string()
    files = []
    for rows, kind in ((flat, text), (grouped, pa.list_(text))):
        schema = pa.schema([("image", pa.binary()), ("ko", kind), ("en", kind)])
        columns = [{"image": data[number], "ko": ko, "en": en} for number, ko, en in rows]
        files.append(folder / f"rows-{next(FILES)}.parquet")
        pq.write_table(pa.Table.from_pylist(columns, schema), files[-1])
    return files


def opened(file: Path, **options: Any) -> EvalSet:
    source = SourceConfig(path=str(file), name="rows", captions={"ko": "ko", "en": "en"})
    return open_set(EvalSetConfig(source=source, **options))


@settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)
@given(drawn_rows(), st.sampled_from([0, 2, 3]))
def test_one_row_per_caption_gives_the_numbers_of_one_row_per_picture(rows: tuple, most: int) -> None:
    tasks = ["retrieval", "languages", "stress", "zero_shot"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_RESAMPLES", 20)
        options = {"tasks": tasks, "max_images": most, "max_skipped_fraction": 0.99}
        flat, grouped = (outcome(file, options) for file in both_layouts(Path(folder), *rows))
        assert flat == grouped


def outcome(file: Path, options: dict[str, Any]) -> object:
    """Return all numbers, how many pictures there are and what they are; or the error: too few are left."""
    try:
        eval_set = opened(file, **options)
        numbers = evaluate(Embedder(Guessing(), 8), [eval_set])
    except (ConfigError, ValueError) as error:
        return type(error)
    return {name: metric.to_dict() for name, metric in numbers.items()}, len(eval_set.images), eval_set.images.digest


def test_each_row_of_a_set_of_classes_counts_but_its_pictures_are_one_where_captions_are_asked(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text("- {key: low, ko: 0 낮음}\n- {key: high, ko: 11 높음}\n", encoding="utf-8")
    rows = [{"image": picture(n), "ko": text, "key": "high" if n > 5 else "low"} for n, text in pairs()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = SourceConfig(path=str(tmp_path / "rows.parquet"), captions={"ko": "ko"}, label="key")
    classes = str(tmp_path / "classes.yaml")
    eval_set = open_set(EvalSetConfig(source=source, tasks=["retrieval", "zero_shot"], classes=classes))
    numbers = evaluate(Embedder(Knowing(), 8), [eval_set])
    assert numbers["rows/ko/zero_shot/accuracy"].n == PICTURES * PER_PICTURE
    assert numbers["rows/ko/image_to_text/recall@1"].n == PICTURES
    assert numbers["rows/ko/image_to_text/recall@1"].value == numbers["rows/ko/text_to_image/recall@1"].value == 1.0


@pytest.mark.parametrize("texts", [[None] * 6, ["0 하나", "0 둘", None, None, None, None]])
def test_too_few_pictures_with_captions_are_refused_before_work(texts: list[str | None], tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text("- {key: low, ko: 낮음}\n- {key: high, ko: 높음}\n", encoding="utf-8")
    rows = [
        {"image": picture(place // 2), "ko": text, "key": ("low", "high")[place % 2]}
        for place, text in enumerate(texts)
    ]
    schema = pa.schema([("image", pa.binary()), ("ko", pa.string()), ("key", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    source = SourceConfig(path=str(tmp_path / "rows.parquet"), captions={"ko": "ko"}, label="key")
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.source\.captions: got .*[01] "):
        open_set(EvalSetConfig(source=source, tasks=["retrieval"], classes=str(tmp_path / "classes.yaml")))


def test_a_row_without_its_own_pair_brings_none_to_its_picture(tmp_path: Path) -> None:
    """Captions of a picture's rows correspond as they do in their rows, and no others."""
    cells = [
        (0, ["하나", "둘"], ["one", "two"]),
        (1, ["0"], ["zero"]),
        (0, ["셋", "넷", "다섯"], ["three and four"]),  # unequal numbers: none corresponds
        (0, ["여섯"], []),
        (0, [], ["seven"]),
        (0, ["여덟", ""], ["eight", "nine"]),
    ]
    rows = [{"image": picture(number), "ko": ko, "en": en} for number, ko, en in cells]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    eval_set = opened(tmp_path / "rows.parquet", tasks=["languages"])
    assert eval_set.pairs("ko", "en") == [[("하나", "one"), ("둘", "two"), ("여덟", "eight")], [("0", "zero")]]
    assert [len(texts) for texts in eval_set.texts("ko")] == [7, 1]
    assert [len(texts) for texts in eval_set.texts("en")] == [6, 1]
    assert len(eval_set.images) == 2


def test_training_knows_equal_pictures_in_whatever_rows_and_files(tmp_path: Path, tokenizer: Any) -> None:
    config = DataConfig(sources=[one_file_per_row(tmp_path, pairs()[:20])], num_workers=0)
    batch = next(train_loader(Assembler(config, tokenizer, Views(config, 8)), BatchPart(20)))
    captions = [tokenizer.decode(ids, skip_special_tokens=True).split()[0] for ids in batch.input_ids]
    images = batch.pair_ids[:, 1].tolist()
    assert sorted(captions) == sorted(text.split()[0] for _, text in pairs()[:20])
    assert len(set(zip(captions, images, strict=True))) == len(set(images)) == 4


def test_a_stream_is_read_up_to_the_limit(tmp_path: Path) -> None:
    eval_set = open_set(EvalSetConfig(source=tar_shard(tmp_path, pairs()), max_images=4))
    assert [len(texts) for texts in eval_set.texts("ko")] == [PER_PICTURE] * 4
    assert eval_set.cut


@pytest.mark.parametrize("second", [("1 하나", None), (["1 하나", "1 둘"], ["one"]), (["1 하나", None], [None, "two"])])
def test_languages_that_cannot_be_compared_are_refused_before_work(second: tuple, tmp_path: Path) -> None:
    cells = [(["0 하나"], ["0 one"]), second, (None, ["2 one"])]
    as_lists = [[[cell] if isinstance(cell, str) else cell for cell in row] for row in cells]
    rows = [{"image": picture(place), "ko": ko, "en": en} for place, (ko, en) in enumerate(as_lists)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.tasks: languages: got '1 .*ko and en"):
        opened(tmp_path / "rows.parquet", tasks=["languages"])


def test_results_say_how_many_rows_pictures_and_captions_there_were(tmp_path: Path) -> None:
    from koclip.evaluation.run import described, notes

    cells = [("0 하나", "0 one"), ("0 둘", None), (None, "0 three"), ("1 넷", "1 four"), (None, None)]
    rows = [{"image": picture(int(place > 2)), "ko": ko, "en": en} for place, (ko, en) in enumerate(cells)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    eval_set = opened(tmp_path / "rows.parquet", tasks=["languages"], max_skipped_fraction=0.5)
    facts = described([eval_set], "nowhere")["rows"]
    assert (facts["rows"], facts["skipped"], facts["images"]) == (5, 1, 2)
    assert facts["captions"] == {"ko": 3, "en": 3}
    assert facts["pairs"] == {"ko-en": {"compared": 2, "images": 2, "of": 2, "left_out": {"ko": 1, "en": 1}}}
    said = "\n".join(notes({"": facts}))
    assert "3 captions in ko, 3 captions in en" in said
    assert "ko-en compares 2 pairs of captions, in 2 of 2 images" in said
    assert "left out: 1 in ko, 1 in en" in said
