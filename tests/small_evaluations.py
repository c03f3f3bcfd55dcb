"""Small data sets in memory and a model that needs no weights, for tests of what an evaluation leaves."""

import io
from dataclasses import replace

import torch
from PIL import Image

from koclip.config import EvalSetConfig, SourceConfig
from koclip.data.sources import Row
from koclip.encoders import Encoder
from koclip.evaluation.embed import Images
from koclip.evaluation.sets import EvalSet
from koclip.text.classes import ClassName

HOSTILE = "<script>alert('$x$ | `y` [red]')</script>"


class Seeing(Encoder):
    """Embeds a picture by its mean colour, and a text by a hash of its letters: some queries hit, others miss."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), None, "seeing")

    def _embed_images(self, images):
        colours = torch.stack([torch.tensor(list(image.resize((2, 2)).tobytes())).float() for image in images])
        return colours

    def _embed_texts(self, texts):
        rows = [torch.rand(12, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return torch.stack(rows)

    _image_features = _embed_images

    def unknown_share(self, texts) -> float:
        return 0.0

    def fingerprint(self) -> str:
        return "seeing"


def pictures(count: int) -> Images:
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (40 + number, 30), (number * 37 % 256, number * 91 % 256, 60)).save(buffer, "PNG")
        rows.append(Row(buffer.getvalue(), {}, f"rows/{number}"))
    return Images(rows)


def captioned(tasks: list[str], count: int = 24) -> EvalSet:
    source = SourceConfig(path="rows.csv", name="photos", captions={"ko": "ko", "en": "en"})
    captions = [{"ko": [f"고양이 {number}마리가 논다"], "en": [f"{number} cats play"]} for number in range(count)]
    captions[0] = {"ko": [f"빨간 공 {HOSTILE}"], "en": [HOSTILE]}
    return EvalSet("photos", EvalSetConfig(source=source, tasks=tasks), pictures(count), captions, {})


def classified(tasks: list[str], num_classes: int = 3, count: int = 60) -> EvalSet:
    source = SourceConfig(path="rows.csv", name="things", label="label", captions={})
    config = EvalSetConfig(
        source=source,
        tasks=tasks,
        classes="things.yaml",
        templates={"ko": ["{label:을/를} 찍은 사진", "{label} | 사진"], "en": ["a photo of {label}", "<b>{label}</b>"]},
        shots=[1, 2],
        corruptions=["noise"] if "shift" in tasks else [],
    )
    names = [ClassName(f"{place}", {"ko": f"이름{place}", "en": f"name {place} $"}, {}) for place in range(num_classes)]
    labels = [number % num_classes for number in range(count)]
    shifted = {"sketch": EvalSet("sketch", config, pictures(count), [{}] * count, {}, classes=names, labels=labels)}
    whole = EvalSet("things", config, pictures(count), [{}] * count, {}, classes=names, labels=labels)
    return replace(whole, shifted=shifted if "shift" in tasks else {})
