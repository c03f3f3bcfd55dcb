"""Features of frozen towers, made once before the first step: of the images, and of the teacher's sentences."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from koclip import distributed
from koclip.config import ConfigError, DataConfig, SourceConfig
from koclip.data import feature_rows, features
from koclip.data.feature_rows import Images, Reader, Sentences, shards
from koclip.data.features import Features, Inputs, Piece
from koclip.data.sources import StreamSource, open_source
from koclip.data.transforms import Views
from koclip.encoders.base import fingerprint, texts_in_batches
from koclip.models import StockModel
from koclip.models.dual_encoder import DualEncoder, encode_images, text_features
from koclip.models.fast import speed_up
from koclip.text import tokenizers

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@torch.no_grad()
def image_features(
    accelerator: Accelerator, encoder: DualEncoder, config: DataConfig, views: Views, directory: Path, dtype: str
) -> Features:
    """Return the unit-norm embeddings of every view of every image, made now where they are not in `directory`.

    Args:
        accelerator: Its device and precision are those of the image tower.
        encoder: Its image side makes the embeddings.
        config: The sources.
        views: What the tower is shown.
        directory: Where the embeddings are kept.
        dtype: `fp16` or `fp32`.

    Raises:
        ConfigError: `directory` holds embeddings of another tower, of other views or of other images.
    """
    model = encoder.model
    speed_up(model, accelerator.device)
    encoder.to(accelerator.device).eval()

    def embed(views: Inputs) -> torch.Tensor:
        pixels = cast(torch.Tensor, views).to(accelerator.device)  # (n, V, 3, H, W)
        with accelerator.autocast():
            pieces = pixels.flatten(0, 1).split(feature_rows.PIECE)
            parts = [encode_images(model, encoder.normalized(piece)) for piece in pieces]
        embeddings: torch.Tensor = torch.cat(parts).unflatten(0, pixels.shape[:2])  # (n, V, D)
        return embeddings

    facts = {
        "features": "unit-norm embeddings of images",
        "image tower": fingerprint(model.vision_model, model.visual_projection),
        "views": " ".join(repr(views).split()),
        "pixels": f"mean {_numbers(encoder.pixel_mean)}, deviation {_numbers(encoder.pixel_std)}",
        "largest image": f"{config.max_image_pixels} pixels",
        "precision": f"{accelerator.mixed_precision}, kept in {dtype}",
    }
    reader = Images(views, config.max_image_pixels)
    make = partial(features.write, embed=embed, dtype=DTYPES[dtype])
    return _features(directory, facts, config, reader, make, "image features")


@torch.no_grad()
def teacher_features(
    accelerator: Accelerator,
    teacher: tuple[StockModel, PreTrainedTokenizerBase],
    config: DataConfig,
    language: str,
    directory: Path,
    dtype: str,
) -> Features:
    """Return the teacher's features of every caption in its language, made now where they are not in `directory`.

    Says how many captions have no counterpart in the teacher's language, and how many rows unequal numbers of captions.

    Args:
        accelerator: Its device and precision are used.
        teacher: A dual encoder, and the tokenizer of its text tower.
        config: The sources.
        language: The teacher's.
        directory: Where the features are kept.
        dtype: `fp16` or `fp32`.

    Raises:
        ConfigError: `directory` holds features of another teacher or of other sentences.
    """
    model, tokenizer = teacher
    speed_up(model, accelerator.device)
    model.to(accelerator.device).eval()

    def embed_batch(texts: list[str]) -> torch.Tensor:
        encoded: Any = tokenizers.encode(tokenizer, texts, padding=True, return_tensors="pt").to(accelerator.device)
        with accelerator.autocast():
            return text_features(model, encoded["input_ids"], encoded["attention_mask"])  # (n, D)

    def embed(inputs: Inputs) -> torch.Tensor:
        sentences = cast(list[str], inputs)
        return texts_in_batches(embed_batch, sentences, feature_rows.PIECE).unsqueeze(1)

    tokenizers.forget_call_state(tokenizer)
    facts = {
        "features": f"features of sentences, {language}",
        "text tower": fingerprint(model.text_model, model.text_projection),
        "tokenizer": xxh3_128(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "longest sentence": f"{tokenizer.model_max_length} tokens",
        "precision": f"{accelerator.mixed_precision}, kept in {dtype}",
    }
    make = partial(features.write, embed=embed, dtype=DTYPES[dtype])
    found = _features(directory, facts, config, Sentences(language), make, "teacher's features")
    cast(nn.Module, model).to("cpu")  # it is not needed again
    return found


def _features(
    directory: Path,
    facts: dict[str, str],
    config: DataConfig,
    reader: Reader,
    make: Callable[[Path, Iterable[Piece]], None],
    label: str,
) -> Features:
    """Check the shards that exist, make the others, each process its own; return all of them.

    Raises:
        ConfigError: `directory` holds features of something else.
    """
    if distributed.rank() == 0:
        features.claim(directory, facts)
    distributed.barrier()
    rank, world_size = distributed.rank(), distributed.world_size()
    sources = [open_source(one, config.seed) for one in config.sources]
    total = sum(0 if isinstance(one, StreamSource) else len(one) for one in sources)
    mine = []
    apart: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with tqdm(desc=label, total=total or None, unit=" rows", disable=rank > 0) as bar:
        for shard in shards(sources, reader, directory, rank, world_size, config.num_workers):
            pieces = _counted(shard.pieces, bar, world_size, apart[shard.path.parent.name])
            if shard.exists:
                features.check(shard.path, [item for piece in pieces for item in piece.items])
            else:
                make(shard.path, pieces)
            mine.append(shard.path)
    found = sorted(itertools.chain(*distributed.gather_objects(mine)))
    everywhere = distributed.gather_objects(apart)
    for number, source in enumerate(config.sources if rank == 0 else ()):
        name = f"{number}-{source.short_name}"
        _tell_apart(sum((one[name] for one in everywhere), Counter()), source)
    left_over = sorted(set(directory.rglob("shard-*.safetensors")) - set(found))
    if left_over:
        raise ConfigError(
            f"align.cache_dir: {left_over[0]} was made of rows that the sources no longer have; delete {directory} or "
            "name another directory"
        )
    return Features(found)


def _tell_apart(apart: Counter[str], source: SourceConfig) -> None:
    """Say what in a source does not correspond to the teacher's language (`Sentences`), of the languages drawn."""
    weights = source.languages or dict.fromkeys(source.captions, 1.0)
    for language in (name for name, weight in weights.items() if weight):
        rows, captions = apart[f"rows/{language}"], apart[f"captions/{language}"]
        for count, what in (
            (rows, f"rows have unequal numbers of captions in {language} and in the teacher's: any of them teaches"),
            (
                captions,
                f"captions in {language} have none in the teacher's language in their place: they are not taught",
            ),
        ):
            if count:
                tqdm.write(f"{source.short_name}: {count:,} {what}")


def _counted(pieces: Iterable[Piece], bar: Any, world_size: int, apart: Counter[str]) -> Iterator[Piece]:
    """Pass pieces on, add up what is `apart` and move the bar, which takes all processes to be as fast as this one."""
    for piece in pieces:
        apart.update(piece.apart)
        yield piece
        bar.update(min(piece.num_rows * world_size, (bar.total or math.inf) - bar.n))


def _numbers(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.flatten().tolist()]
