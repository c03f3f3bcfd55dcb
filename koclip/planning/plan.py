"""A plan: what each stage of a run takes, and the whole run, as plain numbers that JSON can hold."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from koclip.config import AlignConfig, PlanConfig, PretrainConfig, Stage
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import parts
from koclip.planning import counting, devices, memory, speed
from koclip.planning.counting import Shapes
from koclip.planning.measure import measure
from koclip.planning.models import PlannedModel, build

Run = PretrainConfig | AlignConfig
_SAMPLE = 2  # pairs whose FLOPs are counted; FLOPs of a tower are proportional to the pairs
# Numbers per parameter that the optimizer's update reads and writes, halved: other operations count what they write,
# and read about as much. AdamW reads four numbers and writes three; clipping reads a gradient twice and writes it.
_UPDATE = 5
_AVERAGE = 1.5  # of a moving average: two reads and a write


def plan(config: PlanConfig, run: Run) -> dict[str, Any]:
    """Return the plan of a run.

    Raises:
        ConfigError: a model cannot be built from its configuration, `device` is not in the table, or `machine` cannot
            be read or is of another machine.
    """
    if config.device is not None:
        devices.named_device(config.device)
    if config.machine is not None and (not config.steps or Path(config.machine).exists()):
        speed.read(Path(config.machine))
    planned = build(run, torch.device("meta"))
    planned.attach(run)
    with counting.without_data(planned.dual_encoder) as encoder:
        whole = Shapes(_SAMPLE, _tokens(config, run), planned.image_size)
        if run.train.fast:
            counting.use_fast_layers(encoder, _device_type(config))
        features = counting.flops(encoder, whole)
        stages = [_stage(config, run, planned, stage) for stage in run.stages]
        width, inputs = _width(encoder), _projection_inputs(encoder)
    for stage, result in zip(run.stages, stages, strict=True):
        if config.steps:
            shapes = Shapes(run.train.batch_size, whole.tokens, planned.image_size, result["image"], result["text"])
            result["measured"] = measure(run, stage, shapes, width, config.steps)
    if config.machine is not None:
        _use_machine(config, run, stages)
    cached = {"image": features.image / _SAMPLE, "caption": features.text / _SAMPLE}
    return {
        "run": config.run,
        "recipe": "align" if isinstance(run, AlignConfig) else "pretrain",
        "image_size": planned.image_size,
        "tokens": whole.tokens,
        "precision": run.train.precision,
        "parameters": stages[-1]["parameters"],
        "stages": stages,
        "disk": _disk(config, run, stages[-1], (width, *inputs)),
        "features": {f"flops_per_{name}": value for name, value in cached.items()},
        "total": _total(config, run, stages),
    }


def _tokens(config: PlanConfig, run: Run) -> int:
    """Return the tokens per caption."""
    return config.tokens or run.tokenizer.max_tokens


def _device_type(config: PlanConfig) -> str:
    return "cuda" if config.device is not None or torch.cuda.is_available() else "cpu"


def _width(encoder: DualEncoder) -> int:
    """Return the width of the embeddings."""
    projection = parts(encoder.model).image_projection
    text: Any = encoder.model.config
    return int(getattr(projection, "out_features", 0) or text.text_config.projection_dim)


def _projection_inputs(encoder: DualEncoder) -> tuple[int, int]:
    """Return the widths of the features before the image and the text projection."""
    model = parts(encoder.model)
    width = _width(encoder)
    return tuple(getattr(side, "in_features", width) for side in (model.image_projection, model.text_projection))  # type: ignore[return-value]


def _inputs(run: Run, encoder: DualEncoder, stage: Stage) -> tuple[str, str]:
    """Return what the batches of a stage hold of an image and of a text, as in recipes/align.py."""
    if not isinstance(run, AlignConfig):
        return "pixels", "tokens"
    text = "pooled" if stage.text_layers == 0 and run.align.cache else "tokens"
    if not stage.images:
        return "nothing", text
    if encoder.trains_tower("image") or not run.align.cache:
        return "pixels", text
    return "pooled" if encoder.trains_projection("image") else "embedding", text


def _stage(config: PlanConfig, run: Run, planned: PlannedModel, stage: Stage) -> dict[str, Any]:
    """Return what a stage takes: parameters that train, FLOPs per pair, memory."""
    encoder, train = planned.dual_encoder, run.train
    planned.begin(run, stage)
    image, text = _inputs(run, encoder, stage)
    shapes = Shapes(_SAMPLE, _tokens(config, run), planned.image_size, image, text)
    work = counting.flops(encoder, shapes)
    per_pair = {"image": work.image, "text": work.text, "backward": work.backward, "recomputed": 0}
    micro = train.micro_batch_size or train.batch_size
    if micro < train.batch_size:  # GradCache embeds twice what trains
        per_pair["recomputed"] = work.image * encoder.trains("image") + work.text * encoder.trains("text")
    again = per_pair["recomputed"] / (work.image + work.text)
    per_pair = {name: count // _SAMPLE for name, count in per_pair.items()}
    everyone = train.batch_size * config.num_devices
    loss = counting.loss_flops(train.batch_size, everyone, _width(encoder)) // train.batch_size
    passes = cache(lambda pairs: counting.step(encoder, shapes._replace(pairs=pairs), train.precision))

    def needs(pairs: int) -> memory.Memory:
        return _memory(config, run, planned, shapes._replace(pairs=pairs), passes(pairs).peak)

    result = {
        "name": stage.name,
        "steps": stage.end - stage.start,
        "pairs": (stage.end - stage.start) * everyone,
        "image": image,
        "text": text,
        "parameters": counting.parameters(encoder),
        "flops_per_pair": {**per_pair, "loss": loss, "total": sum(per_pair.values()) + loss},
        "memory": _as_bytes(needs(micro)),
        "operations": _operations(run, encoder, passes(micro), again),
    }
    limit = config.memory_gib or (devices.DEVICES[config.device].memory_gib if config.device else None)
    if limit is not None:
        largest = memory.largest_batch(lambda size: needs(size).peak, int(limit * 2**30), train.batch_size)
        result["largest_micro_batch"] = largest
        result["memory_limit"] = int(limit * 2**30)
    return result


def _operations(run: Run, encoder: DualEncoder, step: counting.Step, again: float) -> dict[str, float]:
    """Return the bytes that all operations of a training step write, and the number of calls.

    `again` is the share of the forward pass that GradCache repeats.
    """
    size = run.train.batch_size
    pieces = math.ceil(size / (run.train.micro_batch_size or size))
    written, calls = (pieces * (forward * (1 + again) + backward) for forward, backward in (step.written, step.calls))
    state = _state(counting.parameters(encoder), run)
    update = _UPDATE * state["gradients"] + _AVERAGE * state["average"]
    return {"written": written + update + memory.loss_bytes(size, size, size, "cpu"), "calls": calls}


def _memory(config: PlanConfig, run: Run, planned: PlannedModel, shapes: Shapes, step: int) -> memory.Memory:
    """Return the memory of a step with `shapes.pairs` in the model at a time, whose passes allocate `step` bytes."""
    encoder, train = planned.dual_encoder, run.train
    micro = shapes.pairs
    device = _device_type(config)
    held = train.batch_size if device == "cpu" else micro  # pairs whose pixels are in the device's memory
    pixels = 3 * shapes.image_size**2 if shapes.image == "pixels" else 4 * _width(encoder)
    needs = memory.Memory(
        **_state(counting.parameters(encoder), run),
        step=step,
        loss=memory.loss_bytes(train.batch_size, train.batch_size * config.num_devices, run.loss.tile_rows, device),
        batch=held * (pixels + 16 * shapes.tokens),
        cached=micro < train.batch_size,
    )
    return needs.sharded(config.num_devices) if config.sharded else needs


def _state(counts: dict[str, dict[str, int]], run: Run) -> dict[str, int]:
    """Return the bytes of weights, gradients, moments and average, for the numbers of parameters by part."""
    total, trained = (sum(part[name] for part in counts.values()) for name in ("total", "trained"))
    return memory.state_bytes(total, trained, run.train.ema_decay > 0)


def _use_machine(config: PlanConfig, run: Run, stages: list[dict[str, Any]]) -> None:
    """Add the measured stages to the machine file, or add to each stage what the machine file predicts."""
    path = Path(config.machine or "")
    works = [work_of(run, stage) for stage in stages]
    if config.steps:
        size = run.train.batch_size
        results = [stage["measured"] for stage in stages]
        speed.add(path, [
            speed.Measured(config.run, work, size / result["pairs_per_second"], result["memory_gib"] * 2**30)
            for work, result in zip(works, results, strict=True)
        ])  # fmt: skip
        return
    machine = speed.fit(speed.read(path))
    for work, stage in zip(works, stages, strict=True):
        pairs_per_second = run.train.batch_size / machine.seconds(work)
        stage["predicted"] = {"pairs_per_second": pairs_per_second, "memory_gib": machine.peak(work) / 2**30}


def work_of(run: Run, stage: dict[str, Any]) -> speed.Work:
    """Return what a step of a planned stage does."""
    flops = stage["flops_per_pair"]["total"] * run.train.batch_size
    return speed.Work(run.train.precision, flops, **stage["operations"], peak=stage["memory"]["peak"])


def _as_bytes(needs: memory.Memory) -> dict[str, int]:
    names = ("weights", "gradients", "moments", "average", "step", "loss", "batch")
    return {name: getattr(needs, name) for name in names} | {"peak": needs.peak}


def _disk(config: PlanConfig, run: Run, stage: dict[str, Any], widths: tuple[int, int, int]) -> dict[str, int]:
    """Return bytes on disk. `widths` are those of the embeddings, and of the inputs of both projections."""
    sizes = memory.checkpoint_bytes(_state(stage["parameters"], run), run.train.keep_checkpoints)
    if isinstance(run, AlignConfig) and run.align.cache:
        number = 2 if run.align.cache_dtype == "fp16" else 4
        width, image_width, text_width = widths
        if stage["image"] in ("embedding", "pooled") and config.num_images:
            stored = image_width if stage["image"] == "pooled" else width
            sizes["image_features"] = config.num_images * run.data.num_crops * stored * number
        if stage["text"] == "pooled" and config.num_captions:
            sizes["text_features"] = config.num_captions * text_width * number
    return sizes


def _total(config: PlanConfig, run: Run, stages: list[dict[str, Any]]) -> dict[str, float]:
    """Return FLOPs and pairs of the run; with a measurement or a device also hours, kWh and price."""
    total: dict[str, float] = {
        "pairs": sum(stage["pairs"] for stage in stages),
        "flops": sum(stage["pairs"] * stage["flops_per_pair"]["total"] for stage in stages),
    }
    device = devices.DEVICES[config.device] if config.device else None
    if config.steps or config.machine:
        source = "measured" if config.steps else "predicted"
        speeds = [stage[source]["pairs_per_second"] * config.num_devices for stage in stages]
        device = None  # the watts are not those of this machine
    elif device:
        rate = devices.peak_flops(device, run.train.precision) * config.utilization * config.num_devices
        speeds = [rate / stage["flops_per_pair"]["total"] for stage in stages]
    else:
        return total
    for stage, per_second in zip(stages, speeds, strict=True):
        stage["pairs_per_second"], stage["hours"] = per_second, stage["pairs"] / per_second / 3600
    hours = math.fsum(stage["hours"] for stage in stages)
    total |= {"hours": hours, "device_hours": hours * config.num_devices}
    watts = config.watts if config.watts is not None else device.watts if device else None
    if watts is not None:
        total["kwh"] = devices.energy_kwh(hours, config.num_devices, watts)
    if config.price_per_hour is not None:
        total["price"] = hours * config.num_devices * config.price_per_hour
    return total
