"""Memory of a training step on one device, and sizes on disk."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from koclip.losses import TILE_SIZE

_FP32 = 4  # bytes of a weight, a gradient and a moment: training keeps them in fp32 in every precision
# Copies of the similarities of a tile that a contrastive loss and its backward pass hold at a time, in fp32.
_LOSS_COPIES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a device during a step, without the libraries that a process loads."""

    weights: int
    gradients: int
    moments: int  # the two of AdamW
    average: int  # exponential moving average of the weights
    step: int  # activations at their peak, with the gradients that exist by then
    loss: int
    batch: int  # pixels and tokens
    cached: bool  # micro-batches (GradCache): the gradients exist while activations do

    @property
    def peak(self) -> int:
        """The most bytes at a time: in the backward pass, or when the optimizer updates the weights."""
        backward = self.step + (self.gradients if self.cached else 0)
        backward = max(backward, self.loss) if self.cached else backward + self.loss
        return self.weights + self.moments + self.average + self.batch + max(backward, self.gradients)

    def sharded(self, num_devices: int) -> "Memory":
        """Return the memory with weights, gradients and moments sharded over devices (FSDP2).

        The layer that is gathered at a time is not counted; it is small beside the activations.
        """
        shares = {name: -(-getattr(self, name) // num_devices) for name in ("weights", "gradients", "moments")}
        return dataclasses.replace(self, **shares)


def state_bytes(total: int, trained: int, averaged: bool) -> dict[str, int]:
    """Return the bytes of weights, gradients, moments and average, for numbers of parameters."""
    average = total * _FP32 if averaged else 0
    return {
        "weights": total * _FP32,
        "gradients": trained * _FP32,
        "moments": 2 * trained * _FP32,
        "average": average,
    }


def loss_bytes(pairs: int, global_pairs: int, tile_rows: int | None, device: str) -> int:
    """Return the bytes of the similarities that a loss has in memory at a time."""
    rows = tile_rows or max(64, TILE_SIZE[device] // global_pairs)
    return _LOSS_COPIES * _FP32 * min(rows, pairs) * global_pairs


def checkpoint_bytes(state: dict[str, int], keep: int) -> dict[str, int]:
    """Return the bytes of a checkpoint, and of all that exist at a time: those that are kept, and the next one."""
    size = state["weights"] + state["moments"] + state["average"]
    return {"checkpoint": size, "checkpoints": size * (keep + 1), "model": state["weights"]}


def largest_batch(peak: Callable[[int], int], limit: int, most: int) -> int:
    """Return the largest number of pairs, up to `most`, whose peak bytes are within `limit`; 0 if not even 1 fits.

    `peak` grows with the number. It is called a few times: the next number to try follows from a straight line through
    the numbers that are known, which is nearly exact because activations grow with the batch.
    """
    if peak(1) > limit:
        return 0
    low, high = (1, peak(1)), (most, peak(most))
    if high[1] <= limit:
        return most
    while high[0] - low[0] > max(1, low[0] // 50):  # to 2 %
        share = (limit - low[1]) / max(1, high[1] - low[1])
        middle = low[0] + round(share * (high[0] - low[0]))
        middle = min(max(middle, low[0] + 1), high[0] - 1)
        for candidate in (middle, middle + max(1, middle // 60)):
            if low[0] < candidate < high[0]:
                value = peak(candidate)
                low, high = ((candidate, value), high) if value <= limit else (low, (candidate, value))
    return low[0]
