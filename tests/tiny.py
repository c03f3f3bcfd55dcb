"""Models small enough for tests, built from random weights."""

import torch
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from koclip.config import ModelConfig
from koclip.data.batches import Batch
from koclip.losses.contrastive import Embeddings
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.text.tokenizers import train_bpe

CAPTIONS = ["빨간 원", "파란 사각형", "노란 삼각형 위에 작은 별", "a red circle", "a blue square", "a small green star"]
IMAGE_SIZES = {"image_size": 32, "patch_size": 8, "image_width": 64, "image_layers": 2}
TEXT_SIZES = {"text_width": 64, "text_layers": 2, "embed_dim": 32}


def tiny_config(**changes: object) -> ModelConfig:
    sizes = TEXT_SIZES if "preset" in changes else IMAGE_SIZES | TEXT_SIZES
    return ModelConfig(**{"preset": "tiny", **sizes, **changes})  # type: ignore[arg-type]


def tiny_tokenizer(max_tokens: int = 24) -> PreTrainedTokenizerBase:
    return train_bpe(CAPTIONS, vocab_size=560, max_tokens=max_tokens)


def paper_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of the paper's size: 49,408 entries, the end token last, 77 tokens."""
    vocab = {f"token{index}": index for index in range(49_406)}
    vocab |= {"<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def tiny_dual_encoder(logit_bias: float | None = None, **changes: object) -> DualEncoder:
    return DualEncoder(*from_scratch(tiny_config(**changes), tiny_tokenizer()), logit_bias)


def tiny_batch(size: int, seed: int = 0, image_size: int = 32) -> dict[str, torch.Tensor]:
    """The arguments of a `DualEncoder`: `size` random pictures with captions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    captions = [f"{CAPTIONS[index % len(CAPTIONS)]} {index}" for index in range(size)]
    text = tiny_tokenizer()(captions, padding=True, return_tensors="pt")
    return {"pixel_values": pixels, "input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}


def tiny_pieces(sizes: list[int], seed: int = 0) -> list[Batch]:
    """A batch in pieces of these sizes, each padded to its own longest caption; some captions are equal."""
    pieces = []
    for number, size in enumerate(sizes):
        inputs = tiny_batch(size, seed=100 * seed + number)
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        pieces.append(
            Batch(
                pixel_values=inputs["pixel_values"],
                input_ids=inputs["input_ids"][:, :longest],
                attention_mask=inputs["attention_mask"][:, :longest],
                pair_ids=(torch.arange(size) + 2 * number)[:, None].expand(-1, 2),
                keys=[f"{seed}/{number}/{place}" for place in range(size)],
                skipped=[],
                num_drawn=size,
            )
        )
    return pieces


def random_embeddings(count: int, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.nn.functional.normalize(torch.randn(2, count, 8, generator=generator), dim=-1)
    leaves = [leaf.clone().requires_grad_() for leaf in (image, text, torch.tensor(9.0), torch.tensor(-4.0))]
    return Embeddings(*leaves)
