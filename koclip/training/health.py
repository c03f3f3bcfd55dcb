"""Skip optimizer steps whose loss or gradient is not finite; record loss spikes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from koclip import distributed
from koclip.config import RunError

_DECAY = 0.98  # of the running mean and variance of the loss: about 50 steps
_MIN_STEPS = 100  # good steps before a spike can be distinguished from noise


class Event(NamedTuple):
    """A step that went wrong, and the samples of its batch, of all processes."""

    step: int
    kind: str  # bad_step, overflow or spike
    loss: float
    grad_norm: float
    keys: list[str]


class DivergedError(RunError):
    """Too many steps in a row had no finite loss and gradient."""


@dataclass
class _Counts:
    """What a resumed run must remember."""

    bad_steps: int = 0
    in_a_row: int = 0
    good_steps: int = 0
    mean: float = 0.0
    variance: float = 0.0


@dataclass
class Health:
    """Judges every step.

    Args:
        max_bad_steps: Bad steps in a row after which the run stops.
        spike_sigmas: Standard deviations of the running loss above its mean at which a loss is a spike; 0: never.
    """

    max_bad_steps: int
    spike_sigmas: float
    counts: _Counts = field(default_factory=_Counts)
    events: list[Event] = field(default_factory=list)

    def judge(self, step: int, loss: float, grad_norm: float, keys: Sequence[str], loss_scale: float | None) -> bool:
        """Return whether the step may change the model. All processes must pass the same numbers.

        Args:
            step: Its number.
            loss: Mean over the processes.
            grad_norm: Norm of the global gradient.
            keys: This process's samples.
            loss_scale: That of fp16 training, None without. A gradient that overflows at a scale of 1 or more is how
                the scaler finds its scale: the step is skipped, but it does not count as bad.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._note_spike(step, loss, grad_norm, keys)
            self.counts.in_a_row = 0
            return True
        if math.isfinite(loss) and loss_scale is not None and loss_scale >= 1:
            self._note(step, "overflow", loss, grad_norm, keys)
            return False
        self.counts.bad_steps += 1
        self.counts.in_a_row += 1
        self._note(step, "bad_step", loss, grad_norm, keys)
        return False

    def stop_if_diverged(self) -> None:
        """Raise a `DivergedError` after `max_bad_steps` bad steps in a row."""
        if self.counts.in_a_row >= self.max_bad_steps:
            raise DivergedError(
                f"train.max_bad_steps: {self.counts.in_a_row} steps in a row had no finite loss and gradient; none of "
                "them changed the model. events.jsonl in the run directory lists them with their samples; mend these, "
                "or lower optim.lr (--resume auto --resume_with '[optim.lr]' goes on from the last checkpoint)"
            )

    def take_events(self) -> list[Event]:
        """Return the events since the last call."""
        taken, self.events = self.events, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must remember."""
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what `state_dict` returned."""
        self.counts = _Counts(**state)

    def _note_spike(self, step: int, loss: float, grad_norm: float, keys: Sequence[str]) -> None:
        """Compare a loss with the running mean, then add it to it (West 1979, exponentially weighted)."""
        counts = self.counts
        limit = counts.mean + self.spike_sigmas * math.sqrt(counts.variance)
        if self.spike_sigmas and counts.good_steps >= _MIN_STEPS and loss > limit:
            self._note(step, "spike", loss, grad_norm, keys)
        weight = max(1 - _DECAY, 1 / (counts.good_steps + 1))
        difference = loss - counts.mean
        counts.mean += weight * difference
        counts.variance = (1 - weight) * (counts.variance + weight * difference**2)
        counts.good_steps += 1

    def _note(self, step: int, kind: str, loss: float, grad_norm: float, keys: Sequence[str]) -> None:
        everyone = [key for part in distributed.gather_objects(list(keys)) for key in part]
        self.events.append(Event(step, kind, loss, grad_norm, everyone))
