"""Open what a model is evaluated on: pictures, their captions, and multiple-choice tasks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from koclip.config import DataConfig, EvalSetConfig, SourceConfig
from koclip.data import scenes
from koclip.data.batches import Skip
from koclip.data.sources import Row, StreamSource, open_source
from koclip.data.tables import SourceError
from koclip.data.transforms import ImageError, decode

_BATCH = 256  # rows read at once
_MAX_PIXELS = DataConfig.max_image_pixels
_TASK_SIZE = 400  # questions per scenes task


class Pictures(Sequence[Image.Image]):
    """The images of rows, decoded when asked for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Image.Image: ...
    @overload
    def __getitem__(self, place: slice) -> list[Image.Image]: ...
    def __getitem__(self, place: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        picture: Image.Image = to_pil_image(decode(self._rows[place].image, _MAX_PIXELS))
        return picture


@dataclass(frozen=True)
class Choice:
    """A multiple-choice task: which of its candidate texts fits each picture. Everything by position."""

    name: str
    pictures: Pictures
    candidates: dict[str, list[list[str]]]  # by language, then by picture
    answers: list[int]


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

    @property
    def languages(self) -> list[str]:
        """Languages that at least one picture has a caption in."""
        return [name for name in self.config.source.captions if any(name in captions for captions in self.captions)]


def open_set(config: EvalSetConfig) -> EvalSet:
    """Read a set's captions and check its images; unusable rows are left out and listed in `skipped`.

    Raises:
        SourceError: a source cannot be opened or has no usable row.
    """
    rows, skipped = [], []
    limit = config.max_images or None
    for row in itertools.islice(_rows(config.source), limit):
        try:
            if not row.captions:
                raise ImageError("no usable caption")
            decode(row.image, _MAX_PIXELS)
            rows.append(row)
        except ImageError as error:
            skipped.append(Skip(row.key, str(error)))
    if not rows:
        raise SourceError(f"evaluation source {config.source.path!r} has no usable row; first: {skipped[:1]}")
    gallery: dict[str, list[str]] = {}
    for source in config.gallery:
        for captions in _captions(source):
            for language, texts in captions.items():
                gallery.setdefault(language, []).extend(texts)
    return EvalSet(
        name=config.source.label,
        config=config,
        pictures=Pictures(rows),
        captions=[row.captions for row in rows],
        gallery=gallery,
        choices=scene_choices() if config.source.path == "scenes" else [],
        skipped=skipped,
    )


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


def scene_choices() -> list[Choice]:
    """Return the built-in set's zero-shot tasks.

    `unseen_pairs`: the (colour, shape) of a lone object, among all 40, though training never showed that pair.
    `relation`: where one object is from another (4-way). `size` (2-way) and `count` (3-way).
    """
    unseen = [scenes.unseen_pair(1, index) for index in range(_TASK_SIZE)]
    shown = [scenes.scene("test", 1, index) for index in range(12 * _TASK_SIZE)]
    by_kind = {kind: [scene for scene in shown if scene.kind == kind][:_TASK_SIZE] for kind in scenes.KINDS}
    return [
        _choice("unseen_pairs", unseen, scenes.pair_question),
        _choice("relation", by_kind["relation"], scenes.relation_question),
        _choice("size", by_kind["single"], scenes.size_question),
        _choice("count", by_kind["count"], scenes.count_question),
    ]


def _choice(name: str, shown: list[scenes.Scene], question: scenes.Question) -> Choice:
    rows = [Row(scenes.draw(scene, number), {}, f"scenes/{name}/{number}") for number, scene in enumerate(shown)]
    asked = [question(scene) for scene in shown]
    languages = asked[0][0]
    candidates = {language: [texts[language] for texts, _ in asked] for language in languages}
    return Choice(name, Pictures(rows), candidates, [answer for _, answer in asked])
