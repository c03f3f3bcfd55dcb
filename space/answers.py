"""The answers of the Space: functions of images and texts. How they look is in `layout`."""

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import guard
import matplotlib
import numpy as np
import torch
from PIL import Image
from texts import RefusedError

from koclip.encoders import Encoder, NoPatchesError
from koclip.evaluation.tasks.zero_shot import ensemble
from koclip.search import ImageIndex, SearchResult
from koclip.text.classes import fill, load_templates
from koclip.text.korean.hangul import is_syllable

PER_PAGE = 12  # images
MAX_PAGE = 50
SECONDS = 20  # time limit for embedding the texts, or the covered images, of one call
_TEXTS, _PICTURES = 64, 10  # batch sizes; the clock is read after each batch
_BEST = 10  # captions in an answer
_KEPT_CAPTIONS = 500  # captions of the index that are compared with an image
_COLOURS = "inferno"
_OPACITY = 0.6
WAYS = ("cover", "patches")  # methods of a heat map
_PLACES = 7  # places per side that are covered
_COVERED_SIDE = 448  # pixels; more than most image towers take


class Classified(NamedTuple):
    """Probabilities by label, the most likely first, and the prompts that the model read."""

    scores: dict[str, float]
    prompts: list[str]


class Hit(NamedTuple):
    """An image of the index."""

    picture: Image.Image | None  # None: the index has no thumbnail of it
    caption: str
    score: float


class Heat(NamedTuple):
    """An image under a heat map, and the scores (R, C) of the map."""

    picture: Image.Image
    scores: np.ndarray[Any, Any]


@dataclass
class Answers:
    """Answers questions with one model and one index.

    Args:
        encoder: The model.
        index: The images to search, embedded by the same model.
        seconds: Time limit for embedding the texts, or the covered images, of one call.
        clock: Returns the time in seconds.
    """

    encoder: Encoder
    index: ImageIndex
    seconds: float = SECONDS
    clock: Callable[[], float] = time.monotonic
    # A tokenizer must not be used by two threads at the same time.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _captions: tuple[list[str], torch.Tensor] | None = None

    def classify(self, image: Image.Image, labels: str, template: str, whole: bool) -> Classified:
        """Return the probability of each label.

        Args:
            image: The image.
            labels: One per line, or all on one line with commas.
            template: A text with a slot for the label (`koclip.text.classes`).
            whole: Use the mean of all built-in templates of each label's language instead of `template`.
        """
        names = guard.read_labels(labels)
        templates = [templates_for(name) if whole else [template] for name in names]
        prompts = [[prompt(template, name) for template in many] for name, many in zip(names, templates, strict=True)]
        embedded = self._texts([text for many in prompts for text in many])
        parts = embedded.split([len(many) for many in prompts])
        classes = torch.cat([ensemble(part[None]) for part in parts])  # (C, D)
        scores = (self.encoder.scale * (self._image(image) @ classes.T)).softmax(dim=-1)[0]
        order = scores.argsort(descending=True, stable=True).tolist()
        read = [text for many in prompts for text in many]
        return Classified({names[place]: float(scores[place]) for place in order}, read)

    def search(self, query: str, page: float, alpha: float = 0) -> tuple[list[Hit], int]:
        """Return a page of the images that are most similar to a text, and the rank of its first image, from 0.

        With `alpha`, only images that match (`koclip.search.ImageIndex.matches`): the first page may be empty.
        """
        text = guard.read_text(query)
        promises = self.index.promises
        if alpha and alpha not in promises.get(language_of(text), []):
            available = (f"{language} {', '.join(f'{own:g}' for own in promises[language])}" for language in promises)
            raise RefusedError("bad_matches", limit="; ".join(available) or "-")
        return self._page(self._texts([text]), page, alpha, language_of(text))

    def similar(self, image: Image.Image) -> list[Hit]:
        """Return the first page of the images that are most similar to an image."""
        return self._page(self._image(image), 1)[0]

    def captions(self, image: Image.Image, captions: str) -> dict[str, float]:
        """Return the ten captions that are most similar to an image, with their cosine similarities, the best first.

        Args:
            image: The image.
            captions: One per line. If empty: the captions of the first images of the index. There may be none.
        """
        if captions and captions.strip():
            texts = guard.read_list(captions, "no_text")
            embedded = self._texts(texts)
        else:
            texts, embedded = self._own_captions()
        scores = (self._image(image) @ embedded.T)[0]
        best = scores.argsort(descending=True, stable=True)[:_BEST].tolist()
        return {texts[place]: float(scores[place]) for place in best}

    def prepare(self) -> None:
        """Embed the captions of the index, so that the first visitor does not wait for it."""
        seconds, self.seconds = self.seconds, float("inf")
        self._own_captions()
        self.seconds = seconds

    def heat(self, image: Image.Image, query: str, way: str) -> Heat:
        """Return a heat map: which places of an image make it similar to a text.

        Args:
            image: The image.
            query: The text.
            way: `patches`: the similarity of each patch to the text (`koclip.encoders.transformers` has the formula,
                and explains why the map may miss the object). `cover`: the drop of the similarity when a place is
                covered with the mean colour of the image, score_p = max(0, <e(image), t> - <e(image without p), t>),
                for 7 x 7 places, each two sevenths wide (Zeiler and Fergus 2014, section 4.2). It works for each model.

        Raises:
            RefusedError: `way` has another value, or the model has no patches.
        """
        text = self._texts([guard.read_text(query)])[0]
        view = self.encoder.view
        if way == "cover":
            pictures = [image, *covered(image, view)]
            whole, *rest = (self._encode(self.encoder.encode_images, pictures, _PICTURES) @ text).tolist()
            scores = (whole - np.array(rest)).clip(min=0).reshape(_PLACES, _PLACES)
        elif way == "patches":
            try:
                with self._lock:
                    scores = (self.encoder.patches(image) @ text).numpy()
            except NoPatchesError:
                raise RefusedError("no_patches") from None
        else:
            raise RefusedError("bad_way", limit=", ".join(WAYS))
        return Heat(overlay(image, scores, view), scores)

    def _image(self, image: Image.Image) -> torch.Tensor:
        with self._lock:
            embedded: torch.Tensor = self.encoder.encode_images([image])
        return embedded

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._encode(self.encoder.encode_texts, texts, _TEXTS)

    def _encode(self, encode: Callable[[Any], torch.Tensor], inputs: Sequence[Any], batch: int) -> torch.Tensor:
        """Return the embeddings (N, D) of texts or images.

        Raises:
            RefusedError: it takes more than `seconds`.
        """
        end = self.clock() + self.seconds
        parts = []
        for start in range(0, len(inputs), batch):
            if self.clock() > end:
                raise RefusedError("too_slow", limit=round(self.seconds))
            with self._lock:
                parts.append(encode(inputs[start : start + batch]))
        return torch.cat(parts)

    def _page(self, queries: torch.Tensor, page: float, alpha: float = 0, language: str = "") -> tuple[list[Hit], int]:
        last = min(MAX_PAGE, -(-len(self.index) // PER_PAGE))
        if page not in range(1, last + 1):  # a page that is not a number is not in it either
            raise RefusedError("bad_page", limit=last)
        first = (int(page) - 1) * PER_PAGE
        count = first + PER_PAGE
        if alpha:
            (results,) = self.index.matches(queries, count, alpha, language)
        else:
            results = SearchResult(*(part[0] for part in self.index.search(queries, count)))
        if first and len(results.places) <= first:
            raise RefusedError("bad_page", limit=max(1, -(-len(results.places) // PER_PAGE)))
        pairs = zip(results.places[first:].tolist(), results.scores[first:].tolist(), strict=True)
        return [self._hit(place, score) for place, score in pairs], first

    def _hit(self, place: int, score: float) -> Hit:
        entry = self.index.entry(place)
        captions = entry.record.get("captions") or {}
        caption = next((texts[0] for texts in captions.values() if texts), Path(str(entry.record["key"])).stem)
        picture = Image.open(io.BytesIO(entry.thumbnail)) if entry.thumbnail else None
        return Hit(picture, caption[: guard.MAX_LABEL], score)

    def _own_captions(self) -> tuple[list[str], torch.Tensor]:
        if self._captions is None:
            records = [self.index.entry(place).record for place in range(min(len(self.index), _KEPT_CAPTIONS))]
            captions = (text for record in records for texts in record.get("captions", {}).values() for text in texts)
            texts = list(dict.fromkeys(captions))[:_KEPT_CAPTIONS]
            self._captions = texts, self._texts(texts) if texts else torch.zeros(0, self.index.width)
        return self._captions


def prompt(template: object, label: str) -> str:
    """Return a template filled with a label and the right particles.

    Raises:
        RefusedError: the template is too long, or it has no slot or a wrong slot.
    """
    text = template if isinstance(template, str) else ""
    if len(text) > guard.MAX_LABEL:
        raise RefusedError("long_label", limit=guard.MAX_LABEL)
    try:
        return fill(text.strip(), label)
    except ValueError:
        raise RefusedError("bad_template", slot="{label}") from None


def templates_for(label: str) -> list[str]:
    """Return the built-in templates for photos: the Korean ones if the label contains Hangul, else the English ones."""
    return load_templates(language_of(label))["photo"]


def language_of(text: str) -> str:
    """Return `ko` if the text contains Hangul, else `en`."""
    return "ko" if any(is_syllable(character) for character in text) else "en"


def seen(image: Image.Image, view: tuple[float, float] | None) -> tuple[int, int, int, int]:
    """Return the part of an image that the model sees: left, top, right, bottom, in pixels."""
    width, height = image.size
    if view is None:
        return 0, 0, width, height
    short = min(width, height)
    wide, high = min(width, round(short * view[0])), min(height, round(short * view[1]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def covered(image: Image.Image, view: tuple[float, float] | None) -> list[Image.Image]:
    """Return 49 copies of an image, each with another of 7 x 7 places covered by the mean colour, row by row."""
    image = image.copy()
    image.thumbnail((_COVERED_SIDE, _COVERED_SIDE))
    left, top, right, bottom = seen(image, view)
    wide, high = (right - left) / _PLACES, (bottom - top) / _PLACES
    mean = tuple(round(value) for value in np.asarray(image).mean(axis=(0, 1)))
    images = []
    for row in range(_PLACES):
        for column in range(_PLACES):
            covered = image.copy()
            x, y = left + (column - 0.5) * wide, top + (row - 0.5) * high
            right_edge, bottom_edge = min(image.width, x + 2 * wide), min(image.height, y + 2 * high)
            place = round(max(0, x)), round(max(0, y)), round(right_edge), round(bottom_edge)
            covered.paste(mean, place)
            images.append(covered)
    return images


def overlay(image: Image.Image, scores: np.ndarray[Any, Any], view: tuple[float, float] | None) -> Image.Image:
    """Return an image under a heat map. It is dark where the model does not see it.

    Args:
        image: The image.
        scores: The map (R, C). The smallest score gets the darkest colour, the largest the brightest.
        view: Width and height of the part in the middle that the model sees, as shares of the shorter side. None: all
            of the image.
    """
    image = image.copy()
    image.thumbnail((720, 720))
    if max(image.size) < 480:  # on a small image the map could not be seen
        ratio = 480 / max(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top, right, bottom = seen(image, view)
    spread = float(scores.max() - scores.min())
    even = (scores - scores.min()) / spread if spread > 1e-6 else np.zeros_like(scores)
    stretched = Image.fromarray((255 * even).astype(np.uint8)).resize(
        (right - left, bottom - top), Image.Resampling.BICUBIC
    )
    coloured = matplotlib.colormaps[_COLOURS](np.asarray(stretched) / 255)[..., :3] * 255
    pixels = np.asarray(image, dtype=np.float32) * 0.35
    inside = np.asarray(image, dtype=np.float32)[top:bottom, left:right]
    pixels[top:bottom, left:right] = (1 - _OPACITY) * inside + _OPACITY * coloured
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
