"""How fast, and in how much memory, does one GPU train at the CLIP paper's batch of 32,768?

    python recipes/benchmarks/gpu.py                              # ViT-B/32, 32,768 pairs in pieces of 1,024, bf16
    python recipes/benchmarks/gpu.py --preset vit_b16 --batch_size 1024 --micro_batch_size 1024

koclip and, if open_clip_torch is installed, open_clip with --accum-freq take turns on the same noise, with captions as
long as COCO's. koclip pads them to the longest of a micro-batch, open_clip to 77. Decoding is not measured, nor the
first step of each. The share of the peak is the model's floating point operations (forward and backward, three times
the forward pass, Kaplan et al. 2020; without those that GradCache repeats) divided by the card's dense bf16 peak
(--peak_tflops).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from clip_shapes import integer, towers
from grad_cache import noise
from pairs import CONTEXT
from ratios import spread
from tqdm.auto import tqdm
from transformers import CLIPModel

from koclip import training
from koclip.config import ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.text.tokenizers import train_bpe

OPTIM = OptimConfig(lr=5e-4)
MANY = 10**6  # steps of the schedules; no run gets there


class Measured(NamedTuple):
    """Time and memory of the measured steps of one library."""

    seconds: list[float]
    gib: float


def koclip_step(model: CLIPModel, processor: object, batch: Sequence[Batch], train: TrainConfig) -> Callable[[], None]:
    """Return the recipe's step."""
    trainer = training.prepare(
        training.start(train),
        DualEncoder(model, processor),  # type: ignore[arg-type]
        PretrainConfig(optim=OPTIM, train=train),
    )
    endless = (piece for _ in range(MANY) for piece in batch)
    steps = training.steps(trainer, endless, 0, MANY, MANY)
    return lambda: (next(steps), None)[1]


def open_clip_step(
    model: CLIPModel, processor: object, batch: Sequence[Batch], options: argparse.Namespace
) -> Callable[[], None]:
    """Return open_clip's step with gradient accumulation."""
    from open_clip_peer import OpenClip, as_pairs

    precision = "amp_bf16" if options.precision == "bf16" else "fp32"
    peer = OpenClip(model.config, OPTIM, MANY, precision, accum_freq=len(batch), device="cuda")
    pairs = [as_pairs(piece, processor.image_processor) for piece in batch]  # type: ignore[attr-defined]
    return lambda: peer.train(pairs)


def flops(model: CLIPModel, batch: Sequence[Batch]) -> float:
    """Return the floating point operations of a training step: two per weight and token, and those of attention."""
    total = 0.0
    vision, text = towers(model.config)
    patch_size = integer(vision.patch_size)
    patches = (integer(vision.image_size) // patch_size) ** 2 + 1
    for piece in batch:
        pairs, length = piece.input_ids.shape
        sizes = (
            (vision.hidden_size, vision.num_hidden_layers, patches),
            (text.hidden_size, text.num_hidden_layers, length),
        )
        for width, layers, tokens in sizes:
            weights = 12 * width**2 * layers
            attention = 2 * tokens * width * layers
            total += pairs * tokens * 2 * (weights + attention)
        total += pairs * patches * 2 * 3 * patch_size**2 * vision.hidden_size
    return 3 * total


def measure(step: Callable[[], None], rounds: int, name: str) -> Measured:
    """Time `rounds` steps after one of warm-up."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in tqdm(range(rounds), name):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Measured(seconds, torch.cuda.max_memory_allocated() / 2**30)


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parser().parse_args(args)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU, and torch finds none here")
    torch.backends.cuda.matmul.allow_tf32 = True
    words = [f"{first}{second}" for first in "가나다라마바사" for second in "각난달람"]
    config = ModelConfig(preset=options.preset)
    model, processor = from_scratch(config, train_bpe(words, vocab_size=49_152, max_tokens=CONTEXT))
    assert isinstance(model, CLIPModel)
    batch = list(noise(model, options.batch_size, options.micro_batch_size))
    train = TrainConfig(
        num_steps=MANY, batch_size=options.batch_size, micro_batch_size=options.micro_batch_size,
        precision=options.precision, compile=options.compile, tracker="none",
    )  # fmt: skip
    work = flops(model, batch)
    measured = {"koclip": measure(koclip_step(model, processor, batch, train), options.rounds, "koclip")}
    torch.cuda.empty_cache()
    if find_spec("open_clip"):
        step = open_clip_step(model, processor, batch, options)
        measured["open_clip"] = measure(step, options.rounds, "open_clip")
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; {options.preset}, {options.precision}")
    print(f"{options.batch_size} pairs in pieces of {options.micro_batch_size}, {options.rounds} steps\n")
    print("| way | peak memory, GiB | images/s | share of the peak | koclip is faster |\n|---|---|---|---|---|")
    for name, result in measured.items():
        seconds = statistics.median(result.seconds)
        share = work / seconds / (options.peak_tflops * 1e12)
        ratio = spread(measured["koclip"].seconds, result.seconds)
        print(f"| {name} | {result.gib:.1f} | {options.batch_size / seconds:,.0f} | {share:.1%} | {ratio} |")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--preset", choices=["vit_b32", "vit_b16", "vit_l14"], default="vit_b32")
    cli.add_argument("--batch_size", type=int, default=32_768, help="pairs in a step (default: 32768)")
    cli.add_argument("--micro_batch_size", type=int, default=1_024, help="pairs in a piece (default: 1024)")
    cli.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    cli.add_argument("--compile", action="store_true", help="torch.compile koclip's model")
    cli.add_argument("--rounds", type=int, default=3, help="measured steps (default: 3)")
    cli.add_argument("--peak_tflops", type=float, default=989.0, help="dense bf16 peak (default: 989, H100 and H200)")
    return cli


if __name__ == "__main__":
    main()
