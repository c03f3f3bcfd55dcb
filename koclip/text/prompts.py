"""Templates and class names -> prompts."""

import re

from koclip.text.korean.particles import attach, particle

_SLOT = re.compile(r"\{([^{}]*)\}")


def has_particle(template: str) -> bool:
    """Tell whether a template has a slot for a particle: {label:을/를} or {을/를}."""
    return any("/" in slot[1] for slot in _SLOT.finditer(template))


def spelt_out(template: str) -> str:
    """Return a template with both forms of each particle, for any name: {label:을/를} becomes {label}을(를)."""

    def both(slot: re.Match[str]) -> str:
        value, colon, pair = slot[1].rpartition(":")
        return (f"{{{value}}}" if colon else "") + particle("", pair) if "/" in pair else slot[0]

    return _SLOT.sub(both, template)


def fill(template: str, label: str, **others: str) -> str:
    """Return the template with its slots filled.

    `{}` and `{label}` stand for `label`, `{who}` for `others["who"]`, `{label:을/를}` for a value with its particle,
    and `{이/가}` for the particle that fits what stands before it.

    Raises:
        ValueError: the template has no slot for `label`, or a slot that is neither a value nor a known particle.
    """
    values = {**others, "": label, "label": label}
    slots = [(slot, *slot[1].partition(":")[::2]) for slot in _SLOT.finditer(template)]
    if not any(key in ("", "label") for _, key, _ in slots):
        raise ValueError(
            f"template {template!r} has no slot; write {{}}, {{label}} or {{label:을/를}} where the class name goes"
        )
    filled, end = "", 0
    for slot, key, pair in slots:
        filled += template[end : slot.start()]
        try:
            if key in values:
                filled += attach(values[key], pair) if pair else values[key]
            else:
                filled += particle(filled, slot[1])
        except ValueError as error:
            known = ", ".join(["label", *others])
            raise ValueError(f"template {template!r}, slot {slot[0]!r}: {error}; values: {known}") from None
        end = slot.end()
    return filled + template[end:]
