"""From folders of a few images to a classifier directory: what is chosen, written, read again and refused."""

import json
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fake_encoder import COLOURS, ColourEncoder
from PIL import Image

import koclip
from koclip.classifiers import directory as directories
from koclip.classifiers.heads import Shots, tip_adapter
from koclip.config import AdaptConfig, ConfigError, SourceConfig
from koclip.data.sources import SourceError
from koclip.evaluation.adapt import Adapted, adapt, open_pictures
from koclip.evaluation.embed import Embedder
from koclip.evaluation.report import classifier

COUNT = 6


def write_folders(root: Path, count: int = COUNT, seed: int = 0, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Write a folder of images for each colour; the images are so noisy that zero-shot makes mistakes."""
    drawn = random.Random(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            colour = tuple(min(255, max(0, value + drawn.randint(-150, 150))) for value in COLOURS[name])
            Image.new("RGB", (8, 8), colour).save(root / name / f"{number}.png")
    return root


def folder(path: Path) -> SourceConfig:
    return SourceConfig(path=str(path), format="image_folder", split="all", label="label", captions={})


def config(tmp_path: Path, **changes: object) -> AdaptConfig:
    values = {"model": "colours", "images": str(tmp_path / "shots"), "methods": ["linear"], "cache_dir": None}
    return AdaptConfig(**{**values, "output_dir": str(tmp_path / "out"), **changes})  # type: ignore[arg-type]


def run(cfg: AdaptConfig) -> tuple[Adapted, Path]:
    encoder = ColourEncoder()
    result = adapt(cfg, Embedder(encoder, 64), open_pictures(cfg))
    return result, classifier.write(cfg, result, encoder)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapted, Path, Path]:
    root = tmp_path_factory.mktemp("adapt")
    write_folders(root / "shots", 8)
    test = write_folders(root / "test", 8, seed=1)
    write_folders(root / "calibration", 8, seed=2)
    wrong = [f"- {{key: {key}, ko: {name}}}\n" for key, name in zip(COLOURS, [*list(COLOURS)[1:], "빨강"], strict=True)]
    (root / "classes.yaml").write_text("".join(wrong), encoding="utf-8")  # so that zero-shot cannot win
    parts = {"test": folder(test), "calibration": folder(root / "calibration")}
    cfg = config(root, classes=str(root / "classes.yaml"), **parts)
    return *run(cfg), test


def test_a_folder_per_class_becomes_a_classifier(adapted):
    result, directory, test = adapted
    assert result.chosen.fitted.method == "linear"
    assert result.chosen.gain.value > 0
    opened = koclip.load_classifier(directory, ColourEncoder())
    assert opened.labels == list(COLOURS)
    files = sorted(test.rglob("*.png"))
    predictions = opened.predict(files)
    answers = [max(each.probabilities, key=each.probabilities.__getitem__) for each in predictions]
    right = sum(answer == file.parent.name for answer, file in zip(answers, files, strict=True))
    left_out = result.left_out.get("test", 0)
    assert abs(right / len(files) - result.chosen.accuracy.value) <= left_out / len(files) + 1e-9
    assert all(abs(sum(each.probabilities.values()) - 1) < 1e-9 for each in predictions)


def test_stock_code_of_the_card_gives_the_same_probabilities(adapted, monkeypatch):
    _, directory, test = adapted
    files = sorted(test.rglob("*.png"))
    blocks = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if "safetensors" in block)
    assert code.count("\n") == 3
    monkeypatch.chdir(directory)
    names = {"safetensors": safetensors, "image": ColourEncoder().encode_images(files)}
    exec(code, names)
    opened = koclip.load_classifier(directory, ColourEncoder())
    expected = torch.tensor([list(each.probabilities.values()) for each in opened.predict(files)])
    torch.testing.assert_close(names["probabilities"], expected, check_dtype=False)


def test_the_threshold_of_the_directory_refuses(adapted):
    result, directory, test = adapted
    files = sorted(test.rglob("*.png"))
    facts = json.loads((directory / "classifier.json").read_text(encoding="utf-8"))
    assert facts["none"]["alpha"] == 0.1
    assert facts["none"]["calibrated_on"] == "calibration"
    assert facts["none"]["thresholds"] == result.thresholds
    opened = koclip.load_classifier(directory, ColourEncoder())
    strict = {**facts, "none": {**facts["none"], "thresholds": [1.1] * 4}}
    refused = directories.Classifier(opened.head, strict, opened.encoder).predict(files[:1])[0]
    assert (refused.label, refused.names["ko"]) == (None, "해당 없음")
    lenient = {**facts, "none": None}
    kept = directories.Classifier(opened.head, lenient, opened.encoder).predict(files[:1])[0]
    assert kept.label == max(kept.probabilities, key=kept.probabilities.__getitem__)


def test_the_same_command_gives_the_same_classifier(tmp_path):
    write_folders(tmp_path / "shots", 3)
    weights = []
    for _ in range(2):
        _, directory = run(config(tmp_path, shots=2, methods=["linear", "tip_adapter"]))
        weights.append((directory / "classifier.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_cache_is_saved_and_opened(tmp_path):
    texts = torch.eye(4, 8)
    head = tip_adapter(texts, Shots(torch.rand(5, 8), torch.tensor([0, 1, 2, 3, 0])), 2.0, 3.0)
    facts = {"classes": [{"key": key, "names": {"en": key}} for key in "abcd"], "width": 8, "temperature": 1.0}
    encoder = ColourEncoder()
    facts |= {"none": None, "encoder": {"name": "colours", "fingerprint": encoder.image_fingerprint()}}
    directories.save_classifier(tmp_path, head, facts)
    opened, images = koclip.load_classifier(tmp_path, encoder), torch.rand(3, 8)
    assert torch.equal(opened.head.logits(images), head.logits(images))


def test_images_of_the_shots_are_not_tested(tmp_path):
    shots = write_folders(tmp_path / "shots")
    (write_folders(tmp_path / "test", 2, seed=5) / "빨강" / "copy.png").write_bytes(
        next(shots.glob("빨강/*")).read_bytes()
    )
    result, directory = run(config(tmp_path, test=folder(tmp_path / "test")))
    assert result.left_out["test"] == 1
    assert "test: 1 images left out" in (directory / "README.md").read_text(encoding="utf-8")


def test_too_small_a_calibration_set_says_what_it_could_promise(tmp_path):
    write_folders(tmp_path / "shots", 2)
    result, directory = run(config(tmp_path, alpha=0.05))
    assert result.thresholds is None
    assert "0.1112" in result.reason  # 1 / (8 + 1)
    assert json.loads((directory / "classifier.json").read_text(encoding="utf-8"))["none"] is None
    assert "No threshold" in (directory / "README.md").read_text(encoding="utf-8")


def test_one_image_per_class_is_zero_shot_by_the_rule(tmp_path):
    write_folders(tmp_path / "shots", 1)
    result, _ = run(config(tmp_path))
    assert result.chosen.fitted.method == "zero_shot"
    assert [each.fitted.chosen_by for each in result.candidates] == ["cross-validation", "rule"]


def test_names_of_several_languages_come_from_the_class_list(tmp_path):
    write_folders(tmp_path / "shots", 2)
    lines = [f"- {{key: {key}, ko: {key}, en: {name}}}\n" for key, name in zip(COLOURS, "abcd", strict=True)]
    (tmp_path / "classes.yaml").write_text("".join(lines), encoding="utf-8")
    result, directory = run(config(tmp_path, classes=str(tmp_path / "classes.yaml")))
    assert [(each.language, each.fitted.method) for each in result.candidates] == [
        ("ko", "zero_shot"),
        ("ko", "linear"),
        ("en", "zero_shot"),
        ("en", "linear"),
    ]
    facts = json.loads((directory / "classifier.json").read_text(encoding="utf-8"))
    assert facts["classes"][0]["names"] == {"ko": "빨강", "en": "a"}


def empty_class(tmp_path: Path) -> None:
    (write_folders(tmp_path / "shots") / "검정").mkdir()
    open_pictures(config(tmp_path))


def absent_class(tmp_path: Path) -> None:
    write_folders(tmp_path / "shots")
    lines = [f"- {{key: {key}, ko: {key}}}\n" for key in [*COLOURS, "검정"]]
    (tmp_path / "classes.yaml").write_text("".join(lines), encoding="utf-8")
    open_pictures(config(tmp_path, classes=str(tmp_path / "classes.yaml")))


def repeated_label(tmp_path: Path) -> None:
    write_folders(tmp_path / "shots")
    lines = [f"- {{key: {key}, ko: 색}}\n" for key in COLOURS]
    (tmp_path / "classes.yaml").write_text("".join(lines), encoding="utf-8")
    open_pictures(config(tmp_path, classes=str(tmp_path / "classes.yaml")))


def one_image(tmp_path: Path) -> None:
    write_folders(tmp_path / "shots", 1, names=("빨강",))
    open_pictures(config(tmp_path))


def two_labels(tmp_path: Path) -> None:
    shots = write_folders(tmp_path / "shots")
    (shots / "초록" / "copy.png").write_bytes(next(shots.glob("빨강/*")).read_bytes())
    run(config(tmp_path))


def uncalibrated_class(tmp_path: Path) -> None:
    write_folders(tmp_path / "shots")
    write_folders(tmp_path / "calibration", 12, seed=3, names=("빨강", "초록", "파랑"))
    run(config(tmp_path, none="class", calibration=folder(tmp_path / "calibration")))


def other_encoder(tmp_path: Path) -> None:
    write_folders(tmp_path / "shots", 2)
    _, directory = run(config(tmp_path))
    koclip.load_classifier(directory, ColourEncoder(english=False))


def no_classifier(tmp_path: Path) -> None:
    koclip.load_classifier(tmp_path)


def other_format(tmp_path: Path) -> None:
    (tmp_path / "classifier.json").write_text('{"format": 99}', encoding="utf-8")
    koclip.load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (empty_class, ["folders without an image", "검정"]),
        (absent_class, ["classes without an image", "검정"]),
        (repeated_label, ["classes.yaml", "색", "make them different"]),
        (one_image, ["folders with files", "빨강", "two or more"]),
        (two_labels, ["label of", "equal image"]),
        (uncalibrated_class, ["classes without a calibration image", "노랑"]),
        (other_encoder, ["encoder", "colours"]),
        (no_classifier, ["classifier.json", "koclip adapt"]),
        (other_format, ["format", "99"]),
    ],
)
def test_mistakes_are_named(mistake, words, tmp_path):
    with pytest.raises((ConfigError, SourceError)) as error:
        mistake(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_settings_are_checked(tmp_path):
    for changes in ({"methods": ["svm"]}, {"alpha": 1.0}, {"images": ""}, {"model": ""}, {"languages": ["kr"]}):
        with pytest.raises(ConfigError):
            config(tmp_path, **changes)
