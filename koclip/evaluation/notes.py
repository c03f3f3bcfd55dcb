"""What a data set's numbers were measured on: as results.json has it, and in words beside the numbers.

`data.<set>` of results.json holds: `source`, the configuration; `rows` read, of which `skipped` were left out, and
`images` measured, fewer than rows where rows of equal images are one; `cut` where `max_images` left rows unread;
`parts`, the same of train, shifted sets and gallery; `captions` by language, equal ones too; `pairs`, of the task
languages: how many captions are `compared`, in how many `images` of how many, and how many that have no counterpart are
`left_out`; `classes`, `absent_classes` that were left out, and `labels`, how they are named; `trained_on`, how many
`images` of all that are tested (`of`) the model was trained on, null where nothing is known, and of which models it is
not known (`unknown`).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from koclip.config import to_dict
from koclip.evaluation.sets import EvalSet
from koclip.evaluation.tasks.zero_shot import asked_templates
from koclip.training import pictures

Facts = Mapping[str, Any]


def described(sets: Sequence[EvalSet], model: str) -> dict[str, dict[str, Any]]:
    """Return what results.json says of each data set that a model was measured on."""
    ids, unknown = pictures.of_model(model)
    return {one.name: _described(one) | {"trained_on": _trained_on(one, ids, unknown)} for one in sets}


def _described(one: EvalSet) -> dict[str, Any]:
    facts: dict[str, Any] = {"source": to_dict(one.config), **counts(one)}
    if one.classes:
        facts |= {"classes": len(one.classes), "absent_classes": len(one.absent), "labels": one.labels_by}
    parts: dict[str, Any] = {f"shifted.{name}": counts(part) for name, part in one.shifted.items()}
    if one.train is not None:
        parts["train"] = {**counts(one.train), "in_source": one.train.in_source}
    if one.config.gallery:
        parts["gallery"] = {"rows": one.gallery_rows, "skipped": len(one.gallery_skipped)}
    if one.config.source.captions:
        facts["captions"] = {name: sum(map(len, one.texts(name))) for name in one.config.source.captions}
    if "languages" in one.config.tasks:
        facts["pairs"] = _pairs(one.captioned)
    templates = asked_templates(one)
    return facts | ({"parts": parts} if parts else {}) | ({"templates": templates} if templates else {})


def counts(part: EvalSet) -> dict[str, Any]:
    """Return the rows read, those left out and the images measured of a set or of a part of one."""
    rows = len(part.pictures) + len(part.skipped) if part.num_rows is None else part.num_rows
    facts = {"rows": rows, "images": len(part.pictures), "skipped": len(part.skipped)}
    return facts | ({"cut": True} if part.cut else {})


def _pairs(one: EvalSet) -> dict[str, Any]:
    """Return how many captions the task languages compares and leaves out, by pair of languages."""
    pairs = {}
    for first, second in itertools.combinations(one.languages, 2):
        own = one.pairs(first, second)
        compared = sum(map(len, own))
        left_out = {name: sum(map(len, one.texts(name))) - compared for name in (first, second)}
        images = {"images": sum(map(bool, own)), "of": len(own)}
        pairs[f"{first}-{second}"] = {"compared": compared, **images, "left_out": left_out}
    return pairs


def _trained_on(one: EvalSet, ids: pictures.Ids | None, unknown: list[str]) -> dict[str, Any]:
    tested = [one.pictures, *(part.pictures for part in one.shifted.values()), *(task.pictures for task in one.choices)]
    images = None if ids is None else sum(pictures.count(ids, shown.digests()) for shown in tested)
    return {"images": images, "of": sum(map(len, tested)), "unknown": unknown}


def notes(facts: Mapping[str, Facts]) -> list[str]:
    """Return what a reader of a data set's numbers should know of what they were measured on.

    Args:
        facts: What `described` returns, by the model's label; they differ in `trained_on` only.
    """
    first = next(iter(facts.values()))
    found = [f"{name}: {text}" if name else text for name, text in _of_rows(first)]
    if first.get("captions"):
        found.append(", ".join(f"{count:,} captions in {name}" for name, count in first["captions"].items()))
    found += [_of_pairs(languages, pairs) for languages, pairs in first.get("pairs", {}).items()]
    if first.get("labels", "").startswith("number"):
        found.append(f"classes by {first['labels']}")
    if first.get("absent_classes"):
        classes = first["classes"] + first["absent_classes"]
        found.append(f"{first['absent_classes']:,} of {classes:,} classes have no image and are left out")
    for label, own in facts.items():
        for text in _of_training(own.get("trained_on", {})):
            found.append(f"{label}: {text}" if len(facts) > 1 else text)
    return found


def _of_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    for name, part in {"": facts, **facts.get("parts", {})}.items():
        if "rows" not in part:  # written before rows were counted
            continue
        used = part["rows"] - part["skipped"]
        text = f"{used:,} of {part['rows']:,} rows, {part['skipped']:,} left out"
        if part.get("in_source"):
            text += f" ({part['in_source']:,} because the source holds the same image)"
        if part.get("images", used) != used:
            text += f", {part['images']:,} images"
        yield name, text + (", the first ones only (max_images)" if part.get("cut") else "")


def _of_pairs(languages: str, pairs: Facts) -> str:
    images = f"{pairs['images']:,} of {pairs['of']:,} images"
    text = f"{languages} compares {pairs['compared']:,} pairs of captions, in {images}"
    left_out = [f"{count:,} in {language}" for language, count in pairs["left_out"].items() if count]
    reason = "captions that have no counterpart at their place are left out"
    return f"{text}; {reason}: {', '.join(left_out)}" if left_out else text


def _of_training(trained: Facts) -> Iterator[str]:
    if trained.get("images"):
        yield f"{trained['images']:,} of {trained['of']:,} images tested are among those that the model was trained on"
    elif trained.get("images") == 0:
        yield f"none of {trained['of']:,} images tested is among those that the model was trained on"
    if trained.get("unknown"):
        yield f"not compared with the training images of {', '.join(trained['unknown'])}, which are not known here"
