"""GradCache: the gradient of pieces is that of the batch, with the same random numbers, for every kind of model."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers.gradients import (
    LOSSES,
    SIZES,
    assert_equal_gradients,
    at_once,
    gradients,
    in_pieces,
    prepare,
    random_model,
)
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_dual_encoder, tiny_pieces
from torch import Tensor

from koclip import losses, training
from koclip.config import LossConfig
from koclip.data.batches import Batch
from koclip.losses import Loss
from koclip.training import grad_cache


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.name}-{loss.tile_rows}")
def test_gradients_are_those_of_the_whole_batch(loss: LossConfig) -> None:
    names = assert_equal_gradients(prepare(random_model(loss), loss))
    assert {"model.logit_scale", *(["logit_bias"] if loss.name == "sigmoid" else [])} <= names


def test_without_the_random_numbers_of_the_first_pass_gradients_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    monkeypatch.setattr("koclip.training.grad_cache.restore_random", lambda _: None)
    with pytest.raises(AssertionError):
        assert_equal_gradients(prepare(random_model(LOSSES[0]), LOSSES[0]))


def test_gradient_checkpointing() -> None:
    model = random_model(LOSSES[0], image_gradient_checkpointing=True, text_gradient_checkpointing=True)
    assert_equal_gradients(prepare(model, LOSSES[0]))


def test_bf16() -> None:
    trainer = prepare(random_model(LOSSES[0]), LOSSES[0], "bf16")
    assert_equal_gradients(trainer, cosine=0.999, ratio=2e-2)  # bf16 sums of one piece and of four round differently


def test_lora() -> None:
    """Only adapters are trained; their dropout is replayed too."""
    model = random_model(LOSSES[0])
    for tower in (model.model.vision_model, model.model.text_model):
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1), tower)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "logit_scale" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would hide half of the gradients
    names = assert_equal_gradients(prepare(model, LOSSES[0]))
    assert sum("lora_A" in name for name in names) > 4


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_frozen_tower_runs_once_and_without_dropout(side: str) -> None:
    model = random_model(LOSSES[0])
    tower = {"image": "vision", "text": "text"}[side]
    frozen = [model.model.get_submodule(f"{tower}_model"), model.model.get_submodule(f"{side_of(side)}_projection")]
    for module in frozen:
        module.requires_grad_(False)
    calls = []
    trainer = prepare(model, LOSSES[0])
    trainer.model.train()
    assert not frozen[0].training
    frozen[0].register_forward_hook(lambda *_: calls.append(1))
    gradients(trainer, in_pieces)
    assert len(calls) == len(SIZES)
    names = assert_equal_gradients(trainer)
    assert not [name for name in names if name.startswith((f"model.{tower}_model", f"model.{side_of(side)}_proj"))]


def side_of(side: str) -> str:
    return {"image": "visual", "text": "text"}[side]


@pytest.mark.parametrize("loss", LOSSES[:2], ids=lambda loss: loss.name)
def test_weights_after_20_steps(loss: LossConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> dict[str, Tensor]:
        trainer = prepare(random_model(loss), loss)
        torch.manual_seed(9)
        for _ in training.steps(trainer, pieces(), 0, 20, log_every=10):
            pass
        return trainer.dual_encoder.state_dict()

    def pieces() -> Iterator[Batch]:
        return itertools.chain.from_iterable(tiny_pieces(SIZES, seed) for seed in range(20))

    cached = train()
    called = []

    def plain(accelerator: object, model: object, dual_encoder: object, loss: object, pieces: Sequence[Batch]) -> Loss:
        called.append(1)
        trainer = Plain(accelerator, model, loss)
        return at_once(trainer, pieces)  # type: ignore[arg-type]

    monkeypatch.setattr(grad_cache, "backward", plain)
    whole = train()
    assert len(called) == 20
    worst = max((cached[name] - weight).abs().max().item() for name, weight in whole.items())
    assert worst <= 1e-5


class Plain:
    """As much of a trainer as `at_once` needs."""

    def __init__(self, accelerator: object, model: object, loss: object) -> None:
        self.accelerator, self.model, self.loss = accelerator, model, loss


def test_without_dropout_pieces_equal_the_one_forward_pass() -> None:
    """The plain way itself is the literal big batch: padding and pieces make no difference."""
    loss = LossConfig()
    trainer = prepare(tiny_dual_encoder(temperature=0.5), loss)
    pieces = tiny_pieces(SIZES)
    length = max(piece.input_ids.shape[1] for piece in pieces)
    pad = trainer.dual_encoder.model.config.text_config.pad_token_id
    ids = torch.cat(
        [torch.nn.functional.pad(p.input_ids, (0, length - p.input_ids.shape[1]), value=pad) for p in pieces]
    )
    mask = torch.cat([torch.nn.functional.pad(p.attention_mask, (0, length - p.input_ids.shape[1])) for p in pieces])
    embeddings = trainer.model(torch.cat([piece.pixel_values for piece in pieces]), ids, mask)
    literal = losses.infonce(embeddings, torch.cat([piece.pair_ids for piece in pieces]), "positives")
    literal.value.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in trainer.dual_encoder.named_parameters()}  # type: ignore[union-attr]
    trainer.model.zero_grad()
    assert in_pieces(trainer, pieces).value.item() == pytest.approx(literal.value.item(), abs=1e-6)
    for name, parameter in trainer.dual_encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4, msg=name)
