"""What `koclip adapt` leaves: the classifier, its card, the reliability diagram and the table on the terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

import koclip
from koclip import storage
from koclip.classifiers import calibration
from koclip.classifiers.directory import NONE, WEIGHTS, save_classifier
from koclip.classifiers.selection import describe
from koclip.config import AdaptConfig, to_dict
from koclip.encoders import Encoder
from koclip.evaluation.adapt import Adapted, Candidate
from koclip.evaluation.report.charts import GREY, colour, korean_style, save
from koclip.evaluation.report.table import console, markdown_table
from koclip.metrics import Metric

CARD, PICTURE = "README.md", "reliability.png"
_HEADER = ("language", "method", "settings", "chosen by", "accuracy, %", "over zero-shot, points")
_CALIBRATION = ("language", "method", "temperature", "calibration error before, %", "after, %")


def write(config: AdaptConfig, result: Adapted, encoder: Encoder) -> Path:
    """Write the classifier directory and return it."""
    directory = Path(config.output_dir)
    facts = _facts(config, result, encoder)
    save_classifier(directory, result.chosen.fitted.head, facts)
    with korean_style():
        save(_reliability(result), directory / PICTURE)
    storage.replace_text(directory / CARD, card(result, facts))
    return directory


def show(result: Adapted) -> None:
    """Print the methods side by side, the choice, and what was left out."""
    table = Table(title=f"Accuracy on images of {result.tested}, with 95 % intervals", title_justify="left")
    for name in _HEADER:
        table.add_column(name, justify="right" if "," in name else "left")
    for candidate in result.candidates:
        table.add_row(*_row(candidate), style="bold" if candidate is result.chosen else "")
    terminal = console()
    terminal.print(table)
    for note in _notes(result):
        terminal.print(note, markup=False, highlight=False, soft_wrap=True)


def _notes(result: Adapted) -> Iterator[str]:
    """Yield what a reader must know about the numbers."""
    chosen = result.chosen
    won = " (no method was better on the held-out images)" if chosen.fitted.method == "zero_shot" else ""
    yield f"Chosen: {chosen.fitted.method}, {chosen.language} names{won}."
    counts = result.pictures.labels
    yield f"Fitted on {len(counts):,} images of {len(result.pictures.classes):,} classes."
    if chosen.temperature == 1:
        yield "Temperature 1: the held-out images show no certain gain by another."
    if result.thresholds is None:
        yield f'No threshold of "none of these": {result.reason}.'
    elif result.calibrated_on == "held out":
        yield (
            'The threshold of "none of these" and the temperature come from the held-out images of the choice, so its '
            "promise is approximate. Name other images for `calibration` to make it exact."
        )
    for name, count in result.left_out.items():
        yield f"{name}: {count:,} images left out, because they are equal to an earlier one."
    skipped = result.pictures.all_skipped()
    if skipped:
        yield f"{len(skipped):,} rows left out, listed in skipped.jsonl."


def _row(candidate: Candidate) -> tuple[str, ...]:
    fitted = candidate.fitted
    settings = ", ".join(f"{name} {value}" for name, value in describe(fitted.settings).items())
    gain = "" if fitted.method == "zero_shot" else _interval(candidate.gain, "+")
    return candidate.language, fitted.method, settings, fitted.chosen_by, _interval(candidate.accuracy), gain


def _interval(metric: Metric | None, sign: str = "") -> str:
    """Return a share in percent with its interval; "-" without a number."""
    if metric is None:
        return "-"
    low, high = metric.ci95
    return f"{100 * metric.value:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def _facts(config: AdaptConfig, result: Adapted, encoder: Encoder) -> dict[str, Any]:
    """Return the content of classifier.json."""
    chosen, fitted = result.chosen, result.chosen.fitted
    promise = None
    if result.thresholds is not None:
        count = 0 if result.calibration is None else len(result.calibration.labels)
        promise = {
            "alpha": config.alpha,
            "of": config.none,
            "thresholds": result.thresholds,
            "calibrated_on": result.calibrated_on,
            "n": count,
        }
    return {
        "koclip": koclip.__version__,
        "method": fitted.method,
        "settings": fitted.settings,
        "chosen_by": fitted.chosen_by,
        "language": chosen.language,
        "classes": [{"key": name.key, "names": name.names} for name in result.pictures.classes],
        "width": fitted.head.weight.shape[1],
        "temperature": chosen.temperature,
        "none": promise,
        "none_reason": result.reason,
        "encoder": {"name": encoder.name, "fingerprint": encoder.image_fingerprint()},
        "tested": result.tested,
        "numbers": {f"{each.language}/{each.fitted.method}": _numbers(each) for each in result.candidates},
        "config": to_dict(config),
    }


def _numbers(candidate: Candidate) -> dict[str, Any]:
    metrics = {"accuracy": candidate.accuracy, "gain": candidate.gain}
    if candidate.errors is not None:
        metrics |= dict(zip(("calibration_error_before", "calibration_error"), candidate.errors, strict=True))
    numbers: dict[str, Any] = {name: metric.to_dict() for name, metric in metrics.items() if metric is not None}
    return numbers | {"settings": candidate.fitted.settings, "temperature": candidate.temperature}


def _reliability(result: Adapted) -> Figure:
    """Draw the share of right answers over the confidence of the chosen classifier, on the calibration images."""
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 100], [0, 100], color=GREY, linestyle=":")
    if result.calibration is not None:
        for value, style in ((1.0, "--"), (result.chosen.temperature, "-")):
            bars = calibration.bins(result.calibration, value)
            x, y = [100 * bar.confidence for bar in bars], [100 * bar.accuracy for bar in bars]
            label = f"temperature {value:.2f}"
            axis.plot(x, y, style, marker="o", color=colour(result.chosen.language), label=label)
        axis.legend(frameon=False)
    axis.set(xlabel="confidence, %", ylabel="right answers, %", xlim=(0, 100), ylim=(0, 100))
    axis.set_title(f"{result.chosen.fitted.method}, {result.chosen.language}")
    return figure


def card(result: Adapted, facts: dict[str, Any]) -> str:
    """Return the card: classes, use, numbers, calibration and notes."""
    classes = result.pictures.classes
    languages = list(classes[0].names)
    parts = [
        f"# Classifier of {len(classes)} classes",
        f"Made by `koclip adapt` {facts['koclip']} for the image embeddings of `{facts['encoder']['name']}`. Method: "
        f"{facts['method']}, from the names in {facts['language']}.",
        *_notes(result),
        "## Use",
        f'```python\nimport koclip\n\nclassifier = koclip.load_classifier("{facts["config"]["output_dir"]}")\n'
        'print(classifier.predict(["photo.jpg"]))\n```',
    ]
    if result.chosen.fitted.head.cache is None:
        parts += [
            "It is a matrix: with `image`, the unit-norm embeddings (N, "
            f"{facts['width']}) of the same model by any library, these lines give the same probabilities.",
            f"```python\n{stock_code(facts)}\n```",
        ]
    rows = [_row(candidate) for candidate in result.candidates]
    parts += [f"## Accuracy on images of {result.tested}", _markdown(_HEADER, rows)]
    parts += [f"## Calibration on images of {result.tested}", _markdown(_CALIBRATION, list(_calibrated(result)))]
    parts += [f"![Reliability diagram]({PICTURE})"]
    if facts["none"]:
        parts += [_promise(facts)]
    parts += ["## Classes", _markdown(("key", *languages), [(name.key, *name.names.values()) for name in classes])]
    return "\n\n".join(parts) + "\n"


def stock_code(facts: dict[str, Any]) -> str:
    """Return the lines that use a linear classifier without koclip."""
    return (
        f'weights = safetensors.torch.load_file("{WEIGHTS}")\n'
        'logits = image @ weights["weight"].T + weights["bias"]\n'
        f"probabilities = (logits.double() / {facts['temperature']!r}).softmax(dim=1)"
    )


def _promise(facts: dict[str, Any]) -> str:
    none = facts["none"]
    whom = "of each class" if none["of"] == "class" else "that have a class"
    names = " / ".join(NONE.values())
    least, most = min(none["thresholds"]), max(none["thresholds"])
    return (
        f"## {names}\n\nThe answer is none of the classes if the probability of each class is below its threshold "
        f"({least:.3f} to {most:.3f}). A share of at most {none['alpha']:g} of the images {whom} is refused, by "
        f"{none['n']:,} images ({none['calibrated_on']}). Nothing is promised about images of other things."
    )


def _calibrated(result: Adapted) -> Iterator[tuple[str, ...]]:
    for each in result.candidates:
        before, after = each.errors or (None, None)
        yield each.language, each.fitted.method, f"{each.temperature:.2f}", _interval(before), _interval(after)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return markdown_table([header, ["---"] * len(header), *rows])
