"""What a model has kept of its source, forgotten and gained: paired numbers, in results.json and the report."""

import io
import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from align_runs import RECIPE, align, arguments, write_pairs, write_source
from fake_encoder import ColourEncoder, write_colours
from PIL import Image
from small_evaluations import captioned

from koclip import config
from koclip.config import EvalSetConfig, SourceConfig
from koclip.evaluation.embed import Embedder
from koclip.evaluation.forgetting import HEADING, compare, comparisons
from koclip.evaluation.report import forgotten, write
from koclip.evaluation.results import MAIN, records_of
from koclip.evaluation.run import evaluate, evaluate_source
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks import SPECS, TASKS
from koclip.metrics import Gallery, Metric, first_ranks, gained, kept, mean, recall_at, share

BEFORE = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1])
AFTER = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0])
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def test_gain_and_kept_share_by_hand() -> None:
    before, after = mean(BEFORE, GROUPS), mean(AFTER, GROUPS)
    gain, ratio = gained(before, after), kept(before, after)
    assert gain.value == pytest.approx(-1 / 8)
    assert ratio.value == pytest.approx(5 / 6)
    assert gain.n == ratio.n == 8
    assert gain.ci95 == mean(AFTER.double() - BEFORE.double(), GROUPS).ci95
    assert ratio.ci95[0] < 5 / 6 < ratio.ci95[1]


def test_the_interval_of_the_kept_share_resamples_groups() -> None:
    """The same draws as a plain loop over resamples of whole groups, by quantiles."""
    rng = np.random.default_rng(1)
    before, after = rng.random((50, 4)) < 0.8, rng.random((50, 4)) < 0.6
    groups = torch.arange(50).repeat_interleave(4)
    ratio = kept(*(mean(torch.from_numpy(hits.reshape(-1).copy()), groups) for hits in (before, after)))
    draws = [rng.integers(0, 50, 50) for _ in range(4_000)]
    values = [after[draw].sum() / before[draw].sum() for draw in draws]
    assert ratio.ci95 == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.02)


def test_pairs_make_a_narrow_interval() -> None:
    """Two models that miss the same queries differ by little, however uncertain each number is."""
    hits = torch.arange(400) % 2 == 0
    changed = hits.clone()
    changed[0] = False
    low, high = gained(share(hits), share(changed)).ci95
    wide = share(hits).ci95
    assert high - low < 0.1 * (wide[1] - wide[0])
    assert gained(share(hits), share(hits)).ci95 == (0.0, 0.0)
    assert kept(share(hits), share(hits)) == Metric(1.0, (1.0, 1.0), 400)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (Metric(0.5, (0.4, 0.6), 9), mean(AFTER), "without its queries"),
        (mean(BEFORE), mean(AFTER[:5]), "got 5 values of the second metric for 8"),
        (mean(torch.zeros(8)), mean(AFTER), "all values of the first metric are 0"),
    ],
)
def test_what_cannot_be_paired_is_refused(before: Metric, after: Metric, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept(before, after)


def test_the_chance_level_is_the_mean_of_random_orders() -> None:
    """All orders of five entries: how often one of the positives is among the first k."""
    for positives, k in itertools.product((1, 2, 3), (1, 2, 5, 10)):
        orders = list(itertools.permutations(range(5)))
        hits = [any(entry < positives for entry in order[:k]) for order in orders]
        assert Gallery(5, [positives]).chance(k) == pytest.approx(sum(hits) / len(orders))
    assert Gallery(5, [1, 3]).chance(1) == pytest.approx((0.2 + 0.6) / 2)


def test_a_random_model_is_at_its_chance_level() -> None:
    rng = torch.Generator().manual_seed(0)
    right = torch.eye(40, dtype=torch.bool).repeat_interleave(50, dim=0)  # (2000, 40)
    ranks = first_ranks(torch.rand(2_000, 40, generator=rng), right)
    recalls = recall_at(ranks, gallery=Gallery(40, [1] * 2_000))
    for k in (1, 5, 10):
        metric = recalls[f"recall@{k}"]
        assert metric.chance == pytest.approx(k / 40)
        assert metric.ci95[0] <= k / 40 <= metric.ci95[1]
    assert recalls["median_rank"].chance is None


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """Colours with captions in Korean and English."""
    path = tmp_path_factory.mktemp("colours") / "colours.parquet"
    write_colours(path, encoded)
    source = SourceConfig(path=str(path), name="colours", captions={"ko": "ko", "en": "en"})
    return open_set(EvalSetConfig(source=source, tasks=["retrieval", "zero_shot", "languages"]))


def encoded(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


class Reading(ColourEncoder):
    """Reads the colours in some languages; other texts have all the same embedding. Images may be shifted."""

    def __init__(self, korean: bool = True, english: bool = True, brighter: float = 0.0) -> None:
        super().__init__(english)
        self._names = self._names if korean else self._names[4:]
        self.images = 0
        self.brighter = brighter

    def _embed_images(self, images):
        self.images += len(images)
        return super()._embed_images(images) + self.brighter

    def fingerprint(self) -> str:
        return f"{self._names}-{self.brighter}"


def compared(source: Reading, model: Reading, eval_set: EvalSet) -> tuple[dict[str, Metric], dict[str, Metric]]:
    """Return the model's metrics and their comparison."""
    embedder = Embedder(model, 16)
    metrics = evaluate(embedder, [eval_set])
    return metrics, compare(evaluate_source(Embedder(source, 16), embedder, [eval_set], metrics), metrics, SPECS)


def test_a_language_is_gained_and_another_is_forgotten(colours: EvalSet) -> None:
    """A source that reads English only, and a model that reads Korean only."""
    metrics, comparison = compared(Reading(korean=False), Reading(english=False), colours)
    name = "colours/{}/{}text_to_image/recall@10"
    english, korean = (comparison[name.format(language, "gain_")] for language in ("en", "ko"))
    assert english.ci95[1] < 0 < korean.ci95[0]
    assert comparison[name.format("en", "kept_")].value < 1
    assert name.format("ko", "kept_") not in comparison  # the source cannot read Korean: nothing to keep
    for language in ("ko", "en"):
        source, gain = (comparison[name.format(language, prefix)].value for prefix in ("source_", "gain_"))
        assert source + gain == pytest.approx(metrics[name.format(language, "")].value)
        assert comparison[name.format(language, "chance_")].value == pytest.approx(10 / len(colours.images))


def test_only_main_shares_with_a_chance_level_are_compared(colours: EvalSet) -> None:
    """No median rank, no gap between languages, no protocol of the first caption alone."""
    metrics, comparison = compared(Reading(), Reading(), colours)
    compared_keys = {key.split("/", 2)[2] for key in comparison}
    tasks = {record.key for record in records_of(metrics, SPECS) if f"gain_{record.key}" in compared_keys}
    recalls = {f"{way}/recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    assert tasks == recalls | {"zero_shot/accuracy", "zero_shot/accuracy@5"}
    assert all(metric.value == 0 for key, metric in comparison.items() if "/gain_" in key)
    assert all(metric == Metric(1.0, (1.0, 1.0), metric.n) for key, metric in comparison.items() if "/kept_" in key)


def test_of_the_source_only_tasks_that_are_compared_run(colours: EvalSet) -> None:
    """The task `languages` measures nothing that is compared."""
    embedder = Embedder(Reading(), 16)
    metrics = evaluate(embedder, [colours])
    of_source = evaluate_source(Embedder(Reading(korean=False), 16), embedder, [colours], metrics)
    languages = {name.split("/")[1] for name in metrics}
    assert languages - {name.split("/")[1] for name in of_source} == {"ko-en"}
    assert {name for name in metrics if "/ko-en/" not in name} == set(of_source)
    everything = evaluate(Embedder(Reading(korean=False), 16), [colours])
    assert compare(of_source, metrics, SPECS) == compare(everything, metrics, SPECS)


def test_every_number_has_a_spec_of_its_own(colours: EvalSet) -> None:
    """Also those of the tasks whose patterns begin with a field."""
    names = {"set/ko/gain_unseen/accuracy": Metric(0.1, (0.0, 0.2), 9)}
    names |= compared(Reading(korean=False), Reading(), colours)[1]
    for record in records_of(names, SPECS):
        assert record.group == HEADING
        assert record.params["compared"] == f"{record.task.partition('_')[0]}_"
        assert record.spec.unit == ("points" if record.task.startswith("gain_") else "percent")
    own = {id(spec) for task in TASKS for spec in task.specs}
    assert {spec.group for spec in SPECS if id(spec) not in own} == {HEADING} != {MAIN}


@pytest.mark.parametrize(("brighter", "expected"), [(0.0, 8), (0.5, 8 + 24)], ids=["same images", "other images"])
def test_equal_images_are_embedded_once(brighter: float, expected: int, colours: EvalSet) -> None:
    """The first eight show whether both models embed them the same."""
    source, model = Reading(brighter=brighter), Reading()
    compared(source, model, colours)
    assert source.images == expected
    assert model.images == 24 + 8


def test_the_rows_say_at_chance_instead_of_a_share(colours: EvalSet) -> None:
    metrics, comparison = compared(Reading(korean=False), Reading(english=False), colours)
    records = records_of(metrics | comparison, SPECS)
    rows = forgotten.rows(records)
    assert len(rows) == len(comparisons(records)) == len([name for name in comparison if "/gain_" in name])
    by_language = {language: [row for row in rows if row.language == language] for language in ("ko", "en")}
    assert all(row.kept is None and row.chance in row.texts[-1] for row in by_language["ko"])
    assert {row.label for row in by_language["en"] if row.kept} >= {"text to image, R@10", "image to text, R@10"}
    page = forgotten.markdown(rows, "mine", "english")
    assert page.count("\n| colours |") == len(rows)
    assert forgotten.chart(records, "colours") is not None
    assert forgotten.chart(records_of(metrics, SPECS), "colours") is None


def test_without_a_source_there_is_no_comparison() -> None:
    eval_set = captioned(["retrieval"])
    metrics = evaluate(Embedder(Reading(), 16), [eval_set])
    assert not forgotten.rows(records_of(metrics, SPECS))
    assert compare({}, metrics, SPECS) == {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source CLIP and photos."""
    folder = tmp_path_factory.mktemp("forgetting")
    write_source(folder / "source")
    write_pairs(folder / "pairs.parquet")
    return folder


def test_an_alignment_reports_what_was_forgotten(place: Path) -> None:
    """In results.json, table.md, report.html and a picture; the source's captions are cached, and no image."""
    run = place / "run"
    rest = ("--model.text_encoder", "same", "--output_dir", str(run), "--optim.lr", "0.01")
    align(*arguments(place / "source", place / "pairs.parquet", *rest), reported=True)
    metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"]
    for language, way, k in itertools.product(("ko", "en"), ("text_to_image", "image_to_text"), (1, 5, 10)):
        own, source, gain = (
            metrics[f"pairs/{language}/{prefix}{way}/recall@{k}"]["value"] for prefix in ("", "source_", "gain_")
        )
        assert own - source == pytest.approx(gain)
    for file in ("table.md", "report.html"):
        assert HEADING in (run / file).read_text(encoding="utf-8")
    assert (run / "pictures" / "forgotten-pairs.png").is_file()
    cached = {path.name.partition("-")[0] for path in (run / "features" / "evaluation").rglob("*.safetensors")}
    assert cached == {"texts"}


def test_the_comparison_can_be_switched_off(place: Path) -> None:
    run = place / "alone"
    rest = ("--align.compare_source", "false", "--output_dir", str(run))
    align(*arguments(place / "source", place / "pairs.parquet", *rest), reported=True)
    assert HEADING not in (run / "report.html").read_text(encoding="utf-8")
    assert not (run / "features" / "evaluation").exists()


def test_a_source_that_cannot_be_embedded_with_does_not_cost_the_report(place: Path, capsys) -> None:
    """It has no tokenizer, which the new text encoder does not need. The report warns."""
    source = write_source(place / "without")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (source / name).unlink(missing_ok=True)
    run = place / "warned"
    align(*arguments(source, place / "pairs.parquet", "--output_dir", str(run)), reported=True)
    assert "not compared" in (run / "report.html").read_text(encoding="utf-8")
    assert (run / "results.json").is_file()


def test_a_comparison_that_fails_does_not_cost_the_report(place: Path, monkeypatch) -> None:
    """Whatever the error is: the report has its reason, and the run fails after that."""
    run = place / "failed"
    monkeypatch.setattr(write, "evaluate_source", _fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        align(*arguments(place / "source", place / "pairs.parquet", "--output_dir", str(run)), reported=True)
    _check_report_of_a_failure(run)


def test_an_evaluation_reports_the_models_although_the_comparison_fails(place: Path, monkeypatch) -> None:
    run, rows = place / "evaluated", f"path: {place / 'pairs.parquet'}, captions: {{ko: captions_ko}}"
    monkeypatch.setattr(write, "evaluate_source", _fails)
    source = str(place / "source")
    options = ("--model", source, "--source", source, "--output_dir", str(run), "--cache_dir", "null")
    main = runpy.run_path(str(RECIPE.with_name("evaluate.py")))["main"]
    with pytest.raises(RuntimeError, match="out of memory"):
        main(config.parse(config.EvaluateConfig, [*options, "--sets", f"[{{source: {{{rows}}}}}]"]))
    _check_report_of_a_failure(run)


def _fails(*args: object) -> None:
    raise RuntimeError("out of memory")


def _check_report_of_a_failure(run: Path) -> None:
    metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert "pairs/ko/text_to_image/recall@10" in metrics
    assert not any("gain_" in name for name in metrics)
    for file in ("table.md", "report.html"):
        assert "RuntimeError: out of memory" in (run / file).read_text(encoding="utf-8")
