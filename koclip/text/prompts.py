"""Templates and class names -> prompts."""

import re

from koclip.text.particles import particle

_SLOT = re.compile(r"\{([^{}]*)\}")


def fill(template: str, name: str) -> str:
    """Return the template with `{}` replaced by `name`, and `{이/가}` by the form that fits what stands before it.

    Raises:
        ValueError: the template has no `{}`, or names an unknown particle.
    """
    if "{}" not in template:
        raise ValueError(f"template {template!r} has no slot; write {{}} where the class name goes")
    filled, end = "", 0
    for slot in _SLOT.finditer(template):
        filled += template[end : slot.start()]
        filled += particle(filled, slot[1]) if slot[1] else name
        end = slot.end()
    return filled + template[end:]
