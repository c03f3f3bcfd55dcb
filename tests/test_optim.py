"""Parameter groups and the learning rate over a run."""

import math

import pytest
import torch
from tiny import tiny_dual_encoder

from koclip.config import OptimConfig
from koclip.optim import adamw, warmup_cosine


def test_only_matrices_decay() -> None:
    dual_encoder = tiny_dual_encoder(logit_bias=-10.0)
    decayed, kept = adamw(dual_encoder, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    spared = {id(parameter) for parameter in kept["params"]}
    for name, parameter in dual_encoder.named_parameters():
        small = "norm" in name or "layrnorm" in name or name.endswith((".bias", "class_embedding"))
        assert (id(parameter) in spared) == (small or name in ("model.logit_scale", "logit_bias")), name


def test_frozen_parameters_are_left_out() -> None:
    dual_encoder = tiny_dual_encoder()
    dual_encoder.model.vision_model.requires_grad_(False)
    trained = sum(parameter.requires_grad for parameter in dual_encoder.parameters())
    assert sum(len(group["params"]) for group in adamw(dual_encoder, OptimConfig()).param_groups) == trained


def test_settings_reach_the_optimizer() -> None:
    config = OptimConfig(lr=0.25, beta1=0.8, beta2=0.9, eps=1e-3)
    group = adamw(torch.nn.Linear(2, 2), config).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.8, 0.9), 1e-3)


def test_warm_up_rises_linearly_and_the_cosine_falls_to_its_floor() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)
    optimizer = adamw(torch.nn.Linear(2, 2), config)
    schedule = warmup_cosine(optimizer, config, num_steps=12)
    rates = []
    for _ in range(14):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # halfway
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[12:] == pytest.approx([0.2, 0.2])


def test_no_warm_up_starts_at_the_peak() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=0)
    assert warmup_cosine(adamw(torch.nn.Linear(2, 2), config), config, 10).get_last_lr()[0] == 1.0
