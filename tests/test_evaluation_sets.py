"""Opening what is evaluated: classes found by name and number, what is left out is said, and mistakes are named."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_encoder import CLASSES, ColourEncoder, write_colours

from koclip.config import ConfigError, EvalSetConfig, SourceConfig
from koclip.evaluation.embed import Embedder
from koclip.evaluation.run import evaluate, warnings_of
from koclip.evaluation.sets import EvalSet, open_set


@pytest.mark.parametrize("label", ["key", "number"])
def test_classes_are_found_by_key_and_by_number(label: str, colours: Callable[..., EvalSet]) -> None:
    eval_set = colours(label)
    assert eval_set.labels == [0, 1, 2, 3] * 6
    assert eval_set.languages == ["ko", "en"]
    assert not eval_set.warnings


def test_a_folder_of_folders_has_its_classes_by_folder_name(
    tmp_path: Path, encoded: Callable[..., bytes], colours: Callable[..., EvalSet]
) -> None:
    for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(encoded(colour))
    eval_set = colours("label", path=tmp_path / "photos", present_classes=True)
    assert [eval_set.classes[label].key for label in eval_set.labels] == ["blue", "red"]


def test_class_label_features_are_read_by_name(tmp_path: Path, colours: Callable[..., EvalSet]) -> None:
    """Their numbers follow the data set's own list, not ours."""
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["yellow", "red"])})
    rows = {"image": [Image.new("RGB", (4, 4), "yellow"), Image.new("RGB", (4, 4), "red")], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "named.parquet"))
    eval_set = colours("label", path=tmp_path / "named.parquet")
    assert [eval_set.classes[label].key for label in eval_set.labels] == ["yellow", "red"]
    assert "2 of 4 classes have no image" in eval_set.warnings[0]
    assert "green, blue" in eval_set.warnings[0]


def test_absent_classes_may_be_left_out(tmp_path: Path, encoded: Callable[..., bytes], colours) -> None:
    file = write_colours(tmp_path / "two.parquet", encoded, colours=("노랑", "빨강"))
    eval_set = colours(path=file, present_classes=True)
    assert [name.key for name in eval_set.classes] == ["red", "yellow"]
    assert eval_set.labels == [1, 0] * 12
    assert not eval_set.warnings


def test_training_images_of_classes_that_are_left_out_are_left_out_too(tmp_path: Path, encoded, colours) -> None:
    file = write_colours(tmp_path / "two.parquet", encoded, colours=("노랑", "빨강"))
    train = SourceConfig(path=str(tmp_path / "colours.parquet"), label="key", captions={})
    eval_set = colours(path=file, present_classes=True, train=train, tasks=["linear_probe"])
    assert eval_set.train is not None
    assert eval_set.train.labels == [0, 1] * 6
    assert len(eval_set.train.images) == 12


def test_a_class_that_the_list_lacks_is_named(tmp_path: Path, colours: Callable[..., EvalSet]) -> None:
    (tmp_path / "three.yaml").write_text("\n".join(CLASSES.strip().splitlines()[:3]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.classes: .*'yellow'.*colours~\w+/3.*red, green, blue"):
        colours(classes=str(tmp_path / "three.yaml"))


def test_one_class_is_refused(tmp_path: Path, encoded: Callable[..., bytes], colours) -> None:
    file = write_colours(tmp_path / "one.parquet", encoded, colours=("빨강",))
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.classes: .*'red'"):
        colours(path=file, present_classes=True)


def test_a_class_twice_is_refused(tmp_path: Path, colours: Callable[..., EvalSet]) -> None:
    (tmp_path / "twice.yaml").write_text(CLASSES + "- {key: crimson, ko: 빨강, en: crimson}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'빨강'.*the same as '빨강' .numbers 0 and 4"):
        colours(classes=str(tmp_path / "twice.yaml"))


def test_a_source_without_captions_is_refused(tmp_path: Path, colours: Callable[..., EvalSet]) -> None:
    colours()
    source = SourceConfig(path=str(tmp_path / "colours.parquet"), captions={"ko": "key"}, where={"key": ["pink"]})
    with pytest.raises(ConfigError, match="has no rows"):
        open_set(EvalSetConfig(source=source))


def test_an_empty_query_set_is_named(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    """One image, or one with a caption: nothing to rank; no Korean caption: nothing to rewrite."""
    rows = [{"image": encoded((200, 0, 0)), "ko": caption, "en": "red"} for caption in ("빨강", "")]
    rows[1]["en"] = ""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "one.parquet")
    source = SourceConfig(path=str(tmp_path / "one.parquet"), captions={"ko": "ko", "en": "en"})
    left_out = r"has 1 usable images in 2 rows, expected 2 or more. Left out: 1 one~\w+/1: no usable caption"
    with pytest.raises(ConfigError, match=left_out):
        open_set(EvalSetConfig(source=source))
    others = [{"image": encoded((200, shade, 0)), "ko": "", "en": "red"} for shade in range(3)]
    pq.write_table(pa.Table.from_pylist(others), tmp_path / "one.parquet")
    eval_set = open_set(EvalSetConfig(source=source, tasks=["stress"]))
    with pytest.raises(ConfigError, match=" ko"):
        evaluate(Embedder(ColourEncoder(), 8), [eval_set])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"tasks": ["linear_probe"]}, r"tasks: got \['linear_probe'\], .*source.label"),
        ({"classes": "cifar10", "tasks": ["zero_shot"]}, r"eval\.sets\[\]\.source\.label: got None"),
        ({"tasks": ["languages"], "source": SourceConfig(captions={"ko": "ko"})}, "languages: got .*2 language"),
        ({"tasks": ["stress"], "source": SourceConfig(captions={"en": "en"})}, "stress: got .*captions in ko"),
        ({"tasks": ["retrieval"], "source": SourceConfig(captions={}, label="key")}, "retrieval: got"),
        ({"tasks": ["shift"]}, r"eval\.sets\[\]\.shifted: got {}"),
        ({"shots": [0]}, r"eval\.sets\[\]\.shots: got \[0\]"),
        ({"templates": {"fr": ["{}"]}}, r"templates: got \['fr'\], .*\['ko', 'en'\]"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        EvalSetConfig(**settings)  # type: ignore[arg-type]


def test_a_tokenizer_that_cannot_read_hangul_is_named(colours: Callable[..., EvalSet]) -> None:
    class Blind(ColourEncoder):
        def unknown_share(self, texts) -> float:
            return sum(not text.isascii() for text in texts) / len(texts)

    (warning,) = warnings_of(Embedder(Blind(), 8), [colours()])
    assert "colours/ko: 100% of the tokens are unknown to the tokenizer of colours" in warning
