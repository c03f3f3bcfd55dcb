"""The errors that end a run with one line, and the checks that raise the first."""

MOST_PIXELS = 178_956_970  # of a picture that PIL decodes


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, what was got and the fix."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says why, what is kept and what to do."""


def check(condition: bool, key: str, got: object, fix: str) -> None:
    """Raise a `ConfigError` naming `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: got {got!r}, {fix}")


def check_pixels(key: str, pixels: int) -> None:
    """Raise a `ConfigError` naming `key` unless it can be the largest width x height of a picture."""
    check(1 <= pixels <= MOST_PIXELS, key, pixels, f"expected 1 to {MOST_PIXELS}, the most that PIL decodes")
