"""The curve of the preservation weight: from the files of runs, which are replaced here by written numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from koclip import config
from koclip.metrics import Metric

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for the script that it runs

import preservation  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_before")
ENGLISH = {0.0: 0.9, 1.0: 0.95, 10.0: 0.99}
KOREAN = {1.0: 0.01, 10.0: -0.005}


def entry(value: float) -> dict[str, Any]:
    return Metric(value, (value - 0.02, value + 0.03), 99).to_dict()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the runs: parse their commands, and write the numbers that they would write."""
    names: list[str] = []

    def start(recipe: str, *words: str) -> None:
        names.append(recipe)
        if recipe == "align.py":
            run_config = config.parse(config.AlignConfig, list(words))
            run, weight = Path(run_config.output_dir or ""), run_config.distill.preserve
            numbers = {run: {"scenes/en/kept_text_to_image/recall@1": entry(ENGLISH[weight])}}
            run.mkdir(parents=True)
            config.dump(run_config, run / "config.yaml")
        else:
            parsed = config.parse(config.EvaluateConfig, list(words))
            assert Path(parsed.source or "").parent.name.startswith("0-")
            assert parsed.sets[0].source.scenes_part == "test"
            models = {Path(model).parent.name: float(Path(model).parent.name.split("-")[0]) for model in parsed.models}
            numbers = {  # of one model alone in the output directory itself
                Path(parsed.output_dir or "") / (name if len(models) > 1 else ""): {
                    "scenes/ko/gain_text_to_image/recall@1": entry(KOREAN[weight])
                }
                for name, weight in models.items()
            }
        for folder, metrics in numbers.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "results.json").write_text(json.dumps({"metrics": metrics}), encoding="utf-8")

    monkeypatch.setattr(preservation, "start", start)
    return names


def test_the_command_in_the_first_lines_parses() -> None:
    assert preservation.parser().parse_args([]).weights[0] == 0
    assert "python recipes/benchmarks/preservation.py" in preservation.__doc__


def test_the_curve_is_drawn_from_the_files_of_the_runs(tmp_path: Path, started: list[str], capsys) -> None:
    words = ["--weights", "0", "1", "10", "--seeds", "0", "2", "--output_dir", str(tmp_path)]
    preservation.main([*words, "--source", "clip-{seed}"])
    assert started == ["align.py", "align.py", "align.py", "evaluate.py"] * 2
    assert (tmp_path / "preservation.png").stat().st_size > 1_000
    shown = capsys.readouterr().out
    assert all(text in shown for text in (" 99.0 (97.0 to 102.0)", "-0.5 (-2.5 to +2.5)", "95.0"))
    preservation.main([*words, "--source", "clip-{seed}"])  # everything exists: nothing runs again
    assert len(started) == 8


def test_each_weight_alone_gets_its_own_number(tmp_path: Path, started: list[str], capsys) -> None:
    """Also without weight 0 among the words: it is the base of every comparison."""
    for weight, korean in (("1", "+1.0"), ("10", "-0.5")):
        preservation.main(["--weights", weight, "--seeds", "0", "--output_dir", str(tmp_path)])
        assert korean in capsys.readouterr().out
    assert started.count("evaluate.py") == 2


def test_means_are_over_the_seeds() -> None:
    own = [Metric(value, (0.0, 1.0), 9) for value in (0.1, 0.3)]
    points = [preservation.Point(2.0, seed, own[seed], own[1 - seed]) for seed in (0, 1)]
    assert preservation.means(points)[2.0] == pytest.approx((0.2, 0.2))


def test_a_source_at_chance_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="chance"):
        preservation.number(tmp_path, "en/kept_text_to_image/recall@1")
