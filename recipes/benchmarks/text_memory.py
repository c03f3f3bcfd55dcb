"""Memory and time of a training step of multilingual-e5-small, for what trains of it, on a CPU.

    python recipes/benchmarks/text_memory.py --cpu_time         # batch 128, one thread, about 2 CPU minutes
    python recipes/benchmarks/text_memory.py --layers 4 --ways all layers

The text encoder has the shape of multilingual-e5-small (12 layers, 384 wide, 250,037 pieces) with random weights, and
the images are cached embeddings: nothing is downloaded. A step is that of recipes/align.py with `align.method:
frozen_image`: forward, backward, clipping and AdamW. Ways:

- all: every weight of the text tower trains (align.freeze_embeddings: false);
- embeddings: all but the token embeddings, which is koclip's default for such an encoder;
- layers: only the top `--layers` layers and the text projection (align.text_layers).

Every way runs in its own process, the ways in turns. Memory is the peak of the process, with the weights and the
libraries. The first step of a process does not count for the time. Bars of the project: `layers` in at most 2.5 GiB,
and at least twice as fast as `all`.
"""

import argparse
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from clip_shapes import build_clip
from ratios import add_timing_options, hardware, run_worker, spread
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel

from koclip import training
from koclip.align.methods import set_trainable
from koclip.config import AlignConfig, AlignMethodConfig, DataConfig, ModelConfig, OptimConfig, SwapConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.models.dual_encoder import DualEncoder
from koclip.models.swap import swap_text_tower
from koclip.text.tokenizers import train_bpe

WAYS = ("all", "embeddings", "layers")
WIDTH = 512  # of the embeddings


def encoder(options: argparse.Namespace, pad_token_id: int) -> BertModel:
    """Return a text encoder with random weights in the shape of multilingual-e5-small, or smaller."""
    return BertModel(
        BertConfig(
            vocab_size=options.pieces,
            hidden_size=options.width,
            num_hidden_layers=options.depth,
            num_attention_heads=options.width // 32,
            intermediate_size=4 * options.width,
            pad_token_id=pad_token_id,
        ),
        add_pooling_layer=False,
    )


def batches(options: argparse.Namespace) -> Iterator[Batch]:
    """Yield batches of random tokens, of `options.tokens` each, and random image embeddings, endlessly."""
    size, random = options.batch_size, torch.Generator().manual_seed(0)
    while True:
        numbers = torch.arange(size)
        yield Batch(
            input_ids=torch.randint(600, options.pieces, (size, options.tokens), generator=random),
            attention_mask=torch.ones(size, options.tokens, dtype=torch.int64),
            pair_ids=torch.stack([numbers, numbers], dim=1),
            keys=[str(number) for number in range(size)],
            skipped=[],
            num_drawn=size,
            image=F.normalize(torch.randn(size, WIDTH, generator=random), dim=-1),
        )


def worker(options: argparse.Namespace) -> None:
    """Measure one way in this process, and print the result as JSON."""
    (way,) = options.ways
    method = AlignMethodConfig(freeze_embeddings=way != "all", text_layers=options.layers if way == "layers" else None)
    config = AlignConfig(
        model=SwapConfig(clip="random weights", text_encoder="random weights", pooling="first"),
        align=method,
        data=DataConfig(num_crops=1),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(
            num_steps=options.steps + 1, batch_size=options.batch_size, num_threads=options.threads, tracker="none"
        ),
    )
    sizes = ModelConfig(embed_dim=WIDTH, text_width=64, text_layers=1)
    clip, processor = build_clip(sizes, train_bpe(["a caption"] * 9, 600, options.tokens))
    model = swap_text_tower(clip, encoder(options, processor.tokenizer.pad_token_id))
    dual_encoder = DualEncoder(model, processor)
    accelerator = training.start(config.train)
    set_trainable(dual_encoder, config, config.stages[0], clip)
    state = training.prepare(accelerator, dual_encoder, config)
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = [clock()]
    for _ in training.steps(state, batches(options), 0, config.train.num_steps, config.train.num_steps):
        times.append(clock())
    seconds = [end - begin for begin, end in itertools.pairwise(times[1:])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    trained = sum(weight.numel() for weight in dual_encoder.parameters() if weight.requires_grad)
    print(json.dumps({"seconds": statistics.median(seconds), "gib": peak, "millions": trained / 1e6}))


def run(way: str, args: Sequence[str]) -> dict[str, float]:
    """Run `worker` in its own process."""
    return run_worker(__file__, [*args, "--worker", "--ways", way], way)


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = sys.argv[1:] if args is None else args
    options = parser().parse_args(args)
    if options.worker:
        worker(options)
        return
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for way in tqdm([way for _ in range(options.rounds) for way in options.ways], "steps"):
        measured[way].append(run(way, args))
    clock = "CPU time" if options.cpu_time else "wall time"
    print(f"{hardware()}; torch {torch.__version__}; {options.threads} thread(s), {clock}, {options.rounds} round(s)")
    print(f"{options.depth} layers, {options.width} wide, {options.pieces:,} pieces; fp32, batch {options.batch_size}")
    print(f"{options.tokens} tokens a caption; layers: the top {options.layers}\n")
    print("| trains | weights, million | peak memory | s a step | faster than all |")
    print("|---|---|---|---|---|")
    for way, rounds in measured.items():
        seconds = [result["seconds"] for result in rounds]
        everything = [result["seconds"] for result in measured.get("all", [])]
        ratio = spread(seconds, everything) if everything else "-"
        memory = max(result["gib"] for result in rounds)
        cells = [way, f"{rounds[0]['millions']:.1f}", f"{memory:.1f} GiB", f"{statistics.median(seconds):.2f}", ratio]
        print(f"| {' | '.join(cells)} |")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="default: all")
    cli.add_argument("--layers", type=int, default=2, help="top layers that train in the last way (default: 2)")
    cli.add_argument("--batch_size", type=int, default=128, help="pairs (default: 128)")
    cli.add_argument("--tokens", type=int, default=32, help="tokens a caption (default: 32)")
    cli.add_argument("--depth", type=int, default=12, help="layers of the text encoder (default: 12)")
    cli.add_argument("--width", type=int, default=384, help="its width (default: 384)")
    cli.add_argument("--pieces", type=int, default=250_037, help="its vocabulary (default: 250037)")
    cli.add_argument("--steps", type=int, default=2, help="timed steps of a process (default: 2)")
    add_timing_options(cli, rounds=2)
    cli.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return cli


if __name__ == "__main__":
    main()
