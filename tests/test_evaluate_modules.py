"""koclip's metrics as modules of the `evaluate` library: loaded from this machine, in batches and in two processes."""

import doctest
import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from koclip.metrics import first_ranks, mean_per_class, recall_at, share

MODULES = Path(str(files("koclip") / "evaluation" / "modules"))
NAMES = ("retrieval_recall", "zero_shot_accuracy")
RANDOM = torch.Generator().manual_seed(0)
SIMILARITY = torch.randint(0, 12, (40, 9), generator=RANDOM).double() / 8  # with ties
OWNED = [sorted({place % 9, (place * place) % 9}) for place in range(40)]
GROUPS = [place // 4 for place in range(40)]
LABELS = torch.randint(0, 9, (40,), generator=RANDOM)


@pytest.fixture(autouse=True)
def out_of_home(tmp_path, monkeypatch):
    """evaluate copies scripts and keeps inputs below the home unless told otherwise."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def load(name: str, *args: str, **options):
    return evaluate.load(str(MODULES / name), *args, **options)


def marked(owned: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[entry in own for entry in range(9)] for own in owned])


def expected(metrics) -> dict[str, object]:
    values = {name: metric.value for name, metric in metrics.items()}
    intervals = {f"{name}_ci95": list(metric.ci95) for name, metric in metrics.items()}
    return values | intervals | {"n": 40}


def accuracies() -> dict[str, object]:
    ranks = first_ranks(SIMILARITY, marked([[label] for label in LABELS.tolist()]))
    per_class = mean_per_class(ranks < 1, LABELS)
    return expected({"accuracy": share(ranks < 1), "accuracy@5": share(ranks < 5), "mean_per_class": per_class})


def test_recalls_are_those_of_koclips_metrics():
    ranks = first_ranks(SIMILARITY, marked(OWNED))
    values = load("retrieval_recall").compute(predictions=SIMILARITY.tolist(), references=OWNED)
    assert values == expected(recall_at(ranks))
    assert 0 < values["recall@1"] < values["recall@5"] < 1
    values = load("retrieval_recall").compute(predictions=SIMILARITY.tolist(), references=OWNED, ks=[2, 3])
    assert values == expected(recall_at(ranks, ks=[2, 3]))


def test_intervals_of_grouped_queries_resample_groups():
    values = load("retrieval_recall", "grouped").compute(
        predictions=SIMILARITY.tolist(), references=OWNED, groups=GROUPS
    )
    assert values == expected(recall_at(first_ranks(SIMILARITY, marked(OWNED)), torch.tensor(GROUPS)))
    assert values != expected(recall_at(first_ranks(SIMILARITY, marked(OWNED))))


def test_accuracies_are_those_of_koclips_metrics():
    values = load("zero_shot_accuracy").compute(predictions=SIMILARITY.tolist(), references=LABELS.tolist())
    assert values == accuracies()
    assert 0 < values["accuracy"] < values["accuracy@5"] < 1


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list], ids=["numpy", "torch", "lists"])
def test_batches_are_the_same_as_all_at_once(kind):
    recall, accuracy = load("retrieval_recall"), load("zero_shot_accuracy", keep_in_memory=True)
    for start in range(0, 40, 16):
        part = slice(start, start + 16)
        recall.add_batch(predictions=kind(SIMILARITY[part]), references=OWNED[part])
        accuracy.add_batch(predictions=kind(SIMILARITY[part]), references=kind(LABELS[part]))
    assert recall.compute() == expected(recall_at(first_ranks(SIMILARITY, marked(OWNED))))
    assert accuracy.compute() == accuracies()


def test_one_by_one_is_the_same_as_all_at_once():
    accuracy = load("zero_shot_accuracy")
    for row, label in zip(SIMILARITY.tolist(), LABELS.tolist(), strict=True):
        accuracy.add(prediction=row, reference=label)
    assert accuracy.compute() == accuracies()


def test_float32_similarities_are_not_rounded_to_ties():
    close = torch.tensor([[1.0, 1.0 + 2**-40], [1.0, 0.0]], dtype=torch.float64)
    values = load("retrieval_recall").compute(predictions=close.tolist(), references=[[1], [0]])
    assert values["recall@1"] == 1.0


PROCESS = """
import json, sys
import evaluate
path, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = json.load(open(folder + "/rows.json"))
module = evaluate.load(path, cache_dir=folder, num_process=2, process_id=rank, experiment_id="two", timeout=60)
for part in (slice(20 * rank, 20 * rank + 13), slice(20 * rank + 13, 20 * rank + 20)):
    module.add_batch(**{name: column[part] for name, column in rows.items()})
print(json.dumps(module.compute()))
"""


def test_two_processes_are_the_same_as_one(tmp_path):
    rows = {"predictions": SIMILARITY.tolist(), "references": LABELS.tolist()}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = [sys.executable, "-c", PROCESS, str(MODULES / "zero_shot_accuracy"), str(tmp_path)]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen([*arguments, str(rank)], **pipes) for rank in (0, 1)]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    first, second = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert first == accuracies()
    assert second is None


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("retrieval_recall", ([[0.1, 0.2], [0.3]], [[0], [0]]), r"rows of 1 to 2 numbers; expected .* entry"),
        ("retrieval_recall", ([[0.1, 0.2]] * 2, [[0], []]), r"references: got \[\] in row 1; expected .*, 0 to 1"),
        ("retrieval_recall", ([[0.1, 0.2]] * 2, [[0], [2]]), r"references: got \[2\] in row 1; expected .*, 0 to 1"),
        ("retrieval_recall", ([[0.1, 0.2]] * 2, [[-1], [0]]), r"references: got \[-1\] in row 0"),
        ("retrieval_recall", ([[0.1, None]] * 2, [[0], [0]]), r"missing number in row 0"),
        ("retrieval_recall", ([[0.1, float("nan")]] * 2, [[0], [0]]), "NaN or infinity"),
        ("retrieval_recall", ([[0.1, 0.2]], [[0]]), "expected at least 2"),
        ("retrieval_recall", ([[0.1, 0.2]] * 2, [0, 0]), "don't match the expected format"),
        ("retrieval_recall", ([[0.1, 0.2]] * 2, [[0]]), "Mismatch in the number of predictions"),
        ("zero_shot_accuracy", ([[0.1, 0.2]] * 2, [0, 5]), r"references: got \[5\] in row 1; expected .* class"),
        ("zero_shot_accuracy", ([[0.1, 0.2], [0.3]], [0, 0]), "expected .* class"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(predictions=inputs[0], references=inputs[1])


def test_unknown_options_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="default or grouped"):
        load("retrieval_recall", "by_image")
    with pytest.raises(ValueError, match=r"ks: got \[0\]"):
        load("retrieval_recall").compute(predictions=[[0.1, 0.2]] * 2, references=[[0], [1]], ks=[0])
    with pytest.raises(ValueError, match="groups"):
        load("retrieval_recall", "grouped").compute(predictions=[[0.1, 0.2]] * 2, references=[[0], [1]])


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_module_can_be_used_again(name):
    module = load(name)
    with pytest.raises(ValueError, match="numbers"):
        module.compute(predictions=[[0.1, 0.2], [0.3]], references=[[0], [0]] if name == "retrieval_recall" else [0, 0])
    right = OWNED if name == "retrieval_recall" else LABELS.tolist()
    assert module.compute(predictions=SIMILARITY.tolist(), references=right)["n"] == 40


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_card_come_out_as_printed(name):
    card = (MODULES / name / "README.md").read_text(encoding="utf-8").replace("```\n", "\n")  # no part of the output
    examples = doctest.DocTestParser().get_doctest(card, {}, name, None, None)
    failed, tried = doctest.DocTestRunner().run(examples)
    assert failed == 0
    assert tried >= 5


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_evaluates_form_and_names_every_number(name):
    card = (MODULES / name / "README.md").read_text(encoding="utf-8")
    assert re.match(r"---\ntitle: .*\ntags:\n- evaluate\n- metric\ndescription: >-\n", card)
    for title in ("Metric Description", "How to Use", "Inputs", "Output Values", "Limitations and Bias", "Citation"):
        assert re.search(rf"^##+ {title}$", card, re.MULTILINE), title
    right = OWNED if name == "retrieval_recall" else LABELS.tolist()
    for number in load(name).compute(predictions=SIMILARITY.tolist(), references=right):
        assert re.sub(r"@\d+", "@k", number) in re.sub(r"@\d+", "@k", card) or number.endswith("_ci95"), number
