"""Checks of the files of a published directory, one by one: what is there, and what must not be."""

import getpass
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from koclip.config import check
from koclip.publishing.formats import onnx, sentence_transformers

CARD, LICENCE = "README.md", "LICENSE.md"
ADAPTER = "adapter"
# What adapter_config.json names where no repository holds the base: no Hub id, so that errors which quote it help.
BUILT = "built by koclip, see README.md of this folder"
FOLDERS = (".", ADAPTER, onnx.FOLDER, sentence_transformers.FOLDER)  # what a repository consists of
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
# .txt and .model: vocabularies of stock tokenizers.
_KINDS = {".json", ".safetensors", ".md", ".txt", ".model", ".onnx"}
_VOCABULARIES = {"vocab.json", "added_tokens.json"}  # whose keys are words of the training text
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".msgpack", ".h5"}
_WEIGHTS = {".safetensors", ".onnx", *_PICKLES}
_TYPES = {"F32", "I64", "I32", "BOOL", "U8"}  # weights are fp32; the others are buffers of positions
_ROOTS = (
    r"home|[Uu]sers?|root|tmp|var|mnt|media|Volumes|nfs|efs|fsx|gpfs|lustre|ceph(?:fs)?|raid|ssd|nvme|hdd|disk|storage|"
    r"shared?|data(?:sets?)?|work|workspaces?|projects?|opt|usr|etc|srv|dev/shm|export|scratch|private|content|kaggle"
)
# A slash that follows a letter, a dot or a slash is a URL's or a relative path's; `?` comes before `s:\s` of patterns.
_PATH = re.compile(
    rf"(?:(?<![\w./~-])/(?:{_ROOTS})\d*/|(?<![\w./:~-])~/|(?<![\w./?-])[A-Za-z]:[\\/](?=\w)|\bfile:/)[^\s\"'`)\]]*"
)
_TOKEN = re.compile(rb"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}")
# Account names that are also words; they count only as a part of a path.
_WORDS = {"root", "user", "ubuntu", "admin", "runner", "jovyan", "guest", "nobody", "model", "data", "test"}


@dataclass(frozen=True)
class Check:
    """One line of the release list: what is wrong, nothing if all is well, and how to mend it."""

    name: str
    problems: list[str]
    mend: str


def publishable(directory: Path, adapter: bool = True) -> list[str]:
    """Return the files that a repository gets, relative, sorted; hidden ones and, if not wanted, the adapter stay here.

    Raises:
        ConfigError: it is no directory with a config.json.
    """
    expected = "expected a directory with a config.json, as a training recipe writes runs/<run>/model"
    check((directory / "config.json").is_file(), "model", str(directory), expected)
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    shown = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(path.as_posix() for path in shown if adapter or path.parts[0] != ADAPTER)


def check_files(directory: Path, repo_id: str | None = None, adapter: bool = True) -> list[Check]:
    """Check the files of a directory that is to be published as `repo_id`."""
    files = publishable(directory, adapter)
    return [
        Check(
            "files are complete",
            _missing(directory, files),
            "publish what koclip wrote as model/, whole: train or save again",
        ),
        Check("no pickles, no foreign files", _foreign(files), "move these files out of the directory"),
        Check("no remote code", _remote_code(directory, files), "use a stock class of transformers; drop auto_map"),
        Check("weights are fp32", _types(directory, files), "save the model again in fp32, as safetensors"),
        Check("tokenizer.json: no call's state", _state(directory), 'set "padding" and "truncation" to null in it'),
        Check(
            "nothing of this machine",
            _traces(directory, files, repo_id),
            "put a Hub id in the path's place, or delete the entry",
        ),
        Check("no token", _tokens(directory, files), "delete it from the file, and revoke it at hf.co/settings/tokens"),
        Check(
            "adapter's base can be found",
            _base(directory) if adapter else [],
            "publish its base and name it, --clip org/base; or --adapter false: the merged model needs none",
        ),
        Check("licence is stated", _licence(directory, files), "write the card: recipes/publish.py does"),
    ]


def _missing(directory: Path, files: list[str]) -> list[str]:
    lacking = [f"{name} is missing" for name in _NEEDED if name not in files]
    lacking += [] if any(_is_weights(name) for name in files) else ["no model*.safetensors"]
    for name in (name for name in files if name.endswith(".json")):
        try:
            json.loads((directory / name).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            lacking.append(f"{name} cannot be read: {error}")
    return lacking


def _foreign(files: list[str]) -> list[str]:
    pickles = [f"{name} is a pickle or the like" for name in files if Path(name).suffix in _PICKLES]
    others = [name for name in files if Path(name).suffix not in _KINDS | _PICKLES]
    deep = [name for name in files if Path(name).parent.as_posix() not in FOLDERS]
    return pickles + [f"{name} is nothing that a model consists of" for name in sorted({*others, *deep})]


def _remote_code(directory: Path, files: list[str]) -> list[str]:
    found = [name for name in files if name.endswith(".json") and "auto_map" in _keys(_read(directory / name))]
    return [f"{name} has auto_map" for name in found]


def _types(directory: Path, files: list[str]) -> list[str]:
    problems = []
    for name in (name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(directory / name, framework="pt") as weights:
                found = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118  # no mapping
        except SafetensorError as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        if found - _TYPES:
            problems.append(f"{name} holds {', '.join(sorted(found - _TYPES))}")
    return problems


def _state(directory: Path) -> list[str]:
    file = directory / "tokenizer.json"
    values = _read(file) if file.is_file() else {}
    return [f'"{name}" is {values[name]}' for name in ("padding", "truncation") if values.get(name) is not None]


def _traces(directory: Path, files: list[str], repo_id: str | None) -> list[str]:
    user = getpass.getuser()
    named = user not in _WORDS and len(user) > 2 and user not in (repo_id or "")
    as_word = re.compile(rf"(?<![\w-]){re.escape(user)}(?![\w-])")
    as_part = re.compile(rf"[/\\]{re.escape(user)}[/\\]|(?<![\w-]){re.escape(user)}@")
    own = [str(place) for place in (directory.resolve(), Path.home(), Path.cwd()) if len(place.parts) > 1]
    problems = []
    for name, text in _texts(directory, files):
        path = _PATH.search(text)
        here = path[0] if path else next((place for place in own if place in text), None)
        relative = "/" in text and len(text) < 200 and " " not in text and Path(text).exists()
        if here or relative:
            problems.append(f"{name} names the path {here or text}")
        elif as_part.search(text) or (named and as_word.search(text)):
            problems.append(f"{name} names the user {user}")
    return list(dict.fromkeys(problems))


def _tokens(directory: Path, files: list[str]) -> list[str]:
    """Look into the bytes of all but weights, vocabularies too, and into what JSON and weights hold as text."""
    own = (get_token() or "").encode()
    read = [(name, (directory / name).read_bytes()) for name in files if Path(name).suffix not in _WEIGHTS]
    read += [(name, text.encode(errors="replace")) for name, text in _texts(directory, files)]
    # The token itself is never printed, only where it stands.
    leaks = [name for name, content in read if _TOKEN.search(content) or (own and own in content)]
    return [f"{name} holds an access token" for name in dict.fromkeys(leaks)]


def _base(directory: Path) -> list[str]:
    file = directory / ADAPTER / "adapter_config.json"
    if not file.is_file():
        return []
    base = _read(file).get("base_model_name_or_path")
    if base not in (None, BUILT):
        return [] if is_hub_id(base) else [f"{ADAPTER}/adapter_config.json names {base!r}, which is no Hub id"]
    readme = directory / ADAPTER / CARD
    told = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    unnamed = re.findall(r"<model\.\w+>", told)
    if unnamed or "swap_text_tower" not in told:
        return [f"{ADAPTER}/ does not say what it adapts: {', '.join(unnamed) or 'no base_model_name_or_path'}"]
    return []


def _licence(directory: Path, files: list[str]) -> list[str]:
    if CARD not in files:
        return [f"there is no {CARD}"]
    data = ModelCard.load(directory / CARD, ignore_metadata_errors=True).data
    if not data.license:
        return [f"{CARD} has no license in its front matter"]
    if data.license == "other" and (not data.get("license_name") or LICENCE not in files):
        return [f"license: other needs license_name in {CARD}, and {LICENCE}"]
    return []


def is_hub_id(name: str) -> bool:
    """Return whether a name may be a Hub repository's: one of that form, and no directory here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _is_weights(name: str) -> bool:
    return re.fullmatch(r"model.*\.safetensors", name) is not None


def _read(file: Path) -> Any:
    """Return what a file of JSON holds; nothing if it is broken, which the first check tells."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def _texts(directory: Path, files: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (file, text) of what people or machines wrote into JSON, Markdown and the heads of weights.

    Vocabularies are left out.
    """
    for name in files:
        if name.endswith(".md"):
            yield from ((name, line) for line in (directory / name).read_text(encoding="utf-8").splitlines())
        elif name.endswith(".json") and Path(name).name not in _VOCABULARIES:
            values = _read(directory / name)
            if name == "tokenizer.json":
                values = {key: value for key, value in values.items() if key not in ("model", "added_tokens")}
            yield from ((name, text) for text in _walk(values, lambda one: isinstance(one, str)))
        elif name.endswith(".safetensors"):
            yield from ((name, text) for item in _metadata(directory / name).items() for text in item)


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as weights:
            return weights.metadata() or {}
    except SafetensorError:
        return {}  # told by the check of their types


def _keys(values: Any) -> set[str]:
    return {key for one in _walk(values, lambda one: isinstance(one, dict)) for key in one}


def _walk(values: Any, wanted: Callable[[Any], bool]) -> Iterator[Any]:
    if wanted(values):
        yield values
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in parts:
        if isinstance(key, str) and wanted(key):
            yield key
        yield from _walk(value, wanted)
