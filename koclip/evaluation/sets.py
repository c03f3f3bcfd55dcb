"""Open what a model is evaluated on: pictures, their captions or classes, and multiple-choice tasks."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from koclip.config import ConfigError, EvalSetConfig, SourceConfig
from koclip.data.batches import Skip
from koclip.data.sources import Row, StreamSource, open_source
from koclip.data.tables import SourceError
from koclip.data.transforms import ImageError, decode
from koclip.evaluation.choices import Choice, scene_choices
from koclip.evaluation.pictures import MAX_PIXELS, Pictures
from koclip.text.classes import ClassName, load_classes

_BATCH = 256  # rows read at once
_NAMED = 10  # classes or rows that a message names at most
_FEWEST = 2  # images: nothing can be ranked among one


@dataclass(frozen=True)
class EvalSet:
    """One data set, opened."""

    name: str
    config: EvalSetConfig
    pictures: Pictures
    captions: list[dict[str, list[str]]]  # by picture, then by language
    gallery: dict[str, list[str]]  # captions that belong to no picture, by language
    choices: list[Choice] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    classes: list[ClassName] = field(default_factory=list)  # none: captions are the names
    labels: list[int] = field(default_factory=list)  # each picture's place in `classes`
    train: "EvalSet | None" = None
    shifted: "dict[str, EvalSet]" = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def languages(self) -> list[str]:
        """Languages of the classes; without classes, those that at least one picture has a caption in."""
        if self.classes:
            return list(self.classes[0].names)
        return [name for name in self.config.source.captions if any(name in captions for captions in self.captions)]

    def everything(self) -> "list[EvalSet]":
        """Return this set and those it is compared with or trained on."""
        return [self, *self.shifted.values(), *([self.train] if self.train else [])]


def open_set(config: EvalSetConfig) -> EvalSet:
    """Read a set's captions and check its images; unusable rows are left out and listed in `skipped`.

    Raises:
        SourceError: a source cannot be opened or has no usable row.
        ConfigError: an image's class is not in the list, or there are fewer than two.
    """
    listed = load_classes(config.classes) if config.classes else []
    rows, labels, skipped = _usable(config, config.source, listed)
    classes, warnings = _present(listed, set(labels), config) if listed else ([], [])
    gallery: dict[str, list[str]] = {}
    for source in config.gallery:
        for captions in _captions(source):
            for language, texts in captions.items():
                gallery.setdefault(language, []).extend(texts)
    places = {listed.index(one): place for place, one in enumerate(classes)}

    def related(source: SourceConfig) -> EvalSet:
        """Open a set of the same classes; images of classes that have been left out are left out, too."""
        rows, labels, skipped = _usable(config, source, listed)
        known = [place for place, label in enumerate(labels) if label in places] if listed else range(len(rows))
        rows, labels = [rows[place] for place in known], [places[labels[place]] for place in known if listed]
        captions = [row.captions for row in rows]
        return EvalSet(source.short_name, config, Pictures(rows), captions, {}, [], skipped, classes, labels)

    train = related(config.train) if config.train else None
    shifted = {name: related(source) for name, source in config.shifted.items()}
    others = [*shifted.values(), *([train] if train else [])]
    return EvalSet(
        name=config.source.short_name,
        config=config,
        pictures=Pictures(rows),
        captions=[row.captions for row in rows],
        gallery=gallery,
        choices=scene_choices() if config.source.path == "scenes" else [],
        skipped=[*skipped, *(skip for one in others for skip in one.skipped)],
        classes=classes,
        labels=[places[label] for label in labels],
        train=train,
        shifted=shifted,
        warnings=warnings,
    )


def _usable(
    config: EvalSetConfig, source: SourceConfig, classes: list[ClassName]
) -> tuple[list[Row], list[int], list[Skip]]:
    """Return the rows with an image and what the tasks need, their classes' places in the list, and what was left."""
    rows, labels, skipped = [], [], []
    keys = {one.key: place for place, one in enumerate(classes)}
    for row in itertools.islice(_rows(source), config.max_images or None):
        try:
            if classes and row.label is None:
                raise ImageError("no class")
            if not classes and not row.captions:
                raise ImageError("no usable caption")
            decode(row.image, MAX_PIXELS)
        except ImageError as error:
            skipped.append(Skip(row.key, str(error), source.path))
            continue
        rows.append(row)
        if classes:
            labels.append(_place(row, keys, config))
    if len(rows) < _FEWEST:
        reasons = "; ".join(f"{skip.key}: {skip.reason}" for skip in skipped[:_NAMED])
        raise SourceError(
            f"evaluation source {source.path!r} has {len(rows)} usable rows, expected {_FEWEST} or more. Left out: "
            f"{len(skipped)} {reasons}"
        )
    return rows, labels, skipped


def _place(row: Row, keys: dict[str, int], config: EvalSetConfig) -> int:
    """Return the place of a row's class in the list: found by its key, else by its number."""
    label = str(row.label)
    if label in keys:
        return keys[label]
    if label.isdecimal() and int(label) < len(keys):
        return int(label)
    raise ConfigError(
        f"eval.sets[].classes: {config.classes} has no class {label!r} of image {row.key}; its keys are "
        f"{_few(list(keys))}: add the class, or name another column than source.label: "
        f"{config.source.label}"
    )


def _present(classes: list[ClassName], labels: set[int], config: EvalSetConfig) -> tuple[list[ClassName], list[str]]:
    """Leave classes without an image out if asked to, else warn of them; return classes and warnings."""
    present = [one for place, one in enumerate(classes) if place in labels]
    absent = [one.key for place, one in enumerate(classes) if place not in labels]
    warnings = []
    name = config.source.short_name
    if absent and not config.present_classes:
        warnings.append(
            f"{name}: {len(absent)} of {len(classes)} classes have no image and can only be taken by mistake: "
            f"{_few(absent)}; present_classes: true leaves them out"
        )
    kept = present if config.present_classes else classes
    if len(kept) < 2:
        raise ConfigError(
            f"eval.sets[].classes: {name} has one class, {kept[0].key!r}, and every answer would be right: expected "
            "two or more"
        )
    return kept, warnings


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def _rows(config: SourceConfig) -> Iterator[Row]:
    source = open_source(config)
    if isinstance(source, StreamSource):
        yield from source.stored_rows()
        return
    for start in range(0, len(source), _BATCH):
        yield from source.rows(range(start, min(start + _BATCH, len(source))))


def _captions(config: SourceConfig) -> Iterator[dict[str, list[str]]]:
    source = open_source(config)
    if isinstance(source, StreamSource):
        yield from source.captions()
        return
    yield from source.captions(range(len(source)))
