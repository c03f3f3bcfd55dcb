"""The one error of a run that cannot start, and the check that raises it."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, what was got and the fix."""


def check(condition: bool, key: str, got: object, fix: str) -> None:
    """Raise a `ConfigError` naming `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: got {got!r}, {fix}")
