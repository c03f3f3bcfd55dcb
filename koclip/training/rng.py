"""The states of the random-number generators that a training step draws from, to set them back."""

import torch

States = dict[str, torch.Tensor]


def states() -> States:
    """Return this process's states; "cuda" is the current GPU's."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(found: States) -> None:
    """Set generators to the states that `states` returned; one that is missing stays as it is."""
    if "cpu" in found:
        torch.set_rng_state(found["cpu"])
    if torch.cuda.is_available() and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])
