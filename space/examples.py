"""Example inputs: images of the index with their captions, so that they suit the images that are searched."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from koclip.data.formats import scenes
from koclip.search import ImageIndex

_COUNT = 4  # example images
_LOOKED_AT = 64  # images of the index
_LONGEST = 80  # characters of an example text
_SIDE = 240  # pixels per side of a drawn image
_SCENES = (4, 12, 21, 36)  # numbers of drawn images
# For an index without captions: what many photos show.
_GENERAL = {"ko": ["사람", "음식", "바다", "강아지"], "en": ["a person", "food", "the sea", "a dog"]}


class Example(NamedTuple):
    """An example image, and a caption by language."""

    picture: Image.Image
    captions: Mapping[str, str]


def examples(index: ImageIndex, folder: Path) -> dict[str, list[list[Any]]]:
    """Write the example images into `folder`, and return the example inputs by tab.

    The images are thumbnails of the index; if it has none, drawn images. The texts are their captions; if they have
    none, general words.
    """
    folder.mkdir(exist_ok=True)
    chosen = _of_index(index) or _drawn()
    paths = [str(folder / f"{number}.png") for number in range(len(chosen))]
    for path, example in zip(paths, chosen, strict=True):
        example.picture.save(path)
    texts = {
        name: list(dict.fromkeys(own.captions[name] for own in chosen if name in own.captions)) for name in _GENERAL
    }
    template = "{label}"
    if not any(texts.values()):
        texts, template = _GENERAL, "{label:이/가} 나온 사진"
    every = [text for own in texts.values() for text in own]
    labels = "\n".join(texts["ko"] or texts["en"])
    rows = list(zip(paths, chosen, strict=True))
    return {
        "classify": [[path, labels, template, False] for path in paths[:3]],
        "search": [[text] for own in texts.values() for text in own[:2]],
        "caption": [[paths[0], ""], [paths[-1], "\n".join(every)]],
        "heatmap": [[path, next(iter(own.captions.values()), every[0])] for path, own in rows[1:] or rows],
    }


def _of_index(index: ImageIndex) -> list[Example]:
    """Return some images of the index that have a thumbnail, those with captions first."""
    places = range(0, len(index), max(1, len(index) // _LOOKED_AT))
    entries = [entry for entry in map(index.entry, places) if entry.thumbnail]
    shown = [
        Example(Image.open(io.BytesIO(entry.thumbnail)).convert("RGB"), _captions(entry.record.get("captions") or {}))
        for entry in entries
    ]
    captioned = [example for example in shown if example.captions] or shown
    return captioned[:: max(1, len(captioned) // _COUNT)][:_COUNT]


def _drawn() -> list[Example]:
    """Return images of the built-in scenes."""
    drawn = []
    for number in _SCENES:
        scene = scenes.scene("test", 0, number)
        picture = Image.fromarray(scenes.draw(scene, number)).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        drawn.append(Example(picture, _captions(scenes.captions(scene))))
    return drawn


def _captions(captions: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the first short caption in Korean and in English."""
    short = {name: [text for text in captions.get(name, ()) if len(text) <= _LONGEST] for name in _GENERAL}
    return {name: texts[0] for name, texts in short.items() if texts}
