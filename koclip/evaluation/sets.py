"""Evaluation sets: images with their captions, classes, questions or ratings; and how they are opened."""

import itertools
from collections.abc import Iterator, Sequence
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

_FEWEST = 2  # images: nothing can be ranked among one


class Question(NamedTuple):
    """A multiple-choice task: which candidate text fits each image?"""

    name: str
    images: Images
    candidates: dict[str, list[list[str]]]  # by language, then by image
    answers: list[int]  # by image: the place of the right candidate


class Ratings(NamedTuple):
    """People's ratings of captions for images."""

    language: str
    rows: list[tuple[int, str, float]]  # place of the image, caption, rating


@dataclass(frozen=True)
class EvalSet:
    """A data set, opened.

    Rows of equal images are one image with all their captions. In a set of classes each row is a labelled image of its
    own; tasks of captions use `captioned` there.
    """

    name: str
    config: EvalSetConfig
    images: Images
    captions: list[dict[str, list[str]]]  # by image, then by language, in places as a `Row` has them
    gallery: dict[str, list[str]]  # captions that belong to no image, by language
    questions: list[Question] = field(default_factory=list)
    ratings: Ratings | None = None
    skipped: list[Skip] = field(default_factory=list)  # rows left out, not those of `train`, `shifted` and gallery
    classes: list[ClassName] = field(default_factory=list)  # none: captions are the names
    labels: list[int] = field(default_factory=list)  # each image's place in `classes`
    train: "EvalSet | None" = None
    shifted: "dict[str, EvalSet]" = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    num_rows: int | None = None  # read of its source, `skipped` among them; None: it was not read from one
    cut: bool = False  # `max_images` left rows unread
    labels_by: str = ""  # "key", or "number: " and what the numbers stand for; where there are classes
    absent: list[str] = field(default_factory=list)  # keys of the classes that `present_classes` left out
    in_source: int = 0  # of `train`: rows left out because the source holds the same image
    gallery_rows: int = 0  # read
    gallery_skipped: list[Skip] = field(default_factory=list)  # of these, rows without a usable caption

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that are asked for, and of those that the data brings with it."""
        return list(dict.fromkeys([*self.config.tasks, *(["multiple_choice"] if self.questions else [])]))

    @property
    def languages(self) -> list[str]:
        """Languages of the classes; without classes, those that at least one image has a caption in."""
        if self.classes:
            return list(self.classes[0].names)
        return [name for name in self.config.source.captions if any(name in captions for captions in self.captions)]

    @cached_property
    def captioned(self) -> "EvalSet":
        """This set without classes: equal images are merged, and images without captions are left out."""
        if not self.classes:
            return self
        by_image: dict[bytes, list[Row]] = {}
        for row, digest in zip(self.images.rows, self.images.digests(), strict=True):
            by_image.setdefault(digest, []).append(row)
        rows = [row for row in map(merged, by_image.values()) if row.captions]
        captions = [row.captions for row in rows]
        return replace(self, images=Images(rows), captions=captions, classes=[], labels=[])

    def texts(self, language: str) -> list[list[str]]:
        """Return each image's usable captions in a language."""
        return [usable(captions.get(language, [])) for captions in self.captions]

    def templates(self, language: str) -> list[str]:
        """Return the templates of a language: those listed, or those of a file, or the bare name."""
        asked = self.config.templates.get(language, ["{}"])
        return templates_of_kind(asked, self.config.template_kind, f"eval.sets[].templates.{language}")

    @property
    def used_templates(self) -> dict[str, list[str]]:
        """The templates that the classes are put in, by language; none if no task does."""
        used = set(CLASS_TASKS) & set(self.config.tasks)
        return {language: self.templates(language) for language in self.languages} if used else {}

    def pairs(self, first: str, second: str) -> list[list[tuple[str, str]]]:
        """Return each image's captions in two languages that correspond: both stand at the same place.

        Images with unequal numbers of places have none.
        """
        both = [(captions.get(first, []), captions.get(second, [])) for captions in self.captions]
        return [[(own[place], other[place]) for place in paired(own, other) or ()] for own, other in both]

    def everything(self) -> "list[EvalSet]":
        """Return this set and those it is compared with or trained on."""
        return [self, *self.shifted.values(), *([self.train] if self.train else [])]

    def all_skipped(self) -> list[Skip]:
        """Return the rows left out of this set and of all that belong to it."""
        return [*(skip for part in self.everything() for skip in part.skipped), *self.gallery_skipped]


class _Rows(NamedTuple):
    """The usable rows of a part, and the others."""

    rows: list[Row]  # without classes, one row for each image
    skipped: list[Skip]
    num_rows: int  # read
    cut: bool
    limit: PixelLimit  # of an image


def open_set(config: EvalSetConfig, limit: PixelLimit = PIXEL_LIMIT) -> EvalSet:
    """Read a set's captions and check its images; unusable rows are left out and listed in `skipped`.

    Raises:
        SourceError: a source cannot be opened, has too few usable rows or too large a share of unusable ones.
        ConfigError: labels are not of the listed classes, or fewer than two classes have images; templates are of other
            languages or cannot be filled; there is no such corruption; `train` holds nothing but images of the source,
            or lacks a class.
    """
    listed = load_classes(config.classes) if config.classes else []
    _check_names(config, listed)
    read = {part: _usable(config, part, source, limit) for part, source in config.parts.items()}
    gallery, gallery_rows, gallery_skipped = _gallery(config)
    by, places = "", {part: [0] * len(own.rows) for part, own in read.items()}
    classes: list[ClassName] = []
    warnings: list[str] = []
    if listed:
        by, places = read_labels({part: own.rows for part, own in read.items()}, listed, config)
        classes, warnings = _present(listed, set(places["source"]), config, read["source"].cut)
    new = {place: classes.index(name) for place, name in enumerate(listed) if name in classes} or {0: 0}
    opened = {
        part: _part(config, source, read[part], [new.get(place) for place in places[part]], classes)
        for part, source in config.parts.items()
    }
    whole = opened["source"]
    _check_captions(whole)
    return replace(
        whole,
        gallery=gallery,
        gallery_rows=gallery_rows,
        gallery_skipped=gallery_skipped,
        train=_apart(opened["train"], whole) if config.train else None,
        shifted={name: opened[f"shifted.{name}"] for name in config.shifted},
        warnings=warnings,
        labels_by=f"number: {numbering([name.key for name in listed])}" if by == "number" else by,
        absent=[name.key for name in listed if name not in classes],
    )


def _check_captions(whole: EvalSet) -> None:
    """Make sure that there is something to rank, and to compare, in every language that is asked in."""
    languages, asked = whole.config.source.captions, set(whole.config.tasks) & set(CAPTIONED)
    captioned = whole.captioned if languages else whole
    images, expected = len(captioned.images), f"expected {_FEWEST} or more for {sorted(asked)}"
    got = f"captions of {images} different images of {whole.name}"
    check(not asked or images >= _FEWEST, "eval.sets[].source.captions", got, expected)
    for language in languages:
        count = sum(map(bool, captioned.texts(language)))
        expected = f"expected {_FEWEST} images or more with a caption in it, or none; take the language out"
        check(count != 1, f"eval.sets[].source.captions.{language}", f"{count} image of {whole.name}", expected)
    for first, second in itertools.combinations(languages if "languages" in asked else (), 2):
        count = sum(map(bool, captioned.pairs(first, second)))
        expected = f"expected {_FEWEST} or more with equally many captions in both languages, and both at one place"
        got = f"{count} images of {whole.name} to compare in {first} and {second}"
        check(count >= _FEWEST, "eval.sets[].tasks: languages", got, expected)


def _check_names(config: EvalSetConfig, classes: Sequence[ClassName]) -> None:
    """Check what is named by text, before images are read: languages, templates, corruptions."""
    if classes:
        unknown = sorted(set(config.templates) - set(classes[0].names))
        named = f"{config.classes} names its classes in {list(classes[0].names)}"
        check(not unknown, "eval.sets[].templates", unknown, named)
    for language, asked in config.templates.items():
        templates_of_kind(asked, config.template_kind, f"eval.sets[].templates.{language}")
    strange = sorted(set(config.corruptions) - set(CORRUPTIONS))
    check(not strange, "eval.sets[].corruptions", strange, f"expected some of {list(CORRUPTIONS)}")


def _usable(config: EvalSetConfig, part: str, source: SourceConfig, limit: PixelLimit) -> _Rows:
    """Read the rows of a part of the set; those without an image or what the tasks need are left out."""
    rows, skipped = [], []
    by_image: dict[bytes, list[Row]] = {}
    cut = False
    for row, content in _first(config, part, source):
        if content is None:
            cut = True
            continue
        equal = by_image.setdefault(content, [])
        try:
            if config.classes and not normalize(row.label or ""):
                raise ImageError("no class")
            if not config.classes and not row.captions:
                raise ImageError("no usable caption")
            if not equal:
                decode(row.image, *limit)
        except ImageError as error:
            skipped.append(Skip(row.key, str(error), source.path))
        else:
            rows.append(row)
            equal.append(row)
    read = len(rows) + len(skipped)
    if not config.classes:
        rows = [merged(equal) for equal in by_image.values() if equal]
    if len(rows) < _FEWEST:
        raise SourceError(
            f"evaluation source {source.path!r} has {len(rows)} usable images in {read} rows, expected {_FEWEST} or "
            f"more. Left out: {len(skipped)} {_reasons(skipped)}"
        )
    _check_share(config, part, source, skipped, read)
    return _Rows(rows, skipped, read, cut, limit)


def _first(config: EvalSetConfig, part: str, source: SourceConfig) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the rows that are asked for, each with its image's content, and others with None."""
    limit = 0 if part == "train" else config.max_images
    opened = open_source(source)
    if config.classes:
        return first_rows(opened.iter_rows(), limit)
    return first_images(opened.iter_rows(), limit, streamed=opened.size is None)


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


def _part(
    config: EvalSetConfig, source: SourceConfig, read: _Rows, places: Sequence[int | None], classes: list[ClassName]
) -> EvalSet:
    """Return a part of the set; rows without a place, whose classes are left out, are left out, too.

    Args:
        config: The set's.
        source: The part's.
        read: Its rows.
        places: Their classes' places in `classes`; without classes no matter.
        classes: All classes, or none.
    """
    rows, labels, skipped = [], [], list(read.skipped)
    for row, place in zip(read.rows, places, strict=True):
        if place is None:
            reason = f"no image of the source is of its class, {row.label} (present_classes)"
            skipped.append(Skip(row.key, reason, source.path))
            continue
        rows.append(row)
        labels.append(place)
    if len(rows) < _FEWEST:
        raise SourceError(
            f"evaluation source {source.path!r} has {len(rows)} rows of classes that the set's source has images of, "
            f"expected {_FEWEST} or more"
        )
    return EvalSet(
        name=source.short_name,
        config=config,
        images=Images(rows, limit=read.limit),
        captions=[row.captions for row in rows],
        gallery={},
        skipped=skipped,
        classes=classes,
        labels=labels if classes else [],
        num_rows=read.num_rows,
        cut=read.cut,
    )


def _apart(train: EvalSet, source: EvalSet) -> EvalSet:
    """Leave out of `train` the images that the source holds: a probe must not be fitted on what it is tested on.

    Raises:
        ConfigError: nothing is left, or a class of the source is not among it.
    """
    tested = set(source.images.digests())
    kept = [place for place, digest in enumerate(train.images.digests()) if digest not in tested]
    shared = len(train.images) - len(kept)
    where = train.config.train.path if train.config.train else ""
    check(
        bool(kept),
        "eval.sets[].train",
        where,
        f"all of its {shared} images are in the source, too: a probe would be tested on what it was fitted on; name "
        "other images, or leave train out: then half of the source is fitted on and the other half tested",
    )
    labels = [train.labels[place] for place in kept]
    lacking = [source.classes[label].key for label in sorted(set(source.labels) - set(labels))]
    check(not lacking, "eval.sets[].train", where, f"it has no image of {few(lacking)}, whose images are tested")
    left = [train.images.rows[place].key for place in range(len(train.images)) if place not in set(kept)]
    return replace(
        train,
        images=Images([train.images.rows[place] for place in kept], limit=train.images.limit),
        captions=[train.captions[place] for place in kept],
        labels=labels,
        skipped=[*train.skipped, *(Skip(key, "the source holds the same image", where) for key in left)],
        in_source=len(left),
    )


def _present(
    classes: list[ClassName], labels: set[int], config: EvalSetConfig, cut: bool
) -> tuple[list[ClassName], list[str]]:
    """Leave out classes without an image if the config says so, else warn of them; return classes and warnings."""
    present = [name for place, name in enumerate(classes) if place in labels]
    absent = [name.key for place, name in enumerate(classes) if place not in labels]
    warnings = []
    short_name = config.source.short_name
    if absent and (cut or not config.present_classes):
        why = "are left out" if config.present_classes else "can only be taken by mistake"
        advice = "" if config.present_classes else "; present_classes: true leaves them out"
        if cut:
            advice = f"; max_images reads the first {config.max_images} rows, and the rest may hold them"
        warnings.append(
            f"{short_name}: {len(absent)} of {len(classes)} classes have no image and {why}: {few(absent)}{advice}"
        )
    kept = present if config.present_classes else classes
    if len(kept) < 2:
        raise ConfigError(
            f"eval.sets[].classes: {short_name} has one class, {kept[0].key!r}, and every answer would be right: "
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
