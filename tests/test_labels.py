"""Labels name classes by key or by number: the same way in a whole evaluation set, or the set is refused."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from koclip.config import ConfigError, EvalSetConfig, SourceConfig
from koclip.evaluation.sets import EvalSet, open_set

NFD = "\u1100\u1161"  # 가, decomposed
WORDS = ["cat", "dog", "bird"]


def write(folder: Path, labels: Sequence[Any], keys: Sequence[str], name: str = "rows", **images: Any) -> SourceConfig:
    """Write pictures with these labels, and the list of classes with these keys; each picture is another."""
    classes = [{"key": key, "en": f"name {number}"} for number, key in enumerate(keys)]
    (folder / "classes.yaml").write_text(yaml.safe_dump(classes, allow_unicode=True), encoding="utf-8")
    rows = [{"image": picture(number, name), "label": label} for number, label in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return SourceConfig(path=str(folder / f"{name}.parquet"), label="label", captions={})


def picture(number: int, name: str) -> bytes:
    """Return the smallest picture, another one for each number and name: PPM, header and one pixel."""
    return b"P6 1 1 255\n" + bytes([number % 256, number // 256, sum(name.encode()) % 256])


def opened(source: SourceConfig, **changes: Any) -> EvalSet:
    classes = str(Path(source.path).parent / "classes.yaml")
    return open_set(EvalSetConfig(source=source, classes=classes, **{"tasks": ["zero_shot"], **changes}))


def keys_of(eval_set: EvalSet) -> list[str]:
    return [eval_set.classes[label].key for label in eval_set.labels]


@pytest.mark.parametrize(
    ("labels", "keys", "expected"),
    [
        (["cat", "dog", "bird"], WORDS, WORDS),
        ([2, 0, 1], WORDS, ["bird", "cat", "dog"]),  # places in the list
        (
            [2.0, None, 0.0, 1.0] * 4 + [0.0] * 28,
            WORDS,
            ["bird", "cat", "dog"] * 4 + ["cat"] * 28,
        ),  # as pandas has them
        ([7, 9, 8], ["7", "8", "9"], ["7", "9", "8"]),  # keys that are numbers
        (["001", "003", "002"], ["001", "002", "003"], ["001", "003", "002"]),
        ([1, 2, 3, 1], ["3", "2", "1"], ["1", "2", "3", "1"]),  # by key, though all might be places
        ([NFD, "나", " 가 "], ["가", "나"], ["가", "나", "가"]),
        ([True, False], ["True", "False"], ["True", "False"]),
    ],
)
def test_labels_that_fit_one_way_are_read_that_way(tmp_path, labels, keys, expected) -> None:
    assert keys_of(opened(write(tmp_path, labels, keys))) == expected


@pytest.mark.parametrize(
    ("labels", "keys", "error"),
    [
        (
            [0, 1, 2, 3, 4, 5],
            ["1", "2", "3", "4", "5", "6"],
            "no class '0'",
        ),  # by key and by place: classes would merge
        ([0, 0, 0], ["1", "2", "3"], "the keys are different numbers"),
        ([0, 1, 2], ["01", "02", "03"], "the keys are different numbers"),
        ([1, 2, 3], WORDS, "the list has 3 classes, so 3 of source is too large"),  # counted from 1
        ([1, 2, 1], WORDS, "0 of the list's 3 has no image"),  # counted from 1, and the last class is missing
        ([0, 1, 1], WORDS, "2 of the list's 3 has no image"),  # perhaps a number in another, longer list
        (["001", "002", "000"], WORDS, "no class '001'"),  # ids, no places
        (["cat", "1", "dog"], WORDS, "no class '1'"),
        (["0", "cat", "dog"], ["0", "cat"], "no class 'dog'"),
        (["Cat", "dog", "bird"], WORDS, "no class 'Cat'"),
        ([0, -1, 2], WORDS, "no class '-1'"),
        ([0.5, 1.0, 2.0], WORDS, "no class '0.5'"),
        (["1.0", "2.0", "0.0"], WORDS, "no class '1.0'"),  # text is not arithmetic
        (["n9", "n1"], ["n1", "n2"], "no class 'n9'"),
    ],
)
def test_labels_that_fit_no_way_or_two_are_refused(tmp_path, labels, keys, error) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.sets\[\]\.(classes|labels): .*{re.escape(error)}"):
        opened(write(tmp_path, labels, keys))


def test_numbers_that_are_said_to_be_places_are(tmp_path) -> None:
    """As in a part of a data set that has no image of some classes."""
    eval_set = opened(write(tmp_path, [1, 2, 1], WORDS), labels="number")
    assert keys_of(eval_set) == ["dog", "bird", "dog"]
    assert eval_set.labels_by == "number: 0 = cat, 1 = dog, 2 = bird"
    with pytest.raises(ConfigError, match="no class '3'"):
        opened(write(tmp_path, [3, 0], WORDS), labels="number")
    with pytest.raises(ConfigError, match="no class '0'"):
        opened(write(tmp_path, [0, 1, 2], WORDS), labels="key")


def test_numbers_of_a_longer_list_are_refused_also_where_they_are_small(tmp_path) -> None:
    """The trap of Tiny-ImageNet with 160 of its 200 classes: numbers have gaps, keys are WordNet ids."""
    keys = [f"n{number:08}" for number in range(160)]
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.labels: .*is too large"):
        opened(write(tmp_path, [0, 199, 5], keys))
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.labels: .*has no image"):
        opened(write(tmp_path, [0, 1, 5], keys))


@pytest.mark.parametrize("part", ["train", "shifted"])
def test_all_parts_of_a_set_are_read_the_same_way(tmp_path, part) -> None:
    other = write(tmp_path, [0, 1, 2] * 3, WORDS, "other")
    named = write(tmp_path, WORDS * 3, WORDS)
    asked = {"train": other, "tasks": ["linear_probe"]} if part == "train" else {"shifted": {"x": other}}
    with pytest.raises(ConfigError, match=r"'0' .*other~\w+/0 \((train|shifted\.x)\)"):
        opened(named, **asked)
    numbered = write(tmp_path, [0, 1, 2] * 3, WORDS)
    eval_set = opened(numbered, **asked)
    assert (eval_set.train or eval_set.shifted["x"]).labels == [0, 1, 2] * 3


def test_numbers_of_a_shifted_set_that_lacks_classes_are_refused(tmp_path) -> None:
    """Data sets of shifted pictures often have a part of the classes, and numbers of their own."""
    other = write(tmp_path, [0, 1, 1], WORDS, "other")
    with pytest.raises(ConfigError, match=r"2 .*3 .*shifted\.x"):
        opened(write(tmp_path, [0, 1, 2], WORDS), shifted={"x": other})


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_numbers_are_the_tables_own(tmp_path, streaming) -> None:
    """Nested ones, too; -1 is how the Hub writes that there is no label."""
    numbered = datasets.ClassLabel(names=["dog", "bird", "cat"])
    for features, label in (({"label": numbered}, "label"), ({"info": {"label": numbered}}, "info.label")):
        source = write(tmp_path, [], WORDS)
        values = [0, 1, 2, -1] * 3 + [0] * 30
        cells = values if label == "label" else [{"label": value} for value in values]
        images = [Image.new("RGB", (2, 2), (number, 0, 0)) for number in range(len(values))]
        features = datasets.Features({"image": datasets.Image(), **features})
        table = datasets.Dataset.from_dict({"image": images, next(iter(features.keys() - {"image"})): cells}, features)
        table.to_parquet(source.path)
        eval_set = opened(SourceConfig(path=source.path, label=label, captions={}, streaming=streaming))
        assert keys_of(eval_set) == ["dog", "bird", "cat"] * 3 + ["dog"] * 30
        assert [skip.reason for skip in eval_set.skipped] == ["no class"] * 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(st.sampled_from(["a", "b", "0", "1", "2", "01", "c"]), min_size=2, max_size=5, unique=True),
    data=st.data(),
)
def test_whatever_is_read_is_by_key_or_by_place(tmp_path, keys, data) -> None:
    """For any keys and labels: all are keys, all are places, or the set is refused."""
    labels = data.draw(st.lists(st.sampled_from([*keys, "0", "1", "2", "3", "x"]), min_size=12, max_size=24))
    try:
        eval_set = opened(write(tmp_path, labels, keys))
    except ConfigError:
        return
    if set(labels) <= set(keys):
        assert keys_of(eval_set) == labels
    else:
        assert keys_of(eval_set) == [keys[int(label)] for label in labels]
        assert set(labels) == {str(place) for place in range(len(keys))}
        assert not [key for key in keys if key.isdecimal()]
