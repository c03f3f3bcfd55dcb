"""From the command line to a configuration, and from a configuration to YAML."""

import dataclasses
import difflib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml

from koclip import installation, storage
from koclip.config.checks import ConfigError, RunError, Stopped, all_faults

Config = TypeVar("Config")


def parse(
    schema: type[Config], args: Sequence[str] | None = None, default: Path | None = None, first: str | None = None
) -> Config:
    """Build `schema` from the command line, by default this process's: `--config FILE.yaml`, `--section.key value`.

    `--config` takes a file, or a name that `koclip ls` lists; without it, `default` is read. A first word that is no
    option is the value of the key `first`: `emoji` means `--name emoji`. An unknown key, a wrong type, a missing file
    or a value out of range prints a line on stderr and exits with code 2.
    """
    installation.require("data")
    from jsonargparse import ArgumentError, ArgumentParser  # only the command line needs it

    words = list(sys.argv[1:] if args is None else args)
    if first is not None and words and not words[0].startswith("-"):
        words.insert(0, f"--{first}")
    words = _collect_overrides(words, schema)
    words = _join_lists(words, schema)
    words = _spell_out_flags(words, schema)
    words = _replace_lists(words, set(_lists_of_sections(schema)))
    if default is not None and not any(word.split("=")[0] == "--config" for word in words):
        words = ["--config", str(default), *words]
    summary = (schema.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=_program(), description=summary, exit_on_error=False, allow_abbrev=False)
    config_help = "YAML file with any of the keys below, or a name that `koclip ls` lists."
    parser.add_argument("--config", action="config", help=config_help)
    parser.add_class_arguments(schema, as_group=False)
    try:
        values = parser.parse_args(_find_configs(words))
        with all_faults():
            sections = parser.instantiate(values)
            return schema(**{f.name: sections[f.name] for f in dataclasses.fields(schema)})  # type: ignore[arg-type]
    except (ArgumentError, ConfigError, OSError) as error:
        known = [option for action in parser._actions for option in action.option_strings]
        _explain(" ".join(str(error).split()) + _nearest(str(error), known))


def _collect_overrides(words: list[str], schema: Any) -> list[str]:
    """Put options with a dot into the list `overrides` of a schema that has it: they are keys of another recipe."""
    if "overrides" not in {field.name for field in dataclasses.fields(schema)}:
        return words
    own: list[str] = []
    overrides: list[str] = []
    target = own
    for word in words:
        if word.startswith("--"):
            target = overrides if "." in word.split("=")[0] else own
        target.append(word)
    return [*own, *([f"--overrides={json.dumps(overrides)}"] if overrides else [])]


def _join_lists(words: list[str], schema: Any) -> list[str]:
    """Allow `--models a b c` for a top-level list of texts; jsonargparse takes only `--models '[a, b, c]'`."""
    lists = {f"--{field.name}" for field in dataclasses.fields(schema) if field.type == list[str]}
    joined: list[str] = []
    while words:
        word, *words = words
        joined.append(word)
        if word in lists and words and not words[0].startswith("["):
            values = list(itertools.takewhile(lambda value: not value.startswith("--"), words))
            words = words[len(values) :]
            joined.append(json.dumps(values))
    return joined


def _spell_out_flags(words: list[str], schema: Any) -> list[str]:
    """Allow `--dry_run` for a top-level switch; jsonargparse takes only `--dry_run true`."""
    flags = {f"--{field.name}" for field in dataclasses.fields(schema) if field.type is bool}
    pairs = itertools.pairwise([*words, "--"])
    return [f"{word}=true" if word in flags and after.startswith("--") else word for word, after in pairs]


def _lists_of_sections(schema: Any, prefix: str = "--") -> Iterator[str]:
    """Yield the options that take a list of sections, such as --data.sources."""
    for field in dataclasses.fields(schema):
        name, inner = f"{prefix}{field.name}", get_args(field.type)
        if dataclasses.is_dataclass(field.type):
            yield from _lists_of_sections(field.type, f"{name}.")
        elif get_origin(field.type) is list and dataclasses.is_dataclass(inner[0]):
            yield name


def _replace_lists(words: list[str], lists: set[str]) -> list[str]:
    """Let a list of sections replace the list in the file; jsonargparse would keep keys that an item does not name."""
    replaced: list[str] = []
    for word in words:
        option = word.split("=")[0]
        replaced += [f"{option}=[]", word] if option in lists else [word]
    return replaced


def _find_configs(words: list[str]) -> list[str]:
    """Allow `--config align/scenes`, the name of a configuration of koclip, if no such file exists."""
    located: list[str] = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--config=") else ("", "", word)
        named = bool(equals) or located[-1:] == ["--config"]
        located.append(f"{option}{equals}{_config_file(value)}" if named else word)
    return located


def _config_file(name: str) -> str:
    return name if Path(name).exists() else str(installation.config_path(name))


def _nearest(message: str, known: list[str]) -> str:
    """Return " Did you mean ...?" with the known options that are similar to unknown options in a message."""
    options = [word.strip("'\"").split("=")[0] for word in message.split() if word.startswith("--")]
    near = [match for word in options if word not in known for match in difflib.get_close_matches(word, known, n=1)]
    return f" Did you mean {', '.join(near)}?" if near else ""


def _program() -> str:
    return " ".join(installation.command(sys.argv[:1]))


def _explain(message: str, code: int = 2) -> NoReturn:
    print(f"{_program()}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def run(
    main: Callable[[Config], None], schema: type[Config], default: Path | None = None, first: str | None = None
) -> None:
    """Parse the command line, as `parse` does, and run a recipe.

    A mistake in the configuration or the data prints one line and exits with code 2. A run that cannot continue exits
    with code 1, a run that was asked to stop with code 0.
    """
    config = parse(schema, default=default, first=first)
    try:
        with suppress(Stopped):
            main(config)
    except ConfigError as error:
        _explain(str(error))
    except RunError as error:
        _explain(str(error), code=1)
    except KeyboardInterrupt:
        _explain("interrupted; everything saved so far is complete", code=130)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists and scalars."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return plain


def dump(config: Any, path: Path) -> None:
    """Write a configuration as YAML; `--config` reads it back to an equal configuration."""
    storage.replace_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
