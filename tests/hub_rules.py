"""What the Hub says of a file, and what it refuses in a card's front matter."""

import hashlib
import re
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils.sha import git_hash

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "other"}


def entry(path: str, content: bytes, large: bool) -> dict[str, Any]:
    """Return a file as the Hub lists it."""
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    known = {"type": "file", "path": path, "size": len(content), "oid": git_hash(pointer if large else content)}
    return known | ({"lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)}} if large else {})


def metadata_problems(content: str) -> list[str]:
    """Return what the Hub would refuse in a card's front matter, by its documented rules that can be checked here."""
    block = REGEX_YAML_BLOCK.search(content)
    if not block:
        return ["no front matter"]
    values = yaml.safe_load(block[2])
    other = values.get("license") == "other"
    codes, ids = values.get("language") or [], [*as_list(values, "base_model"), *as_list(values, "datasets")]
    rules = {
        f'"license" must be one of {sorted(LICENCES)}': values.get("license") in LICENCES,
        '"license: other" needs "license_name" and "license_link"': not other
        or bool(values.get("license_name") and values.get("license_link")),
        '"license_name" must be lower case letters, digits, - and .': bool(
            re.fullmatch(r"[a-z0-9-.]*", values.get("license_name") or "")
        ),
        f'"language" must be ISO 639: {codes}': all(re.fullmatch(r"[a-z]{2,3}", code) for code in codes),
        f'"base_model" and "datasets" must be Hub ids: {ids}': all(
            re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) for hub_id in ids
        ),
    }
    problems = [rule for rule, kept in rules.items() if not kept]
    try:
        results = ModelCardData(**values).eval_results or []
    except ValueError as error:
        return [*problems, str(error)]
    whole = all(
        isinstance(result.metric_value, int | float) and result.metric_type and result.dataset_type
        for result in results
    )
    return problems + ([] if whole else ['"model-index" has an incomplete result'])


def space_problems(content: str) -> list[str]:
    """Return what the Hub would refuse in the front matter of a Space."""
    block = REGEX_YAML_BLOCK.search(content)
    values = yaml.safe_load(block[2]) if block else {}
    rules = {
        '"sdk" must be one of gradio, docker, static': values.get("sdk") in ("gradio", "docker", "static"),
        f'"colorFrom" and "colorTo" must be of {sorted(COLOURS)}': {values.get("colorFrom"), values.get("colorTo")}
        <= COLOURS,
        '"short_description" must have 60 characters or fewer': len(values.get("short_description", "")) <= 60,
        '"models" must be Hub ids': all(
            re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) for hub_id in as_list(values, "models")
        ),
    }
    return [rule for rule, kept in rules.items() if not kept]


def as_list(values: dict[str, Any], key: str) -> list[str]:
    value = values.get(key) or []
    return [value] if isinstance(value, str) else value
