"""Tasks name their numbers; a task that does not exist, or whose data is missing, is refused before data is read."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_encoder import ColourEncoder, write_colours
from small_evaluations import Seeing, captioned

from koclip.config import ConfigError, EvalConfig, EvalSetConfig, RatingsConfig, SourceConfig
from koclip.evaluation import run as module
from koclip.evaluation.embed import Embedder
from koclip.evaluation.results import Spec, Task
from koclip.evaluation.run import evaluate, open_all
from koclip.evaluation.tasks import TASKS
from koclip.metrics import Metric

ROOT = Path(__file__).parents[1]


def test_an_unknown_task_is_refused_before_data_are_read() -> None:
    source = SourceConfig(path="nowhere.parquet")
    config = EvalConfig(sets=[EvalSetConfig(source=source, tasks=["retrieval", "retreival"])])
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.tasks: got \['retreival'\]") as error:
        open_all(config)
    assert all(task.name in str(error.value) for task in TASKS)


@pytest.mark.parametrize("task", ["ratings", "multiple_choice"])
def test_a_task_without_its_data_is_refused(task: str, tmp_path: Path, encoded) -> None:
    source = SourceConfig(path=str(write_colours(tmp_path / "rows.parquet", encoded)), captions={"ko": "ko"})
    with pytest.raises(ConfigError, match=rf"eval\.sets\[\]\.tasks: {task}"):
        open_all(EvalConfig(sets=[EvalSetConfig(source=source, tasks=[task])]))


def test_scenes_bring_their_questions() -> None:
    scenes = EvalSetConfig(source=SourceConfig(scenes_part="test", scenes_size=4), tasks=["multiple_choice"])
    (eval_set,) = open_all(EvalConfig(sets=[scenes]))
    assert eval_set.tasks == ["multiple_choice"]
    assert [question.name for question in eval_set.questions] == ["unseen_pairs", "relation", "size", "count"]


def test_ratings_are_a_set_of_a_training_run(tmp_path: Path, encoded) -> None:
    (tmp_path / "red.png").write_bytes(encoded((250, 5, 5)))
    (tmp_path / "ratings.tsv").write_text("red.png\t빨강\t4\t3\nred.png\t파랑\t1\t2\n", encoding="utf-8")
    config = EvalConfig(sets=[], ratings=[RatingsConfig(path=str(tmp_path / "ratings.tsv"), language="ko")])
    metrics = evaluate(Embedder(ColourEncoder(), 8), open_all(config))
    assert set(metrics) == {f"ratings/ko/agreement/kendall_tau_{variant}" for variant in "bc"}


def test_a_number_that_no_spec_describes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Task(
        "toy",
        lambda *_: {"toy/unheard_of": Metric(0.5, (0.4, 0.6), 9)},
        lambda eval_set: ["ko"],
        (Spec(pattern="toy/known", label="toy"),),
    )
    monkeypatch.setattr(module, "TASKS", (toy,))
    with pytest.raises(ValueError, match="toy/unheard_of"):
        evaluate(Embedder(Seeing(), 8), [captioned(["toy"])])


def test_the_space_loads_no_scikit_learn() -> None:
    code = "import sys; import koclip.evaluation.tasks.zero_shot; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
