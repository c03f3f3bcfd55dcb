"""Memory, time and exactness of a large batch in micro-batches, compared with open_clip's --accum-freq.

    python recipes/benchmarks/grad_cache.py                                         # 4,096 pairs in pieces of 64
    python recipes/benchmarks/grad_cache.py --batch_size 1024 --rounds 3

Each way takes one training step in its own process, to measure its peak memory; the ways take turns, round by round.
Memory is the peak of the process minus its memory after the imports: weights, optimizer, the batch itself (uint8 pixels
on the host) and everything that the step needs. Ratios of time are taken within a round.

- one piece: the same model on a single micro-batch: the lower limit;
- plain: all pairs at once;
- koclip: train.micro_batch_size (koclip/training/grad_cache.py), with the tiled loss;
- open_clip: its train_one_epoch with --accum-freq, on its own model of the same shape, text padded to 77.

The second table compares the gradients of a smaller batch in micro-batches with the gradients of the same batch at
once, for each library. Bars of the project: memory at most 1.5x one piece's, time at most 1.4x plain's and 0.4x
open_clip's.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from clip_shapes import build_clip, integer, towers
from pairs import CONTEXT
from ratios import add_timing_options, hardware, run_worker, spread
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor

from koclip import training
from koclip.config import ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.models.dual_encoder import DualEncoder
from koclip.text.tokenizers import train_bpe

MODEL = ModelConfig(preset="small", image_size=64)
OPTIM = OptimConfig(max_grad_norm=0, warmup_steps=0)  # gradients as they are
METHODS = ("one piece", "plain", "koclip", "open_clip")
WORDS = [f"{first}{second}" for first in "가나다라마바사" for second in "각난달람"]


def build() -> tuple[CLIPModel, CLIPProcessor]:
    """Return the model that all ways train."""
    return build_clip(MODEL, train_bpe(WORDS, vocab_size=600, max_tokens=CONTEXT))


def noise(model: CLIPModel, count: int, size: int) -> Iterator[Batch]:
    """Yield `count` pairs of noise in pieces; captions are as long as COCO's, and of similar length within a piece."""
    rng = np.random.default_rng(0)
    vision, text = towers(model.config)
    side = integer(vision.image_size)
    lengths = np.sort(np.rint(rng.lognormal(np.log(12.7), 0.23, count)).astype(int).clip(4, CONTEXT))
    starts = range(0, count, size)
    for start in rng.permutation(starts):
        part = lengths[start : start + size]
        ids = torch.from_numpy(rng.integers(300, text.vocab_size - 2, (len(part), part.max())))
        places = torch.arange(part.max()), torch.from_numpy(part)[:, None] - 1
        ids[:, 0] = integer(text.bos_token_id)
        ids = ids.masked_fill(places[0] == places[1], integer(text.eos_token_id))
        ids = ids.masked_fill(places[0] > places[1], integer(text.pad_token_id))
        yield Batch(
            pixel_values=torch.from_numpy(rng.integers(0, 256, (len(part), 3, side, side), dtype=np.dtype(np.uint8))),
            input_ids=ids,
            attention_mask=(places[0] <= places[1]).long(),
            pair_ids=torch.arange(start, start + len(part)),
            keys=[str(number) for number in range(start, start + len(part))],
            skipped=[],
            num_drawn=len(part),
        )


def koclip_step(count: int, micro_batch_size: int | None, size: int) -> dict[str, Tensor]:
    """Take the recipe's step over `count` pairs, made in pieces of `size`; return its gradients."""
    model, processor = build()
    train = TrainConfig(num_steps=1, batch_size=count, micro_batch_size=micro_batch_size, tracker="none")
    dual_encoder = DualEncoder(model, processor)
    trainer = training.prepare(training.start(train), dual_encoder, PretrainConfig(optim=OPTIM, train=train))
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update(gradients_of(dual_encoder))

    optimizer = trainer.optimizer
    assert isinstance(optimizer, AcceleratedOptimizer)
    optimizer.optimizer.register_step_pre_hook(keep)
    batches: Iterator[Batch] = noise(model, count, size)
    if micro_batch_size is None:
        batches = iter([joined(list(batches), integer(towers(model.config).text.pad_token_id))])
    list(training.steps(trainer, batches, 0, 1, 1))
    return gradients


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model's parameters."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def joined(batches: Sequence[Batch], pad: int) -> Batch:
    """Return pieces as one batch, padded to its longest caption."""
    longest = max(batch.input_ids.shape[1] for batch in batches)

    def wide(ids: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(ids, (0, longest - ids.shape[1]), value=value)

    return Batch(
        pixel_values=torch.cat([batch.pixel_values for batch in batches if batch.pixel_values is not None]),
        input_ids=torch.cat([wide(batch.input_ids, pad) for batch in batches]),
        attention_mask=torch.cat([wide(batch.attention_mask, 0) for batch in batches]),
        pair_ids=torch.cat([batch.pair_ids for batch in batches]),
        keys=[key for batch in batches for key in batch.keys],
        skipped=[],
        num_drawn=sum(batch.num_drawn for batch in batches),
    )


def open_clip_step(count: int, size: int, accum_freq: int) -> dict[str, Tensor]:
    """Take open_clip's step over the same pairs in `accum_freq` parts; return its gradients."""
    from open_clip_peer import OpenClip, as_pairs

    model, processor = build()
    torch.manual_seed(0)
    peer = OpenClip(model.config, OPTIM, 1, accum_freq=accum_freq)
    batches = list(noise(model, count, size))
    if accum_freq == 1:
        batches = [joined(batches, integer(towers(model.config).text.pad_token_id))]
    del model
    peer.train([as_pairs(batch, processor.image_processor) for batch in batches])
    return gradients_of(peer.model)


def step(method: str, count: int, size: int) -> dict[str, Tensor]:
    """Take one step of the given way."""
    if method == "open_clip":
        return open_clip_step(count, size, count // size)
    if method == "open_clip plain":
        return open_clip_step(count, size, 1)
    if method == "one piece":
        return koclip_step(size, None, size)
    return koclip_step(count, None if method == "plain" else size, size)


def worker(method: str, options: argparse.Namespace) -> None:
    """Measure one way in this process and print the result as JSON."""
    if method.startswith("open_clip"):
        import open_clip_peer  # noqa: F401 - its imports are not what is measured
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, clock()
    step(method, options.batch_size, options.micro_batch_size)
    seconds = clock() - began
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": seconds, "megabytes": megabytes}))


def run(method: str, options: argparse.Namespace) -> dict[str, float]:
    """Run `worker` in its own process."""
    words = [f"--{name}={getattr(options, name)}" for name in ("batch_size", "micro_batch_size", "threads")]
    words += ["--cpu_time"] if options.cpu_time else []
    return run_worker(__file__, ["--method", method, *words], method)


def gradient_error(method: str, plain: str, options: argparse.Namespace) -> str:
    """Return the difference of a way's gradients from those of the same batch at once, as cells of a table."""
    sizes = options.check_batch_size, options.micro_batch_size
    expected, actual = step(plain, *sizes), step(method, *sizes)
    scale = next(name for name in expected if name.endswith("logit_scale"))
    ratio = (actual.pop(scale) / expected.pop(scale)).item()
    whole, pieces = (
        torch.cat([gradients[name].flatten().double() for name in expected]) for gradients in (expected, actual)
    )
    cosine = torch.nn.functional.cosine_similarity(whole, pieces, dim=0).item()
    return f"{ratio:.6f} | {cosine:.8f} | {(pieces.norm() / whole.norm()).item():.6f}"


def main(args: Sequence[str] | None = None) -> None:
    """Print both tables."""
    options = parser().parse_args(args)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if options.method:
        worker(options.method, options)
        return
    methods = [name for name in METHODS if name != "open_clip" or find_spec("open_clip")]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for name in tqdm([name for _ in range(options.rounds) for name in methods], "steps"):
        measured[name].append(run(name, options))
    seconds = {name: [step["seconds"] for step in steps] for name, steps in measured.items()}
    clock = "CPU time" if options.cpu_time else "wall time"
    print(f"{hardware()}; torch {torch.__version__}; {options.threads} thread(s), {clock}, {options.rounds} round(s)")
    print(f"one step of {options.batch_size} pairs in pieces of {options.micro_batch_size}\n")
    print(
        "| way | peak memory | x one piece | s | faster than plain | faster than open_clip |\n|---|---|---|---|---|---|"
    )
    least = statistics.median(step["megabytes"] for step in measured["one piece"])
    for name in methods:
        memory = statistics.median(step["megabytes"] for step in measured[name])
        compared = [spread(seconds[name], seconds[peer]) if peer in seconds else "-" for peer in ("plain", "open_clip")]
        cells = [f"{memory:,.0f} MB", f"{memory / least:.2f}", f"{statistics.median(seconds[name]):.1f}", *compared]
        print(f"| {name} | " + " | ".join(cells if name != "one piece" else [*cells[:3], "-", "-"]) + " |")
    print(f"\ngradients of {options.check_batch_size} pairs in pieces, compared with the batch at once\n")
    print("| way | logit scale, ratio | towers, cosine | towers, ratio of norms |\n|---|---|---|---|")
    print(f"| koclip | {gradient_error('koclip', 'plain', options)} |")
    if "open_clip" in methods:
        print(f"| open_clip | {gradient_error('open_clip', 'open_clip plain', options)} |")
    else:
        print("open_clip is not installed; in a separate venv: pip install -c constraints.txt -e . open_clip_torch")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--batch_size", type=int, default=4096, help="pairs in the step (default: 4096)")
    cli.add_argument("--micro_batch_size", type=int, default=64, help="pairs in a piece (default: 64)")
    cli.add_argument("--check_batch_size", type=int, default=256, help="pairs of the gradient table (default: 256)")
    add_timing_options(cli, rounds=1)
    cli.add_argument("--method", choices=[*METHODS, "open_clip plain"], help=argparse.SUPPRESS)
    return cli


if __name__ == "__main__":
    main()
