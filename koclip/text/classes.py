"""Class names and prompt templates of zero-shot classification: built in (`assets/`), or your own YAML file.

A class file lists the classes in the order of their label numbers. `key` is the label in the data set; every other key
is a language, with the name in it. An ambiguous name may have a description, in every language:

    - {key: crane, ko: 크레인, en: crane, description: {ko: 짐을 들어 올리는 기계, en: machine that lifts loads}}
    - {key: heron, ko: 왜가리, en: heron}

A template file lists templates by kind of picture, with the slots of `fill`. The first template of a kind is its
single prompt:

    photo: ["{label:을/를} 찍은 사진", "{label} 사진"]
    drawing: ["{label:을/를} 그린 그림"]
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from koclip.config import ConfigError, check, check_languages, locate
from koclip.text.korean.particles import attach, particle
from koclip.text.normalize import normalize

_SLOT = re.compile(r"\{([^{}]*)\}")


def has_particle(template: str) -> bool:
    """Return whether a template has a slot for a particle: {label:을/를} or {을/를}."""
    return any("/" in slot[1] for slot in _SLOT.finditer(template))


def spelt_out(template: str) -> str:
    """Return a template with both forms of each particle: {label:을/를} becomes {label}을(를)."""

    def both(slot: re.Match[str]) -> str:
        value, colon, pair = slot[1].rpartition(":")
        return (f"{{{value}}}" if colon else "") + particle("", pair) if "/" in pair else slot[0]

    return _SLOT.sub(both, template)


def fill(template: str, label: str, **others: str) -> str:
    """Return the template with its slots filled.

    `{}` and `{label}` stand for `label`, `{who}` for `others["who"]`, `{label:을/를}` for a value with its particle,
    and `{이/가}` for the particle that fits the text before it.

    Raises:
        ValueError: the template has no slot for `label`, or a slot that is neither a value nor a known particle.
    """
    values = {**others, "": label, "label": label}
    slots = [(slot, *slot[1].partition(":")[::2]) for slot in _SLOT.finditer(template)]
    if not any(key in ("", "label") for _, key, _ in slots):
        raise ValueError(
            f"template {template!r} has no slot; write {{}}, {{label}} or {{label:을/를}} for the class name"
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


_CLASSES = "expected a list of classes such as {key: crane, ko: 크레인, en: crane}"
_TEMPLATES = "expected lists of templates by kind of picture, such as {photo: ['{label} 사진']}"


@dataclass(frozen=True)
class ClassName:
    """A class: its label in the data set, and by language its name and the description of an ambiguous name."""

    key: str
    names: dict[str, str]
    descriptions: dict[str, str]

    def text(self, language: str, described: bool = False) -> str:
        """Return the name, with its description if `described`: 크레인(짐을 들어 올리는 기계), crane (machine ...).

        Raises:
            ConfigError: the class has no name in that language.
        """
        check(language in self.names, f"class {self.key}", language, f"expected one of {list(self.names)}")
        name, description = self.names[language], self.descriptions.get(language)
        if not described or description is None:
            return name
        return f"{name}({description})" if language == "ko" else f"{name} ({description})"


class _Loader(yaml.BaseLoader):
    """Reads every value as text (`no` and `7` are names, too) and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_classes(name: str | Path) -> list[ClassName]:
    """Return the classes of a built-in data set (cifar10, cifar100, emoji_kinds, stl10, tiny_imagenet) or of a file.

    Raises:
        ConfigError: the file is missing or not in the format above; a text is empty or not clean; a class lacks a
            language that another class has; two classes have the same key or name.
    """
    rows = _read("classes", name)
    check(isinstance(rows, list) and bool(rows), str(name), str(rows)[:80], _CLASSES)
    classes = [_class(f"{name}, class {number}", row) for number, row in enumerate(rows)]
    languages = list(dict.fromkeys(language for entry in classes for language in entry.names))
    for number, entry in enumerate(classes):
        for what, texts in (("name", entry.names), ("description", entry.descriptions or entry.names)):
            missing = [language for language in languages if language not in texts]
            where = f"{name}, class {number} ({entry.key}), {what}"
            check(not missing, where, texts, f"add it in {missing}: every class needs all of {languages}")
    _check_distinct(f"{name}, key", [entry.key for entry in classes], [entry.key for entry in classes])
    for language in languages:
        names = [entry.names[language] for entry in classes]
        _check_distinct(f"{name}, {language}", names, (_fold(text) for text in names))
    return classes


def load_templates(name: str | Path) -> dict[str, list[str]]:
    """Return the built-in templates of a language (en, ko), or the templates of a file, by kind of picture.

    Raises:
        ConfigError: the file is missing or not in the format above; a template is empty, not clean or repeated, or has
            no slot or a wrong slot.
    """
    groups = _read("templates", name)
    check(isinstance(groups, dict) and bool(groups), str(name), str(groups)[:80], _TEMPLATES)
    for group, templates in groups.items():
        _check_templates(f"{name}, {group}", templates)
    everything = [template for templates in groups.values() for template in templates]
    _check_distinct(str(name), everything, (_fold(fill(template, "책")) for template in everything))
    return dict(groups)


def templates_of_kind(templates: str | list[str], kind: str, where: str) -> list[str]:
    """Return a list of templates, or the templates of one kind of picture from `load_templates`.

    `where` is the configuration key, for messages.

    Raises:
        ConfigError: see `load_templates`; or no template is of that kind.
    """
    if not isinstance(templates, str):
        _check_templates(where, templates)
        return templates
    groups = load_templates(templates)
    check(kind in groups, "eval.sets[].template_kind", kind, f"{where}: {templates} has the kinds {list(groups)}")
    return groups[kind]


def _check_templates(where: str, templates: Any) -> None:
    check(isinstance(templates, list) and bool(templates), where, templates, _TEMPLATES)
    for number, template in enumerate(templates):
        _check_text(f"{where}, template {number}", template)
        try:
            fill(template, "책")
        except ValueError as error:
            raise ConfigError(f"{where}, template {number}: {error}") from None


def _read(kind: str, name: str | Path) -> Any:
    """Return the content of a built-in or another YAML file."""
    folder = resources.files("koclip").joinpath(f"assets/{kind}")
    known = sorted(Path(file.name).stem for file in folder.iterdir())
    file = folder.joinpath(f"{name}.yaml") if str(name) in known else locate(name)
    check(file.is_file(), kind, str(name), f"expected one of {known}, or the path of a YAML file")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{name}: cannot be read as YAML in UTF-8: {' '.join(str(error).split())}") from None


def _class(where: str, row: Any) -> ClassName:
    check(isinstance(row, dict) and "key" in row, where, row, _CLASSES)
    where = f"{where} ({row['key']})"
    descriptions = row.get("description", {})
    check(isinstance(descriptions, dict), f"{where}, description", descriptions, "expected a text by language")
    names = {language: text for language, text in row.items() if language not in ("key", "description")}
    check(bool(names), where, row, "expected a name in at least one language")
    _check_text(f"{where}, key", row["key"])
    for texts in (names, descriptions):
        for language, text in texts.items():
            check_languages(f"{where}, a key besides `key` and `description`", [language])
            _check_text(f"{where}, {language}", text)
    return ClassName(row["key"], names, descriptions)


def _check_text(where: str, text: Any) -> None:
    check(isinstance(text, str), where, text, "expected a text")
    clean = normalize(text)
    check(bool(clean), where, text, "expected a text: write one, or remove the whole entry")
    composed = unicodedata.is_normalized("NFC", text)
    check(composed, where, text, "expected NFC, not decomposed Hangul or accents: save the file with NFC text")
    fix = "expected single spaces, no invisible characters and no special tokens"
    check(clean == text, where, text, f"{fix}: {clean!r}")


def _check_distinct(where: str, texts: list[str], folded: Iterable[str]) -> None:
    places: dict[str, int] = {}
    for number, fold in enumerate(folded):
        first = places.setdefault(fold, number)
        fix = f"the same as {texts[first]!r} (numbers {first} and {number}, from 0): make them different"
        check(first == number, where, texts[number], fix)


def _fold(text: str) -> str:
    """Return a text that is equal for texts that differ only in spaces, letter case or Unicode form."""
    return "".join(normalize(text).casefold().split())
