"""What an evaluation leaves out is said where the numbers are, too much of it is refused, and nothing is ignored."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_encoder import CLASSES, ENGLISH, ColourEncoder, write_colours
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koclip.config import ConfigError, EvalConfig, EvalSetConfig, SourceConfig
from koclip.evaluation.embed import Embedder
from koclip.evaluation.report.write import Evaluated, write
from koclip.evaluation.run import evaluate, surroundings
from koclip.evaluation.sets import EvalSet, open_set


@pytest.fixture
def photos(tmp_path: Path, encoded) -> Any:
    """Return a function that writes photos, `unusable` of which cannot be used, and returns their source."""

    def write(count: int, unusable: int, name: str = "photos", column: str = "image") -> SourceConfig:
        colours = [(number, 90, len(name)) for number in range(count)]
        broken = [b"", b"junk", encoded(colours[0])[:30], None]
        keys = list(ENGLISH.values())
        rows = [
            {"image": encoded(colour), "ko": f"사진 {number}번", "key": keys[number % 4]}
            for number, colour in enumerate(colours)
        ]
        for number, row in enumerate(rows[:unusable]):
            row[column] = broken[number % 4] if column == "image" else ""
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        return SourceConfig(path=str(tmp_path / f"{name}.parquet"), captions={"ko": "ko"}, label="key")

    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    return write


def shown(run: Path, eval_set: EvalSet) -> dict[str, Any]:
    """Evaluate and present a set as recipes/evaluate.py does, and return what results.json says of it."""
    embedder = Embedder(ColourEncoder(), 8)
    run.mkdir(exist_ok=True)
    write(run, [Evaluated("some/model", run, embedder, evaluate(embedder, [eval_set]))], [eval_set], surroundings(), [])
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["data"][eval_set.name]


@pytest.mark.parametrize("column", ["image", "ko"])
@pytest.mark.parametrize(("count", "unusable"), [(60, 40), (60, 7), (10, 2)])
def test_too_many_unusable_rows_are_refused(photos, column, count, unusable) -> None:
    source = photos(count, unusable, column=column)
    with pytest.raises(
        ConfigError, match=rf"max_skipped_fraction: {unusable} of {count} rows .*photos~\w+/0: .*photos~\w+/1: "
    ):
        open_set(EvalSetConfig(source=source))
    assert len(open_set(EvalSetConfig(source=source, max_skipped_fraction=0.9)).images) == count - unusable


@pytest.mark.parametrize("part", ["train", "shifted", "gallery"])
def test_every_part_of_a_set_has_that_limit(tmp_path, photos, part) -> None:
    good, bad = photos(40, 0), photos(44, 12, "bad", "image" if part != "gallery" else "ko")
    classes = {} if part == "gallery" else {"classes": str(tmp_path / "classes.yaml")}
    asked = {
        "train": {"train": bad, "tasks": ["linear_probe"]},
        "shifted": {"shifted": {"x": bad}, "tasks": ["shift"]},
        "gallery": {"gallery": [bad]},
    }[part]
    with pytest.raises(ConfigError, match=rf"max_skipped_fraction: 12 of 44 rows of .*\({part}"):
        open_set(EvalSetConfig(source=good, **classes, **asked))
    eval_set = open_set(EvalSetConfig(source=good, **classes, **asked, max_skipped_fraction=0.3))
    assert len(eval_set.all_skipped()) == 12
    facts = shown(tmp_path / "run", eval_set)["parts"]
    ((name, counts),) = facts.items()
    assert name.startswith(part)
    assert (counts["rows"], counts["skipped"]) == (44, 12)


def test_what_is_left_out_is_said_everywhere(tmp_path, photos, capsys) -> None:
    facts = shown(tmp_path / "run", open_set(EvalSetConfig(source=photos(60, 6))))
    assert (facts["rows"], facts["images"], facts["skipped"]) == (60, 54, 6)
    said = "54 of 60 rows, 6 left out"
    assert f"photos: {said}" in capsys.readouterr().out
    for name in ("table.md", "report.html"):
        assert said in (tmp_path / "run" / name).read_text(encoding="utf-8")


def test_nothing_left_out_is_said_too(tmp_path, photos, capsys) -> None:
    assert shown(tmp_path / "run", open_set(EvalSetConfig(source=photos(12, 0))))["skipped"] == 0
    assert "photos: 12 of 12 rows, 0 left out" in capsys.readouterr().out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), min_size=3, max_size=40))
def test_every_row_is_used_or_listed(tmp_path, encoded, usable) -> None:
    rows = [
        {"image": encoded((number, 0, 0)) if good else b"", "ko": f"사진 {number}"}
        for number, good in enumerate(usable)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = SourceConfig(path=str(tmp_path / "rows.parquet"), captions={"ko": "ko"})
    refused = usable.count(False) > 0.5 * len(usable) or usable.count(True) < 2
    try:
        eval_set = open_set(EvalSetConfig(source=source, max_skipped_fraction=0.5))
    except ConfigError:
        assert refused
        return
    assert not refused
    assert eval_set.num_rows == len(rows) == len(eval_set.images) + len(eval_set.skipped)
    assert [skip.key for skip in eval_set.skipped] == [f"{source.key}/{n}" for n, good in enumerate(usable) if not good]


def test_max_images_does_not_cut_what_probes_are_fitted_on(tmp_path, encoded) -> None:
    """A file sorted by class has its last class at its end."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    file = write_colours(tmp_path / "colours.parquet", encoded)
    rows = sorted(pq.read_table(file).to_pylist(), key=lambda row: row["number"])
    for row in rows:
        row["image"] += b" "  # another file of the same picture
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sorted.parquet")
    test, train = (
        SourceConfig(path=str(path), label="key", captions={}) for path in (file, tmp_path / "sorted.parquet")
    )
    classes = str(tmp_path / "classes.yaml")
    eval_set = open_set(EvalSetConfig(source=test, classes=classes, tasks=["linear_probe"], train=train, max_images=12))
    assert len(eval_set.images) == 12
    assert sorted(eval_set.train.labels) == [number for number in range(4) for _ in range(6)]
    facts = shown(tmp_path / "run", eval_set)
    assert facts["cut"]
    assert "cut" not in facts["parts"]["train"]


def test_a_sorted_file_that_max_images_cuts_is_warned_of(tmp_path, encoded) -> None:
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    rows = pq.read_table(write_colours(tmp_path / "colours.parquet", encoded)).to_pylist()
    pq.write_table(pa.Table.from_pylist(sorted(rows, key=lambda row: row["number"])), tmp_path / "colours.parquet")
    source = SourceConfig(path=str(tmp_path / "colours.parquet"), label="key", captions={})
    for present_classes in (False, True):
        eval_set = open_set(
            EvalSetConfig(
                source=source,
                classes=str(tmp_path / "classes.yaml"),
                tasks=["zero_shot"],
                max_images=12,
                present_classes=present_classes,
            )
        )
        assert re.search(r"2 of 4 classes have no image.*blue, yellow; max_images", eval_set.warnings[0])
    assert shown(tmp_path / "run", eval_set)["absent_classes"] == 2
    assert "2 of 4 classes have no image and are left out" in (tmp_path / "run" / "table.md").read_text(
        encoding="utf-8"
    )


def test_training_images_that_lack_a_tested_class_are_refused(tmp_path, encoded, colours) -> None:
    file = write_colours(
        tmp_path / "two.parquet", lambda colour: encoded(colour, size=(9, 9)), colours=("빨강", "노랑")
    )
    train = SourceConfig(path=str(file), label="key", captions={})
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.train.*green, blue"):
        colours(tasks=["linear_probe"], train=train)


def test_rows_of_classes_that_are_left_out_are_listed(tmp_path, encoded, colours) -> None:
    file = write_colours(tmp_path / "two.parquet", encoded, colours=("노랑", "빨강"))
    other = SourceConfig(path=str(tmp_path / "colours.parquet"), label="key", captions={})
    eval_set = colours(path=file, present_classes=True, shifted={"x": other}, tasks=["shift"])
    assert len(eval_set.shifted["x"].images) + len(eval_set.shifted["x"].skipped) == 24
    assert {skip.reason for skip in eval_set.shifted["x"].skipped} == {
        f"the source has no image of its class, {name} (present_classes)" for name in ("green", "blue")
    }


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"templates": {"ja": ["{}の写真"]}}, r"eval\.sets\[\]\.templates: got \['ja'\]"),
        ({"templates": {"ko": "ko"}, "template_kind": "sketch"}, r"eval\.sets\[\]\.template_kind: got 'sketch'"),
        ({"templates": {"ko": "mine.yaml"}}, r"mine\.yaml"),
        ({"templates": {"ko": ["사진"]}}, r"eval\.sets\[\]\.templates\.ko, template 0: .*no slot"),
        ({"templates": {"ko": ["{label:을/를} {}", "{label:가/나}"]}}, r"eval\.sets\[\]\.templates\.ko, template 1"),
        ({"templates": {"ko": []}}, r"eval\.sets\[\]\.templates\.ko: got \[\]"),
        ({"tasks": ["shift"], "corruptions": ["snow"]}, r"eval\.sets\[\]\.corruptions: got \['snow'\]"),
    ],
)
def test_what_is_named_by_text_is_checked_before_images_are_read(colours, monkeypatch, changes, error) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr("koclip.evaluation.sets.decode", refuse)
    with pytest.raises(ConfigError, match=error):
        colours(**changes)


LABELLED = {"source": SourceConfig(path="a.parquet", label="key", captions={}), "classes": "cifar10"}
OTHER = SourceConfig(path="b.parquet", label="key", captions={})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({**LABELLED, "tasks": ["linear_probe"], "templates": {"ko": ["{}"]}}, "templates"),
        ({**LABELLED, "tasks": ["linear_probe"], "shifted": {"x": OTHER}}, "shifted"),
        ({**LABELLED, "tasks": ["zero_shot"], "corruptions": ["noise"]}, "corruptions"),
        ({**LABELLED, "tasks": ["zero_shot"], "train": OTHER}, "train"),
        ({**LABELLED, "tasks": ["zero_shot"], "gallery": [SourceConfig()]}, "gallery"),
        ({**LABELLED, "tasks": ["zero_shot"], "template_kind": "drawing"}, "template_kind"),
        ({"present_classes": True}, "present_classes"),
        ({"labels": "number"}, "labels"),
        ({**LABELLED, "tasks": ["shift"], "shifted": {"noise": OTHER}, "corruptions": ["noise"]}, "shifted"),
        ({**LABELLED, "tasks": ["shift"], "shifted": {"none": OTHER}}, "shifted"),
        ({**LABELLED, "tasks": ["shift"], "shifted": {"a/b": OTHER}}, "shifted"),
        ({**LABELLED, "tasks": ["shift"], "shifted": {"x": SourceConfig(path="b.parquet")}}, r"shifted\.x\.label"),
        ({"tasks": ["shift"], "shifted": {"x": SourceConfig(captions={"en": "en"})}}, r"shifted\.x\.captions"),
        ({"max_skipped_fraction": 1.0}, "max_skipped_fraction"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(settings, key) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.sets\[\]\.{key}: got"):
        EvalSetConfig(**settings)


def test_two_sets_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.source\.name"):
        EvalConfig(sets=[EvalSetConfig(), EvalSetConfig()])


def test_sets_too_small_for_their_probes_are_refused_before_anything_is_embedded(tmp_path, encoded) -> None:
    from koclip.evaluation.run import open_all

    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    source = SourceConfig(path=str(write_colours(tmp_path / "rows.parquet", encoded)), label="key", captions={})
    for tasks, error in ((["linear_probe"], "too few"), (["few_shot"], r"eval\.sets\[\]\.shots")):
        with pytest.raises(ConfigError, match=error):
            open_all(
                EvalConfig(sets=[EvalSetConfig(source=source, classes=str(tmp_path / "classes.yaml"), tasks=tasks)])
            )


def test_one_image_with_a_caption_in_a_language_is_refused(tmp_path, encoded) -> None:
    rows = [{"image": encoded((n, 0, 0)), "ko": f"사진 {n}", "en": "a photo" if n == 2 else ""} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = SourceConfig(path=str(tmp_path / "rows.parquet"), captions={"ko": "ko", "en": "en"})
    with pytest.raises(ConfigError, match=r"captions\.en: got '1 image"):
        open_set(EvalSetConfig(source=source))
