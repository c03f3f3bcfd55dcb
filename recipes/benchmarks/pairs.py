"""Batches for the benchmarks from koclip's loader: real pairs if they are available, otherwise synthetic pairs."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import normalize
from transformers import CLIPImageProcessor, PreTrainedTokenizerBase

from koclip.config import DataConfig, SourceConfig
from koclip.data.batches import Assembler, Batch
from koclip.data.loader import train_loader
from koclip.data.order import BatchPart
from koclip.data.sources import open_source
from koclip.data.transforms import Views, read
from koclip.text.normalize import usable

FLICKR8K_KO = Path("data/flickr8k_ko/train.parquet")
CONTEXT = 77  # tokens; what CLIP pads every text to


def real_pairs(path: str | None) -> SourceConfig | None:
    """Return the source at `path`, by default Flickr8k-ko; None if that is not available."""
    if path is None and not FLICKR8K_KO.exists():
        return None
    return SourceConfig(path=path or str(FLICKR8K_KO))


def stand_ins(folder: Path, count: int) -> SourceConfig:
    """Write `count` pairs with captions as long as COCO's: 13 tokens on average, with both special tokens."""
    rng = np.random.default_rng(0)
    words = [f"{first}{second}{third}" for first in "bdgkl" for second in "aeiou" for third in "mnrst"]
    lengths = np.rint(rng.lognormal(np.log(10.7), 0.23, count)).astype(int).clip(6, CONTEXT - 2)
    Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / "noise.jpg")
    rows = [{"image": "noise.jpg", "caption": " ".join(rng.choice(words, length))} for length in lengths]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return SourceConfig(path=str(path), captions={"en": "caption"})


class Pairs(NamedTuple):
    """Photos in files, with a caption each."""

    files: list[Path]
    captions: list[str]
    source: SourceConfig  # of the same


def some_pairs(path: str, count: int, folder: Path) -> Pairs:
    """Write the first `count` photos of a source, and the first Korean caption of each, to `folder`."""
    source = open_source(SourceConfig(path=path, captions={"ko": "captions_ko"}))
    files, captions = [], []
    for number, row in enumerate(itertools.islice(source.iter_rows(), count)):
        content = read(row.image)
        assert isinstance(content, bytes)
        files.append(folder / f"{number:06}.jpg")
        files[-1].write_bytes(content)
        captions.append(usable(row.captions["ko"])[0])
    listed = folder / "pairs.jsonl"
    rows = [{"image": file.name, "caption": caption} for file, caption in zip(files, captions, strict=True)]
    listed.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return Pairs(files, captions, SourceConfig(path=str(listed), captions={"ko": "caption"}))


def record(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, image_size: int, batch_size: int, count: int
) -> list[Batch]:
    """Return the first `count` batches of a training run."""
    return list(
        itertools.islice(
            train_loader(Assembler(data, tokenizer, Views(data, image_size)), BatchPart(batch_size)), count
        )
    )


def normalized(batch: Batch, images: CLIPImageProcessor) -> Tensor:
    """Return the pixels for other training loops: (B, 3, H, W) float32, normalised."""
    assert batch.pixel_values is not None
    pixels: Tensor = normalize(batch.pixel_values.float() / 255, images.image_mean, images.image_std)
    return pixels


def padded(ids: Tensor, value: int, length: int = CONTEXT) -> Tensor:
    """Return (B, L) ids padded on the right with `value` to (B, length)."""
    return F.pad(ids, (0, length - ids.shape[1]), value=value)
