"""The built-in bilingual data set: coloured shapes, drawn on the fly, with Korean and English captions.

A scene is a pure function of (part, seed, index): nothing is stored or downloaded. Scenes come in twins: scene 2k+1
equals scene 2k except for one property (positions, colour, shape, size or count), so that a model must read every word
to tell them apart. The (colour, shape) pairs in `HELD_OUT` never occur in training; the zero-shot test names them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from koclip.config import SourceConfig
from koclip.data.formats import Format, MapSource, Row
from koclip.data.formats.files import SourceError
from koclip.text.korean.particles import attach

Part = Literal["train", "test"]
Kind = Literal["single", "relation", "count"]
KINDS: tuple[Kind, ...] = ("single", "relation", "count")
_KIND_CHANCES = (0.45, 0.42, 0.13)
SIDE = 48  # pixels
LANGUAGES = ["ko", "en"]

# Many colours and few shapes: a model learns shapes only if they do not depend on the colour.
COLOURS = {
    "red": ((214, 40, 40), "빨간"),
    "yellow": ((247, 201, 20), "노란"),
    "green": ((38, 150, 66), "초록색"),
    "cyan": ((0, 190, 200), "청록색"),
    "blue": ((38, 84, 196), "파란"),
    "purple": ((138, 43, 190), "보라색"),
    "pink": ((245, 120, 180), "분홍색"),
    "brown": ((125, 75, 40), "갈색"),
    "black": ((25, 25, 25), "검은"),
    "gray": ((125, 125, 125), "회색"),
}
_SHADE = 15  # of 255: largest random change of each channel of an object's colour
SHAPES = {"circle": "원", "square": "사각형", "triangle": "삼각형", "star": "별"}
SIZES = {"large": "큰", "small": "작은"}
COUNTS = {2: ("two", "두"), 3: ("three", "세"), 4: ("four", "네")}
RELATIONS = {
    "left": ("to the left of", "왼쪽에", (-1, 0)),
    "right": ("to the right of", "오른쪽에", (1, 0)),
    "above": ("above", "위에", (0, -1)),
    "below": ("below", "아래에", (0, 1)),
}
HELD_OUT = frozenset(
    {
        *(("red", "star"), ("purple", "star"), ("blue", "triangle"), ("black", "triangle")),
        *(("yellow", "circle"), ("green", "square")),
    }
)
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_AXIS = (np.arange(SIDE, dtype=np.float32) + 0.5) / np.float32(SIDE)  # centres of the pixels
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


class Thing(NamedTuple):
    """One object; centre and radius are shares of the side of the picture."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """The content of a picture. `kind` says which fact the captions state."""

    kind: Kind
    things: tuple[Thing, ...]
    size: str = "large"
    relation: str = "left"


def english(colour: str, shape: str, count: int = 1) -> str:
    """Return "red circle" or "red circles"."""
    return f"{colour} {shape}{'s' if count > 1 else ''}"


def korean(colour: str, shape: str) -> str:
    """Return "빨간 원"."""
    return f"{COLOURS[colour][1]} {SHAPES[shape]}"


def relation_captions(first: Thing, relation: str, second: Thing) -> dict[str, list[str]]:
    """Return captions by language: "first is to the <relation> of second"."""
    words, korean_words, _ = RELATIONS[relation]
    ko_first = attach(korean(first.colour, first.shape), "이/가")
    ko_second = korean(second.colour, second.shape)
    en_first, en_second = english(first.colour, first.shape), english(second.colour, second.shape)
    return {"ko": [f"{ko_first} {ko_second} {korean_words} 있다"], "en": [f"a {en_first} {words} a {en_second}"]}


def captions(scene: Scene) -> dict[str, list[str]]:
    """Return all captions of a scene by language; each of them is true."""
    first = scene.things[0]
    ko, en = korean(first.colour, first.shape), english(first.colour, first.shape)
    if scene.kind == "relation":
        return relation_captions(first, scene.relation, scene.things[1])
    if scene.kind == "count":
        count = len(scene.things)
        words, korean_words = COUNTS[count]
        ko_texts = [f"{ko} {korean_words} 개", f"{attach(ko, '이/가')} {korean_words} 개 있다"]
        return {"ko": ko_texts, "en": [f"{words} {english(first.colour, first.shape, count)}"]}
    size = SIZES[scene.size]
    # Captions with the colour or the shape alone teach both words separately, not only as pairs.
    ko_parts = [f"{COLOURS[first.colour][1]} 도형", SHAPES[first.shape]]
    en_parts = [f"a {first.colour} shape", f"a {first.shape}"]
    return {
        "ko": [ko, f"{size} {ko}", f"{size} {attach(ko, '이/가')} 있다", *ko_parts],
        "en": [f"a {en}", f"a {scene.size} {en}", *en_parts],
    }


Question = Callable[[Scene], tuple[dict[str, list[str]], int]]


def pair_question(scene: Scene) -> tuple[dict[str, list[str]], int]:
    """Return the 40 (colour, shape) prompts by language, and the index of the correct one."""
    first = scene.things[0]
    texts = {"ko": [korean(*pair) for pair in PAIRS], "en": [f"a {english(*pair)}" for pair in PAIRS]}
    return texts, PAIRS.index((first.colour, first.shape))


def relation_question(scene: Scene) -> tuple[dict[str, list[str]], int]:
    """Return a caption for each of the four relations, by language, and the index of the correct one."""
    answers = [relation_captions(scene.things[0], relation, scene.things[1]) for relation in RELATIONS]
    texts = {language: [caption[language][0] for caption in answers] for language in ("ko", "en")}
    return texts, list(RELATIONS).index(scene.relation)


def size_question(scene: Scene) -> tuple[dict[str, list[str]], int]:
    """Return a caption for each size, by language, and the index of the correct one."""
    first = scene.things[0]
    ko, en = korean(first.colour, first.shape), english(first.colour, first.shape)
    texts = {"ko": [f"{word} {ko}" for word in SIZES.values()], "en": [f"a {size} {en}" for size in SIZES]}
    return texts, list(SIZES).index(scene.size)


def count_question(scene: Scene) -> tuple[dict[str, list[str]], int]:
    """Return a caption for each count, by language, and the index of the correct one."""
    first, count = scene.things[0], len(scene.things)
    ko = korean(first.colour, first.shape)
    plural = english(first.colour, first.shape, count=2)
    texts = {
        "ko": [f"{ko} {word} 개" for _, word in COUNTS.values()],
        "en": [f"{word} {plural}" for word, _ in COUNTS.values()],
    }
    return texts, list(COUNTS).index(count)


@functools.lru_cache(maxsize=16_384)  # a batch reads the captions first and the pictures later
def scene(part: Part, seed: int, index: int) -> Scene:
    """Return scene `index`; scenes 2k and 2k + 1 are twins."""
    rng = np.random.default_rng((seed, part == "test", index // 2))
    make = {"single": _single, "relation": _relation, "count": _count}[rng.choice(KINDS, p=_KIND_CHANCES)]
    return make(rng, index % 2, SEEN_PAIRS)


def unseen_pair(seed: int, index: int) -> Scene:
    """Return a test scene with one object whose (colour, shape) pair never occurs in training."""
    rng = np.random.default_rng((seed, 2, index))
    return _single(rng, 0, tuple(sorted(HELD_OUT)))


def _radius(rng: np.random.Generator, size: str) -> float:
    return float(rng.uniform(0.28, 0.32) if size == "large" else rng.uniform(0.18, 0.205))


def _pick(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    return pairs[int(rng.integers(len(pairs)))]


def _single(rng: np.random.Generator, twin: int, pairs: tuple[tuple[str, str], ...]) -> Scene:
    colour, shape = _pick(rng, pairs)
    size = str(rng.choice(tuple(SIZES)))
    x, y = rng.uniform(0.4, 0.6, 2)
    radius, other_radius = _radius(rng, size), _radius(rng, "small" if size == "large" else "large")
    thing = Thing(colour, shape, float(x), float(y), radius)
    same_colour = [pair for pair in pairs if pair[0] == colour and pair[1] != shape]
    same_shape = [pair for pair in pairs if pair[1] == shape and pair[0] != colour]
    change = rng.choice(3, p=(0.2, 0.6, 0.2))  # size, shape, colour
    if not twin:
        return Scene("single", (thing,), size=size)
    if change == 0 or not (same_colour and same_shape):
        return Scene("single", (thing._replace(radius=other_radius),), size="small" if size == "large" else "large")
    colour, shape = _pick(rng, tuple(same_colour if change == 1 else same_shape))
    return Scene("single", (thing._replace(colour=colour, shape=shape),), size=size)


def _relation(rng: np.random.Generator, twin: int, pairs: tuple[tuple[str, str], ...]) -> Scene:
    first = _pick(rng, pairs)
    second = _pick(rng, tuple(pair for pair in pairs if pair != first))
    relation = str(rng.choice(tuple(RELATIONS)))
    dx, dy = RELATIONS[relation][2]
    gap = rng.uniform(0.23, 0.25)
    slip_x, slip_y = rng.uniform(-0.06, 0.06, 2)
    mid_x, mid_y = rng.uniform(0.49, 0.51, 2)
    radii = rng.uniform(0.19, 0.215, 2)
    off_x, off_y = dx * gap + dy * slip_x, dy * gap + dx * slip_y
    places = [(mid_x + off_x, mid_y + off_y), (mid_x - off_x, mid_y - off_y)]
    exchanged = [(first[0], second[1]), (second[0], first[1])]
    differ = first[0] != second[0] and first[1] != second[1]
    exchange_shapes = rng.random() < 0.5 and differ and set(exchanged) <= set(pairs)
    if twin and exchange_shapes:
        first, second = exchanged
    elif twin:
        places.reverse()
        relation = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
    things = tuple(
        Thing(colour, shape, float(x), float(y), float(radius))
        for (colour, shape), (x, y), radius in zip((first, second), places, radii, strict=True)
    )
    return Scene("relation", things, relation=relation)


def _count(rng: np.random.Generator, twin: int, pairs: tuple[tuple[str, str], ...]) -> Scene:
    colour, shape = _pick(rng, pairs)
    count = int(rng.choice(tuple(COUNTS), 2, replace=False)[twin])
    cells = rng.permutation(4)[:count]  # quarters of the picture, so that objects never touch
    slips = rng.uniform(-0.08, 0.08, (4, 2))
    things = []
    for cell in cells:
        slip_x, slip_y = slips[cell]
        x, y = 0.27 + 0.46 * (cell % 2) + slip_x, 0.27 + 0.46 * (cell // 2) + slip_y
        things.append(Thing(colour, shape, float(x), float(y), 0.15))
    return Scene("count", tuple(things))


def draw(scene: Scene, background: int) -> npt.NDArray[np.uint8]:
    """Return the picture of a scene, (SIDE, SIDE, 3) RGB, antialiased; `background` is the seed of the tints."""
    rng = np.random.default_rng(background)
    ground = rng.uniform(205, 245, 3)
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = ground
    for thing in scene.things:
        (rows, dy), (columns, dx) = _span(thing.y, thing.radius), _span(thing.x, thing.radius)
        distance = _distance(thing.shape, dx[None, :], dy[:, None]) * thing.radius * SIDE  # pixels
        part = picture[rows, columns]
        colour = np.array(COLOURS[thing.colour][0] + rng.uniform(-_SHADE, _SHADE, 3), np.float32)
        part += np.clip(0.5 - distance, 0, 1)[..., None] * (colour - part)
    return picture.round().clip(0, 255).astype(np.uint8)


def _span(centre: float, radius: float) -> tuple[slice, npt.NDArray[np.float32]]:
    """Return the pixels of one axis that an object may cover, and their distances from its centre in radii."""
    reach = 1.15 * radius + 1.5 / SIDE
    pixels = slice(max(0, int((centre - reach) * SIDE)), math.ceil((centre + reach) * SIDE))
    return pixels, (_AXIS[pixels] - np.float32(centre)) / np.float32(radius)


def _distance(shape: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the signed distance to the outline of a shape of radius 1 (negative inside), nearly exact near it."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - 0.95)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.82)
    if shape == "triangle":
        return np.asarray(np.maximum(math.sqrt(3) / 2 * np.abs(x) - y / 2, y) - 0.55)
    # A star. Its edge from a tip (radius 1.05, angle 0) to a notch (radius 0.45, angle 36 degrees), as a half plane.
    angle = np.abs((np.arctan2(x, -y) / (2 * math.pi) * 5 + 0.5) % 1 - 0.5) * 2 * math.pi / 5
    tip, notch = 1.05, (0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5))
    normal, radius = (notch[1], tip - notch[0]), np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    return np.asarray(((along - tip) * normal[0] + across * normal[1]) / math.hypot(*normal))


class ScenesSource(MapSource):
    """The built-in scenes as rows; another `seed` gives other scenes.

    Raises:
        SourceError: scenes have no captions in a language of `captions`.
    """

    group = 2
    stored = False

    def __init__(self, config: SourceConfig, seed: int = 0) -> None:
        unknown = sorted(set(config.captions) - set(LANGUAGES))
        if unknown:
            raise SourceError(f"source 'scenes': got captions in {unknown}, expected languages of {LANGUAGES}")
        self.config, self.seed = config, seed

    def __len__(self) -> int:
        return self.config.scenes_size

    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        """Draw these scenes."""
        part = self.config.scenes_part
        rows = []
        for index in indices:
            drawn = scene(part, self.seed, index)
            texts = captions(drawn)
            wanted = {language: texts[language] for language in self.config.captions}
            rows.append(Row(draw(drawn, index) if images else None, wanted, f"scenes/{part}/{index}"))
        return rows


FORMATS = {"scenes": Format(ScenesSource)}
