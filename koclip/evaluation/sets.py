"""Evaluation sets: images with captions, classes, questions or ratings; and how they are opened."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from koclip.config import ConfigError, EvalSetConfig, SourceConfig, check
from koclip.config.evaluation import CAPTIONED, CLASS_TASKS
from koclip.data.sources import Row, Skip, SourceError, open_source
from koclip.data.transforms import CORRUPTIONS, PIXEL_LIMIT, ImageError, PixelLimit, decode
from koclip.evaluation.embed import Images, first_images, first_rows, merged
from koclip.evaluation.labels import NAMED, few, numbering, read_labels
from koclip.text.classes import ClassName, load_classes, templates_of_kind
from koclip.text.normalize import normalize, paired, usable

_FEWEST = 2  # images; a ranking of one image says nothing


class Question(NamedTuple):
    """A multiple-choice task: which candidate text fits each image?"""

    name: str
    images: Images
    candidates: dict[str, list[list[str]]]  # by language, then by image
    answers: list[int]  # by image: the index of the right candidate


class Ratings(NamedTuple):
    """People's ratings of captions for images."""

    language: str
    rows: list[tuple[int, str, float]]  # index of the image, caption, rating


@dataclass(frozen=True)
class EvalSet:
    """An opened data set.

    With classes, each row is one labelled image. Without classes, rows with equal images are one image with all their
    captions; `captioned` is this view of a set with classes.
    """

    name: str
    config: EvalSetConfig
    images: Images
    captions: list[dict[str, list[str]]]  # by image, then by language; "" where a caption is missing, as in a `Row`
    gallery: dict[str, list[str]]  # captions without an image, by language
    questions: list[Question] = field(default_factory=list)
    ratings: Ratings | None = None
    skipped: list[Skip] = field(default_factory=list)  # unusable rows; `train`, `shifted` and gallery have their own
    classes: list[ClassName] = field(default_factory=list)  # if empty, the captions are the names
    labels: list[int] = field(default_factory=list)  # each image's index in `classes`
    train: "EvalSet | None" = None
    shifted: "dict[str, EvalSet]" = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    num_rows: int | None = None  # rows read, skipped rows included; None: the set was not read from a source
    cut: bool = False  # whether reading stopped at `max_images`
    labels_by: str = ""  # with classes: "key", or "number: " and what the first and last numbers mean
    absent: list[str] = field(default_factory=list)  # keys of the classes that `present_classes` left out
    in_source: int = 0  # of `train`: rows left out because the source has the same image
    gallery_rows: int = 0  # rows read
    gallery_skipped: list[Skip] = field(default_factory=list)  # gallery rows without a usable caption

    @property
    def tasks(self) -> list[str]:
        """The tasks of the configuration, and `multiple_choice` if the data has questions."""
        return list(dict.fromkeys([*self.config.tasks, *(["multiple_choice"] if self.questions else [])]))

    @property
    def languages(self) -> list[str]:
        """Languages of the classes; without classes, the languages in which at least one image has a caption."""
        if self.classes:
            return list(self.classes[0].names)
        return [name for name in self.config.source.captions if any(name in captions for captions in self.captions)]

    @cached_property
    def captioned(self) -> "EvalSet":
        """This set without classes: equal images are merged, and images without captions are left out."""
        if not self.classes:
            return self
        by_image: dict[bytes, list[Row]] = {}
        for row, digest in zip(self.images.rows, self.images.digests, strict=True):
            by_image.setdefault(digest, []).append(row)
        rows = [row for row in map(merged, by_image.values()) if row.captions]
        captions = [row.captions for row in rows]
        return replace(self, images=Images(rows), captions=captions, classes=[], labels=[])

    def texts(self, language: str) -> list[list[str]]:
        """Return each image's usable captions in a language."""
        return [usable(captions.get(language, [])) for captions in self.captions]

    def templates(self, language: str) -> list[str]:
        """Return the templates of a language; default: the bare name."""
        templates = self.config.templates.get(language, ["{}"])
        return templates_of_kind(templates, self.config.template_kind, f"eval.sets[].templates.{language}")

    @property
    def used_templates(self) -> dict[str, list[str]]:
        """The templates by language; {} if no task uses them."""
        used = set(CLASS_TASKS) & set(self.config.tasks)
        return {language: self.templates(language) for language in self.languages} if used else {}

    def pairs(self, first: str, second: str) -> list[list[tuple[str, str]]]:
        """Return by image its pairs of captions in two languages: those at the same index, if both are usable.

        An image whose numbers of captions differ between the languages has no pairs.
        """
        both = [(captions.get(first, []), captions.get(second, [])) for captions in self.captions]
        return [[(own[place], other[place]) for place in paired(own, other) or ()] for own, other in both]

    def all_skipped(self) -> list[Skip]:
        """Return the rows left out of this set, its shifted sets, its training images and its gallery."""
        parts = [self, *self.shifted.values(), *([self.train] if self.train else [])]
        return [*(skip for part in parts for skip in part.skipped), *self.gallery_skipped]


def open_set(config: EvalSetConfig, limit: PixelLimit = PIXEL_LIMIT) -> EvalSet:
    """Read a set's captions and check its images. Unusable rows are left out and listed in `skipped`.

    Raises:
        SourceError: a source cannot be opened, has too few usable rows or too large a share of unusable rows.
        ConfigError: a label is in no class, fewer than two classes have images, a template or a corruption does not
            exist or does not fit, or `train` has no image of a class that the source does not have too.
    """
    listed = load_classes(config.classes) if config.classes else []
    _check_names(config, listed)
    parts = {name: _read_part(config, name, source, limit) for name, source in config.parts.items()}
    gallery, gallery_rows, gallery_skipped = _gallery(config)
    labels_by, classes, warnings = "", listed, list[str]()
    if listed:
        labels_by, labels = read_labels({name: part.images.rows for name, part in parts.items()}, listed, config)
        classes, warnings = _present(listed, set(labels["source"]), config, parts["source"].cut)
        places = [classes.index(name) if name in classes else None for name in listed]
        parts = {
            name: _labelled(part, config.parts[name], [places[label] for label in labels[name]], classes)
            for name, part in parts.items()
        }
    whole = parts["source"]
    _check_captions(whole)
    return replace(
        whole,
        gallery=gallery,
        gallery_rows=gallery_rows,
        gallery_skipped=gallery_skipped,
        train=_without_source(parts["train"], whole) if config.train else None,
        shifted={name: parts[f"shifted.{name}"] for name in config.shifted},
        warnings=warnings,
        labels_by=f"number: {numbering([name.key for name in listed])}" if labels_by == "number" else labels_by,
        absent=[name.key for name in listed if name not in classes],
    )


def _check_captions(whole: EvalSet) -> None:
    """Check that every language of the tasks has enough captions to rank and to compare."""
    languages, tasks = whole.config.source.captions, set(whole.config.tasks) & set(CAPTIONED)
    captioned = whole.captioned if languages else whole
    images, expected = len(captioned.images), f"expected {_FEWEST} or more for {sorted(tasks)}"
    got = f"captions of {images} different images of {whole.name}"
    check(not tasks or images >= _FEWEST, "eval.sets[].source.captions", got, expected)
    for language in languages:
        count = sum(map(bool, captioned.texts(language)))
        expected = f"expected {_FEWEST} or more images with a caption in {language}, or none: remove the language"
        check(count != 1, f"eval.sets[].source.captions.{language}", f"{count} image of {whole.name}", expected)
    for first, second in itertools.combinations(languages if "languages" in tasks else (), 2):
        count = sum(map(bool, captioned.pairs(first, second)))
        expected = f"expected {_FEWEST} or more images with equally many captions in both languages"
        got = f"{count} images of {whole.name} to compare in {first} and {second}"
        check(count >= _FEWEST, "eval.sets[].tasks: languages", got, expected)


def _check_names(config: EvalSetConfig, classes: Sequence[ClassName]) -> None:
    """Check languages, templates and corruptions before images are read."""
    if classes:
        unknown = sorted(set(config.templates) - set(classes[0].names))
        known = f"expected languages of {config.classes}: {list(classes[0].names)}"
        check(not unknown, "eval.sets[].templates", unknown, known)
    for language, templates in config.templates.items():
        templates_of_kind(templates, config.template_kind, f"eval.sets[].templates.{language}")
    unknown = sorted(set(config.corruptions) - set(CORRUPTIONS))
    check(not unknown, "eval.sets[].corruptions", unknown, f"expected some of {list(CORRUPTIONS)}")


def _read_part(config: EvalSetConfig, part: str, source: SourceConfig, limit: PixelLimit) -> EvalSet:
    """Read a source of the set: a row for each image. Rows without an image, a label or a caption are skipped."""
    opened, most = open_source(source), 0 if part == "train" else config.max_images
    if config.classes:
        read = first_rows(opened.iter_rows(), most)
    else:
        read = first_images(opened.iter_rows(), most, streamed=opened.size is None)
    rows, skipped, cut = list[Row](), list[Skip](), False
    by_image: dict[bytes, list[Row]] = {}
    for row, content in read:
        if content is None:
            cut = True
            continue
        equal = by_image.setdefault(content, [])
        try:
            if not (normalize(row.label or "") if config.classes else row.captions):
                raise ImageError("no class" if config.classes else "no usable caption")
            if not equal:
                decode(row.image, *limit)
        except ImageError as error:
            skipped.append(Skip(row.key, str(error), source.path))
        else:
            rows.append(row)
            equal.append(row)
    skipped += [] if cut else opened.left_out  # of a cut source, nobody knows which belong to the rows read
    num_rows = len(rows) + len(skipped)
    if not config.classes:
        rows = [merged(equal) for equal in by_image.values() if equal]
    if len(rows) < _FEWEST:
        raise SourceError(
            f"evaluation source {source.path!r} has {len(rows)} usable images in {num_rows} rows, expected {_FEWEST} "
            f"or more. Left out: {len(skipped)} {_reasons(skipped)}"
        )
    _check_share(config, part, source, skipped, num_rows)
    captions, images = [row.captions for row in rows], Images(rows, limit=limit)
    return EvalSet(source.short_name, config, images, captions, {}, skipped=skipped, num_rows=num_rows, cut=cut)


def _check_share(
    config: EvalSetConfig, part: str, source: SourceConfig, skipped: Sequence[Skip], num_rows: int
) -> None:
    share = config.max_skipped_fraction
    if len(skipped) > share * num_rows:
        raise SourceError(
            f"eval.sets[].max_skipped_fraction: {len(skipped)} of {num_rows} rows of {source.path!r} ({part}) cannot "
            f"be used, more than {share:.0%}: {_reasons(skipped)}"
        )


def _reasons(skipped: Sequence[Skip]) -> str:
    return "; ".join(f"{skip.key}: {skip.reason}" for skip in skipped[:NAMED])


def _labelled(part: EvalSet, source: SourceConfig, labels: Sequence[int | None], classes: list[ClassName]) -> EvalSet:
    """Add the classes and each row's index in them; rows with the index None, whose class is left out, are skipped."""
    rows = list(zip(part.images.rows, labels, strict=True))
    kept = [(row, label) for row, label in rows if label is not None]
    if len(kept) < _FEWEST:
        raise SourceError(
            f"evaluation source {source.path!r} has {len(kept)} images of the classes that the set's source has, "
            f"expected {_FEWEST} or more"
        )
    reason = "the source has no image of its class, {} (present_classes)"
    absent = [Skip(row.key, reason.format(row.label), source.path) for row, label in rows if label is None]
    return replace(
        part,
        images=Images([row for row, _ in kept], limit=part.images.limit),
        captions=[row.captions for row, _ in kept],
        skipped=[*part.skipped, *absent],
        classes=classes,
        labels=[label for _, label in kept],
    )


def _without_source(train: EvalSet, source: EvalSet) -> EvalSet:
    """Leave out of `train` the images that the source has too: a probe must not be tested on its training images.

    Raises:
        ConfigError: no image is left, or none of a class that the source has.
    """
    tested = set(source.images.digests)
    kept = [place for place, digest in enumerate(train.images.digests) if digest not in tested]
    left_out = [train.images.rows[place].key for place in range(len(train.images)) if place not in set(kept)]
    path = train.config.train.path if train.config.train else ""
    check(
        bool(kept),
        "eval.sets[].train",
        path,
        f"expected images that the source does not have: it has all {len(left_out)} of them. Use other images, or "
        "remove train: then half of the source trains the probe and the other half tests it",
    )
    labels = [train.labels[place] for place in kept]
    lacking = [source.classes[label].key for label in sorted(set(source.labels) - set(labels))]
    check(not lacking, "eval.sets[].train", path, f"expected images of every tested class; none is of {few(lacking)}")
    return replace(
        train,
        images=Images([train.images.rows[place] for place in kept], limit=train.images.limit),
        captions=[train.captions[place] for place in kept],
        labels=labels,
        skipped=[*train.skipped, *(Skip(key, "the source has the same image", path) for key in left_out)],
        in_source=len(left_out),
    )


def _present(
    classes: list[ClassName], labels: set[int], config: EvalSetConfig, cut: bool
) -> tuple[list[ClassName], list[str]]:
    """Leave out classes without an image if `present_classes`, else warn; return the classes and the warnings."""
    absent = [name.key for place, name in enumerate(classes) if place not in labels]
    warnings = []
    short_name = config.source.short_name
    if absent and (cut or not config.present_classes):
        effect = "are left out" if config.present_classes else "can only be wrong answers"
        advice = "" if config.present_classes else "; present_classes: true leaves them out"
        if cut:
            advice = f"; max_images reads the first {config.max_images} rows, and the rest may have images of them"
        warnings.append(
            f"{short_name}: {len(absent)} of {len(classes)} classes have no image and {effect}: {few(absent)}{advice}"
        )
    kept = [name for name in classes if name.key not in absent] if config.present_classes else classes
    if len(kept) < 2:
        raise ConfigError(
            f"eval.sets[].classes: {short_name} has one class, {kept[0].key!r}, so every answer would be right; "
            "expected two or more"
        )
    return kept, warnings


def _gallery(config: EvalSetConfig) -> tuple[dict[str, list[str]], int, list[Skip]]:
    """Return the gallery's captions by language, the number of its rows, and its rows without a usable caption."""
    gallery: dict[str, list[str]] = {}
    skipped: list[Skip] = []
    num_rows = 0
    for source in config.gallery:
        rows = [row.captions for row in open_source(source).iter_rows(images=False)]
        for captions in rows:
            for language, texts in captions.items():
                gallery.setdefault(language, []).extend(usable(texts))
        keys = (f"{source.short_name}/{number}" for number, captions in enumerate(rows) if not captions)
        unusable = [Skip(key, "no usable caption", source.path) for key in keys]
        _check_share(config, "gallery", source, unusable, len(rows))
        skipped, num_rows = [*skipped, *unusable], num_rows + len(rows)
    return gallery, num_rows, skipped
