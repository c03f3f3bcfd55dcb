"""What was dropped, and why: dropped.jsonl, report.json, the table on the terminal and the waterfall picture."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from koclip import storage
from koclip.curation.batch import DETAIL, KEY, NOTES, REASON, Batch, captions_at, kept_places
from koclip.curation.captions import PERSONAL
from koclip.evaluation.report.charts import GREY, WORSE, korean_style, save

FILE, DROPPED, PICTURE = "report.json", "dropped.jsonl", "waterfall.png"


def write(
    folder: Path, tables: Iterable[Batch], left_out: Sequence[dict[str, str]], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Write dropped.jsonl, report.json and waterfall.png into a folder; return the content of report.json.

    `left_out` are lines of dropped.jsonl for files that are not rows; `numbers` are those of the global steps.
    """
    rows, captions, personal, languages = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    storage.append_lines(folder / DROPPED, left_out)
    num_rows = 0
    for batch in tables:
        num_rows += len(batch[KEY])
        rows.update(reason for reason in batch[REASON] if reason)
        for note in (note for notes in batch[NOTES] for note in notes):
            remark = note.partition(": ")[2]
            (personal if remark in PERSONAL else captions)[remark] += 1
        for place in kept_places(batch):
            languages.update(language for language, _, _ in captions_at(batch, place))
        storage.append_lines(folder / DROPPED, _lines(batch))
    content: dict[str, Any] = {
        "rows": {"read": num_rows, "kept": num_rows - rows.total(), "dropped": _ordered(rows)},
        "captions": {"kept": _ordered(languages), "dropped": _ordered(captions)},
        "personal_data_removed": _ordered(personal),
        "not_rows": len(left_out),
    } | dict(numbers)
    storage.replace_text(folder / FILE, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    with korean_style():
        save(waterfall(content["rows"]), folder / PICTURE)
    return content


def _ordered(counts: Counter[str]) -> dict[str, int]:
    """Return counts, the largest first; equal counts by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _lines(batch: Batch) -> Iterator[dict[str, Any]]:
    """Yield a line for each row that is dropped or has lost something: key, reason ("": the row is kept), captions."""
    for place, notes in enumerate(batch[NOTES]):
        if batch[REASON][place] or notes:
            line = {"key": batch[KEY][place], "reason": batch[REASON][place], "detail": batch[DETAIL][place]}
            yield line | {"captions": notes}


def table(content: Mapping[str, Any]) -> str:
    """Return the table for the terminal: rows by reason, with their share of all rows."""
    rows = content["rows"]
    entries = [("rows read", rows["read"]), *((f"- {name}", count) for name, count in rows["dropped"].items())]
    entries.append(("rows kept", rows["kept"]))
    lines = [f"{name:40} {count:>12,} {count / max(1, rows['read']):>7.1%}" for name, count in entries]
    for title, counts in (
        ("captions kept", content["captions"]["kept"]),
        ("captions dropped", content["captions"]["dropped"]),
        ("personal data removed", content["personal_data_removed"]),
    ):
        lines += [f"{f'{title}: {name}':40} {count:>12,}" for name, count in counts.items()]
    for when in ("before", "after"):
        balance = content.get("balance", {}).get(when, {})
        lines += [f"{f'{when} balance: {name}'.replace('_', ' '):40} {value:>12,}" for name, value in balance.items()]
    counts = {f"{name}: pictures compared": numbers["pictures"] for name, numbers in content.get("overlap", {}).items()}
    if scores := content.get("scores"):
        counts |= {"rows with a score": scores["scored"], "rows without a score": scores["without_score"]}
    lines += [f"{name:40} {count:>12,}" for name, count in counts.items()]
    return "\n".join(lines)


def waterfall(rows: Mapping[str, Any]) -> Figure:
    """Draw the number of rows that remain after each reason."""
    names, counts = ["read", *rows["dropped"], "kept"], [rows["read"], *rows["dropped"].values(), rows["kept"]]
    starts, left = [0], rows["read"]
    for count in rows["dropped"].values():
        left -= count
        starts.append(left)
    colours = [GREY, *[WORSE] * len(rows["dropped"]), GREY]
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.barh(places, counts, left=[*starts, 0], color=colours)
    for place, start, count in zip(places, [*starts, 0], counts, strict=True):
        axes.text(start + count, place, f" {count:,}", va="center")
    axes.set(yticks=places, yticklabels=names, xlabel="rows", xlim=(0, 1.15 * max(1, rows["read"])))
    axes.invert_yaxis()
    return figure
