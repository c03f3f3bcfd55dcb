"""The errors that end a run with one line, and the checks that raise the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MOST_PIXELS = 178_956_970  # of a picture that PIL decodes


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, what was got and the fix."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says why, what is kept and what to do."""


class Stopped(Exception):  # noqa: N818 - no error
    """The run was asked to stop and has saved a checkpoint. The message says how to continue."""


# What code raises that runs on with a value it does not expect. A `ConfigError` is a `ValueError`.
_CONSEQUENCES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)  # inside `all_faults`


def check(condition: bool, key: str, got: object, fix: str) -> None:
    """Raise a `ConfigError` naming `key` unless `condition` holds; inside `all_faults`, note it and go on."""
    if condition:
        return
    fault, collected = f"{key}: got {got!r}, {fix}", _collected.get()
    if collected is None:
        raise ConfigError(fault)
    collected.append(fault)


@contextmanager
def all_faults() -> Iterator[None]:
    """Raise one `ConfigError` with every fault that `check` finds in the block, instead of the first alone.

    A block inside another one leaves its faults to that one. What an error says that comes after a fault is left out:
    the code ran on with a value that it does not expect.
    """
    outer = _collected.get()
    faults: list[str] = []
    token = _collected.set(faults)
    try:
        yield
    except _CONSEQUENCES as error:
        if not faults:
            raise
        if isinstance(error, ConfigError):  # raised by hand, which is a fault too
            faults.append(str(error))
    finally:
        _collected.reset(token)
    if outer is not None:
        outer += faults
    elif faults:
        raise ConfigError(_listed(list(dict.fromkeys(faults))))


def _listed(faults: list[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} faults: " + "; ".join(f"({number}) {fault}" for number, fault in enumerate(faults, 1))


def check_pixels(key: str, pixels: int) -> None:
    """Raise a `ConfigError` naming `key` unless it can be the largest width x height of a picture."""
    check(1 <= pixels <= MOST_PIXELS, key, pixels, f"expected 1 to {MOST_PIXELS}, the most that PIL decodes")
