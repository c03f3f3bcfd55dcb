"""How fast does koclip train next to open_clip and transformers' Trainer, on a CPU?

    python recipes/benchmarks/train_speed.py                    # fp32, one thread, about 10 minutes
    python recipes/benchmarks/train_speed.py --precision bf16 --threads 2

Three training loops take turns in one process, so that other load on the machine affects all of them equally:

- open_clip: `train_one_epoch` on its own model, ClipLoss and AdamW groups; text always padded to 77;
- Trainer: transformers' Trainer on the stock CLIPModel (`return_loss=True`); text padded to 77;
- koclip: the recipe's `training.steps`: batches of similar caption length padded to their longest, and the faster
  layers of koclip/models/fast.py.

All have the same shape (ViT and text transformer of the sizes below) and the same pairs in the same batches. A round is
the same 8 batches (one pool of the recipe's length grouping) in each loop; the first round does not count. Decoding is
not measured here (see decode_speed.py). In the table, images/s is the median of the rounds; a ratio is taken within a
round, with its median, lowest and highest value. On a busy machine, use `--cpu_time` to count CPU time instead of wall
time. Bars of the project: fp32 1.6x open_clip and 1.4x Trainer; bf16, on a CPU with AMX, 2.7x and 2.2x.
"""

import argparse
import copy
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from clip_shapes import build_clip
from pairs import CONTEXT, normalized, padded, real_pairs, record, stand_ins
from ratios import add_timing_options, hardware, spread
from transformers import CLIPModel, CLIPProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from koclip import training
from koclip.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.data.loader import training_captions
from koclip.models.dual_encoder import DualEncoder
from koclip.text.tokenizers import train_bpe

MODEL = ModelConfig(preset="vit_b32", image_width=384, image_layers=6, text_width=256, text_layers=6)
OPTIM = OptimConfig(lr=5e-4)
MANY = 10**6  # steps of the schedules; no run gets there
Loop = Callable[[], object]  # takes one round's steps
Clock = Callable[[], float]  # seconds
Seconds = dict[str, list[float]]  # per loop, per round


def koclip_loop(model: CLIPModel, processor: CLIPProcessor, batches: Sequence[Batch], train: TrainConfig) -> Loop:
    """Return the recipe's loop over `batches`."""
    accelerator = training.start(train)
    trainer = training.prepare(accelerator, DualEncoder(model, processor), PretrainConfig(optim=OPTIM, train=train))
    steps = training.steps(trainer, itertools.cycle(batches), 0, train.num_steps, train.log_every)
    return lambda: list(itertools.islice(steps, len(batches)))


def open_clip_loop(model: CLIPModel, processor: CLIPProcessor, batches: Sequence[Batch], precision: str) -> Loop:
    """Return open_clip's loop over `batches`."""
    from open_clip_peer import OpenClip, as_pairs

    peer = OpenClip(model.config, OPTIM, MANY, "amp_bf16" if precision == "bf16" else "fp32")
    pairs = [as_pairs(batch, processor.image_processor) for batch in batches]
    return lambda: peer.train(pairs)


class TakeTurns(TrainerCallback):
    """Runs the other loops after each round of `num_steps` of Trainer, which owns its loop."""

    def __init__(self, num_steps: int, others: dict[str, Loop], clock: Clock) -> None:
        self._num_steps, self._others, self._clock, self._began = num_steps, others, clock, 0.0
        self.seconds: Seconds = {name: [] for name in ["Trainer", *others]}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the clock before a round's first step."""
        if state.global_step % self._num_steps == 0:
            self._began = self._clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """After a round's last step, time a round of each other loop."""
        if state.global_step % self._num_steps:
            return
        self.seconds["Trainer"].append(self._clock() - self._began)
        for name, loop in self._others.items():
            began = self._clock()
            loop()
            self.seconds[name].append(self._clock() - began)


def rounds(
    model: CLIPModel,
    processor: CLIPProcessor,
    batches: Sequence[Batch],
    others: dict[str, Loop],
    options: argparse.Namespace,
) -> Seconds:
    """Train `model` with Trainer for a warm-up round and the measured rounds, with the other loops in between."""
    pad = processor.tokenizer.pad_token_id
    inputs = [
        {
            "pixel_values": normalized(batch, processor.image_processor),
            "input_ids": padded(batch.input_ids, pad),
            "attention_mask": padded(batch.attention_mask, 0),
            "return_loss": True,
        }
        for batch in batches
    ]
    turns = TakeTurns(len(batches), others, time.process_time if options.cpu_time else time.perf_counter)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # one item is a whole batch: collation costs nothing, as for the others
            max_steps=(options.rounds + 1) * len(batches),
            bf16=options.precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        dataset: Any = inputs
        transformers.Trainer(model, arguments, itemgetter(0), dataset, callbacks=[turns]).train()
    return {name: seconds[1:] for name, seconds in turns.seconds.items()}


def table(seconds: Seconds, images_per_round: int) -> str:
    """Return images/s and the ratio of each loop to the two peers as a Markdown table."""
    rows = ["| loop | images/s | over open_clip | over Trainer |", "|---|---|---|---|"]
    for name, own in seconds.items():
        cells = [f"{images_per_round / statistics.median(own):.1f}"]
        cells += [spread(own, seconds[peer]) for peer in ("open_clip", "Trainer")]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def measure(options: argparse.Namespace, model_config: ModelConfig, folder: Path) -> tuple[Seconds, str]:
    """Build the three loops, run them in turns and describe their texts."""
    size = options.batch_size * options.batches
    data = DataConfig(sources=[real_pairs(options.data) or stand_ins(folder, 4 * size)])
    tokenizer = train_bpe(training_captions(data), vocab_size=49_152, max_tokens=CONTEXT)
    model, processor = build_clip(model_config, tokenizer)
    image_size = processor.image_processor.crop_size["height"]
    batches = record(data, tokenizer, image_size, options.batch_size, options.batches)
    train = TrainConfig(
        num_steps=MANY, batch_size=options.batch_size, precision=options.precision, num_threads=options.threads,
        tracker="none",
    )  # fmt: skip
    others = {
        "open_clip": open_clip_loop(model, processor, batches, options.precision),
        "koclip": koclip_loop(copy.deepcopy(model), processor, batches, train),
    }
    seconds = rounds(model, processor, batches, others, options)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches) / size
    longest = statistics.mean(batch.input_ids.shape[1] for batch in batches)
    source = data.sources[0].short_name
    return seconds, f"{source}: {tokens:.1f} tokens a caption, {longest:.1f} padded; vocabulary {len(tokenizer):,}"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    add_timing_options(cli, rounds=5)
    cli.add_argument("--batches", type=int, default=8, help="steps of a round (default: 8)")
    cli.add_argument("--batch_size", type=int, default=64, help="pairs per step (default: 64)")
    cli.add_argument("--data", help="pairs to take captions from: any path that data.sources[].path takes")
    return cli


def main(args: Sequence[str] | None = None, model: ModelConfig = MODEL) -> None:
    """Print the table."""
    options = parser().parse_args(args)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        seconds, text = measure(options, model, Path(folder))
    print(f"{hardware()}; {options.precision}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"{text}; batch {options.batch_size}, {options.rounds} rounds of {options.batches} steps"
        + (", CPU time" if options.cpu_time else "")
    )
    print(table(seconds, options.batch_size * options.batches))


if __name__ == "__main__":
    main()
