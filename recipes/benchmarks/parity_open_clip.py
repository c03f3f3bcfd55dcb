"""Do koclip and open_clip take the same training steps?

    python recipes/benchmarks/parity_open_clip.py            # 50 steps, a minute on one core

A small model of koclip is copied into an `open_clip.CLIP`. Both train on the same batches: koclip with the parts of its
recipe (text padded to the batch's longest, fused AdamW, its kernels), open_clip with its own loop, ClipLoss, AdamW
groups and schedule (text padded to 77). The table shows both losses; the last line is the largest difference of any
step. The exit code is 1 if it is above 1e-4.

Batches are Flickr8k-ko photos and captions if data/flickr8k_ko has them, else the built-in scenes. Five batches repeat,
so that the loss falls far within 50 steps: a flat curve would hide a wrong learning rate or decay.
"""

import argparse
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from clip_shapes import build_clip
from open_clip_weights import to_open_clip
from pairs import CONTEXT, real_pairs, record

from koclip import training
from koclip.config import DataConfig, LossConfig, ModelConfig, OptimConfig, PretrainConfig, SourceConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.data.loader import training_captions
from koclip.models.dual_encoder import DualEncoder
from koclip.text.tokenizers import train_bpe

TOLERANCE = 1e-4
NUM_BATCHES = 5  # distinct ones
MODEL = ModelConfig(preset="small", image_size=64, patch_size=16, text_layers=3)


class Curves(NamedTuple):
    """The loss of every step, of both."""

    koclip: list[float]
    open_clip: list[float]

    @property
    def difference(self) -> float:
        """The largest difference of any step."""
        return max(abs(own - peer) for own, peer in zip(*self, strict=True))


def compare(source: SourceConfig, num_steps: int, batch_size: int, model: ModelConfig = MODEL) -> Curves:
    """Train both for `num_steps` and return their losses."""
    from open_clip_peer import OpenClip, as_pairs

    optim = OptimConfig(lr=5e-4, warmup_steps=max(1, num_steps // 5))
    data = DataConfig(sources=[source])
    tokenizer = train_bpe(training_captions(data), vocab_size=4_096, max_tokens=CONTEXT)
    clip, processor = build_clip(model, tokenizer)
    recorded = record(data, tokenizer, processor.image_processor.crop_size["height"], batch_size, NUM_BATCHES)
    batches = [recorded[step % NUM_BATCHES] for step in range(num_steps)]

    peer = OpenClip(clip.config, optim, num_steps)
    peer.model.load_state_dict(to_open_clip(clip.state_dict()))
    peer.train([as_pairs(batch, processor.image_processor) for batch in batches])
    return Curves(koclip_losses(DualEncoder(clip, processor), optim, batches), [loss.item() for loss in peer.losses])


def koclip_losses(model: DualEncoder, optim: OptimConfig, batches: Sequence[Batch]) -> list[float]:
    """Train as in the recipe, with the CLIP paper's loss, and return the loss of every step."""
    train = TrainConfig(num_steps=len(batches), log_every=1, tracker="none")
    accelerator = training.start(train)
    loss = LossConfig(name="infonce", duplicates="negatives")
    trainer = training.prepare(accelerator, model, PretrainConfig(loss=loss, optim=optim, train=train))
    return [stats["loss"] for _, stats in training.steps(trainer, iter(batches), 0, len(batches), log_every=1)]


def table(curves: Curves) -> str:
    """Return about ten of the steps, and the verdict."""
    count = len(curves.koclip)
    rows = ["| step | koclip | open_clip | difference |", "|---|---|---|---|"]
    for step in sorted({*range(0, count, max(1, count // 10)), count - 1}):
        own, peer = curves.koclip[step], curves.open_clip[step]
        rows.append(f"| {step + 1} | {own:.6f} | {peer:.6f} | {own - peer:+.1e} |")
    verdict = "equal" if curves.difference <= TOLERANCE else "DIFFERENT"
    return "\n".join([*rows, f"{verdict}: largest difference {curves.difference:.1e}, allowed {TOLERANCE:.0e}"])


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--steps", type=int, default=50, help="optimizer steps (default: 50)")
    cli.add_argument("--batch_size", type=int, default=64, help="pairs per step (default: 64)")
    cli.add_argument("--data", help="pairs to train on: any path that data.sources[].path takes")
    cli.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return cli


def main(args: Sequence[str] | None = None) -> int:
    """Print the comparison; return the exit code."""
    options = parser().parse_args(args)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(options.threads)
    source = real_pairs(options.data) or SourceConfig()
    print(f"{options.steps} steps of {options.batch_size} pairs of {source.path}, fp32, torch {torch.__version__}")
    curves = compare(source, options.steps, options.batch_size)
    print(table(curves))
    return int(curves.difference > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
