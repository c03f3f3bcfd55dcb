"""Check the files of a directory before it is published: which must be there, and which must not."""

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
from koclip.models.pretrained import is_hub_id
from koclip.publishing.formats import onnx, sentence_transformers

CARD, LICENCE = "README.md", "LICENSE.md"
ADAPTER = lora.FOLDER
# The base in adapter_config.json if no repository holds it. It is no Hub id, so an error that quotes it helps.
BUILT = "built by koclip, see README.md of this folder"
FOLDERS = (".", ADAPTER, onnx.FOLDER, sentence_transformers.FOLDER)  # the folders of a repository
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
# .txt and .model: vocabularies of stock tokenizers.
_KINDS = {".json", ".safetensors", ".md", ".txt", ".model", ".onnx"}
_VOCABULARIES = {"vocab.json", "added_tokens.json"}  # whose keys are words of the training text
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".msgpack", ".h5"}
_WEIGHTS = {".safetensors", ".onnx", *_PICKLES}
_TYPES = {"F32", "I64", "I32", "BOOL", "U8"}  # weights are fp32; integers are buffers of positions
_ROOTS = (
    r"home|[Uu]sers?|root|tmp|var|mnt|media|Volumes|nfs|efs|fsx|gpfs|lustre|ceph(?:fs)?|raid|ssd|nvme|hdd|disk|storage|"
    r"shared?|data(?:sets?)?|work|workspaces?|projects?|opt|usr|etc|srv|dev/shm|export|scratch|private|content|kaggle"
)
# A slash that follows a letter, a dot or a slash is a URL's or a relative path's; `?` comes before `s:\s` of patterns.
_PATH = re.compile(
    rf"(?:(?<![\w./~-])/(?:{_ROOTS})\d*/|(?<![\w./:~-])~/|(?<![\w./?-])[A-Za-z]:[\\/](?=\w)|\bfile:/)[^\s\"'`)\]]*"
)
_TOKEN = re.compile(rb"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}")
# Account names that are also words: they are refused in paths only.
_WORDS = {"root", "user", "ubuntu", "admin", "runner", "jovyan", "guest", "nobody", "model", "data", "test"}


@dataclass(frozen=True)
class Check:
    """One line of the release list: its name, the problems (none if it passes), and how to fix them."""

    name: str
    problems: list[str]
    fix: str


def publishable(directory: Path, adapter: bool = True) -> list[str]:
    """Return the files to publish, sorted, relative to `directory`: no hidden files, adapter/ only if `adapter`.

    Raises:
        ConfigError: the directory has no config.json.
    """
    expected = "expected a directory with a config.json, as a training recipe writes runs/<run>/model"
    check((directory / "config.json").is_file(), "model", str(directory), expected)
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(path.as_posix() for path in visible if adapter or path.parts[0] != ADAPTER)


def name_base(directory: Path, clip: str | None, text_encoder: str | None) -> None:
    """Write Hub ids into the adapter's files where training used local directories. Without an adapter do nothing.

    A base that koclip builds from two models is in no repository: adapter_config.json then names `BUILT`.

    Args:
        directory: The model's directory.
        clip: Hub id of `model.clip`.
        text_encoder: Hub id of `model.text_encoder`.
    """
    folder = directory / ADAPTER
    base, file = lora.read_base(folder), folder / "adapter_config.json"
    settings = _read(file) if file.is_file() else {}
    if base is None or not settings:  # missing or broken: a check says so
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
    problems = [f"{name} is missing" for name in _NEEDED if name not in files]
    problems += [] if any(_is_weights(name) for name in files) else ["no model*.safetensors"]
    for name in (name for name in files if name.endswith(".json")):
        try:
            json.loads((directory / name).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            problems.append(f"{name} cannot be read: {error}")
    return problems


def _foreign(files: list[str]) -> list[str]:
    pickles = [
        f"{name} is a pickle or another format that can run code" for name in files if Path(name).suffix in _PICKLES
    ]
    others = [name for name in files if Path(name).suffix not in _KINDS | _PICKLES]
    deep = [name for name in files if Path(name).parent.as_posix() not in FOLDERS]
    return pickles + [f"{name} is no file of a model" for name in sorted({*others, *deep})]


def _remote_code(directory: Path, files: list[str]) -> list[str]:
    files_of_json = [name for name in files if name.endswith(".json")]
    return [f"{name} has auto_map" for name in files_of_json if "auto_map" in _keys(_read(directory / name))]


def _types(directory: Path, files: list[str]) -> list[str]:
    problems = []
    for name in (name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(directory / name, framework="pt") as weights:
                types = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118  # no mapping
        except SafetensorError as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        if types - _TYPES:
            problems.append(f"{name} holds {', '.join(sorted(types - _TYPES))}")
    return problems


def _state(directory: Path) -> list[str]:
    file = directory / "tokenizer.json"
    values = _read(file) if file.is_file() else {}
    return [f'"{name}" is {values[name]}' for name in ("padding", "truncation") if values.get(name) is not None]


def _traces(directory: Path, files: list[str], repo_id: str | None) -> list[str]:
    user = getpass.getuser()
    is_a_name = user not in _WORDS and len(user) > 2 and user not in (repo_id or "")
    as_word = re.compile(rf"(?<![\w-]){re.escape(user)}(?![\w-])")
    as_part = re.compile(rf"[/\\]{re.escape(user)}[/\\]|(?<![\w-]){re.escape(user)}@")
    folders = [str(path) for path in (directory.resolve(), Path.home(), Path.cwd()) if len(path.parts) > 1]
    problems = []
    for name, text in _texts(directory, files):
        match = _PATH.search(text)
        absolute = match[0] if match else next((folder for folder in folders if folder in text), None)
        relative = "/" in text and len(text) < 200 and " " not in text and Path(text).exists()
        if absolute or relative:
            problems.append(f"{name} names the path {absolute or text}")
        elif as_part.search(text) or (is_a_name and as_word.search(text)):
            problems.append(f"{name} names the user {user}")
    return list(dict.fromkeys(problems))


def _tokens(directory: Path, files: list[str]) -> list[str]:
    """Search the bytes of all files except weights, and the texts inside JSON and the metadata of weights."""
    own = (get_token() or "").encode()
    read = [(name, (directory / name).read_bytes()) for name in files if Path(name).suffix not in _WEIGHTS]
    read += [(name, text.encode(errors="replace")) for name, text in _texts(directory, files)]
    # The token itself is never printed, only the file's name.
    leaks = [name for name, content in read if _TOKEN.search(content) or (own and own in content)]
    return [f"{name} holds an access token" for name in dict.fromkeys(leaks)]


def _base(directory: Path) -> list[str]:
    file = directory / ADAPTER / "adapter_config.json"
    if not file.is_file():
        return []
    base = _read(file).get("base_model_name_or_path")
    if base not in (None, BUILT):
        return [] if is_hub_id(base) else [f"{ADAPTER}/adapter_config.json names {base!r}, which is no Hub id"]
    facts = lora.read_base(directory / ADAPTER)
    if facts is None:
        return [f"{ADAPTER}/ does not say what it adapts: no {lora.FILE}"]
    if facts.unnamed or not facts.is_built:
        keys = [f"<{key}>" for key in facts.unnamed]
        return [f"{ADAPTER}/ does not say what it adapts: {', '.join(keys) or 'no base_model_name_or_path'}"]
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


def _is_weights(name: str) -> bool:
    return re.fullmatch(r"model.*\.safetensors", name) is not None


def _read(file: Path) -> Any:
    """Return the content of a JSON file; {} if it is broken, which the first check reports."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def _texts(directory: Path, files: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (file, text) for the texts in Markdown, in JSON and in the metadata of weights, vocabularies excepted."""
    for name in files:
        if name.endswith(".md"):
            yield from ((name, line) for line in (directory / name).read_text(encoding="utf-8").splitlines())
        elif name.endswith(".json") and Path(name).name not in _VOCABULARIES:
            values = _read(directory / name)
            if name == "tokenizer.json":
                values = {key: value for key, value in values.items() if key not in ("model", "added_tokens")}
            yield from ((name, text) for text in _walk(values, lambda value: isinstance(value, str)))
        elif name.endswith(".safetensors"):
            yield from ((name, text) for item in _metadata(directory / name).items() for text in item)


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as weights:
            return weights.metadata() or {}
    except SafetensorError:
        return {}  # the check of the types reports it


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
