"""A model's card, rendered from the measured numbers and the configuration. It adds no number of its own."""

import re
import shlex
from collections.abc import Iterator
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from koclip import storage
from koclip.config import PublishConfig, check
from koclip.evaluation.report.table import NOTE, Cell, Line, sections
from koclip.evaluation.results import IMAGES, MAIN, Spec
from koclip.evaluation.run import notes
from koclip.evaluation.tasks import SPECS
from koclip.publishing.card_inputs import Facts
from koclip.publishing.checks import ADAPTER, CARD, LICENCE
from koclip.publishing.formats import int8
from koclip.publishing.formats import sentence_transformers as sentence
from koclip.publishing.formats.onnx import EXACT, FOLDER, INT8, SIDES
from koclip.publishing.licences import ALLOWS, Licence, conclude

_MARK = "<!-- Made by koclip's recipes/publish.py"
_ENGLISH = {"ko": "Korean", "en": "English", "ja": "Japanese", "zh": "Chinese"}
_KOREAN = {"ko": "한국어", "en": "영어", "ja": "일본어", "zh": "중국어"}
_PIPELINE = "zero-shot-image-classification"
_ONLY_IMAGES, _LAST = "Pictures alone", "Other"  # headings behind those of the languages and of the specs
# By class, which versions of transformers were tried, and what came of it.
_VERSIONS = {
    "CLIPModel": "transformers 4.57.1, 5.23.0 and 5.24.0 were tried.",
    "ChineseCLIPModel": "transformers 4.57.1, 5.23.0 and 5.24.0 were tried. In 4.57.1 `get_text_features` of this "
    "class fails; these lines work.",
    "VisionTextDualEncoderModel": "transformers 5.23.0 and 5.24.0 were tried. Do not take version 4: of some towers, "
    "CLIP's text transformer among them, 4.57.1 finds no weights, says so in a warning only, and goes on with random "
    "ones.",
}
# Absolute paths in a command: all but the last part is this machine's.
_PARTS = r"[^\s\"'=,:\[\]{}]*[/\\]"
_FOLDERS = re.compile(rf"(?<![\w.~-])(?:~|[A-Za-z]:)?[/\\](?:{_PARTS}(?=recipes/)|(?:{_PARTS})?)")


class Row(NamedTuple):
    """One number of the evaluation, as text."""

    data: str
    label: str
    value: str
    interval: str
    n: str


class Group(NamedTuple):
    """Rows under one heading; there is at least one."""

    heading: str
    rows: list[Row]


class Exports(NamedTuple):
    """Other formats beside the model, for libraries other than transformers."""

    graphs: dict[str, str]  # dtype of transformers.js -> how the names of both ONNX graphs end
    sentence_transformers: bool

    @property
    def tags(self) -> list[str]:
        """The Hub's tags for them."""
        # transformers.js has no class for the pair but classes for each tower, which the card names.
        graphs = ["onnx", "transformers.js"] if self.graphs else []
        return graphs + (["sentence-transformers"] if self.sentence_transformers else [])


class Headline(NamedTuple):
    """A number in the Korean summary."""

    korean: str
    value: str
    interval: str
    data: str


def write_card(cfg: PublishConfig, facts: Facts) -> None:
    """Write README.md into the model's directory, and LICENSE.md where the licence is no common one.

    Raises:
        ConfigError: a README.md is there that koclip did not write; or what the card needs is missing.
    """
    directory = Path(cfg.model)
    file = directory / CARD
    is_ours = not file.exists() or _MARK in file.read_text(encoding="utf-8")
    check(
        is_ours,
        "model",
        str(file),
        "a card that koclip did not write: move it away, and put what it says into data cards",
    )
    card, licence = render(cfg, facts), conclude(facts.chain, cfg.license)
    storage.replace_text(file, str(card))
    (directory / LICENCE).unlink(missing_ok=True)
    if licence.name:
        storage.replace_text(directory / LICENCE, _terms(cfg, facts, licence))


def render(cfg: PublishConfig, facts: Facts, year: int | None = None) -> ModelCard:
    """Return the card with its metadata.

    Args:
        cfg: The repository, and what the model's makers state.
        facts: Its inputs.
        year: Of publication; default: this one.

    Raises:
        ConfigError: a field that it needs is missing or empty; the message names it.
    """
    author, name = cfg.repo_id.split("/")
    licence = conclude(facts.chain, cfg.license)
    groups = list(_groups(facts))
    check(bool(groups), "results: metrics", [], "expected numbers of a retrieval or a classification to show")
    fields: dict[str, Any] = {
        "repo_id": cfg.repo_id,
        "name": name,
        "author": author,
        "key": re.sub(r"\W", "_", name.lower()),
        "year": year or date.today().year,
        "kind": facts.model["architectures"][0],
        "versions": _VERSIONS.get(facts.model["architectures"][0]),
        "width": facts.model["projection_dim"],
        "languages_en": _enumerated([_ENGLISH.get(code, code) for code in facts.languages]),
        "languages_ko": "·".join(_KOREAN.get(code, code) for code in facts.languages),
        "max_tokens": facts.max_tokens,
        "image_size": facts.image_size,
        "headlines": list(_headlines(facts)),
        "licence": licence,
        "data": facts.data,
        "trained": [data_set for data_set in facts.data if data_set.trained],
        "training": list(_training(cfg, facts)),
        "note": NOTE,
        "groups": groups,
        "measured": _measured(facts),
        "allows": list(ALLOWS.values()),
        "chain": list(_chain(facts)),
    }
    missing = [key for key, value in fields.items() if value in (None, "", [])]
    check(not missing, "the card", missing, "these fields are empty: complete the inputs that they come from")
    template = files("koclip") / "assets" / "model_card.md"
    data = metadata(cfg, facts, licence)
    card: ModelCard = ModelCard.from_template(
        data, template_str=template.read_text(encoding="utf-8"), **fields, **_what_may_be_missing(cfg, facts)
    )
    return card


def _what_may_be_missing(cfg: PublishConfig, facts: Facts) -> dict[str, Any]:
    """Return the fields of the template that are empty for some models."""
    return {
        "towers": facts.towers,
        "exports": _exports(Path(cfg.model)),
        "reads_longer": facts.reads_longer,
        "cleans": facts.cleans,
        "int8": int8.read(Path(cfg.model), facts.results["fingerprint"]),
        "measured_on": [
            f"{name}: {note}" for name, data in facts.results["data"].items() for note in notes({name: data})
        ],
        "adapter": cfg.adapter and (Path(cfg.model) / ADAPTER).is_dir(),
    }


def metadata(cfg: PublishConfig, facts: Facts, licence: Licence) -> ModelCardData:
    """Return the card's front matter."""
    other: dict[str, Any] = {"license_name": licence.name, "license_link": LICENCE} if licence.name else {}
    hub_data = [data_set.hub_id for data_set in facts.data if data_set.trained and data_set.hub_id]
    return ModelCardData(
        language=facts.languages,
        license=licence.id,
        **other,
        base_model=facts.base_models or None,
        library_name="transformers",
        pipeline_tag=_PIPELINE,
        datasets=list(dict.fromkeys(hub_data)) or None,
        tags=["clip", "koclip", *(["korean"] if "ko" in facts.languages else []), *_exports(Path(cfg.model)).tags],
        model_name=cfg.repo_id.split("/")[1],
        eval_results=list(_eval_results(facts)) or None,
    )


def _exports(directory: Path) -> Exports:
    """Return the formats beside the model."""
    kinds = {"fp32": EXACT, "q8": INT8}
    graphs = {
        dtype: kind
        for dtype, kind in kinds.items()
        if all((directory / FOLDER / f"{side}{kind}.onnx").is_file() for side in SIDES)
    }
    return Exports(graphs, (directory / sentence.MODULES).is_file())


def _eval_results(facts: Facts) -> Iterator[EvalResult]:
    """Yield the numbers that readers need first, as they are in results.json."""
    for section in sections([facts.records], {}):
        for line in section.main:
            (record,) = line.records
            if record is None or line.spec.unit != "percent":
                continue
            yield EvalResult(
                task_type=line.spec.hub_task,
                dataset_type=section.name.replace("/", "-"),
                dataset_name=f"{section.name} ({_ENGLISH.get(line.language, line.language)})",
                dataset_config=line.language,
                metric_type=record.metric.replace("@", "_at_"),
                metric_name=line.label,
                metric_value=record.value,
            )


def _groups(facts: Facts) -> Iterator[Group]:
    """Yield the rows by what they are about: each language, the languages against each other, Korean under stress."""
    rows: dict[str, list[Row]] = {}
    for section in sections([facts.records], {}):
        for group, lines in section.groups.items():
            for line in lines:
                (cell,) = line.cells
                if cell is None or (group != MAIN and not line.spec.card):
                    continue
                label = line.label if group == MAIN else f"{group}: {line.label}"
                row = Row(section.name, label + f" ({cell.note})" * bool(cell.note), *_numbers(cell), f"{line.n:,}")
                rows.setdefault(_heading(line.spec, line.language), []).append(row)
    order = [*_ENGLISH.values(), *(spec.card for spec in SPECS), _ONLY_IMAGES, _LAST]
    yield from (Group(heading, rows[heading]) for heading in dict.fromkeys(order) if heading in rows)


def _heading(spec: Spec, language: str) -> str:
    return spec.card or (_ONLY_IMAGES if language == IMAGES else _ENGLISH.get(language, _LAST))


def _numbers(cell: Cell) -> tuple[str, str]:
    return cell.value + " *" * cell.marked, cell.interval


def _headlines(facts: Facts) -> Iterator[Headline]:
    """Yield the numbers of the summary: those with a headline, the first of each; else the first share of all."""
    shares = [
        (section.name, line, cell)
        for section in sections([facts.records], {})
        for line in section.main
        if (cell := line.cells[0]) is not None and cell.share is not None
    ]
    order = {id(spec): place for place, spec in enumerate(SPECS)}
    by_spec = sorted(shares, key=lambda share: order.get(id(share[1].spec), len(order)))
    chosen: dict[str, tuple[str, Line, Cell]] = {}
    for language in dict.fromkeys(language for spec in SPECS for language in spec.headline):
        for share in by_spec:
            headline = share[1].spec.headline.get(language)
            if headline and share[1].language == language:
                chosen.setdefault(headline, share)
    first = {line.label: (data, line, cell) for data, line, cell in shares[:1]}
    for korean, (data, _, cell) in (chosen or first).items():
        yield Headline(korean, f"{cell.value} %", cell.interval.replace(" to ", "~"), data)


def _training(cfg: PublishConfig, facts: Facts) -> Iterator[tuple[str, str]]:
    config, environment = facts.config, facts.environment
    method = config.get("align", {}).get("method")
    yield "method", f"alignment, {method}" if method else "contrastive, from random weights"
    if facts.base_models:
        yield "began with", ", ".join(f"[{hub_id}](https://huggingface.co/{hub_id})" for hub_id in facts.base_models)
    pairs = config["train"]["batch_size"] * environment["num_processes"]
    yield "steps", f"{config['train']['num_steps']:,} of {pairs:,} pairs"
    yield "command", f"`recipes/{shlex.join(_FOLDERS.sub('', word) for word in environment['command'])}`"
    yield "hardware", f"{_hardware(environment)}, {_count(environment['num_processes'], 'process', 'es')}"
    measured = f"{_duration(facts.seconds)}, from the start to the last step" if facts.seconds else None
    if time := cfg.training_time or measured:
        yield "time", time
    yield "software", _software(environment)


def _measured(facts: Facts) -> str:
    environment = facts.results["environment"]
    for name in ("packages", "python", "gpus", "cpu_threads"):
        check(name in environment, f"results: environment.{name}", None, "expected what the numbers were measured with")
    return (
        f"Measured on {_hardware(environment)}: {_software(environment)}. "
        f"Fingerprint of what was measured: `{facts.results['fingerprint']}`."
    )


def _hardware(environment: dict[str, Any]) -> str:
    return _enumerated(environment["gpus"]) or _count(environment["cpu_threads"], "CPU thread", "s")


def _duration(seconds: float) -> str:
    """Return a time in the largest unit that it has two or more of."""
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((name for name, size in units.items() if seconds >= 2 * size), "seconds")
    return f"{seconds / units[unit]:,.1f} {unit}"


def _count(number: int, what: str, plural: str) -> str:
    return f"{number} {what}{plural * (number != 1)}"


def _software(environment: dict[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in environment["packages"].items()]
    commit = environment.get("commit")
    return ", ".join([*versions, f"Python {environment['python']}", *([f"commit {commit[:12]}"] if commit else [])])


def _chain(facts: Facts) -> Iterator[list[str]]:
    """Yield the terms of every part: source, role, part, licence, the answers to `ALLOWS`, and who states them."""
    for source in facts.chain:
        for part in source.parts:
            yield [source.name, source.role, part.part, part.licence, *part.answers, part.source]


def _terms(cfg: PublishConfig, facts: Facts, licence: Licence) -> str:
    lines = []
    for name, role, part, terms, *answers, stated in _chain(facts):
        allowed = ", ".join(f"{what}: {answer}" for what, answer in zip(ALLOWS.values(), answers, strict=True))
        lines.append(f"- {name} ({role}), {part}: {terms}. {allowed}. Stated: {stated}")
    return (
        f"# {licence.name}\n\n{cfg.repo_id} is not under a common licence: {licence.why}.\n\nIts towers and training "
        "data, with their terms; the strictest of them hold for the model:\n\n" + "\n".join(lines) + "\n"
    )


def _enumerated(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
