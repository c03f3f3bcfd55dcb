"""Whole evaluations by recipes/evaluate.py: what they leave behind, by one process and two, of one model and two."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fake_encoder import CLASSES, write_colours
from helpers.warm_python import run_in_processes
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer

import koclip
from koclip import config
from koclip.evaluation.run import processes
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "evaluate.py"


def run(folder: Path, *args: str) -> None:
    """Run the recipe's main() in this process."""
    spec = importlib.util.spec_from_file_location("evaluate_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.main(config.parse(config.EvaluateConfig, ["--config", str(folder / "suite.yaml"), *args]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two tiny models and a suite of every task."""
    import io

    from PIL import Image

    def encoded(colour: object) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
        return buffer.getvalue()

    folder = tmp_path_factory.mktemp("evaluation")
    for seed in (0, 1):
        dual_encoder = tiny_dual_encoder(seed=seed)
        _, processor = from_scratch(tiny_config(), tiny_tokenizer())
        save_stock_model(folder / f"run{seed}" / "model", dual_encoder.model, processor, dual_encoder.state_dict())
    (folder / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    colours = str(write_colours(folder / "colours.parquet", encoded, 48))
    labelled = {"path": colours, "label": "key", "captions": {}}
    (folder / "ratings.tsv").write_text("red.png\t빨강\t4\t3\nred.png\t파랑\t1\t2\n", encoding="utf-8")
    (folder / "red.png").write_bytes(encoded((250, 5, 5)))
    suite = {
        "batch_size": 7,
        "device": "cpu",
        "sets": [
            {
                "source": {"path": colours, "name": "photos", "captions": {"ko": "ko", "en": "en"}},
                "tasks": ["retrieval", "languages", "stress"],
            },
            {
                "source": {**labelled, "name": "colours"},
                "classes": str(folder / "classes.yaml"),
                "templates": {"ko": "ko", "en": "en"},
                "tasks": ["zero_shot", "shift", "linear_probe", "few_shot"],
                "corruptions": ["noise"],
                "shifted": {"same": {**labelled}},
                "shots": [1, 2],
            },
        ],
        "ratings": [{"path": str(folder / "ratings.tsv"), "language": "ko"}],
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Return the run directory of one model and one process."""
    run(folder, "--model", str(folder / "run0" / "model"), *places(folder, "alone"))
    return folder / "alone"


def places(folder: Path, name: str) -> list[str]:
    return ["--output_dir", str(folder / name), "--cache_dir", str(folder / f"kept-{name}")]


def test_every_task_leaves_numbers_with_intervals(alone: Path) -> None:
    results = json.loads((alone / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"model", "fingerprint", "data", "metrics", "environment"}
    assert results["fingerprint"] == koclip.load(results["model"], "cpu").fingerprint()
    tasks = {tuple(name.split("/")[:3]) for name in results["metrics"]}
    wanted = {
        ("photos", "ko", "text_to_image"),
        ("photos", "en", "image_to_text_first_caption"),
        ("photos", "ko-en", "languages"),
        ("photos", "ko", "stress_typo"),
        ("colours", "ko", "zero_shot"),
        ("colours", "ko", "zero_shot_naive"),
        ("colours", "en", "zero_shot_described"),
        ("colours", "en", "shift_noise"),
        ("colours", "ko", "shift_same"),
        ("colours", "images", "linear_probe"),
        ("colours", "images", "few_shot"),
        ("ratings", "ko", "agreement"),
    }
    assert wanted <= tasks
    for name, metric in results["metrics"].items():
        assert set(metric) == {"value", "ci95", "n"}, name
        low, high = metric["ci95"]
        assert low <= metric["value"] + 1e-12 <= high + 1e-9, name
        assert metric["n"] > 0, name


def test_a_run_directory_is_complete(alone: Path) -> None:
    assert config.parse(config.EvaluateConfig, ["--config", str(alone / "config.yaml")]).batch_size == 7
    for name in ("results.json", "table.md", "report.html"):
        assert (alone / name).stat().st_size > 0
    assert len(list((alone / "pictures").glob("*.png"))) >= 6


def test_two_processes_give_the_same_results_to_the_last_digit(folder: Path, alone: Path) -> None:
    args = ["--config", str(folder / "suite.yaml"), "--model", str(folder / "run0" / "model")]
    run_in_processes([str(RECIPE), *args, *places(folder, "two")], 2)
    alone_text, two_text = ((folder / name / "results.json").read_text(encoding="utf-8") for name in ("alone", "two"))
    by_one_process, by_two_processes = json.loads(alone_text), json.loads(two_text)
    for results in (by_one_process, by_two_processes):
        del results["environment"]["command"]
        results["environment"].pop("cpu_threads")
    assert by_one_process == by_two_processes
    assert json.dumps(by_one_process["metrics"]) == json.dumps(by_two_processes["metrics"])  # the order, too


def test_several_models_stand_side_by_side(folder: Path, alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(folder / f"run{seed}" / "model") for seed in (0, 1)]
    run(folder, "--models", *models, *places(folder, "both"))
    for name in ("run0", "run1"):
        assert (folder / "both" / name / "results.json").is_file()
    table = (folder / "both" / "table.md").read_text(encoding="utf-8")
    assert "run0" in table
    assert "run1" in table
    measured_alone, beside_another = (
        json.loads((folder / path / "results.json").read_text(encoding="utf-8"))["metrics"]
        for path in ("alone", "both/run0")
    )
    assert measured_alone == beside_another  # another model beside it changes nothing


def test_kept_embeddings_make_the_second_evaluation_the_same(
    folder: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("it is kept")

    class Checked:
        """Opens the model, which is tried at once, and then refuses to embed."""

        def load(self, spec: str, device: object) -> object:
            encoder = koclip.load(spec, device)
            encoder.encode_images = encoder.encode_texts = encoder.image_features = refuse  # type: ignore[method-assign]
            return encoder

    spec = importlib.util.spec_from_file_location("evaluate_again", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(recipe, "koclip", Checked())
    args = ["--config", str(folder / "suite.yaml"), "--model", str(folder / "run0" / "model")]
    args += ["--output_dir", str(folder / "again"), "--cache_dir", str(folder / "kept-alone")]
    recipe.main(config.parse(config.EvaluateConfig, args))
    again = json.loads((folder / "again" / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert again == json.loads((alone / "results.json").read_text(encoding="utf-8"))["metrics"]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ([], "model: got None, name a directory or Hub id: --model runs/<run>/model"),
        (["--models", "a", "a"], "models: got ['a', 'a']"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], word: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("evaluate_wrong", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    words = ["evaluate.py", "--config", str(folder / "suite.yaml"), "--output_dir", str(folder / "wrong"), *args]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        config.run(recipe.main, config.EvaluateConfig)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("koclip evaluate: error:")
    assert word in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: on one the processes do find each other")
def test_processes_that_do_not_find_each_other_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun on a CPU without ACCELERATE_USE_CPU: each would evaluate everything."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = config.parse(config.EvaluateConfig, ["--config", str(folder / "suite.yaml"), "--model", "any"])
    with pytest.raises(config.ConfigError, match=r"2 processes .*ACCELERATE_USE_CPU=true"):
        processes(dataclasses.replace(asked, device=None))
