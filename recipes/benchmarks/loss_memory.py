"""Memory and time of the contrastive loss of N pairs, forward and backward, compared with dense losses.

    python recipes/benchmarks/loss_memory.py                                   # N = 4,096, 8,192 and 16,384
    python recipes/benchmarks/loss_memory.py --sizes 32768 --ways tiled        # the dense losses are too large

Every measurement runs in its own process, the ways in turns. Memory is the peak of the process minus its memory after
the features (N x 512, fp32) were made, so it includes their gradients. "Kept" is the memory that autograd holds between
the forward and the backward pass, in multiples of the features. Bars of the project: at N = 8,192 at most 1.2x the
features, the loss and its gradients equal to 1e-6 (tests/test_tiled_loss.py); at 16,384 at most 300 MB and no longer
than the dense loss; at 32,768 at most 600 MB.

- tiled: koclip's default at these sizes (loss.tile_rows);
- dense: koclip's own loss with all similarities at once, which it uses for small batches;
- open_clip: its ClipLoss, if open_clip_torch is installed.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import psutil
import torch
import torch.nn.functional as F
from ratios import add_timing_options, hardware, run_worker, spread
from torch import Tensor
from tqdm.auto import tqdm

from koclip import losses
from koclip.config import LossConfig
from koclip.losses.contrastive import Embeddings

WIDTH = 512
WAYS = ("dense", "open_clip", "tiled")


def features(count: int) -> Embeddings:
    """Return `count` pairs of weakly correlated noise."""
    random = torch.Generator().manual_seed(0)
    image, text = (torch.randn(count, WIDTH, generator=random) for _ in range(2))
    text.add_(image, alpha=0.2)
    for tensor in (image, text):
        F.normalize(tensor, dim=-1, out=tensor)
    return Embeddings(*(tensor.requires_grad_() for tensor in (image, text, torch.tensor(20.0), torch.tensor(-8.0))))


def loss_of(way: str, name: str, count: int) -> Callable[[Embeddings], Tensor]:
    """Return the loss that a way computes, (): a function of the embeddings."""
    if way == "open_clip":
        import open_clip

        clip_loss = open_clip.ClipLoss() if name == "infonce" else open_clip.SigLipLoss()
        return lambda embeddings: clip_loss(
            embeddings.image,
            embeddings.text,
            embeddings.logit_scale,
            *([embeddings.logit_bias] if name == "sigmoid" else []),
        )
    tile_rows = count if way == "dense" else None
    loss = losses.build_loss(LossConfig(name=name, duplicates="negatives", tile_rows=tile_rows))
    return lambda embeddings: loss(embeddings, torch.arange(count)).value


def kept(loss: Callable[[Embeddings], Tensor], embeddings: Embeddings) -> tuple[Tensor, int]:
    """Return the loss and the bytes stored for its backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(embeddings)
    return value, sum(storages.values())


def peak() -> float:
    """Return the peak memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(options: argparse.Namespace) -> None:
    """Measure one way at one size in this process, and print the result as JSON."""
    torch.set_num_threads(options.threads)
    (way,), (count,) = options.ways, options.sizes
    loss, embeddings = loss_of(way, options.loss, count), features(count)
    clock = time.process_time if options.cpu_time else time.perf_counter
    before, began = psutil.Process().memory_info().rss / 2**20, clock()
    value, held = kept(loss, embeddings)
    value.backward()
    measured = {"seconds": clock() - began, "megabytes": peak() - before, "value": value.item()}
    print(json.dumps(measured | {"kept": held / (2 * embeddings.image.nbytes)}))


def run(way: str, count: int, options: argparse.Namespace) -> dict[str, float]:
    """Run `worker` in its own process."""
    words = ["--worker", "--ways", way, "--sizes", str(count), "--loss", options.loss]
    words += ["--threads", str(options.threads), *(["--cpu_time"] if options.cpu_time else [])]
    return run_worker(__file__, words, f"{way} at {count} pairs")


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parser().parse_args(args)
    if options.worker:
        worker(options)
        return
    ways = [way for way in options.ways if way != "open_clip" or find_spec("open_clip")]
    clock = "CPU time" if options.cpu_time else "wall time"
    measured: dict[tuple[int, str], list[dict[str, float]]] = {}
    for count, way in tqdm([(n, way) for n in options.sizes for _ in range(options.rounds) for way in ways], "losses"):
        measured.setdefault((count, way), []).append(run(way, count, options))
    print(f"{hardware()}; torch {torch.__version__}; {options.threads} thread(s), {clock}, {options.rounds} round(s)")
    print(f"{options.loss}, {WIDTH} wide, fp32\n")
    print("| pairs | loss | peak memory | kept, x features | s | faster than dense | value |")
    print("|---|---|---|---|---|---|---|")
    for (count, way), rounds in measured.items():
        memory, share, seconds = (
            statistics.median(result[key] for result in rounds) for key in ("megabytes", "kept", "seconds")
        )
        dense = [result["seconds"] for result in measured.get((count, "dense"), [])]
        ratio = spread([result["seconds"] for result in rounds], dense) if dense else "-"
        cells = [f"{count:,}", way, f"{memory:,.0f} MB", f"{share:.2f}", f"{seconds:.1f}", ratio]
        print(f"| {' | '.join(cells)} | {rounds[0]['value']:.6f} |")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--sizes", type=int, nargs="+", default=[4_096, 8_192, 16_384], help="pairs")
    cli.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="default: all")
    cli.add_argument("--loss", choices=["infonce", "sigmoid"], default="infonce")
    add_timing_options(cli, rounds=1)
    cli.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return cli


if __name__ == "__main__":
    main()
