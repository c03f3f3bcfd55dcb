"""Measure the steps of a run on this machine: the real training loop on generated batches of the run's shapes."""

import itertools
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from koclip import training
from koclip.config import AlignConfig, PretrainConfig, Stage
from koclip.data.batches import Batch
from koclip.data.order import BatchPart
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import parts
from koclip.planning.counting import Shapes
from koclip.planning.models import build

_PEAK_OF_LINUX = Path("/proc/self/clear_refs")  # writing 5 forgets the peak (man 5 proc)
_WARM_UP = 2  # steps that do not count: buffers are allocated, kernels are chosen


def measure(
    run: PretrainConfig | AlignConfig, stage: Stage, shapes: Shapes, width: int, num_steps: int
) -> dict[str, float]:
    """Return `pairs_per_second` and `cpu_seconds` a step of this process, and its peak memory.

    `memory_gib` is the peak above the memory before the model.

    Args:
        run: The configuration.
        stage: The stage of it.
        shapes: What a batch of the stage has; `pairs` is not read, the run has its batch size.
        width: Width of the embeddings.
        num_steps: Steps to measure.
    """
    accelerator = training.start(run.train)
    _forget_peak()
    before = psutil.Process().memory_info().rss
    planned = build(run, torch.device("cpu"))
    planned.attach(run)
    planned.begin(run, stage)
    state = training.prepare(accelerator, planned.dual_encoder, run, stage)
    batch = generated(planned.dual_encoder, shapes._replace(pairs=run.train.batch_size), width, stage)
    pieces = BatchPart(run.train.batch_size, micro_batch_size=run.train.micro_batch_size).pieces
    batches = itertools.cycle(list(batch.cut(pieces)))
    for _ in training.steps(state, batches, 0, _WARM_UP, _WARM_UP):
        pass
    start = time.process_time()
    *_, (_, stats) = training.steps(state, batches, _WARM_UP, _WARM_UP + num_steps, _WARM_UP + num_steps)
    cpu_seconds = (time.process_time() - start) / num_steps
    memory = stats["memory_gib"] if accelerator.device.type == "cuda" else _peak_gib() - before / 2**30
    training.release(state)
    return {"pairs_per_second": stats["images_per_second"], "cpu_seconds": cpu_seconds, "memory_gib": memory}


def _forget_peak() -> None:
    """Let the peak of this process start again from the memory that it has; only Linux can do it."""
    if _PEAK_OF_LINUX.exists():
        with _PEAK_OF_LINUX.open("w", encoding="ascii") as file:
            file.write("5")


def _peak_gib() -> float:
    """Return the most memory that this process has had, GiB; on Linux since `_forget_peak`."""
    if _PEAK_OF_LINUX.exists():
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def generated(encoder: DualEncoder, shapes: Shapes, width: int, stage: Stage) -> Batch:
    """Return a batch of random numbers with the shapes of a run's batches. All captions have the same length."""
    generator = torch.Generator().manual_seed(0)
    model, count = parts(encoder.model), shapes.pairs

    def features(width: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)

    tower: Any = model.text_tower
    ids = torch.randint(3, tower.config.vocab_size - 3, (count, shapes.tokens), generator=generator)
    end = tower.config.eos_token_id
    if isinstance(end, int) and end < tower.config.vocab_size:
        ids[:, -1] = end
    columns = torch.arange(count)[:, None].expand(-1, 3 if stage.distill else 2)
    size = shapes.image_size
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pair_ids=columns,
        keys=[str(number) for number in range(count)],
        skipped=[],
        num_drawn=count,
        pixel_values=pixels if shapes.image == "pixels" else None,
        image=features(width) if shapes.image == "embedding" else None,
        image_pooled=features(model.image_projection.in_features) if shapes.image == "pooled" else None,
        text_pooled=features(model.text_projection.in_features) if shapes.text == "pooled" else None,
        teacher=features(width) if stage.distill else None,
        readable=torch.ones(count, dtype=torch.bool) if stage.distill else None,
        source_image=features(width) if stage.preserves and shapes.image == "pixels" else None,
    )
