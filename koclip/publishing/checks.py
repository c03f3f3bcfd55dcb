"""Check the files of a directory before it is published: required files, forbidden files and private content."""

import contextlib
import getpass
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open

from koclip import storage
from koclip.align import lora
from koclip.config import check
from koclip.models import router
from koclip.models.pretrained import is_hub_id
from koclip.publishing.formats import onnx, sentence_transformers

CARD, LICENCE = "README.md", "LICENSE.md"
ADAPTER = lora.FOLDER
# The base in adapter_config.json if it is in no repository. It is not a Hub id, so an error that quotes it helps.
BUILT = "built by koclip, see README.md of this folder"
# The folders of a repository.
FOLDERS = (".", ADAPTER, onnx.FOLDER, sentence_transformers.FOLDER, *router.FOLDERS)
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
# .txt and .model: vocabularies of stock tokenizers.
_KINDS = {".json", ".safetensors", ".md", ".txt", ".model", ".onnx"}
_VOCABULARIES = {"vocab.json", "added_tokens.json"}  # their keys are words of the training text
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".msgpack", ".h5"}
_WEIGHTS = {".safetensors", ".onnx", *_PICKLES}
_TYPES = {"F32", "I64", "I32", "BOOL", "U8"}  # F32: weights; the others: buffers such as position ids
_ROOTS = (
    r"home|[Uu]sers?|root|tmp|var|mnt|media|Volumes|nfs|efs|fsx|gpfs|lustre|ceph(?:fs)?|raid|ssd|nvme|hdd|disk|storage|"
    r"shared?|data(?:sets?)?|work|workspaces?|projects?|opt|usr|etc|srv|dev/shm|export|scratch|private|content|kaggle"
)
# A slash after a letter, a dot or a slash belongs to a URL or a relative path; a `?` before `s:\s` to a pattern.
PRIVATE_PATH = re.compile(
    rf"(?:(?<![\w./~-])/(?:{_ROOTS})\d*/|(?<![\w./:~-])~/|(?<![\w./?-])[A-Za-z]:[\\/](?=\w)|\bfile:/)[^\s\"'`)\]]*"
)
_TOKEN = re.compile(rb"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}")
# Account names that are also words are refused in paths only.
_WORDS = {"root", "user", "ubuntu", "admin", "runner", "jovyan", "guest", "nobody", "model", "data", "test"}


@dataclass(frozen=True)
class Check:
    """One check before a release: its name, its problems ([] if it passes), and how to fix them."""

    name: str
    problems: list[str]
    fix: str


def publishable(directory: Path, adapter: bool = True) -> list[str]:
    """Return the files to publish, sorted, relative to `directory`, without hidden files; adapter/ only if `adapter`.

    Raises:
        ConfigError: the directory has no config.json.
    """
    expected = "expected a directory with a config.json, as a training recipe writes runs/<run>/model"
    expected += "; a set of koclip curate is published with --data" * any(directory.glob("*.parquet"))
    check((directory / "config.json").is_file(), "model", str(directory), expected)
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(path.as_posix() for path in visible if adapter or path.parts[0] != ADAPTER)


def name_base(directory: Path, clip: str | None, text_encoder: str | None) -> None:
    """Replace local directories in the adapter's files by Hub ids; do nothing without an adapter.

    `clip` and `text_encoder` are the Hub ids of `model.clip` and `model.text_encoder`. A base that koclip builds from
    two models is in no repository; adapter_config.json then names `BUILT`.
    """
    folder = directory / ADAPTER
    base, file = lora.read_base(folder), folder / "adapter_config.json"
    settings = _read(file) if file.is_file() else {}
    if base is None or not settings:  # missing or broken; a check reports it
        return
    base = replace(base, base_model=base.base_model or clip, text_encoder=base.text_encoder or text_encoder)
    base.write(folder)
    name = BUILT if base.is_built else base.base_model
    if name and not is_hub_id(settings.get("base_model_name_or_path") or ""):
        settings["base_model_name_or_path"] = name
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        storage.replace_text(file, text + "\n")
    readme = folder / CARD
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        for placeholder, hub_id in (("<model.clip>", clip), ("<model.text_encoder>", text_encoder)):
            text = text.replace(placeholder, hub_id or placeholder)
        storage.replace_text(readme, text)


def check_files(directory: Path, repo_id: str | None = None, adapter: bool = True) -> list[Check]:
    """Check the files of a directory before it is published as `repo_id`."""
    files = publishable(directory, adapter)
    mapped = [name for name in files if name.endswith(".json") and "auto_map" in _keys(_read(directory / name))]
    problems_and_fixes = {
        "files are complete": (_missing(directory, files), "publish a complete model/ of koclip: train or save again"),
        "no pickles, no foreign files": (_foreign(files), "move these files out of the directory"),
        "no remote code": (
            [f"{name} has auto_map" for name in mapped],
            "use a stock class of transformers, and remove auto_map",
        ),
        "weights are fp32": (_types(directory, files), "save the model again in fp32, as safetensors"),
        "tokenizer.json: no padding set": (_state(directory, files), "set padding and truncation to null in it"),
        "no private paths or names": (
            private_traces(directory, files, repo_id),
            "replace the path by a Hub id, or delete the entry",
        ),
        "no token": (
            access_tokens(directory, files),
            "delete it from the file, and revoke it at hf.co/settings/tokens",
        ),
        "adapter's base can be found": (
            _base(directory) if adapter else [],
            "publish its base and give its id, --clip org/base; or use --adapter false: the merged model needs no base",
        ),
        "licence is stated": (licence_faults(directory, files), "write the card with koclip publish"),
    }
    return [Check(name, problems, fix) for name, (problems, fix) in problems_and_fixes.items()]


def _missing(directory: Path, files: list[str]) -> list[str]:
    problems = [f"{name} is missing" for name in _NEEDED if name not in files]
    towers = ("",) if router.FILE not in files else (f"{router.TEXT}/", f"{router.IMAGE}/")
    for tower in towers:
        if not any(re.fullmatch(rf"{tower}model.*\.safetensors", name) for name in files):
            problems.append(f"{tower}model*.safetensors is missing")
    for name in (name for name in files if name.endswith(".json")):
        try:
            json.loads((directory / name).read_text(encoding="utf-8"))
        except ValueError as error:  # not JSON or not UTF-8
            problems.append(f"{name} cannot be read: {error}")
    return problems


def _foreign(files: list[str]) -> list[str]:
    pickles = [name for name in files if Path(name).suffix in _PICKLES]
    others = [name for name in files if Path(name).suffix not in _KINDS | _PICKLES]
    deep = [name for name in files if Path(name).parent.as_posix() not in FOLDERS]
    problems = [f"{name} is a pickle or another format that can run code" for name in pickles]
    return problems + [f"{name} is not a file of a model" for name in sorted({*others, *deep})]


def _types(directory: Path, files: list[str]) -> list[str]:
    problems = []
    for name in (name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(directory / name, framework="pt") as weights:
                types = {weights.get_slice(key).get_dtype() for key in weights.keys()} - _TYPES  # noqa: SIM118
        except SafetensorError as error:
            problems.append(f"{name} cannot be read: {error}")
        else:
            problems += [f"{name} has {', '.join(sorted(types))}"] if types else []
    return problems


def _state(directory: Path, files: list[str]) -> list[str]:
    tokenizers = {name: _read(directory / name) for name in files if Path(name).name == "tokenizer.json"}
    keys = ("padding", "truncation")
    return [
        f'"{key}" is {values[key]}' for values in tokenizers.values() for key in keys if values.get(key) is not None
    ]


def private_traces(directory: Path, files: list[str], repo_id: str | None) -> list[str]:
    """Return the files with a path of this machine or the user's name; not if `repo_id` has that name."""
    user = getpass.getuser()
    is_a_name = user not in _WORDS and len(user) > 2 and user not in (repo_id or "")
    as_word = re.compile(rf"(?<![\w-]){re.escape(user)}(?![\w-])")
    as_part = re.compile(rf"[/\\]{re.escape(user)}[/\\]|(?<![\w-]){re.escape(user)}@")
    folders = [str(path) for path in (directory.resolve(), Path.home(), Path.cwd()) if len(path.parts) > 1]
    problems = []
    for name, text in _texts(directory, files):
        match = PRIVATE_PATH.search(text)
        absolute = match[0] if match else next((folder for folder in folders if folder in text), None)
        relative = "/" in text and len(text) < 200 and " " not in text and Path(text).exists()
        if absolute or relative:
            problems.append(f"{name} has the path {absolute or text}")
        elif as_part.search(text) or (is_a_name and as_word.search(text)):
            problems.append(f"{name} has the user name {user}")
    return list(dict.fromkeys(problems))


def access_tokens(directory: Path, files: list[str]) -> list[str]:
    """Search the bytes of all files except weights, and the texts in JSON and in the metadata of weights."""
    own = (get_token() or "").encode()
    read = [(name, (directory / name).read_bytes()) for name in files if Path(name).suffix not in _WEIGHTS]
    read += [(name, text.encode(errors="replace")) for name, text in _texts(directory, files)]
    leaks = [name for name, content in read if _TOKEN.search(content) or (own and own in content)]
    return [f"{name} has an access token" for name in dict.fromkeys(leaks)]  # the token is never printed


def _base(directory: Path) -> list[str]:
    file = directory / ADAPTER / "adapter_config.json"
    if not file.is_file():
        return []
    base = _read(file).get("base_model_name_or_path")
    if base not in (None, BUILT):
        return [] if is_hub_id(base) else [f"{ADAPTER}/adapter_config.json has {base!r}, which is not a Hub id"]
    facts = lora.read_base(directory / ADAPTER)
    if facts is None:
        return [f"{ADAPTER}/ does not state its base: {lora.FILE} is missing"]
    if facts.unnamed or not facts.is_built:
        missing = ", ".join(f"<{key}>" for key in facts.unnamed) or "base_model_name_or_path"
        return [f"{ADAPTER}/ does not state its base: {missing} is missing"]
    return []


def licence_faults(directory: Path, files: list[str]) -> list[str]:
    """Return what the card's front matter lacks of the licence."""
    if CARD not in files:
        return [f"{CARD} is missing"]
    data = ModelCard.load(directory / CARD, ignore_metadata_errors=True).data
    if not data.license:
        return [f"{CARD} has no license in its front matter"]
    if data.license == "other" and (not data.get("license_name") or LICENCE not in files):
        return [f"license: other needs license_name in {CARD}, and {LICENCE}"]
    return []


def _read(file: Path) -> Any:
    """Return the content of a JSON file; {} if it is broken (the first check reports it)."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def _texts(directory: Path, files: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (file, text) for the texts in Markdown, JSON and the metadata of weights, without vocabularies."""
    for name in files:
        if name.endswith(".md"):
            yield from ((name, line) for line in (directory / name).read_text(encoding="utf-8").splitlines())
        elif name.endswith(".json") and Path(name).name not in _VOCABULARIES:
            values = _read(directory / name)
            if Path(name).name == "tokenizer.json":
                values = {key: value for key, value in values.items() if key not in ("model", "added_tokens")}
            yield from ((name, text) for text in _walk(values, lambda value: isinstance(value, str)))
        elif name.endswith(".safetensors"):
            with contextlib.suppress(SafetensorError), safe_open(directory / name, framework="pt") as weights:
                yield from ((name, text) for item in (weights.metadata() or {}).items() for text in item)


def _keys(values: Any) -> set[str]:
    return {key for mapping in _walk(values, lambda value: isinstance(value, dict)) for key in mapping}


def _walk(values: Any, wanted: Callable[[Any], bool]) -> Iterator[Any]:
    if wanted(values):
        yield values
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in parts:
        if isinstance(key, str) and wanted(key):
            yield key
        yield from _walk(value, wanted)
