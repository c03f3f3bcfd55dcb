"""The command `koclip`: every recipe by name, and the configurations that come with the package."""

import argparse
import difflib
import itertools
import logging
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

import koclip
from koclip import config, installation, storage


class Recipe(NamedTuple):
    """A recipe as a command: what it does, the extra it needs, and its configuration."""

    summary: str
    extra: str
    schema: type | None
    launched: bool = False  # by accelerate; without --config it reads configs/<recipe>/scenes.yaml
    first: str | None = None  # key that the first word sets


RECIPES = {
    "pretrain": Recipe(
        "train a CLIP from random weights on (image, caption) pairs", "train", config.PretrainConfig, launched=True
    ),
    "align": Recipe("give a CLIP a Korean or multilingual text encoder", "train", config.AlignConfig, launched=True),
    "evaluate": Recipe(
        "measure models in Korean and English: results, charts, a report", "eval", config.EvaluateConfig, launched=True
    ),
    "publish": Recipe(
        "check a trained model or a curated set, write its card, push both to the Hub", "publish", config.PublishConfig
    ),
    "adapt": Recipe("build a classifier from a few labelled images per class", "eval", config.AdaptConfig),
    "index": Recipe("make a collection of images searchable", "search", config.IndexConfig),
    "space": Recipe("show a model in the browser", "space", None),
    "data": Recipe("download a data set from its public source", "data", config.DataSetConfig, first="name"),
    "trim": Recipe("cut the vocabulary of a text encoder to your texts", "data", config.TrimConfig),
    "plan": Recipe("say what a training run will take, before it starts", "train", config.PlanConfig, first="run"),
    "curate": Recipe("build a clean set of pairs from raw pairs", "curate", config.CurateConfig),
}
EXAMPLES = """\
examples:
  koclip pretrain                       train on the built-in images, 4 minutes on 2 CPU cores
  koclip cp align/klue_roberta_base_two_stage my.yaml
  koclip align --config my.yaml         or by name: --config align/klue_roberta_base_two_stage
  koclip align --launch '--num_processes 2' --config my.yaml   with options of `accelerate launch`
  koclip align --help                   all options of a command
"""
COLUMNS = ("configuration", "data", "models", "hardware and time")
_HARDWARE = re.compile(r"^# Hardware(?: and time)?: (.*?)(?: \(.*\))?(?:\.(?= [A-Z])|\.?$)", re.MULTILINE)
_MODELS = ("clip", "text_encoder", "model")  # keys that name a model


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; `words` are its arguments, by default those of this process."""
    try:
        _run(list(sys.argv[1:] if words is None else words))
    except BrokenPipeError:  # `koclip ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> None:
    if words and words[0] in RECIPES:
        run_recipe(words[0], words[1:])
        return
    options = _parser(words).parse_args(words or ["--help"])
    try:
        if options.command == "ls":
            print(table(options.recipe))
        elif options.command == "cp":
            copy(options.name, Path(options.to or f"{options.name.rpartition('/')[2]}.yaml"), options.force)
    except (FileNotFoundError, FileExistsError, PermissionError) as error:
        _fail(str(error))


def _parser(words: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="koclip",
        description="Train, align, evaluate and publish CLIP models that understand Korean.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"koclip {koclip.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, recipe in RECIPES.items():
        commands.add_parser(name, help=recipe.summary)
    listing = commands.add_parser("ls", help="list the configurations, and what each needs")
    listing.add_argument("recipe", nargs="?", help="only those of a recipe, or of accelerate")
    copying = commands.add_parser("cp", help="copy a configuration, to change it")
    copying.add_argument("name", help="as `koclip ls` prints it: align/scenes")
    copying.add_argument("to", nargs="?", help="the new file; default: the configuration's name, here")
    copying.add_argument("--force", action="store_true", help="overwrite an existing file")
    if words and not words[0].startswith("-") and words[0] not in commands.choices:
        near = difflib.get_close_matches(words[0], commands.choices, n=1)
        _fail(f"unknown command {words[0]}{f'; did you mean {near[0]}?' if near else ''} `koclip --help` lists all")
    return parser


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"koclip: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def run_recipe(name: str, words: list[str]) -> None:
    """Check a recipe's arguments, which takes no torch; then run it in this process, or let accelerate start it.

    Args:
        name: One of `RECIPES`.
        words: The recipe's arguments, and `--launch OPTIONS` for accelerate.
    """
    recipe = RECIPES[name]
    launch_options, words = _take_launch_options(words)
    if launch_options and not recipe.launched:
        _fail(f"--launch: koclip {name} runs in one process")
    try:
        installation.require(recipe.extra)
    except installation.MissingExtraError as error:
        _fail(f"{name}: {error}")
    sys.argv = [f"koclip {name}", *words]
    folder = installation.files("space" if name == "space" else "recipes")
    if recipe.schema is not None:
        default = folder / "configs" / name / "scenes.yaml" if recipe.launched else None
        config.parse(recipe.schema, words, default, recipe.first)
    if recipe.launched:
        launch(folder / f"{name}.py", launch_options, words)
    elif name == "space":
        sys.path.insert(0, str(folder))  # the app's modules import each other by bare name
        runpy.run_path(str(folder / "app.py"), run_name="__main__")
    else:
        runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")


def _take_launch_options(words: list[str]) -> tuple[list[str], list[str]]:
    """Return what follows `--launch`, split as a shell would, and the other words."""
    options: list[str] = []
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == "--launch":
            value = next(remaining, None)
            if value is None:
                _fail("--launch: expected the options of `accelerate launch` in quotes: --launch '--num_processes 2'")
            options += shlex.split(value)
        elif word.startswith("--launch="):
            options += shlex.split(word.removeprefix("--launch="))
        else:
            others.append(word)
    return options, others


def launch(script: Path, options: list[str], words: list[str]) -> None:
    """Do what `accelerate launch OPTIONS SCRIPT WORDS` does, and exit with the status of the script.

    A single process takes the place of this one, so that it gets the signals and its exit status is kept.
    """
    from accelerate.commands import launch as accelerate_launch  # imports torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not options:  # it warns of every option that it chooses itself
        logging.getLogger(accelerate_launch.__name__).setLevel(logging.ERROR)
    arguments = accelerate_launch.launch_command_parser().parse_args([*options, str(script), *words])
    accelerate_launch.simple_launcher = _replace_process  # its own waits for a child and does not pass signals on
    try:
        accelerate_launch.launch_command(arguments)
    except ChildFailedError as error:  # its processes have said why
        raise SystemExit(error.get_first_failure()[1].exitcode) from None


def _replace_process(arguments: argparse.Namespace) -> NoReturn:
    from accelerate.utils import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(arguments)
    os.execvpe(command[0], command, environment)


def table(recipe: str | None = None) -> str:
    """Return a line for every configuration: its name, the data and models it needs, its hardware and time.

    Args:
        recipe: Only the configurations of this recipe.

    Raises:
        FileNotFoundError: there are none of that recipe.
    """
    names = {name: path for name, path in installation.configs().items() if recipe in (None, name.split("/")[0])}
    if not names:
        recipes = sorted({name.split("/")[0] for name in installation.configs()})
        raise FileNotFoundError(f"no configurations of {recipe}; expected one of {', '.join(recipes)}")
    rows = [COLUMNS, *(_row(name, path) for name, path in names.items() if not name.startswith("accelerate/"))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    launches = [
        f"{name:{widths[0]}}  {_header(path)[0]}" for name, path in names.items() if name.startswith("accelerate/")
    ]
    parts = [lines] * (len(lines) > 1) + [["files for --launch '--config_file FILE':", *launches]] * bool(launches)
    return "\n\n".join("\n".join(part) for part in parts)


def _header(path: Path) -> list[str]:
    """Return the lines of a file's header comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]


def _row(name: str, path: Path) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8")
    entries = list(_entries(yaml.safe_load(text)))
    paths = [value for key, value in entries if key == "path"] or ["scenes"]
    models = dict.fromkeys(value for key, value in entries if key in _MODELS and value != "same")
    hardware = _HARDWARE.search(text)
    return (name, _origin(paths), ", ".join(models) or "-", hardware[1] if hardware else "-")


def _entries(values: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys of nested dictionaries and lists that have a text, with the text."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, str):
            yield str(key), value
        elif isinstance(value, dict | list):
            yield from _entries(value)


def _origin(paths: list[str]) -> str:
    """Say how a user gets the data of these paths."""
    cards = installation.files("data_cards")
    folders = dict.fromkeys(path.removeprefix("data/").split("/")[0] for path in paths if path != "scenes")
    public = [name for name in folders if (cards / f"{name}.md").is_file()]
    origins = [f"koclip data {', '.join(public)}"] * bool(public) + ["your files"] * (len(folders) > len(public))
    return ", ".join(origins) or "built in"


def copy(name: str, target: Path, force: bool = False) -> None:
    """Copy a configuration to a file.

    Raises:
        OSError: there is no configuration of that name, or the file exists.
    """
    source = installation.config_path(name)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; name another file, or overwrite it: --force")
    storage.replace_text(target, source.read_text(encoding="utf-8"))
    recipe, file = name.split("/")[0], shlex.quote(str(target))
    launches = recipe == "accelerate"
    use = f"pretrain --launch {shlex.quote(f'--config_file {file}')}" if launches else f"{recipe} --config {file}"
    print(f"{target} is yours to change. Then: koclip {use}")


if __name__ == "__main__":
    main()
