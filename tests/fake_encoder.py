"""An encoder whose embeddings a test can work out by hand: a picture's colour, and the colours that a text names."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from koclip.encoders import Encoder

COLOURS = {"빨강": (250, 5, 5), "초록": (5, 250, 5), "파랑": (5, 5, 250), "노랑": (250, 250, 5)}
ENGLISH = {"빨강": "red", "초록": "green", "파랑": "blue", "노랑": "yellow"}


class ColourEncoder(Encoder):
    """Images by their mean colour; texts by the colours whose Korean or English names are in them, 8 dimensions wide.

    `calls` counts batches, so that tests see what was kept. What a text has besides moves it a little.
    """

    scale = 100.0

    def __init__(self, english: bool = True) -> None:
        super().__init__(torch.nn.Identity(), None, "colours")
        self.calls = 0
        self._names = [*COLOURS, *(ENGLISH.values() if english else ())]

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        self.calls += 1
        return torch.cat([self._colours(images), torch.full((len(images), 5), 0.02)], dim=1)

    def _image_features(self, images: Sequence[Image.Image]) -> Tensor:
        self.calls += 1
        return self._colours(images)

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.calls += 1
        return torch.stack([self._text(text) for text in texts])

    def unknown_share(self, texts: Sequence[str]) -> float:
        return sum(not text.isascii() for text in texts) / len(texts) if len(self._names) == 4 else 0.0

    def fingerprint(self) -> str:
        return f"colours-{len(self._names)}"

    @staticmethod
    def _colours(images: Sequence[Image.Image]) -> Tensor:
        pixels = [image.convert("RGB").resize((1, 1)).getpixel((0, 0)) for image in images]
        return torch.tensor(pixels) / 255

    def _text(self, text: str) -> Tensor:
        colours = {**COLOURS, **{ENGLISH[name]: colour for name, colour in COLOURS.items()}}
        seen = [torch.tensor(colours[name]) / 255 for name in self._names if name in text]
        generator = torch.Generator().manual_seed(len(text))
        meaning = sum(seen, torch.zeros(3))
        return torch.cat([meaning, 0.1 * torch.rand(5, generator=generator)])


def write_colours(path: Path, encoded, count: int = 24, colours: Sequence[str] = tuple(COLOURS)) -> Path:
    """Write pictures of these colours in turn, each a little different, with label and captions."""
    rows = []
    for number in range(count):
        name = colours[number % len(colours)]
        red, green, blue = COLOURS[name]
        step = number % 24
        shade = (abs(red - step), abs(green - step // 2), abs(blue - step // 3))
        rows.append(
            {
                "image": encoded(shade),
                "key": ENGLISH[name],
                "number": list(COLOURS).index(name),
                "ko": [f"{name} 사진 {number}번", f"{number}번째 {name} 그림이 있다"],
                "en": [f"a {ENGLISH[name]} photo {number}", f"picture {number} is {ENGLISH[name]}"],
                "name": name,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


CLASSES = """
- {key: red, ko: 빨강, en: red}
- {key: green, ko: 초록, en: green, description: {ko: 풀의 색, en: colour of grass}}
- {key: blue, ko: 파랑, en: blue}
- {key: yellow, ko: 노랑, en: yellow}
"""
