"""report.html: the whole evaluation on a page that needs no other file."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from koclip import storage
from koclip.evaluation.report.table import NOTE, Line, Section
from koclip.evaluation.run import notes

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


class Picture(NamedTuple):
    """A picture of a model: its label, a text in its place, and the picture as WebP in base64."""

    label: str
    text: str
    content: str


class Model(NamedTuple):
    """A model as the page shows it."""

    name: str  # as it was given to koclip
    label: str  # a short name
    pictures: Mapping[str, Mapping[str, Path]]  # files by data set and kind
    data: Mapping[str, Mapping[str, Any]]  # what results.json says of the data sets
    training: Path | None = None  # a picture of its training


def write(
    run: Path,
    models: Sequence[Model],
    sections: Sequence[Section],
    environment: Mapping[str, Any],
    warnings: Sequence[str],
) -> None:
    """Write report.html.

    Args:
        run: Where to; its config.yaml is shown if it is there.
        models: In the order of the cells.
        sections: The rows, by data set.
        environment: As in results.json.
        warnings: What a reader should know.
    """
    configuration = run / "config.yaml"
    name, *arguments = environment["command"]
    loader = PackageLoader("koclip", "assets")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = jinja.get_template("report.html").render(
        labels={model.name: model.label for model in models},
        summary=[(section.name, [line for line in section.main if line.spec.summary]) for section in sections],
        sections=sections,
        pictures={section.name: _pictures(section.name, models) for section in sections},
        notes={section.name: _notes(section.name, models) for section in sections},
        training=[Picture(own.label, "loss over steps", _content(own.training)) for own in models if own.training],
        warnings=warnings,
        environment=environment,
        command=shlex.join(["python", f"recipes/{name}", *arguments]),
        configuration=configuration.read_text(encoding="utf-8") if configuration.is_file() else "",
        note=NOTE,
        best=_best,
    )
    storage.replace_text(run / "report.html", text)


def _notes(name: str, models: Sequence[Model]) -> list[str]:
    """Return the notes on a data set; none on ratings."""
    facts = {model.label: model.data[name] for model in models if name in model.data}
    if not facts:
        return []
    first = next(iter(facts.values()))
    classes = f", {first['classes']:,} classes" if "classes" in first else ""
    return [f"{first['images']:,} images{classes}, from {first['source']['source']['path']}", *notes(facts)]


def _best(line: Line) -> list[bool]:
    """Return for each model whether its share is the largest of several."""
    shares = [cell.share if cell and cell.share is not None else None for cell in line.cells]
    known = [share for share in shares if share is not None]
    return [len(known) > 1 and share == max(known) for share in shares]


def _pictures(dataset: str, models: Sequence[Model]) -> dict[str, list[Picture]]:
    """Return a data set's pictures by kind, those of all models side by side."""
    kinds = [name.partition("-")[0] for model in models for name in model.pictures.get(dataset, {})]
    pictures: dict[str, list[Picture]] = {}
    for kind in dict.fromkeys([*_KINDS, *kinds]):
        title = _KINDS.get(kind, kind)
        for model in models:
            for name, file in model.pictures.get(dataset, {}).items():
                if name.partition("-")[0] == kind:
                    text = f"{title}: {dataset}, {model.label}"
                    pictures.setdefault(title, []).append(Picture(model.label, text, _content(file)))
    return pictures


def _content(file: Path) -> str:
    """Return a picture in base64; as WebP, a page with photos is a tenth as large."""
    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
