"""A new evaluation task is one new file and its entry in the tuple: its number arrives everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_encoder import ColourEncoder, write_colours
from small_evaluations import Seeing, captioned

from koclip.config import ConfigError, EvalConfig, EvalSetConfig, RatingsConfig, SourceConfig
from koclip.evaluation import evaluate as module
from koclip.evaluation.embed import Embedder
from koclip.evaluation.evaluate import evaluate, open_all
from koclip.evaluation.results import Spec, Task
from koclip.evaluation.tasks import TASKS
from koclip.metrics import Metric

ROOT = Path(__file__).parents[1]
BREVITY = """
import torch
from koclip.evaluation.results import Spec, Task
from koclip.metrics import share

def run(embedder, eval_set, language):
    captions = [text for own in eval_set.texts(language) for text in own]
    return {"brevity/accuracy": share(torch.tensor([len(text) < 12 for text in captions]))}

TASK = Task(
    "brevity",
    run,
    lambda eval_set: eval_set.languages,
    (Spec(pattern="brevity/accuracy", label="short captions", summary="captions of less than 12 letters",
          chart=("brevity", ""), headline={"en": "짧은 설명"}),),
)
"""
EVALUATE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from small_evaluations import Seeing, captioned
from runs_to_publish import pretrained
from koclip.config import PublishConfig
from koclip.evaluation.embed import Embedder
from koclip.evaluation.evaluate import evaluate
from koclip.evaluation.report.write import Evaluated, write
from koclip.evaluation.run import surroundings
from koclip.publishing.card import render
from koclip.publishing.card_inputs import gather

folder = Path(sys.argv[1])
eval_sets, embedder = [replace(captioned(["brevity"]), name="scenes")], Embedder(Seeing(), 16)
write(folder, [Evaluated("m", folder, embedder, evaluate(embedder, eval_sets))], eval_sets, surroundings(), [])
model = pretrained(folder / "run")
results = json.loads((folder / "run" / "results.json").read_text())
results["metrics"] = json.loads((folder / "results.json").read_text())["metrics"]
(folder / "run" / "results.json").write_text(json.dumps(results))
cfg = PublishConfig(model=str(model), repo_id="org/name", data_cards=sys.argv[2])
(folder / "card.md").write_text(str(render(cfg, gather(cfg))))
"""


def test_a_new_task_is_a_file_and_an_entry(tmp_path: Path) -> None:
    tasks = tmp_path / "koclip" / "evaluation" / "tasks"
    shutil.copytree(ROOT / "koclip", tmp_path / "koclip", ignore=shutil.ignore_patterns("__pycache__"))
    entries = tasks / "__init__.py"
    text = entries.read_text(encoding="utf-8")
    changed = text.replace("import multiple_choice,", "import brevity, multiple_choice,").replace(
        "    multiple_choice.TASK,\n", "    multiple_choice.TASK,\n    brevity.TASK,\n"
    )
    assert changed.count("brevity") == 2
    entries.write_text(changed, encoding="utf-8")
    (tasks / "brevity.py").write_text(BREVITY, encoding="utf-8")
    folder = tmp_path / "left"
    for path in (folder, folder / "run"):
        path.mkdir()
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    command = [sys.executable, "-c", EVALUATE, str(folder), str(ROOT / "data_cards")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, check=True)
    left = {name: (folder / name).read_text(encoding="utf-8") for name in ("results.json", "table.md", "report.html")}
    number = json.loads(left["results.json"])["metrics"]["scenes/en/brevity/accuracy"]["value"]
    shown = f"{100 * number:.1f}"
    assert 0 < number < 1
    assert f"| short captions | en | 24 | {shown} (" in left["table.md"]
    assert "captions of less than 12 letters" in left["report.html"]
    assert (folder / "pictures" / "brevity-scenes.png").is_file()
    card = (folder / "card.md").read_text(encoding="utf-8")
    assert f"| scenes | short captions | {shown} |" in card
    assert f"짧은 설명: {shown} %" in card


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
