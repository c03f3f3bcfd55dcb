"""Exact gradients of a large contrastive batch in the memory of a small one (GradCache, Gao et al. 2021).

A contrastive loss compares all pairs of a batch, so accumulating the gradients of micro-batches does not give the
gradient of the batch. But once the gradient of the loss with respect to every embedding is known, each micro-batch can
be backpropagated alone:

1. embed the micro-batches one by one, without a graph;
2. compute one loss over all embeddings (of all processes), and its gradient with respect to each embedding;
3. embed every micro-batch again, with a graph and the same random numbers, and backpropagate the gradients of its
   embeddings. Processes synchronise after the last micro-batch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from koclip.data.batches import Batch
from koclip.losses import Loss, LossFn
from koclip.losses.contrastive import Embeddings
from koclip.models.dual_encoder import DualEncoder

# The outputs of each pair, and the tower that computes them.
_OUTPUTS: dict[str, Literal["image", "text"]] = {"image": "image", "text": "text", "text_norm": "text"}


def backward(
    accelerator: Accelerator, model: nn.Module, dual_encoder: DualEncoder, loss: LossFn, micro_batches: Sequence[Batch]
) -> Loss:
    """Accumulate the gradient of one loss over all micro-batches, and return that loss.

    The micro-batches stay on the host and go to the device one at a time. They may differ in size and in padding. A
    frozen tower runs once. A batch norm normalises each micro-batch alone and updates its running statistics in both
    passes. `model` is the `dual_encoder` in the accelerator's wrapper.
    """
    states, embedded = [], []
    for batch in micro_batches:
        states.append(random_states())
        with torch.no_grad():
            embedded.append(model(**batch.to(accelerator.device).inputs))
    whole = _join(embedded)
    targets = zip(*(batch.targets for batch in micro_batches), strict=True)
    value, accuracy = loss(whole, *(torch.cat(parts).to(accelerator.device) for parts in targets))
    value.backward()
    start = 0
    for batch, state, first in zip(micro_batches, states, embedded, strict=True):
        last = batch is micro_batches[-1]
        rows = slice(start, start := start + len(batch.keys))
        restore_random(state)
        # The output of a frozen tower is passed in, not computed again.
        known = {name: getattr(first, name) for name, tower in _OUTPUTS.items() if not dual_encoder.trains(tower)}
        with nullcontext() if last else _unsynchronised(accelerator, model):
            again = model(**batch.to(accelerator.device).inputs | known)
            parts = [_pull(getattr(again, name), getattr(whole, name), rows) for name in _OUTPUTS]
            if last:
                parts += [_pull(again.logit_scale, whole.logit_scale), _pull(again.logit_bias, whole.logit_bias)]
            accelerator.backward(torch.stack([part for part in parts if part is not None]).sum())
            del again, parts  # frees this graph before the next graph is built
    return Loss(value.detach(), accuracy)


def _unsynchronised(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[Any]:
    """Keep processes from synchronising. In a run of one process, accelerate does not pause a model in DDP."""
    paused: AbstractContextManager[Any]
    paused = model.no_sync() if isinstance(model, DistributedDataParallel) else accelerator.no_sync(model)
    return paused


def _join(embedded: Sequence[Embeddings]) -> Embeddings:
    """Concatenate embeddings into leaves that collect gradients. Scale and bias are equal in all micro-batches."""
    image, text, norm = (torch.cat([getattr(part, name) for part in embedded]).requires_grad_() for name in _OUTPUTS)
    scale, bias = embedded[0].logit_scale.detach().clone().requires_grad_(), embedded[0].logit_bias
    return Embeddings(image, text, scale, None if bias is None else bias.detach().clone().requires_grad_(), norm)


def _pull(tensor: torch.Tensor | None, leaf: torch.Tensor | None, rows: slice = slice(None)) -> torch.Tensor | None:
    """Return a scalar whose gradient with respect to `tensor` is `leaf.grad`; None if `tensor` is not trained."""
    if tensor is None or leaf is None or leaf.grad is None or not tensor.requires_grad:
        return None
    return (tensor * (leaf.grad[rows] if leaf.grad.ndim else leaf.grad)).sum()


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of the random generators that this process's training steps use, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, torch.Tensor]) -> None:
    """Set the states of the random generators. A generator without a state is not changed."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
