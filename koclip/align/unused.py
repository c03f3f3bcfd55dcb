"""Freeze what texts do not use: weights of a text tower that never get a gradient.

Many encoders have such weights: Longformer's projections for global attention, LUKE's embeddings of entities, XLNet's
embedding of the mask, poolers whose output is not read. With several processes, PyTorch's DDP waits for the gradient of
every weight that is trained, and stops with an error.
"""

import itertools

import torch
from torch import nn

from koclip.models.dual_encoder import text_features
from koclip.models.stock import StockModel, parts

_NUM_TOKENS = 8


def freeze_unused(model: StockModel) -> list[str]:
    """Freeze the weights of the text tower that the features of a text do not depend on; return their names.

    One text is embedded, without a backward pass. Its features depend on the leaves of the graph that autograd records
    for them.
    """
    tower = parts(model).text_tower
    trained = {name: weight for name, weight in tower.named_parameters() if weight.requires_grad}
    if not trained:
        return []
    table: nn.Embedding = tower.get_input_embeddings()
    words = (number for number in range(table.num_embeddings) if number != tower.config.pad_token_id)
    ids = list(itertools.islice(words, _NUM_TOKENS))
    input_ids = torch.tensor([ids], device=table.weight.device)
    training = [module for module in tower.modules() if module.training]
    tower.eval()  # no dropout, so that the random numbers of training stay the same
    with torch.enable_grad():
        used = _leaves(text_features(model, input_ids, torch.ones_like(input_ids)))
    for module in training:
        module.training = True
    unused = {name: weight for name, weight in trained.items() if weight not in used}
    for weight in unused.values():
        weight.requires_grad_(False)
    return list(unused)


def _leaves(tensor: torch.Tensor) -> set[torch.Tensor]:
    """Return the leaves that a tensor depends on and that require a gradient."""
    leaves, waiting = set(), [tensor.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)  # of a node that accumulates a gradient
        if leaf is not None:
            leaves.add(leaf)
        following = [function for function, _ in node.next_functions if function not in seen]
        waiting += following
        seen.update(following)
    return leaves
