"""The errors that end a run with one line, and the check that raises the first."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, what was got and the fix."""


class RunError(RuntimeError):
    """A run that cannot go on. The message says why, what is kept and what to do."""


def check(condition: bool, key: str, got: object, fix: str) -> None:
    """Raise a `ConfigError` naming `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: got {got!r}, {fix}")
