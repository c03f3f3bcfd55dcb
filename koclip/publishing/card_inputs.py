"""Read the inputs of a model's card: the run's configuration, environment and metrics, the towers, the data cards."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

from koclip import installation, storage
from koclip.config import ConfigError, PublishConfig, SourceConfig, all_faults, check
from koclip.encoders import load
from koclip.evaluation.results import Record, records_of
from koclip.evaluation.tasks import SPECS
from koclip.licences import UNSTATED, DataCard, Part, Source, find_data_card, read_data_card, stated_parts
from koclip.metrics import Metric
from koclip.models import open_clip
from koclip.models.pretrained import is_hub_id, read_processor
from koclip.text.normalize import normalize
from koclip.text.prefix import prefix_of

_EVALUATION = "evaluation"
_OFFSET = 2  # positions that a RoBERTa does not use
_DIRTY = "\ufeff고양이\u200b가 \u3164 창가에\u00ad [SEP] 앉아 <|endoftext|> 있다</s>"
_SURROUNDINGS = ("commit", "python", "packages", "cpu_threads", "gpus", "num_processes", "command")


@dataclass(frozen=True)
class DataSet:
    """A data set with the content of its card."""

    name: str
    roles: tuple[str, ...]  # of "training", "training of the base", "evaluation"
    card: DataCard
    version: str
    hub_id: str | None = None

    @property
    def role(self) -> str:
        """Its roles as text."""
        return ", ".join(self.roles)

    @property
    def rows(self) -> str:
        """The number of rows by split."""
        return ", ".join(
            f"{split} {count:,}" if isinstance(count, int) else f"{split}: {count}"
            for split, count in self.card.rows.items()
        )

    @property
    def licence(self) -> str:
        """The licence of every part."""
        return "; ".join(f"{part.part}: {part.licence}" for part in self.card.licenses)

    @property
    def trained(self) -> bool:
        """Whether the model or its base was trained on it."""
        return any(role != _EVALUATION for role in self.roles)


@dataclass(frozen=True)
class Facts:
    """All inputs of a model's card."""

    model: dict[str, Any]  # config.json
    max_tokens: int
    reads_longer: bool  # whether the class embeds texts longer than it was trained on
    cleans: bool  # whether the tokenizer cleans texts
    prefix: str  # that the tokenizer adds to every text
    image_size: int
    config: dict[str, Any]  # the run's config.yaml
    environment: dict[str, Any]
    seconds: float | None  # of training; None if unknown
    results: dict[str, Any]
    records: list[Record]
    data: list[DataSet]
    towers: list[Source]
    base_models: list[str]
    languages: list[str]

    @property
    def chain(self) -> list[Source]:
        """The sources that decide the model's licence: towers and training data."""
        return [
            *self.towers,
            *(Source(each.role, each.name, each.card.licenses) for each in self.data if each.trained),
        ]


def gather(cfg: PublishConfig) -> Facts:
    """Read all inputs of the card of `cfg.model`.

    Raises:
        ConfigError: an input is missing; the message names it and says what to do.
    """
    directory = Path(cfg.model)
    cards = [*([Path(cfg.data_cards)] if cfg.data_cards else []), installation.files("data_cards")]
    run = directory.resolve().parent
    config = _read_config(run)
    results = _read_results(cfg, run)
    published = {"model.clip": cfg.clip, "model.text_encoder": cfg.text_encoder}
    measured = {name: _Place(_measured_path(described)) for name, described in results["data"].items()}
    with all_faults():  # name every missing card at once, before the Hub is asked
        for name, place in [*_trained_on(config, published), *measured.items()]:
            _find_card(name, place.path, cards)
    data = list(_training_data(config, cards, "training"))
    towers: list[Source] = []
    for key, name in _towers(config):
        base_towers, base_data = _tower(key, published[key] or name, cards, cfg.licenses)
        towers, data = towers + base_towers, data + base_data
    data += [_data_set(name, _EVALUATION, cards, place) for name, place in measured.items()]
    log = storage.read_lines(run / "metrics.jsonl")
    model = _read(directory / "config.json")
    processor: Any = read_processor(directory, "model")
    tokenizer = processor.tokenizer
    max_tokens = _needed(directory / "tokenizer_config.json", "model_max_length")
    facts = Facts(
        model=model,
        max_tokens=max_tokens,
        reads_longer=model.get("text_config", {}).get("max_position_embeddings", 0) > max_tokens + _OFFSET,
        cleans=_cleans(tokenizer),
        prefix=prefix_of(tokenizer),
        image_size=_image_size(directory / "preprocessor_config.json"),
        config=config,
        environment={name: _needed(run / "environment.json", name) for name in _SURROUNDINGS},
        seconds=log[-1].get("seconds") if log else None,
        results=results,
        records=records_of({name: Metric.from_dict(values) for name, values in results["metrics"].items()}, SPECS),
        data=_once(data),
        towers=list(dict.fromkeys(towers)),
        base_models=list(dict.fromkeys(tower.name for tower in towers if tower.role in ("clip", "text_encoder"))),
        languages=_languages(config),
    )
    _check_measured(cfg, results)
    return facts


def _once(data: list[DataSet]) -> list[DataSet]:
    """Merge the roles of equal data sets."""
    by_name: dict[str, DataSet] = {}
    for data_set in data:
        before = by_name.get(data_set.name, data_set)
        by_name[data_set.name] = replace(before, roles=tuple(dict.fromkeys((*before.roles, *data_set.roles))))
    return list(by_name.values())


def _read_config(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    check(file.is_file(), "model", str(file), "expected the training run's config.yaml beside the model's directory")
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for section in ("data", "model", "train"):
        check(section in config, f"{file}: {section}", None, "expected the configuration of a training recipe")
    return config


def _read_results(cfg: PublishConfig, run: Path) -> dict[str, Any]:
    file, action = Path(cfg.results) if cfg.results else run / "results.json", _measure_again(cfg)
    check(file.is_file(), "results", str(file), f"no such file; {action}")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for name in ("model", "fingerprint", "data", "metrics", "environment"):
        value = results.get(name)
        check(bool(value), f"results: {file}, {name}", value, f"expected a value in this file; {action}")
    return results


def _check_measured(cfg: PublishConfig, results: Mapping[str, Any]) -> None:
    """Check that the numbers were measured on the model to publish, by its fingerprint."""
    own = load(cfg.model, "cpu").fingerprint()
    other = f"the numbers are of {results['model']}, which is another model or has changed since"
    expected = f"expected {own}, that of {cfg.model}: {other}; {_measure_again(cfg)}"
    check(results["fingerprint"] == own, "results: fingerprint", results["fingerprint"], expected)


def _measure_again(cfg: PublishConfig) -> str:
    command = f"koclip evaluate --model {shlex.quote(cfg.model)} --output_dir runs/measured"
    return f"measure it: {command}, and publish with --results runs/measured/results.json"


def _training_data(config: Mapping[str, Any], cards: Sequence[Path], role: str) -> Iterator[DataSet]:
    for name, place in _sources(config):
        yield _data_set(name, role, cards, place)


def _sources(config: Mapping[str, Any]) -> Iterator[tuple[str, "_Place"]]:
    """Yield the names and the places of a run's training data."""
    for values in config["data"]["sources"]:
        source = SourceConfig(path=values["path"], name=values.get("name"))
        hub_id = source.path if is_hub_id(source.path) and "/" in source.path else None
        yield source.short_name, _Place(source.path, hub_id, values.get("revision"))


def _trained_on(config: Mapping[str, Any], published: Mapping[str, str | None]) -> Iterator[tuple[str, "_Place"]]:
    """Yield the training data of a run and of the local runs that it started from, unless a Hub id replaces them."""
    yield from _sources(config)
    for key, name in _towers(config):
        run = Path(name).resolve().parent
        if not published.get(key) and not is_hub_id(name.removeprefix("auto:")) and (run / "config.yaml").is_file():
            yield from _trained_on(_read_config(run), {})


def _measured_path(described: Mapping[str, Any]) -> str | None:
    """Return the path of an evaluation's data, as results.json describes it."""
    path: str | None = described.get("source", {}).get("source", {}).get("path")
    return path


def _find_card(name: str, path: str | None, cards: Sequence[Path]) -> Path:
    """Return the data card of a data set, as `find_data_card`; it must exist."""
    file = find_data_card(name, path, cards) or cards[0] / f"{name}.md"
    write = "write it, as data_cards/README.md of koclip says, and name its directory: --data_cards"
    also = f", nor one that lists {path}" if path else ""
    expected = f"no such file{also}; {write}"
    check(file.is_file(), f"the data card of {name}", str(file), expected)
    return file


class _Place(NamedTuple):
    """The place that a data set was read from."""

    path: str | None
    hub_id: str | None = None
    revision: str | None = None


def _data_set(name: str, role: str, cards: Sequence[Path], place: _Place) -> DataSet:
    file = _find_card(name, place.path, cards)
    card = read_data_card(file)
    checksums = [f"{Path(path).name} sha256 {digest[:12]}" for path, digest in card.files.items()]
    revision = place.revision or (card.revision if place.path == (card.hub or place.path) else None)
    versions = [f"revision {revision}"] if revision else checksums
    unknown = "generated by koclip" if place.path == "scenes" else "not stated"
    return DataSet(name, (role,), card, ", ".join(versions) or unknown, place.hub_id)


def _towers(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys and the names of the models that an alignment started from."""
    if "align" in config:
        yield "model.clip", config["model"]["clip"]
        if config["model"]["text_encoder"] not in (None, "same"):
            yield "model.text_encoder", config["model"]["text_encoder"]


def _tower(
    key: str, name: str, cards: Sequence[Path], licenses: Mapping[str, str]
) -> tuple[list[Source], list[DataSet]]:
    """Return the towers and the training data behind a model: of a Hub model itself, of a local run its own bases."""
    name, role = open_clip.hub_id(name) or name.removeprefix("auto:"), key.removeprefix("model.")
    if is_hub_id(name):
        return [Source(role, name, _parts(name, licenses))], []
    run = Path(name).resolve().parent
    expected = f"expected a model in the directory of its run, which says its licence; else use --{role} <its Hub id>"
    check((run / "config.yaml").is_file(), key, name, expected)
    config = _read_config(run)
    towers: list[Source] = []
    data = list(_training_data(config, cards, "training of the base"))
    for inner, base in _towers(config):
        base_towers, base_data = _tower(inner, base, cards, licenses)
        towers, data = towers + base_towers, data + base_data
    return towers, data


def _parts(hub_id: str, licenses: Mapping[str, str]) -> tuple[Part, ...]:
    """Return the terms of a Hub model: those in `licenses`, else those of its card."""
    if hub_id in licenses:
        return stated_parts(licenses[hub_id], "the publisher of this model")
    try:
        info = HfApi().model_info(hub_id)
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"licenses: the licence of {hub_id} is unknown, because the Hub answered: {reason} Give it: "
            f"--licenses '{{{hub_id}: mit}}', or {UNSTATED} if it has none"
        ) from error
    card: Any = info.card_data or {}
    words = " ".join(str(card.get(key)) for key in ("license_name", "license_link") if card.get(key))
    stated = card.get("license") or UNSTATED
    several = [str(licence) for licence in (stated if isinstance(stated, list) else [stated])]
    return stated_parts(several, f"huggingface.co/{hub_id}", words)


def _languages(config: Mapping[str, Any]) -> list[str]:
    """Return the languages of the training captions."""
    languages = []
    for source in config["data"]["sources"]:
        weights = source.get("languages")
        languages += [language for language in source["captions"] if weights is None or weights.get(language, 0) > 0]
    check(bool(languages), "data.sources[].captions", [], "expected the languages of the captions in config.yaml")
    return list(dict.fromkeys(languages))


def _cleans(tokenizer: Any) -> bool:
    dirty, clean = (tokenizer(text)["input_ids"] for text in (_DIRTY, normalize(_DIRTY)))
    return bool(dirty == clean)


def _image_size(file: Path) -> int:
    values = _read(file)
    size = values.get("crop_size") or values.get("size") or {}
    side = int(size.get("height") or size.get("shortest_edge") or 0)
    check(side > 0, f"{file}: size", size, "expected the height of the model's input images")
    return side


def _needed(file: Path, name: str) -> Any:
    values = _read(file)
    known = name in values and values[name] not in ("", {})
    check(known, f"{file}: {name}", values.get(name), "expected a value for the card")
    return values[name]


def _read(file: Path) -> dict[str, Any]:
    check(file.is_file(), "model", str(file), "no such file: publish a directory that koclip wrote")
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"model: {file} cannot be read: {error}; publish a directory that koclip wrote") from error
    return values
