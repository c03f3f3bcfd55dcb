"""Templates and class names -> prompts."""

import re

from koclip.text.particles import attach

_SLOT = re.compile(r"\{(?::([^{}]+))?\}")


def fill(template: str, name: str) -> str:
    """Return the template with `{}` replaced by `name`, and `{:을/를}` by `name` and the fitting particle.

    Raises:
        ValueError: the template has no slot, or names an unknown particle.
    """
    if not _SLOT.search(template):
        raise ValueError(f"template {template!r} has no slot; write {{}} where the class name goes")
    return _SLOT.sub(lambda slot: attach(name, slot[1]) if slot[1] else name, template)
