"""The gradient of a batch in pieces and at once, to compare them."""

from collections.abc import Callable, Sequence

import torch
from tiny import tiny_dual_encoder, tiny_pieces
from torch import Tensor

from koclip import training
from koclip.config import LossConfig, OptimConfig, PretrainConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.losses import Loss
from koclip.losses.contrastive import Embeddings
from koclip.models.dual_encoder import DualEncoder
from koclip.training import TrainState, grad_cache

SIZES = [4, 4, 4, 3]  # K = 4, and the last piece is smaller
LOSSES = [LossConfig(), LossConfig(name="sigmoid"), LossConfig(tile_rows=2)]


def random_model(loss: LossConfig, **changes: object) -> DualEncoder:
    """A model with dropout in both towers and patch dropout."""
    torch.manual_seed(0)
    bias = -2.0 if loss.name == "sigmoid" else None
    model = tiny_dual_encoder(logit_bias=bias, temperature=0.5, patch_dropout=0.3, **changes)
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.1
    return model


def prepare(model: DualEncoder, loss: LossConfig, precision: str = "fp32") -> TrainState:
    train = TrainConfig(batch_size=sum(SIZES), micro_batch_size=SIZES[0], tracker="none", precision=precision)  # type: ignore[arg-type]
    return training.prepare(
        training.start(train), model, PretrainConfig(loss=loss, optim=OptimConfig(warmup_steps=1), train=train)
    )


def at_once(trainer: TrainState, pieces: Sequence[Batch]) -> Loss:
    """The plain way: every piece keeps its graph until the one backward pass."""
    outputs = [trainer.model(**piece.inputs) for piece in pieces]
    image, text, norm = (
        torch.cat([getattr(output, side) for output in outputs]) for side in ("image", "text", "text_norm")
    )
    whole = Embeddings(image, text, outputs[0].logit_scale, outputs[0].logit_bias, norm)
    loss = trainer.loss(whole, *(torch.cat(parts) for parts in zip(*(piece.targets for piece in pieces), strict=True)))
    trainer.accelerator.backward(loss.value)
    return loss


def in_pieces(trainer: TrainState, pieces: Sequence[Batch]) -> Loss:
    return grad_cache.backward(trainer.accelerator, trainer.model, trainer.dual_encoder, trainer.loss, pieces)


def gradients(trainer: TrainState, backward: Callable[[TrainState, Sequence[Batch]], Loss]) -> dict[str, Tensor]:
    """Return the loss and every gradient of one batch, from the same random numbers."""
    trainer.model.train()
    torch.manual_seed(5)
    loss = backward(trainer, tiny_pieces(SIZES))
    results = {"loss": loss.value.detach(), "rng": torch.get_rng_state()}
    results |= {
        name: parameter.grad
        for name, parameter in trainer.dual_encoder.named_parameters()
        if parameter.grad is not None
    }
    trainer.model.zero_grad()
    return results


def assert_equal_gradients(trainer: TrainState, cosine: float = 0.99999, ratio: float = 1e-4) -> set[str]:
    wanted, got = gradients(trainer, at_once), gradients(trainer, in_pieces)
    assert got.keys() == wanted.keys()
    torch.testing.assert_close(got.pop("loss"), wanted.pop("loss"), atol=1e-6, rtol=1e-6)
    assert torch.equal(got.pop("rng"), wanted.pop("rng"))  # what comes after draws the same numbers too
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        if gradient.norm() < 1e-6 * largest:  # a key's bias: zero but for rounding
            assert got[name].norm() < 1e-5 * largest
            continue
        both = gradient.flatten().double(), got[name].flatten().double()
        assert torch.nn.functional.cosine_similarity(*both, dim=0) >= cosine, name
        assert abs(both[1].norm() / both[0].norm() - 1) <= ratio, name
    return set(wanted)
