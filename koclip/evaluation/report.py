"""Metrics as results.json, as a table and as a picture of queries against their best images."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from koclip.config import to_dict
from koclip.evaluation.embed import Embedder
from koclip.evaluation.evaluate import evaluate
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Metric

_SHOWN = 6  # images per query
_QUERIES = 3  # per language


def report(run: Path, config: Any, embedder: Embedder, sets: Sequence[EvalSet]) -> dict[str, Metric]:
    """Evaluate; write results.json and pictures/ in the run directory, and print the table."""
    metrics = evaluate(embedder, sets)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    data = {one.name: {"source": to_dict(one.config), "images": len(one.pictures)} for one in sets}
    write_results(run / "results.json", str(run / "model"), data, metrics, environment)
    for one in sets:
        draw_queries(run / "pictures" / f"queries-{one.name}.png", embedder, one)
    draw_training(run / "pictures" / "training.png", run / "metrics.jsonl", metrics)
    sets[0].pictures[0].save(run / "pictures" / "example.png")
    print_table(metrics)
    return metrics


def write_results(
    path: Path, model: str, data: dict[str, Any], metrics: dict[str, Metric], environment: dict[str, Any]
) -> None:
    """Write results.json: what was evaluated, on what, with which numbers, where."""
    results = {
        "model": model,
        "data": data,
        "metrics": {name: metric.to_dict() for name, metric in metrics.items()},
        "environment": environment,
    }
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_table(metrics: dict[str, Metric]) -> None:
    """Print one row per data set, task and language: recall at 1, 5, 10 or accuracy, in percent."""
    table = Table(title="Results, % (95 % interval of the first number)")
    for heading in ("data set", "task", "language"):
        table.add_column(heading)
    for heading in ("R@1 or accuracy", "R@5", "R@10", "queries"):
        table.add_column(heading, justify="right")
    rows: dict[tuple[str, str, str], dict[str, Metric]] = {}
    for name, metric in metrics.items():
        data, language, task, measure = name.split("/")
        rows.setdefault((data, task, language), {})[measure] = metric
    for key, row in sorted(rows.items()):
        first = row.get("recall@1") or row["accuracy"]
        low, high = first.ci95
        rest = [row.get("recall@5") or row.get("accuracy@5"), row.get("recall@10")]
        cells = [f"{100 * metric.value:.1f}" if metric else "" for metric in rest]
        table.add_row(*key, f"{100 * first.value:.1f} ({100 * low:.1f}-{100 * high:.1f})", *cells, f"{first.n:,}")
    Console(width=None if Console().is_terminal else 110).print(table)


def draw_queries(path: Path, embedder: Embedder, one: EvalSet) -> None:
    """Draw a few captions of every language with the images they score highest; true ones are framed green."""
    _use_korean_font()
    images = embedder.images(one.pictures)
    queries = [query for language in one.languages for query in _spread(one, language)]
    scores = embedder.texts([text for _, text in queries]) @ images.T  # (Q, I)
    figure = Figure(figsize=(1.35 * _SHOWN + 3.4, 1.45 * len(queries)))
    axes = figure.subplots(len(queries), _SHOWN + 1, squeeze=False, width_ratios=[2.6] + [1] * _SHOWN)
    for row, (language, text), score in zip(axes, queries, scores, strict=True):
        row[0].text(1.0, 0.5, _wrap(text), ha="right", va="center", fontsize=10)
        row[0].axis("off")
        for axis, place in zip(row[1:], score.topk(min(_SHOWN, len(images))).indices.tolist(), strict=False):
            axis.imshow(one.pictures[place], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            right = text in one.captions[place].get(language, [])
            for spine in axis.spines.values():
                spine.set_color("tab:green" if right else "lightgrey")
                spine.set_linewidth(3 if right else 1)
    figure.suptitle(f"{one.name}: queries and their best images (green: captioned so)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_training(path: Path, log: Path, final: dict[str, Metric]) -> None:
    """Draw the loss of a run over its steps, and the recall or accuracy it was watched on; `final` is at the end."""
    _use_korean_font()
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    watched = {name for line in lines for name in line if name.endswith(("text_to_image/recall@10", "/accuracy"))}
    lines.append({"step": lines[-1]["step"], **{name: metric.value for name, metric in final.items()}})
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*losses, strict=True), color="tab:grey", label="loss")
    axis.set(xlabel="step", ylabel="loss")
    axis.set_ylim(bottom=0)
    if watched:
        percent = axis.twinx()
        percent.set(ylabel="%", ylim=(0, 100))
        for name in sorted(watched):
            points = [(line["step"], 100 * line[name]) for line in lines if name in line]
            percent.plot(*zip(*points, strict=True), marker="o", label=name)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def _spread(one: EvalSet, language: str) -> list[tuple[str, str]]:
    """Return a few captions of the set, evenly spaced, each of another length if possible."""
    texts = sorted({captions[language][0] for captions in one.captions if captions.get(language)}, key=len)
    step = max(1, len(texts) // _QUERIES)
    return [(language, text) for text in texts[step // 2 :: step][:_QUERIES]]


def _wrap(text: str, width: int = 24) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _use_korean_font() -> None:
    """Make matplotlib draw Hangul: its own fonts have none. The package koreanize-matplotlib brings NanumGothic."""
    import matplotlib

    package = importlib.util.find_spec("koreanize_matplotlib")
    folders: Sequence[str] = (package.submodule_search_locations or []) if package else []
    for folder in folders:
        font_manager.fontManager.addfont(str(Path(folder) / "fonts" / "NanumGothic.ttf"))
    matplotlib.rcParams["font.family"] = ["NanumGothic", "DejaVu Sans"] if folders else ["DejaVu Sans"]
