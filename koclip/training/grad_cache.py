"""Exact gradients of a large contrastive batch in the memory of a small one (GradCache, Gao et al. 2021).

A contrastive loss ties all pairs of a batch together, so gradient accumulation over pieces is not the gradient of the
batch. But given the gradient of the loss with respect to every embedding, each piece's part can be computed alone:

1. embed the pieces one by one, without a graph;
2. one loss over all embeddings (and all processes), and its gradient with respect to each of them;
3. embed every piece again, with a graph and the random numbers of the first time, and propagate its embeddings'
   gradients. Processes synchronise after the last piece.
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

_KNOWN: dict[str, Literal["image", "text"]] = {
    "image": "image",
    "text": "text",
    "text_norm": "text",
}  # what a pair gets, and from which tower


def backward(
    accelerator: Accelerator, model: nn.Module, dual_encoder: DualEncoder, loss: LossFn, pieces: Sequence[Batch]
) -> Loss:
    """Accumulate the gradient of the loss over `pieces`, taken as one batch, and return that loss.

    The pieces stay where they are (on the host) and go to the device one at a time. Pieces may differ in size and in
    padding. The embeddings of a tower without trained parameters are computed once. A batch norm sees each piece as a
    batch of its own and updates its running statistics in both passes.

    Args:
        accelerator: Scales the loss and says when processes synchronise.
        model: `dual_encoder` as the accelerator prepared it.
        dual_encoder: Says which towers are trained.
        loss: The loss over the whole batch.
        pieces: The batch of this process.
    """
    states, embedded = [], []
    for piece in pieces:
        states.append(random_states())
        with torch.no_grad():
            embedded.append(model(**piece.to(accelerator.device).inputs))
    whole = _join(embedded)
    value, accuracy = loss(whole, *_targets(pieces, accelerator.device))
    value.backward()
    start = 0
    for piece, state, first in zip(pieces, states, embedded, strict=True):
        last = piece is pieces[-1]
        rows = slice(start, start := start + len(piece.keys))
        restore_random(state)
        # The output of a frozen tower is passed in, not computed again.
        known = {name: getattr(first, name) for name in _KNOWN if not dual_encoder.trains(_KNOWN[name])}
        with nullcontext() if last else _unsynchronised(accelerator, model):
            again = model(**piece.to(accelerator.device).inputs | known)
            parts = [_pull(getattr(again, name), getattr(whole, name), rows) for name in _KNOWN]
            if last:
                parts += [_pull(again.logit_scale, whole.logit_scale), _pull(again.logit_bias, whole.logit_bias)]
            accelerator.backward(torch.stack([part for part in parts if part is not None]).sum())
            del again, parts  # else this graph would still be there while the next one is built
    return Loss(value.detach(), accuracy)


def _unsynchronised(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[Any]:
    """Keep processes from synchronising; accelerate does not where one process alone has its model in DDP."""
    paused: AbstractContextManager[Any]
    paused = model.no_sync() if isinstance(model, DistributedDataParallel) else accelerator.no_sync(model)
    return paused


def _targets(pieces: Sequence[Batch], device: torch.device) -> list[torch.Tensor]:
    """Return what the loss takes besides the embeddings, of the whole batch."""
    return [torch.cat(parts).to(device) for parts in zip(*(piece.targets for piece in pieces), strict=True)]


def _join(embedded: Sequence[Embeddings]) -> Embeddings:
    """Return the embeddings of all pieces as leaves that collect gradients; scale and bias are the same in each."""
    image, text, norm = (torch.cat([getattr(piece, name) for piece in embedded]).requires_grad_() for name in _KNOWN)
    scale, bias = embedded[0].logit_scale.detach().clone().requires_grad_(), embedded[0].logit_bias
    return Embeddings(image, text, scale, None if bias is None else bias.detach().clone().requires_grad_(), norm)


def _pull(tensor: torch.Tensor | None, leaf: torch.Tensor | None, rows: slice = slice(None)) -> torch.Tensor | None:
    """Return a scalar whose gradient with respect to `tensor` is `leaf`'s, or None for what is not trained."""
    if tensor is None or leaf is None or leaf.grad is None or not tensor.requires_grad:
        return None
    return (tensor * (leaf.grad[rows] if leaf.grad.ndim else leaf.grad)).sum()


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of the generators that a training step of this process draws from: "cpu", "cuda"."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, torch.Tensor]) -> None:
    """Set the generators to these states; a generator without a state is not changed."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
