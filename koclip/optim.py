"""Parameter groups of AdamW, learning rates by depth, and the learning-rate schedule."""

import math
from collections.abc import Mapping

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from koclip.config import OptimConfig
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import layout_of


def adamw(
    model: nn.Module,
    config: OptimConfig,
    rates: Mapping[str, float] | None = None,
    decays: Mapping[str, float] | None = None,
) -> AdamW:
    """Return AdamW for all parameters that require a gradient.

    Norms, biases and scalars have no weight decay (Radford et al. 2021, section 2.5). `rates` are learning rates of
    parameters by name, relative to `config.lr`; default: 1. `decays` are weight decays by name; default:
    `config.weight_decay`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = (decays or {}).get(name, config.weight_decay) if parameter.ndim >= 2 else 0.0
            groups.setdefault(((rates or {}).get(name, 1.0), decay), []).append(parameter)
    settings = [
        {"params": parameters, "lr": config.lr * rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    return AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def warmup_cosine(optimizer: Optimizer, config: OptimConfig, num_steps: int, start: int = 0) -> LambdaLR:
    """Return a schedule that rises linearly for `warmup_steps` and falls along a cosine until `num_steps`.

    It starts after `start` steps; those steps count neither for the warm-up nor for the cosine.
    """
    num_steps -= start

    def factor(step: int) -> float:
        step -= start
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    schedule = LambdaLR(optimizer, factor)
    set_step(schedule, start)
    return schedule


def set_step(schedule: LambdaLR, step: int) -> None:
    """Set a schedule and the learning rates of its optimizer to their values after `step` steps."""
    schedule.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


# Every layer reads these relative positions: DeBERTa, MPNet. DeBERTa also has a norm of them.
_SHARED = ("encoder.rel_embeddings.", "encoder.relative_attention_bias.")
_SHARED_NORM = "encoder.LayerNorm."


def depth(tower: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter below a tower's output: 0 above the layers, 1 in the top layer, and so on.

    The layers are the longest list of modules; embeddings, and what all layers share, are one deeper than the lowest
    layer.
    """
    lists = {name: part for name, part in tower.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)}
    if not lists:
        return {name: 0 for name, _ in tower.named_parameters()}
    prefix = max(lists, key=lambda name: len(list(lists[name].children())))
    count = len(list(lists[prefix].children()))
    depths, below = {}, True
    names = [name for name, _ in tower.named_parameters()]
    shared = (*_SHARED, _SHARED_NORM) if any(name.startswith(_SHARED[0]) for name in names) else _SHARED
    for name in names:
        inside = name.startswith(f"{prefix}.")
        below = below and not inside
        number = int(name[len(prefix) + 1 :].split(".")[0]) if inside else 0
        outside = count + 1 if below or name.startswith(shared) else 0
        depths[name] = count - number if inside else outside
    return depths


def layer_rates(encoder: DualEncoder, decay: float) -> dict[str, float]:
    """Return the learning rate of each parameter relative to the peak: decay ** depth, in both towers (as in BEiT)."""
    rates: dict[str, float] = {}
    layout = layout_of(encoder.model)
    for side in (layout.image_tower, layout.text_tower):
        depths = depth(encoder.model.get_submodule(side))
        rates |= {f"model.{side}.{name}": decay**below for name, below in depths.items()}
    return rates


def projection_decay(encoder: DualEncoder, decay: float | None) -> dict[str, float]:
    """Return the weight decay of the image projection, by name; empty if it has none of its own."""
    name = layout_of(encoder.model).image_projection
    return {} if decay is None or name is None else {f"model.{name}.weight": decay}
