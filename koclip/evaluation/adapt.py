"""Build a classifier from labelled images: read them, fit every method in every language, choose, calibrate, measure.

The images are read as those of an evaluation set with classes (`koclip.evaluation.sets`). Equal images count once, and
images of the shots are left out of all other parts, so that nothing is measured or calibrated on what was fitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from koclip import storage
from koclip.classifiers import calibration, conformal
from koclip.classifiers.coop import Prompts
from koclip.classifiers.heads import Shots
from koclip.classifiers.selection import Fitted, HeldOut, choose, fit, method
from koclip.config import AdaptConfig, ConfigError, EvalSetConfig, check, locate
from koclip.data.formats.files import is_folder
from koclip.data.sources import open_source
from koclip.data.transforms import PixelLimit
from koclip.evaluation.embed import Embedder, Images
from koclip.evaluation.labels import few
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks.probe import draw_shots
from koclip.evaluation.tasks.zero_shot import classifier, ensemble
from koclip.metrics import Metric, gained, share
from koclip.text.classes import load_classes
from koclip.text.korean.hangul import is_syllable
from koclip.text.normalize import normalize

CLASSES = "classes.yaml"
_OWN_TEMPLATES = ("ko", "en")
_FEWEST = 2  # images; a share of one has no interval


class Candidate(NamedTuple):
    """A fitted method in a language, and its numbers; None where no image was held out."""

    language: str
    fitted: Fitted
    accuracy: Metric | None
    gain: Metric | None  # of accuracy over zero-shot in the same language, paired
    temperature: float
    errors: tuple[Metric, Metric] | None  # the calibration error before and after the temperature


@dataclass(frozen=True)
class Adapted:
    """What was read, fitted and chosen.

    Args:
        pictures: The shots and the other parts (`shifted`).
        candidates: Every method in every language; zero-shot is the first of each.
        chosen: The best of them.
        tested: The images that the numbers are of: `test`, or `held out`.
        calibrated_on: The images of temperature and threshold: `calibration`, `held out`, or "" without any.
        thresholds: The least probability of each class; None: every image gets a class.
        reason: Why there are no thresholds.
        left_out: Images left out because they are equal to another one, by part.
    """

    pictures: EvalSet
    candidates: Sequence[Candidate]
    chosen: Candidate
    tested: str
    calibrated_on: str
    calibration: HeldOut | None
    thresholds: list[float] | None
    reason: str
    left_out: Mapping[str, int] = field(default_factory=dict)


def open_pictures(config: AdaptConfig) -> EvalSet:
    """Read the shots, and the other parts as `shifted` sets of the same classes.

    Raises:
        ConfigError: a class has no image, labels do not fit the classes, or see `koclip.evaluation.sets.open_set`.
        SourceError: a source cannot be read, or has too few usable images.
    """
    source, *_ = config.parts.values()
    names = config.classes or str(_write_classes(config))
    languages = list(load_classes(names)[0].names)
    own = {language: language for language in _OWN_TEMPLATES if language in languages}
    try:
        pictures = open_set(
            EvalSetConfig(
                source=source,
                tasks=["zero_shot"],
                classes=names,
                labels=config.labels,
                templates=config.templates or own,  # type: ignore[arg-type]
                template_kind=config.template_kind,
                shifted={name: part for name, part in config.parts.items() if name != "source"},
                max_skipped_fraction=config.max_skipped_fraction,
                seed=config.seed,
            ),
            PixelLimit(config.max_image_pixels, "max_image_pixels"),
        )
    except ConfigError as error:  # this recipe's keys have no such beginning
        raise ConfigError(str(error).replace("eval.sets[].shifted.", "").replace("eval.sets[].", "")) from error
    empty = [name.key for place, name in enumerate(pictures.classes) if place not in set(pictures.labels)]
    empty += pictures.absent
    fix = "expected an image of every class: add images, or remove the class from the list"
    check(not empty, f"{source.path}, classes without an image", few(empty), fix)
    unknown = sorted(set(config.languages) - set(languages))
    check(not unknown, "languages", unknown, f"expected some of {languages}, the languages of {names}")
    return pictures


def _write_classes(config: AdaptConfig) -> Path:
    """Write the class list that the labels or the captions of the rows give, unless it exists; return its path."""
    file, source = Path(config.output_dir) / CLASSES, config.parts["source"]
    if file.exists():
        return file
    fix = "expected two or more: a folder with a folder per class, or a column of labels (source.label)"
    own = set[str]()
    if config.images and is_folder(folder := locate(config.images)):
        own = {normalize(path.name) for path in folder.iterdir() if path.is_dir()}
        places = sorted({normalize(path.parent.name) for path in folder.rglob("*") if path.is_file()})
        check(len(places) > 1, f"images: {config.images}, folders with files", places, fix)
    names: dict[str, dict[str, str]] = {}
    for row in open_source(source).iter_rows(images=False):
        label = normalize(row.label or "")
        if label and label not in names:
            names[label] = {language: normalize(texts[0]) for language, texts in row.captions.items()}
    empty = sorted(own - set(names)) if own & set(names) else []
    check(not empty, f"images: {config.images}, folders without an image", few(empty), "add images or remove them")
    check(len(names) > 1, f"{source.path}, classes", list(names), fix)
    language = "ko" if any(map(is_syllable, "".join(names))) else "en"
    entries = [{"key": label, **(names[label] or {language: label})} for label in sorted(names)]
    storage.replace_text(file, yaml.safe_dump(entries, allow_unicode=True, sort_keys=False))
    load_classes(file)  # says what is wrong with the names
    return file


def adapt(config: AdaptConfig, embedder: Embedder, pictures: EvalSet) -> Adapted:
    """Fit, choose, calibrate and measure."""
    parts, left_out = _distinct(pictures)
    embedded = {name: _embedded(embedder, part) for name, part in parts.items()}
    shots = embedded.pop("source")
    if config.shots:
        most = min(config.shots, int(shots.labels.bincount().max()))
        shots = shots.of(torch.from_numpy(draw_shots(shots.labels.numpy(), most, 0, config.seed)[0]))
    calibrated = embedded.get("calibration")
    candidates = []
    for language in config.languages or pictures.languages:
        names = [name.text(language) for name in pictures.classes]
        texts = ensemble(classifier(embedder, names, pictures.templates(language))) * embedder.encoder.scale
        fits = []
        for name in ("zero_shot", *config.methods):
            prompts = Prompts.of(embedder.encoder, names, language, config.seed) if name == "coop" else None
            fits.append(fit(method(name, prompts), texts, shots, embedded.get("validation"), config.seed))
        candidates += [_measured(language, each, fits[0], embedded.get("test"), calibrated) for each in fits]
    chosen = _chosen(candidates)
    held_out = _logits(chosen.fitted, calibrated)
    thresholds, reason = _thresholds(config, held_out, chosen.temperature, [name.key for name in pictures.classes])
    return Adapted(
        pictures=replace(pictures, images=parts["source"].images, labels=parts["source"].labels),
        candidates=candidates,
        chosen=chosen,
        tested="test" if "test" in embedded else "held out",
        calibrated_on="calibration" if calibrated else "held out" if held_out else "",
        calibration=held_out,
        thresholds=thresholds,
        reason=reason,
        left_out=left_out,
    )


def _chosen(candidates: Sequence[Candidate]) -> Candidate:
    """Return the best candidate of all languages; zero-shot is the best of the languages' zero-shots."""
    plain = [each for each in candidates if each.fitted.method == "zero_shot"]
    rates = [float(each.fitted.held_out.hits.double().mean()) for each in plain if each.fitted.held_out]
    first = plain[rates.index(max(rates))]
    ordered = [first, *(each for each in candidates if each is not first)]
    best = choose([each.fitted for each in ordered])
    return next(each for each in ordered if each.fitted is best)


def _measured(language: str, fitted: Fitted, plain: Fitted, test: Shots | None, calibrated: Shots | None) -> Candidate:
    """Measure a method on the test images, or without them on the held-out images of its choice."""
    temperature = calibration.temperature(_logits(fitted, calibrated))
    own, other = _logits(fitted, test), _logits(plain, test)
    if own is None or other is None or len(own.labels) < _FEWEST:
        return Candidate(language, fitted, None, None, temperature, None)
    hits = other.hits
    if own.rows is not None and other.rows is not None:  # the same images in the same order
        hits = hits[torch.searchsorted(other.rows, own.rows)]
    accuracy = share(own.hits)
    errors = calibration.error(own), calibration.error(own, temperature)
    return Candidate(language, fitted, accuracy, gained(share(hits), accuracy), temperature, errors)


def _logits(fitted: Fitted, part: Shots | None) -> HeldOut | None:
    """Return a classifier's logits of a part, or without the part those of its held-out images."""
    return fitted.held_out if part is None else HeldOut(fitted.head.logits(part.images), part.labels)


def _thresholds(
    config: AdaptConfig, held_out: HeldOut | None, temperature: float, classes: Sequence[str]
) -> tuple[list[float] | None, str]:
    """Return the least probability of each class, or None and the reason."""
    if config.none == "no":
        return None, "every image gets a class (none: no)"
    if held_out is None:
        return None, "no image was held out: name images for `calibration`"
    probabilities = (held_out.logits.double() / temperature).softmax(dim=1)
    own = probabilities.gather(1, held_out.labels[:, None])[:, 0]
    try:
        if config.none == "class":
            return conformal.lowest_per_class(own, held_out.labels, classes, config.alpha).tolist(), ""
        return [conformal.lowest_with_class(own, config.alpha)] * len(classes), ""
    except conformal.TooFewScoresError as error:
        return None, str(error)


def _distinct(pictures: EvalSet) -> tuple[dict[str, EvalSet], dict[str, int]]:
    """Return the parts without images that are equal to an earlier one, the shots first, and how many were left out.

    Raises:
        ConfigError: equal images have different labels, or a part has no other image.
    """
    seen: dict[bytes, tuple[int, str]] = {}
    parts, left_out = dict[str, EvalSet](), dict[str, int]()
    for name, part in {"source": pictures, **pictures.shifted}.items():
        kept = []
        for place, (digest, label) in enumerate(zip(part.images.digests, part.labels, strict=True)):
            key = part.images.rows[place].key
            if digest not in seen:
                seen[digest] = (label, key)
                kept.append(place)
            same, earlier = seen[digest]
            fix = f"expected {pictures.classes[same].key}, as of the equal image {earlier}: remove one of them"
            check(label == same, f"{name}, label of {key}", pictures.classes[label].key, fix)
        left_out[name] = len(part.labels) - len(kept)
        check(bool(kept), name, f"{len(part.labels)} images", "expected images that no earlier part has")
        rows = [part.images.rows[place] for place in kept]
        parts[name] = replace(
            part, images=Images(rows, limit=part.images.limit), labels=[part.labels[place] for place in kept]
        )
    return parts, {name: count for name, count in left_out.items() if count}


def _embedded(embedder: Embedder, part: EvalSet) -> Shots:
    return Shots(embedder.images(part.images), torch.tensor(part.labels))
