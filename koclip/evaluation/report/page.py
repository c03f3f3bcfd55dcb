"""report.html: everything of an evaluation on one page that needs no other file."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from koclip.evaluation.notes import notes
from koclip.evaluation.report.printing import NOTE
from koclip.evaluation.report.table import Line, Section

_QUALITY = 85  # of pictures, 0 to 100
_KINDS = {
    "recall": "Recall",
    "queries": "Captions and the images they find",
    "stress": "Captions as people come to write them",
    "templates": "What templates gain",
    "confusion": "Classes taken for others",
    "shift": "Accuracy under shift",
    "shots": "Few-shot probe",
}
# What the summary shows of each data set and language, in words.
_SUMMARY = {
    "text_to_image/recall@10": "captions that find their image among the first 10",
    "stress/drop@10": "points of that lost by the worst rewriting of captions",
    "zero_shot/accuracy": "images whose class is found by its name",
    "linear_probe/accuracy": "images whose class a linear probe finds",
    "languages/gap@10": "points of R@10, first less second language",
    "agreement/kendall_tau_c": "agreement with people's ratings, Kendall's tau c",
}


@dataclass(frozen=True)
class Picture:
    """A picture of one model: its label, what is to be seen, and the picture as WebP in base64."""

    label: str
    text: str
    content: str


def write(
    run: Path,
    labels: Mapping[str, str],
    sections: Sequence[Section],
    drawn: Mapping[str, Mapping[str, Mapping[str, Path]]],
    data: Mapping[str, Mapping[str, Mapping[str, Any]]],
    warnings: Sequence[str],
    environment: Mapping[str, Any],
) -> None:
    """Write report.html.

    Args:
        run: Where to; its config.yaml is shown if it is there.
        labels: A short name of every model.
        sections: The rows, by data set; their cells are in the order of the labels.
        drawn: Files of pictures by model, data set and kind.
        data: What each model's results.json says of the data sets, by label.
        warnings: What a reader should know.
        environment: What results.json says of it.
    """
    configuration = run / "config.yaml"
    name, *arguments = environment["command"]
    loader = PackageLoader("koclip", "assets")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = jinja.get_template("report.html").render(
        labels=labels,
        summary=[(section.name, _summary(section)) for section in sections],
        sections=sections,
        pictures={section.name: _pictures(section.name, labels, drawn) for section in sections},
        notes={section.name: _notes(section.name, data) for section in sections},
        warnings=warnings,
        environment=environment,
        command=shlex.join(["python", f"recipes/{name}", *arguments]),
        configuration=configuration.read_text(encoding="utf-8") if configuration.is_file() else "",
        note=NOTE,
        best=_best,
    )
    (run / "report.html").write_text(text, encoding="utf-8")


def _notes(name: str, data: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return what is said of a data set; nothing of people's ratings, which are none."""
    facts = {label: sets[name] for label, sets in data.items() if name in sets}
    if not facts:
        return []
    first = next(iter(facts.values()))
    classes = f", {first['classes']:,} classes" if "classes" in first else ""
    return [f"{first['images']:,} images{classes}, from {first['source']['source']['path']}", *notes(facts)]


def _summary(section: Section) -> list[tuple[Line, str]]:
    return [(line, _SUMMARY[line.key]) for line in section.main if line.key in _SUMMARY]


def _best(line: Line) -> list[bool]:
    """Return for each model whether its share is the largest of several."""
    shares = [cell.share if cell and cell.share is not None else None for cell in line.cells]
    known = [share for share in shares if share is not None]
    return [len(known) > 1 and share == max(known) for share in shares]


def _pictures(
    data: str, labels: Mapping[str, str], drawn: Mapping[str, Mapping[str, Mapping[str, Path]]]
) -> dict[str, list[Picture]]:
    """Return a data set's pictures by what they show, those of all models side by side."""
    found: dict[str, list[Picture]] = {}
    for kind, title in _KINDS.items():
        for model, label in labels.items():
            for name, file in drawn[model].get(data, {}).items():
                if name.partition("-")[0] == kind:
                    found.setdefault(title, []).append(Picture(label, f"{title}: {data}, {label}", _content(file)))
    return found


def _content(file: Path) -> str:
    """Return a picture in base64; as WebP, a page with photos is a tenth as large."""
    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
