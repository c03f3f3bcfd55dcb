"""The states of the random-number generators that a training step draws from, to set them back."""

import torch

States = dict[str, torch.Tensor]


def states() -> States:
    """Return this process's states; "cuda" is the current GPU's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: States) -> None:
    """Set the generators to these states; a generator without a state is not changed."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
