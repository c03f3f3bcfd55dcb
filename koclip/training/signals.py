"""Stop cleanly: SIGTERM or SIGINT lets the current step finish; a second signal ends the process at once."""

import signal
from types import FrameType, TracebackType

import torch

from koclip import distributed


class StopRequest:
    """While entered, remembers that a signal asked the run to stop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def asked(self) -> bool:
        """Return whether any process of the run was asked to stop; call it on all of them."""
        return distributed.any_process(self._asked, self._device)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
