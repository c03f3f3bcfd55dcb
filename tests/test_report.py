"""What an evaluation leaves: results.json, table.md, pictures and report.html say what the metrics say, and escape."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_evaluations import HOSTILE, Seeing, captioned, classified, pictures

from koclip import distributed
from koclip.evaluation.embed import Embedder
from koclip.evaluation.report.charts import charts
from koclip.evaluation.report.grids import most_confused
from koclip.evaluation.report.table import Section, cell, print_tables, sections
from koclip.evaluation.report.write import Evaluated, report, training_figure, write
from koclip.evaluation.results import Measured, Record, Spec, records_of, write_results
from koclip.evaluation.run import evaluate, folders_of, surroundings
from koclip.evaluation.sets import Question
from koclip.evaluation.tasks import SPECS
from koclip.evaluation.tasks.zero_shot import add_effective_robustness
from koclip.metrics import Metric

ALL = ("zero_shot", "shift", "linear_probe", "few_shot")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every task on two small sets, and people's ratings."""
    embedder = Embedder(Seeing(), 16, tmp_path_factory.mktemp("cache"))
    sets = [captioned(["retrieval", "languages", "stress"]), classified(list(ALL))]
    ratings = {"people/ko/agreement/kendall_tau_c": Metric(0.31234, (0.25, 0.375), 90)}
    return embedder, sets, evaluate(embedder, sets) | ratings


COMMAND = {"command": ["koclip", "evaluate", "--model", "runs/small/model"]}


def shown(measured, run: Path, models: list[str], warnings=()) -> None:
    embedder, sets, metrics = measured
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(f"model: {HOSTILE}\n", encoding="utf-8")
    evaluated = [Evaluated(model, path, embedder, dict(metrics)) for model, path in folders_of(run, models).items()]
    write(run, evaluated, sets, surroundings() | COMMAND, warnings)


def tables(*metrics: dict[str, Metric]) -> list[Section]:
    """Return the sections of the numbers of several models."""
    return sections([records_of(own, SPECS) for own in metrics], {})


def record_of(key: str, metric: Metric) -> Record:
    return records_of({f"set/ko/{key}": metric}, SPECS)[0]


@pytest.fixture(scope="module")
def one_model(measured, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one")
    shown(measured, run, ["runs/small/model"], [f"a warning {HOSTILE}"])
    return run


KINDS = {
    *("recall-photos", "stress-photos", "queries-photos", "templates-things", "shift-things", "shots-things"),
    *("confusion-ko-things", "confusion-en-things"),
}


def test_one_model_leaves_every_file(one_model):
    assert {file.stem for file in (one_model / "pictures").iterdir()} == KINDS
    assert {file.name for file in one_model.iterdir() if file.is_file()} == {
        *("config.yaml", "results.json", "table.md", "report.html")
    }


def test_several_models_have_a_directory_each(measured, tmp_path):
    shown(measured, tmp_path, ["runs/a/model", "runs/b/model"])
    for label, model in (("a", "runs/a/model"), ("b", "runs/b/model")):
        assert json.loads((tmp_path / label / "results.json").read_text(encoding="utf-8"))["model"] == model
        assert {file.stem for file in (tmp_path / label / "pictures").iterdir()} == KINDS
    assert not (tmp_path / "results.json").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 2 * len(KINDS)
    assert "|  | language | n | a | b |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_results_are_what_the_contract_says_and_the_same_on_a_second_call(measured, one_model, tmp_path):
    text = (one_model / "results.json").read_text(encoding="utf-8")
    results = json.loads(text, parse_constant=strict)
    assert list(results) == ["model", "fingerprint", "data", "metrics", "environment"]
    assert results["fingerprint"] == measured[0].encoder.fingerprint()
    assert results["metrics"] == {name: metric.to_dict() for name, metric in measured[2].items()}
    assert results["data"]["things"]["templates"]["ko"] == ["{label:을/를} 찍은 사진", "{label} | 사진"]
    assert results["data"]["things"]["classes"] == 3
    assert "num_processes" not in results["environment"]
    embedder, sets, metrics = measured
    backwards = dict(reversed(metrics.items()))
    write(tmp_path, [Evaluated("runs/small/model", tmp_path, embedder, backwards)], sets, surroundings() | COMMAND, [])
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == text


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_results(
            tmp_path / "results.json", Measured("m", "f"), {}, {"a/ko/b/c": Metric(float("nan"), (0.0, 1.0), 1)}, {}
        )


def test_table_values_equal_the_metrics(measured, one_model):
    rows = (one_model / "table.md").read_text(encoding="utf-8").splitlines()
    for section in tables(measured[2]):
        for line in lines_of(section):
            if line.notes[0] or "template" in line.records[0].params:
                continue  # chosen from others; called by the template's text
            metric = measured[2][line.records[0].name]
            start = f"| {line.label} | {line.language} | {metric.n:,} | {line.cells[0].value} ("
            assert [row for row in rows if row.startswith(start)], start
            scale = 1 if line.spec.unit in ("rank", "number") else 100
            assert float(line.cells[0].value) == pytest.approx(scale * metric.value, abs=0.051)


def test_every_metric_is_in_a_table(measured):
    shown_names = {line.records[0].name for section in tables(measured[2]) for line in lines_of(section)}
    assert set(measured[2]) == shown_names


def lines_of(section) -> list:
    return [line for lines in section.groups.values() for line in lines]


@pytest.mark.parametrize(
    ("name", "metric", "text"),
    [
        ("text_to_image/recall@10", Metric(0.4125, (0.3, 0.5), 9), "41.2 (30.0 to 50.0)"),
        ("zero_shot_particles/gain", Metric(0.02, (0.01, 0.03), 9), "+2.0 (+1.0 to +3.0) *"),
        ("languages/gap@1", Metric(-0.02, (-0.05, 0.01), 9), "-2.0 (-5.0 to +1.0)"),
        ("shift_noise/drop", Metric(-0.0001, (-0.0003, -0.0001), 9), "+0.0 (+0.0 to +0.0) *"),
        ("text_to_image/median_rank", Metric(1200.0, (900.0, 1500.0), 9), "1,200 (900 to 1,500)"),
        ("agreement/kendall_tau_c", Metric(0.31234, (-0.1, 0.4), 9), "0.312 (-0.100 to 0.400)"),
    ],
)
def test_cells(name, metric, text):
    assert str(cell(record_of(name, metric))) == text


def test_effective_robustness_stands_in_the_main_table(measured):
    metrics = {str(number): dict(measured[2]) for number in range(4)}
    for number, own in enumerate(metrics.values()):
        own["things/ko/shift_none/accuracy"] = Metric(0.2 + 0.1 * number, (0.1, 0.9), 60)
    add_effective_robustness(metrics)
    section = next(section for section in tables(*metrics.values()) if section.name == "things")
    assert "effective robustness, sketch" in [line.label for line in section.main]


def test_rows_of_a_language_stand_together():
    names = [f"d/{language}/zero_shot/accuracy{at}" for at in ("", "@5") for language in ("ko", "en")]
    lines = tables(dict.fromkeys(names, Metric(0.5, (0.4, 0.6), 10)))[0].main
    assert [line.language for line in lines] == ["ko", "ko", "en", "en"]


class Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(one_model) -> Reader:
    reader = Reader()
    reader.feed((one_model / "report.html").read_text(encoding="utf-8"))
    return reader


def test_the_page_escapes_what_others_wrote(page):
    assert not [tag for tag, _ in page.tags if tag in ("script", "b", "link", "iframe", "object")]
    assert f"a warning {HOSTILE}" in page.text
    assert "<b>{label}</b>" in page.text
    assert f"model: {HOSTILE}" in page.text


def test_the_page_needs_no_other_file(page):
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/", "#")), (tag, attributes[name][:50])
        assert not [name for name in attributes if name.startswith("on")]
    style = re.sub(r"data:[^\"]*", "", page.text)
    assert "url(" not in style
    assert "@import" not in style
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(KINDS)
    for image in images:
        assert Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).width > 300
        assert image["alt"]


def test_the_page_says_how_it_was_made(page):
    for text in ("Commit", "torch", "koclip evaluate --model", "runs/small/model", "{label:을/를} 찍은 사진", "90"):
        assert text in page.text


def test_a_model_s_name_is_text_everywhere(measured, tmp_path, capsys):
    name = "<img src=x onerror=alert(1)> [red]|`x`"
    shown(measured, tmp_path, [f"runs/{name}/model", "runs/b/model"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert r"\<img src=x onerror=alert(1)> \[red\]\|\`x\`" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "[red]" in capsys.readouterr().out


def test_missing_tasks_leave_nothing_empty(measured, tmp_path):
    embedder = measured[0]
    photos = captioned(["retrieval"])
    metrics = evaluate(embedder, [photos])
    write(tmp_path, [Evaluated("m", tmp_path, embedder, metrics)], [photos], surroundings(), [])
    assert {file.stem for file in (tmp_path / "pictures").iterdir()} == {"recall-photos", "queries-photos"}
    reader = Reader()
    reader.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    for heading in ("Few-shot", "Confusion", "by templates", "under shift", "rewritten Korean", "Each template"):
        assert heading not in reader.text
    assert "##  " not in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "warning" not in reader.text.split("</style>")[-1].split("Evaluated by")[1]


def test_ratings_alone_are_a_table_without_pictures(measured, tmp_path):
    metrics = {"people/ko/agreement/kendall_tau_c": Metric(0.3, (0.2, 0.4), 9)}
    write(tmp_path, [Evaluated("m", tmp_path, measured[0], metrics)], [], surroundings(), [])
    assert "0.300 (0.200 to 0.400)" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert not (tmp_path / "pictures").exists()


def test_no_collective_is_called(measured, tmp_path, monkeypatch):
    """The other processes wait at the end of the recipe: whoever calls a collective here waits for ever."""
    _, sets, metrics = measured

    def refuse(*_: object) -> None:
        raise AssertionError("a collective")

    for name in ("gather_objects", "barrier", "gather", "mean", "any_process"):
        monkeypatch.setattr(distributed, name, refuse)
    spread = Embedder(Seeing(), 16, tmp_path / "cache", spread=True)
    write(tmp_path, [Evaluated("m", tmp_path, spread, metrics)], sets, surroundings(), [])
    with pytest.raises(AssertionError, match="a collective"):
        spread.texts(["고양이"])


def test_hangul_has_glyphs(measured, tmp_path, recwarn):
    """matplotlib warns of each letter that no font has."""
    shown(measured, tmp_path, ["runs/small/model"])
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_many_models_fit_the_terminal(measured, capsys):
    labels = [f"model-{number}" for number in range(9)]
    print_tables(tables(*[measured[2]] * 9), labels)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    for label in labels:
        assert [line for line in lines if label in line]


def test_of_many_classes_the_most_confused_are_shown():
    counts = torch.zeros(40, 40, dtype=torch.long).numpy()
    counts[7, 31], counts[31, 7], counts[2, 5], counts[9, 9] = 3, 3, 4, 50
    assert most_confused(counts, 4) == [7, 31, 2, 5]
    assert most_confused(counts[:3, :3], 4) == [0, 1, 2]


def test_questions_have_a_row(measured):
    question = Question("relation", pictures(4), {"ko": [["위", "아래"]] * 4}, [0, 1, 0, 1])
    asked = replace(captioned([]), questions=[question])
    lines = tables(evaluate(measured[0], [asked]))[0].main
    assert [(line.label, line.language) for line in lines] == [("relation, accuracy", "ko")]


def test_names_come_apart_at_the_last_three_slashes():
    (record,) = records_of({"org/set/ko/text_to_image/recall@1": Metric(0.5, (0.4, 0.6), 9)}, SPECS)
    assert (record.dataset, record.language, record.task, record.metric) == (
        "org/set",
        "ko",
        "text_to_image",
        "recall@1",
    )
    assert record.name == "org/set/ko/text_to_image/recall@1"


@pytest.mark.parametrize(
    ("key", "params", "label", "group"),
    [
        (
            "zero_shot_template_03/gain_over_name",
            {"template": 3},
            "template 03",
            "Each template alone, minus the bare name",
        ),
        ("few_shot/accuracy_02_shots", {"shots": 2}, "probe on 2 per class", ""),
        (
            "shift_noise/accuracy_severity_5",
            {"name": "noise", "severity": 5},
            "noise, severity 5",
            "Accuracy under shift",
        ),
        ("shift_2019/accuracy", {"name": "2019"}, "2019", "Accuracy under shift"),
        ("stress_typo/drop@10", {"rewrite": "typo", "k": 10}, "typo", "R@10 lost by rewritten captions"),
        ("text_to_image/recall@5", {"direction": "text to image", "k": 5}, "text to image, R@5", ""),
        ("nobody/knows_{it}", {}, "nobody/knows_{it}", ""),
    ],
)
def test_a_name_is_read_once(key, params, label, group):
    record = record_of(key, Metric(0.5, (0.4, 0.6), 9))
    assert (dict(record.params), record.label(), record.group) == (params, label, group)


def test_no_number_of_a_run_is_unknown(measured):
    """A task whose number no spec describes would get a row without words."""
    for record in records_of(measured[2], SPECS):
        assert any(record.spec is spec for spec in SPECS), record.name


def test_a_template_is_called_by_its_text():
    record = record_of("zero_shot_template_01/accuracy", Metric(0.5, (0.4, 0.6), 9))
    assert record.label(["{label}", "{label} 사진"]) == "{label} 사진"
    assert record.label(["{label}"]) == "template 01"


def test_numbers_of_a_new_chart_are_bars():
    spec = Spec(pattern="toy/{side}", label="{side}", chart=("toy", ""))
    metrics = {f"set/{language}/toy/{side}": Metric(0.5, (0.4, 0.6), 9) for language in ("ko", "en") for side in "ab"}
    ((kind, figure),) = charts("set", records_of(metrics, [spec]), {})
    assert kind == "toy"
    assert [bar.get_height() for bar in figure.axes[0].patches] == [50.0] * 4
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["a", "b"]


def test_a_training_run_leaves_the_same_files(measured, tmp_path, capsys):
    embedder, sets, metrics = measured
    watched = "photos/ko/text_to_image/recall@10"
    log = [{"step": 5, "loss": 1.0, "accuracy": 0.5}, {"step": 10, "loss": 0.5, watched: 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    (tmp_path / "environment.json").write_text(json.dumps(surroundings() | {"num_processes": 1}), encoding="utf-8")
    (tmp_path / "skipped.jsonl").write_text(
        '{"key": "rows/7", "reason": "no <usable> caption", "source": "pairs.csv"}\n', encoding="utf-8"
    )
    assert report(tmp_path, embedder, sets) == {
        name: metric for name, metric in metrics.items() if name[:6] != "people"
    }
    assert {file.stem for file in (tmp_path / "pictures").iterdir()} == {*KINDS, "training", "example"}
    reader = Reader()
    reader.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len([tag for tag, _ in reader.tags if tag == "img"]) == len(KINDS) + 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("rows/7", "no &lt;usable&gt; caption", "pairs.csv"))
    assert tmp_path.name in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["environment"]["num_processes"] == 1
    assert str(tmp_path / "skipped.jsonl") in capsys.readouterr().out.replace("\n", "")


def test_the_picture_of_training_shows_main_numbers_only(tmp_path):
    names = ["scenes/ko/text_to_image/recall@10", "things/ko/zero_shot_template_01/accuracy"]
    log = [{"step": 5, "loss": 1.0, "accuracy": 0.5}, {"step": 10, **dict.fromkeys(names, 0.5)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    figure = training_figure(tmp_path / "metrics.jsonl", dict.fromkeys(names, Metric(0.5, (0.4, 0.6), 9)))
    (label,) = (str(line.get_label()) for line in figure.axes[1].lines)
    (record,) = (record for record in records_of({names[0]: Metric(0.5, (0.4, 0.6), 9)}, SPECS))
    assert all(part in label for part in ("scenes", record.label(), "ko"))
    assert names[0] not in label
