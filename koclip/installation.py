"""What is installed: the recipes, their configurations, the data cards and the Space, and the optional libraries."""

import difflib
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_ENDING = ".yaml"
# The libraries of each extra of pyproject.toml, by the names they are imported by.
_DATA = ("datasets", "fsspec", "httpx", "jsonargparse")
_EVAL = (*_DATA, "accelerate", "evaluate", "jinja2", "koreanize_matplotlib", "matplotlib", "rich", "scipy", "sklearn")
EXTRAS = {
    "data": _DATA,
    "eval": _EVAL,
    "train": (*_EVAL, "google.protobuf", "peft", "psutil", "tensorboard", "timm"),
    "publish": (*_EVAL, "py3langid"),
    "curate": (*_EVAL, "py3langid"),
    "search": (*_DATA, "faiss"),
    "space": (*_EVAL, "faiss", "gradio"),
}


class MissingExtraError(ModuleNotFoundError):
    """Libraries of an extra are not installed."""


def files(name: str) -> Path:
    """Return the folder `recipes`, `data_cards` or `space`: inside the package, or beside it in a checkout."""
    packaged = Path(__file__).parent / name
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / name


def checkout() -> Path | None:
    """Return the folder of the checkout that this code runs from; None if it was installed without one."""
    root = files("recipes").parent
    return None if root == Path(__file__).parent else root


def commit() -> str | None:
    """Return the commit of this code; None if git does not know it."""
    root = checkout()
    if root is None or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def command(words: Sequence[str]) -> list[str]:
    """Return the words of a command, from `koclip <recipe>` on if they run a recipe, however it was started."""
    program, *arguments = words
    name = Path(program).name
    recipe = name.removesuffix(".py")
    if name != recipe and (files("recipes") / name).is_file():
        return ["koclip", recipe, *arguments]
    return [*(name.split() if name.startswith("koclip ") else [name]), *arguments]


def configs() -> dict[str, Path]:
    """Return the configuration files by name, as `align/scenes`; those of accelerate are under `accelerate/`."""
    folder = files("recipes")
    names = {path.relative_to(folder / "configs"): path for path in sorted(folder.glob(f"configs/*/*{_ENDING}"))}
    names |= {path.relative_to(folder): path for path in sorted(folder.glob(f"accelerate/*{_ENDING}"))}
    return {name.with_suffix("").as_posix(): path for name, path in names.items()}


def config_path(name: str) -> Path:
    """Return the configuration file of that name, with or without `.yaml`.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    known = configs()
    path = known.get(name.removesuffix(_ENDING))
    if path is None:
        near = difflib.get_close_matches(name.removesuffix(_ENDING), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise FileNotFoundError(f"no such file, and no configuration of koclip: {name}; {hint}`koclip ls` lists them")
    return path


def require(extra: str) -> None:
    """Refuse to go on without the libraries of an extra.

    Raises:
        MissingExtraError: a library is missing; the message says how to install the extra.
    """
    missing = [library for library in EXTRAS[extra] if not _is_installed(library)]
    if missing:
        message = f"not installed: {', '.join(missing)}. Run: pip install 'koclip[{extra}]'"
        raise MissingExtraError(message, name=missing[0])


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # of the parent package
        return False
