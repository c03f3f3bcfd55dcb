"""What was dropped, and why: dropped.jsonl, report.json and pictures and the table on the terminal."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import koclip
from koclip import storage
from koclip.config import check
from koclip.config.curation import CurateConfig
from koclip.curation.batch import (
    DETAIL,
    KEY,
    LOST,
    NOTES,
    REASON,
    Batch,
    Rows,
    caption_column,
    kept_places,
    languages_of,
)
from koclip.curation.captions import PERSONAL
from koclip.curation.duplicates import NEAR
from koclip.curation.pictures import PICTURE
from koclip.curation.report import card, charts, page
from koclip.evaluation.report.charts import korean_style, save

FILE, DROPPED = "report.json", "dropped.jsonl"
_QUANTILES = {"shortest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}
_LARGEST, _MEMBERS = 10, 20  # clusters, and keys of a cluster, that are listed


@dataclass
class _Counts:
    """What the report counts. Lengths are numbers of captions by language, and by their number of characters."""

    rows: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    personal: Counter[str] = field(default_factory=Counter)
    read: Counter[int] = field(default_factory=Counter)  # rows by source
    kept: Counter[int] = field(default_factory=Counter)
    before: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    after: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    copies: list[tuple[str, int, str]] = field(default_factory=list)  # key of the row that stays, picture, key

    def add(self, source: int, batch: Batch) -> None:
        """Count a batch of a source."""
        kept = kept_places(batch)
        self.read[source] += len(batch[KEY])
        self.kept[source] += len(kept)
        self.rows.update(filter(None, batch[REASON]))
        for language in languages_of(batch):
            column = batch[caption_column(language)]
            self.before[language].update(_lengths(column))
            self.after[language].update(_lengths(column[place] for place in kept))
        for notes, texts in zip(batch[NOTES], batch[LOST], strict=True):
            for note, text in zip(notes, texts, strict=True):
                place, remark = note.split(": ", 1)
                if remark in PERSONAL:
                    self.personal[remark] += 1
                else:
                    self.captions[remark] += 1
                    self.before[place.partition("/")[0]][len(text)] += 1
        columns = zip(batch[REASON], batch[DETAIL], batch[PICTURE], batch[KEY], strict=True)
        self.copies += [(stays, picture, key) for reason, stays, picture, key in columns if reason == NEAR]


def _lengths(column: Iterable[Sequence[str]]) -> Iterator[int]:
    return (len(caption) for captions in column for caption in captions if caption)


def write(
    folder: Path, config: CurateConfig, rows: Rows, left_out: Sequence[dict[str, str]], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Write all files of the result that are not shards into a folder; return the content of report.json.

    `left_out` are lines of dropped.jsonl for files that are not rows; `numbers` are those of the global steps.

    Raises:
        ConfigError: no row is left.
    """
    counts = _Counts()
    examples: page.Examples = {}
    storage.append_lines(folder / DROPPED, left_out)
    for source, batch in rows.batches():
        counts.add(source, batch)
        page.add_examples(examples, batch)
        storage.append_lines(folder / DROPPED, _lines(batch))
    content = _content(counts, config) | {"not_rows": len(left_out)} | dict(numbers)
    dropped = content["rows"]["dropped"]
    check(content["rows"]["kept"] > 0, "sources", dropped, "no row is left, these are the reasons; relax the rules")
    storage.replace_text(folder / FILE, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    with korean_style():
        for name, figure in charts.all_of(content, counts.before, counts.after):
            save(figure, folder / name)
    page.write(folder, content, examples, rows, config)
    card.write(folder, content, config)
    return content


def _content(counts: _Counts, config: CurateConfig) -> dict[str, Any]:
    captions = {"read": _totals(counts.before), "kept": _totals(counts.after), "dropped": _ordered(counts.captions)}
    return {
        "koclip": koclip.__version__,
        "rows": {"read": counts.read.total(), "kept": counts.kept.total(), "dropped": _ordered(counts.rows)},
        "captions": captions,
        "lengths": {
            language: {"read": quantiles(own), "kept": quantiles(counts.after[language])}
            for language, own in sorted(counts.before.items())
            if own
        },
        "personal_data_removed": _ordered(counts.personal),
        "clusters": clusters(counts.copies),
        **card.facts(config, counts.read, counts.kept),
    }


def _ordered(counts: Counter[str]) -> dict[str, int]:
    """Return counts, the largest first; equal counts by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _totals(lengths: Mapping[str, Counter[int]]) -> dict[str, int]:
    return _ordered(Counter({language: own.total() for language, own in lengths.items() if own}))


def quantiles(lengths: Counter[int]) -> dict[str, int]:
    """Return quantiles of lengths: the smallest length that this share of the captions does not exceed."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    totals = np.cumsum([lengths[length] for length in ordered])
    places = np.searchsorted(totals, np.array(list(_QUANTILES.values())) * totals[-1])
    return {name: ordered[place] for name, place in zip(_QUANTILES, places.tolist(), strict=True)}


def clusters(copies: Iterable[tuple[str, int, str]]) -> dict[str, Any]:
    """Return the number and the sizes of clusters of near-duplicates, and the keys of the largest.

    A cluster is a picture that stays and those dropped for it. `copies` are the key of the row that stays, and the
    picture and the key of a dropped row. Its size is in pictures.
    """
    groups = []
    for stays, own in itertools.groupby(sorted(copies), key=lambda copy: copy[0]):
        members = list(own)
        groups.append((1 + len({picture for _, picture, _ in members}), stays, [key for _, _, key in members]))
    groups.sort(key=lambda group: (-group[0], group[1]))
    sizes = Counter(size for size, _, _ in groups)
    return {
        "number": len(groups),
        "sizes": {str(size): sizes[size] for size in sorted(sizes)},
        "largest": [
            {"pictures": size, "kept": stays, "rows_dropped": len(keys), "dropped": keys[:_MEMBERS]}
            for size, stays, keys in groups[:_LARGEST]
        ],
    }


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
    if content["clusters"]["number"]:
        lines.append(f"{'clusters of near-duplicates':40} {content['clusters']['number']:>12,}")
    for when in ("before", "after"):
        balance = content.get("balance", {}).get(when, {})
        numbers = {name: value for name, value in balance.items() if name != "curve"}
        lines += [f"{f'{when} balance: {name}'.replace('_', ' '):40} {value:>12,}" for name, value in numbers.items()]
    counts = {f"{name}: pictures compared": numbers["pictures"] for name, numbers in content.get("overlap", {}).items()}
    if scores := content.get("scores"):
        counts |= {"rows with a score": scores["scored"], "rows without a score": scores["without_score"]}
    lines += [f"{name:40} {count:>12,}" for name, count in counts.items()]
    return "\n".join(lines)
