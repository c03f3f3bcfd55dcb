"""Write a model's card from its measured numbers, its configuration and the data cards."""

import re
import shlex
from collections.abc import Iterator
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from koclip import installation, storage
from koclip.config import PublishConfig, check
from koclip.evaluation.report import forgotten
from koclip.evaluation.report.table import NOTE, Cell, Line, sections
from koclip.evaluation.results import IMAGES, MAIN
from koclip.evaluation.run import notes
from koclip.evaluation.tasks import SPECS
from koclip.licences import ALLOWS, Licence, chain_rows, conclude, terms
from koclip.publishing.card_inputs import Facts
from koclip.publishing.checks import ADAPTER, CARD, LICENCE
from koclip.publishing.formats import int8
from koclip.publishing.formats.onnx import EXACT, FOLDER, INT8, SIDES
from koclip.publishing.formats.sentence_transformers import MODULES

_MARK = "<!-- Made by koclip"
_ENGLISH = {"ko": "Korean", "en": "English", "ja": "Japanese", "zh": "Chinese"}
_KOREAN = {"ko": "한국어", "en": "영어", "ja": "일본어", "zh": "중국어"}
ROUTER = "RouterModel"
_PIPELINE = "zero-shot-image-classification"
_ONLY_IMAGES, _LAST = "Images only", "Other"  # headings after those of the languages and of the specs
# By class: the tested versions of transformers, and their faults.
_VERSIONS = {
    "CLIPModel": "Tested with transformers 4.57.1, 5.23.0 and 5.24.0.",
    "ChineseCLIPModel": "Tested with transformers 4.57.1, 5.23.0 and 5.24.0. In 4.57.1 `get_text_features` of this "
    "class fails; the lines above work.",
    "VisionTextDualEncoderModel": "Tested with transformers 5.23.0 and 5.24.0. Do not use version 4: for some towers, "
    "such as CLIP's text transformer, 4.57.1 loads no weights, only warns, and uses random weights.",
    **dict.fromkeys(("AltCLIPModel", "MetaClip2Model", "SiglipModel"), "Tested with transformers 5.23.0."),
    ROUTER: "`AutoModel` and the pipelines of transformers do not load this model. sentence-transformers, MTEB and "
    "koclip do.",
}
# The folders of absolute paths in a command. They are private, except for the last part of the path.
_PARTS = r"[^\s\"'=,:\[\]{}]*[/\\]"
_FOLDERS = re.compile(rf"(?<![\w.~-])(?:~|[A-Za-z]:)?[/\\](?:{_PARTS}(?=recipes/)|(?:{_PARTS})?)")


def write_card(cfg: PublishConfig, facts: Facts) -> None:
    """Write README.md into the model's directory, and LICENSE.md if the licence is not a common one.

    Raises:
        ConfigError: koclip did not write the README.md that exists, or an input of the card is missing.
    """
    directory = Path(cfg.model)
    file = directory / CARD
    is_ours = not file.exists() or _MARK in file.read_text(encoding="utf-8")
    fix = "expected no card, or one that koclip wrote: move it away, and put its content into data cards"
    check(is_ours, "model", str(file), fix)
    card, licence = render(cfg, facts), conclude(facts.chain, cfg.license)
    storage.replace_text(file, str(card))
    (directory / LICENCE).unlink(missing_ok=True)
    if licence.name:
        storage.replace_text(directory / LICENCE, _terms(cfg, facts, licence))


def render(cfg: PublishConfig, facts: Facts, year: int | None = None) -> ModelCard:
    """Return the card with its metadata. `year` is that of publication; default: this year.

    Raises:
        ConfigError: a field of the card is empty; the message names it.
    """
    author, name = cfg.repo_id.split("/")
    licence = conclude(facts.chain, cfg.license)
    groups = _groups(facts)
    check(bool(groups), "results: metrics", [], "expected numbers of a retrieval or a classification to show")
    fields: dict[str, Any] = {
        "repo_id": cfg.repo_id,
        "name": name,
        "author": author,
        "key": re.sub(r"\W", "_", name.lower()),
        "year": year or date.today().year,
        "kind": facts.model["architectures"][0],
        "versions": _VERSIONS.get(facts.model["architectures"][0]),
        # SigLIP has no projection: its embeddings are as wide as its image tower.
        "width": facts.model.get("projection_dim") or facts.model["vision_config"]["hidden_size"],
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
        "chain": list(chain_rows(facts.chain)),
    }
    missing = [key for key, value in fields.items() if value in (None, "", [])]
    check(not missing, "the card", missing, "expected a value for each of these fields: complete their inputs")
    template = (files("koclip") / "assets" / "model_card.md").read_text(encoding="utf-8")
    data, optional = metadata(cfg, facts, licence), _optional_fields(cfg, facts)
    card: ModelCard = ModelCard.from_template(data, template_str=template, **fields, **optional)
    return card


def _optional_fields(cfg: PublishConfig, facts: Facts) -> dict[str, Any]:
    """Return the fields of the template that are empty for some models."""
    return {
        "towers": facts.towers,
        "graphs": _graphs(Path(cfg.model)),
        "sentence_transformers": (Path(cfg.model) / MODULES).is_file(),
        "reads_longer": facts.reads_longer,
        "cleans": facts.cleans,
        "prefix": facts.prefix,
        "int8": int8.read(Path(cfg.model), facts.results["fingerprint"]),
        "measured_on": [
            f"{name}: {note}" for name, data in facts.results["data"].items() for note in notes({name: data})
        ],
        "adapter": cfg.adapter and (Path(cfg.model) / ADAPTER).is_dir(),
        "forgotten": [(row.dataset, *row.texts) for row in forgotten.rows(facts.records)],
        "forgotten_note": forgotten.NOTE,
    }


def metadata(cfg: PublishConfig, facts: Facts, licence: Licence) -> ModelCardData:
    """Return the card's front matter."""
    other: dict[str, Any] = {"license_name": licence.name, "license_link": LICENCE} if licence.name else {}
    hub_data = [data_set.hub_id for data_set in facts.data if data_set.trained and data_set.hub_id]
    directory, is_router = Path(cfg.model), facts.model["architectures"][0] == ROUTER
    tags = ["clip", "koclip", *(["korean"] if "ko" in facts.languages else [])]
    tags += ["onnx", "transformers.js"] if _graphs(directory) else []  # transformers.js loads each tower
    tags += ["sentence-transformers"] if (directory / MODULES).is_file() else []
    return ModelCardData(
        language=facts.languages,
        license=licence.id,
        **other,
        base_model=facts.base_models or None,
        library_name="sentence-transformers" if is_router else "transformers",
        pipeline_tag="sentence-similarity" if is_router else _PIPELINE,
        datasets=list(dict.fromkeys(hub_data)) or None,
        tags=tags,
        model_name=cfg.repo_id.split("/")[1],
        eval_results=list(_eval_results(facts)) or None,
    )


def _graphs(directory: Path) -> dict[str, str]:
    """Return the suffixes of the ONNX graphs beside the model, by transformers.js' name of their dtype."""
    return {
        dtype: kind
        for dtype, kind in (("fp32", EXACT), ("q8", INT8))
        if all((directory / FOLDER / f"{side}{kind}.onnx").is_file() for side in SIDES)
    }


def _eval_results(facts: Facts) -> Iterator[EvalResult]:
    """Yield the shares among the main numbers, unrounded."""
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


def _groups(facts: Facts) -> dict[str, list[tuple[str, ...]]]:
    """Return rows (data set, label, value, interval, n) by heading: the languages, then the headings of the specs."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for section in sections([facts.records], {}):
        for group, lines in section.groups.items():
            for line in lines:
                (cell,) = line.cells
                if cell is None or (group != MAIN and not line.spec.card):
                    continue
                label = line.label if group == MAIN else f"{group}: {line.label}"
                label += f" ({cell.note})" * bool(cell.note)
                row = (section.name, label, cell.value + " *" * cell.marked, cell.interval, f"{line.n:,}")
                language = _ONLY_IMAGES if line.language == IMAGES else _ENGLISH.get(line.language, _LAST)
                rows.setdefault(line.spec.card or language, []).append(row)
    order = [*_ENGLISH.values(), *(spec.card for spec in SPECS), _ONLY_IMAGES, _LAST]
    return {heading: rows[heading] for heading in order if heading in rows}


def _headlines(facts: Facts) -> Iterator[tuple[str, str, str, str]]:
    """Yield the numbers of the Korean summary: name, value, interval, data set.

    They are the first number of each headline; without headlines, the first share.
    """
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
        yield korean, f"{cell.value} %", cell.interval.replace(" to ", "~"), data


def _training(cfg: PublishConfig, facts: Facts) -> Iterator[tuple[str, str]]:
    config, environment = facts.config, facts.environment
    method = config.get("align", {}).get("method")
    yield "method", f"alignment, {method}" if method else "contrastive, from random weights"
    if facts.base_models:
        yield "base models", ", ".join(f"[{hub_id}](https://huggingface.co/{hub_id})" for hub_id in facts.base_models)
    pairs = config["train"]["batch_size"] * environment["num_processes"]
    yield "steps", f"{config['train']['num_steps']:,} of {pairs:,} pairs"
    command = installation.command(environment["command"])  # a run of an older koclip names a file
    yield "command", f"`{shlex.join(_FOLDERS.sub('', word) for word in command)}`"
    yield "hardware", f"{_hardware(environment)}, {_count(environment['num_processes'], 'process', 'es')}"
    measured = f"{_duration(facts.seconds)}, from the start to the last step" if facts.seconds else None
    if time := cfg.training_time or measured:
        yield "time", time
    yield "software", _software(environment)


def _measured(facts: Facts) -> str:
    environment = facts.results["environment"]
    for name in ("packages", "python", "gpus", "cpu_threads"):
        check(name in environment, f"results: environment.{name}", None, "expected the environment of the measurement")
    return (
        f"Measured on {_hardware(environment)}: {_software(environment)}. "
        f"Fingerprint of the measured model: `{facts.results['fingerprint']}`."
    )


def _hardware(environment: dict[str, Any]) -> str:
    return _enumerated(environment["gpus"]) or _count(environment["cpu_threads"], "CPU thread", "s")


def _duration(seconds: float) -> str:
    """Return a time in the largest unit in which it is 2 or more."""
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((name for name, size in units.items() if seconds >= 2 * size), "seconds")
    return f"{seconds / units[unit]:,.1f} {unit}"


def _count(number: int, what: str, plural: str) -> str:
    return f"{number} {what}{plural * (number != 1)}"


def _software(environment: dict[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in environment["packages"].items()]
    commit = environment.get("commit")
    return ", ".join([*versions, f"Python {environment['python']}", *([f"commit {commit[:12]}"] if commit else [])])


def _terms(cfg: PublishConfig, facts: Facts, licence: Licence) -> str:
    return (
        f"# {licence.name}\n\n{cfg.repo_id} is not under a common licence: {licence.why}.\n\nIts towers and training "
        f"data have these terms. The strictest of them apply to the model:\n\n{terms(chain_rows(facts.chain))}\n"
    )


def _enumerated(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
