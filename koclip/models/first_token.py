"""Text towers of which a `VisionTextDualEncoderModel` reads the first token's last hidden state.

The class projects what the tower's pooler returns: in BERT and similar encoders tanh(V h + b) of the first token's
state h. Training uses h itself: `FirstToken` takes the pooler's place, and has no weights. The saved model has the
pooler of the stock class, with V = 2^-12 I and b = 0, and a text projection multiplied by 2^12. Near 0, tanh is the
identity: embeddings differ by less than 1e-6 if the states are below 18, as they are after a layer norm.
Both factors are powers of two, so a saved model that is loaded again for
training has exactly the weights that were saved.
"""

import copy
from typing import Any

import torch
from torch import nn

SHRINK = 2.0**-12  # smaller factors lose digits in fp16, larger ones leave the range where tanh is the identity
_PROJECTION = "text_projection."


class FirstToken(nn.Module):
    """A pooler that returns the first token's state.

    Args:
        linear: Name of the stock pooler's linear layer in the tower.
        width: Width of the states, W.
    """

    def __init__(self, linear: str, width: int) -> None:
        super().__init__()
        self.linear, self.width = linear, width

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the first token's state (B, W) of states (B, L, W), or of states (B, W) that the tower chose."""
        return states[:, 0] if states.ndim == 3 else states


def read_first_token(tower: Any) -> None:
    """Replace the pooler of a text tower, in place. A tower whose class has no pooler stays as it is."""
    with torch.device("meta"):  # the class as it is loaded: a tower without a pooler may be of a class that has it
        names = type(tower)(copy.deepcopy(tower.config)).state_dict()
    linear = next((name for name in ("pooler.dense", "pooler") if f"{name}.weight" in names), None)
    if linear is None:
        return
    for name in ("pooler_activation", "activation"):  # of ALBERT and of BigBird, whose pooler is a linear layer
        if hasattr(tower, name):
            setattr(tower, name, nn.Identity())
    tower.pooler = FirstToken(linear, tower.config.hidden_size)


def stock_pooler(tower: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the stock pooler that stand for `FirstToken`; none if the tower has another pooler."""
    pooler = getattr(tower, "pooler", None)
    if not isinstance(pooler, FirstToken):
        return {}
    return {
        f"{pooler.linear}.weight": SHRINK * torch.eye(pooler.width),
        f"{pooler.linear}.bias": torch.zeros(pooler.width),
    }


def fold(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `weights` of a model, or of its adapter, as the stock class computes with them.

    Only models whose text tower has a `FirstToken` change.
    """
    pooler = stock_pooler(model.text_model)
    if not pooler:
        return weights
    scaled = {name: value / SHRINK if name.startswith(_PROJECTION) else value for name, value in weights.items()}
    return scaled | {f"text_model.{name}": value for name, value in pooler.items()}


@torch.no_grad()
def unfold(model: Any) -> None:
    """Undo `fold` in a loaded model, in place. Other models stay as they are."""
    tower = model.text_model
    pooler = getattr(tower, "pooler", None)
    linear: Any = getattr(pooler, "dense", pooler)  # in ALBERT and BigBird the pooler is the linear layer
    if not isinstance(linear, nn.Linear) or linear.bias.any():
        return
    if torch.equal(linear.weight, SHRINK * torch.eye(len(linear.weight)).to(linear.weight)):
        read_first_token(tower)
        model.text_projection.weight.mul_(SHRINK)
