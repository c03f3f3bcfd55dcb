"""The table of methods and photos: from the files of runs, which are replaced here by written numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from koclip import config
from koclip.metrics import Metric

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for the script that it runs

import recipe_runs  # noqa: E402
import which_way  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_before")
PARSED: dict[str, Any] = {
    "pretrain.py": config.PretrainConfig,
    "align.py": config.AlignConfig,
    "evaluate.py": config.EvaluateConfig,
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Replace the runs: parse their commands, write the numbers that they would write, and cost 1 CPU minute each."""
    runs: list[tuple[str, Any]] = []

    def start(recipe: str, *words: str) -> recipe_runs.Cost:
        parsed = config.parse(PARSED[recipe], list(words))
        runs.append((recipe, parsed))
        run = Path(parsed.output_dir)
        (run / "checkpoints").mkdir(parents=True)
        if recipe == "evaluate.py":
            assert (Path(parsed.model).parent / recipe_runs.COST).exists()  # trained before
            assert list(parsed.sets[0].source.captions) == ["ko"]
            key = "flickr8k_ko/ko/text_to_image/recall@10"
            numbers = {key: Metric(0.01 * len(runs), (0.0, 0.5), 99).to_dict()}
            (run / "results.json").write_text(json.dumps({"metrics": numbers}), encoding="utf-8")
        return recipe_runs.Cost(2.0, 1.0, 0.25)

    monkeypatch.setattr(recipe_runs, "start", start)
    return runs


def run(folder: Path, *words: str) -> None:
    which_way.main([*words, "--clip", "tower", "--text_encoder", "texts", "--output_dir", str(folder)])


def row(shown: str, photos: str, method: str) -> list[str]:
    (line,) = [line for line in shown.splitlines() if f" {photos} " in line and f" {method} " in line]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_the_commands_in_the_first_lines_parse() -> None:
    script = "python recipes/benchmarks/which_way.py"
    commands = [line.split("  #")[0].split() for line in (which_way.__doc__ or "").splitlines() if script in line]
    assert len(commands) == 2
    assert which_way.parser().parse_args(commands[1][2:]).methods == []


def test_features_are_computed_once_and_their_costs_add_up(tmp_path: Path, started: list, capsys) -> None:
    run(tmp_path, "--methods", "projection", "top_layers", "--sizes", "300", "1000")
    names = [Path(parsed.output_dir).name for _, parsed in started]
    trained = ["projection-300", "results", "top_layers-300", "results"]
    assert names == ["run", "run", *trained, "run", "run", *(name.replace("300", "1000") for name in trained)]
    shown = capsys.readouterr().out
    assert row(shown, "300", "projection")[-4:] == ["1.0", "2.0", "3.0", "0.2"]
    assert row(shown, "1,000", "projection")[-4:] == ["1.0", "4.0", "5.0", "0.2"]
    assert row(shown, "1,000", "top_layers")[-4:] == ["2.0", "4.0", "6.0", "0.2"]  # with its source's
    assert row(shown, "300", "projection")[3] == "4.0 (0.0-50.0)"
    assert row(shown, "3,000", "projection")[3] == "not run"
    assert (tmp_path / "which_way.png").stat().st_size > 1_000
    assert not list(tmp_path.glob("*-*/checkpoints"))
    count = len(started)
    run(tmp_path, "--methods", "projection", "top_layers", "--sizes", "300", "1000")
    assert len(started) == count
    run(tmp_path, "--methods")
    assert len(started) == count


def test_every_method_follows_the_rules(tmp_path: Path, started: list, capsys) -> None:
    run(tmp_path, "--sizes", "3000", "--features", "stored")
    trained = {Path(parsed.output_dir).name: parsed for recipe, parsed in started if recipe != "evaluate.py"}
    assert list(trained) == [
        f"{name}-3000" for name in ("scratch", "projection", "top_layers", "lora", "frozen", "english", "two_stage")
    ]
    for name, parsed in trained.items():
        assert parsed.data.sources[0].image_range == [0.0, 0.5]
        assert parsed.data.sources[0].languages == {"en" if name == "english-3000" else "ko": 1.0}
        assert not parsed.eval.sets
        passes = {60: ("scratch", "projection", "english"), 6: ("top_layers", "lora", "frozen", "two_stage")}
        (own,) = [count for count, names in passes.items() if name.split("-")[0] in names]
        stages = 2 if name == "two_stage-3000" else 1
        assert parsed.train.num_steps == stages * round(own * 3_000 / parsed.train.batch_size)
    tuned = {name: parsed for name, parsed in trained.items() if parsed.model.seed == 0 and "scratch" not in name}
    for name in ("top_layers", "lora", "frozen"):
        assert tuned[f"{name}-3000"].model.clip == str(tmp_path / "projection-3000" / "model")
        assert tuned[f"{name}-3000"].model.text_encoder == "same"
        assert tuned[f"{name}-3000"].align.cache_dir == "stored"
    assert tuned["two_stage-3000"].model.clip == str(tmp_path / "english-3000" / "model")
    assert row(capsys.readouterr().out, "3,000", "lora")[-3:] == ["-", "-", "0.2"]  # the features cost is not known


def test_steps_have_a_floor() -> None:
    assert which_way.Cell("frozen", 300).steps == which_way.LEAST_STEPS
    assert which_way.Cell("projection", 6_000).steps == 703


def test_an_interrupted_run_runs_again(tmp_path: Path, started: list) -> None:
    left_over = tmp_path / "scratch-300" / "checkpoints" / "step-00000007"
    left_over.mkdir(parents=True)
    run(tmp_path, "--methods", "scratch", "--sizes", "300")
    assert [recipe for recipe, _ in started] == ["pretrain.py", "evaluate.py"]
    assert not left_over.exists()


def test_a_process_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_runs, "RECIPES", tmp_path)
    (tmp_path / "work.py").write_text("import time; kept = bytes(2**25)\nwhile time.process_time() < 0.3: pass")
    (tmp_path / "fail.py").write_text("raise SystemExit(2)")
    cost = recipe_runs.start("work.py")
    assert 0.3 / 60 <= cost.cpu_minutes < 0.1
    assert cost.gib > 2**25 / 2**30
    with pytest.raises(SystemExit, match=r"fail\.py --key stopped with status 2"):
        recipe_runs.start("fail.py", "--key")
