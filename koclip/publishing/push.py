"""Push a model's directory, a Space that shows it, or a data set to the Hub, in one atomic commit.

A push can be repeated at any time. It compares the repository with the directory, sends the files that differ and
compares again. Files that were uploaded before a connection broke are not uploaded twice. The token is that of
`huggingface_hub.get_token`; only its client uses it.
"""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from tqdm.auto import tqdm

from koclip import installation
from koclip.config import ConfigError, RunError, check
from koclip.models import router
from koclip.publishing.checks import ADAPTER, BUILT, CARD, LICENCE
from koclip.publishing.formats import onnx

Answer = TypeVar("Answer")

TRIES = 4
MODEL = "KOCLIP_MODEL"  # the Space's variable that space/app.py reads
_WAIT = 1.0  # seconds before the second try; doubles with each try
# HTTP statuses after which another try may work. 409 and 412: there is a new commit since the files were compared.
_TEMPORARY = {408, 409, 412, 425, 429, 500, 502, 503, 504}
# Files that loaders or koclip's card read. They are deleted on the Hub if the directory lacks them.
_OF_MODELS = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack"),
    *("config.json", "generation_config.json", "*processor_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model", "adapter_*", LICENCE),
    *(router.FILE, *(f"{folder}/*" for folder in router.FOLDERS)),
)
_MANAGED: dict[str, tuple[str, ...]] = {"model": _OF_MODELS, "dataset": ("*.parquet", LICENCE), "space": ()}


@dataclass(frozen=True)
class Repository:
    """A model, a data set or a Space on the Hub. `private` is for a new repository only."""

    repo_id: str
    kind: Literal["model", "dataset", "space"] = "model"
    private: bool = False

    @property
    def key(self) -> str:
        """Its configuration key."""
        return "space" if self.kind == "space" else "repo_id"


@dataclass(frozen=True)
class Changes:
    """Names of the files to upload, and of those to delete on the Hub."""

    added: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the newest commit, and the files that it changed."""

    url: str
    commit: str
    changes: Changes


def check_rights(repo_id: str, key: str = "repo_id") -> None:
    """Check that there is a token and that it may write to `repo_id`, the value of the configuration key `key`.

    Raises:
        ConfigError: there is no token, it is invalid, or it has no write rights.
        RunError: the Hub does not answer.
    """
    login = "log in with `hf auth login` or set HF_TOKEN; create tokens at hf.co/settings/tokens"
    check(get_token() is not None, "token", None, f"expected a token with write rights: {login}")
    namespace = repo_id.split("/")[0]
    user = repeat(lambda: HfApi().whoami(), "reading the owner of the token", key)
    roles = {user["name"]: "admin"} | {org["name"]: org.get("roleInOrg", "write") for org in user.get("orgs", [])}
    namespaces = f"a namespace of {user['name']}: {', '.join(sorted(roles))}"
    check(namespace in roles, key, repo_id, f"expected {namespaces}; choose from these, or use the token of a member")
    may_write = roles[namespace] != "read"
    check(may_write, key, repo_id, f"{user['name']} may only read in {namespace}: ask an admin for write rights")
    access = user.get("auth", {}).get("accessToken", {})
    role = access.get("role")
    writes = role == "write" or (role == "fineGrained" and _grants(access.get("fineGrained", {}), repo_id))
    check(writes or role is None, "token", f"role {role}", f"expected write rights to {repo_id}: {login}")


def check_base(directory: Path) -> None:
    """Check that the Hub has the base model that adapter/adapter_config.json names, if any.

    Raises:
        ConfigError: the Hub lacks it, or this token may not read it.
        RunError: the Hub does not answer.
    """
    file = directory / ADAPTER / "adapter_config.json"
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    if base not in (None, BUILT):
        repeat(lambda: HfApi().model_info(base), f"reading {base}, the base of {ADAPTER}/")


def push(directory: Path, files: Sequence[str], repo: Repository, message: str, tag: str | None = None) -> Pushed:
    """Make the repository equal to `files` of `directory` in one commit; without a commit if it is equal already.

    `files` are relative to `directory`. A missing repository is created. `tag` is the name of the release.

    Raises:
        ConfigError: the tag exists with other files; or the Hub refuses the token, the name or the files.
        RunError: the push failed. The repository is unchanged or complete; the message says which.
    """
    url = repeat(lambda: _create(repo), f"creating {repo.repo_id}", repo.key)
    is_new = bool(tag) and _is_new_tag(repo, str(tag), directory, files)
    sent: list[Changes] = []
    commit = repeat(lambda: _commit(directory, files, repo, message, sent), f"pushing to {repo.repo_id}", repo.key)
    if is_new:
        target: dict[str, Any] = {"tag": tag, "revision": commit, "repo_type": repo.kind, "exist_ok": True}
        repeat(lambda: HfApi().create_tag(repo.repo_id, **target), f"setting the tag {tag} of {repo.repo_id}", repo.key)
    return Pushed(url, commit, sent[-1] if sent else Changes())


def _create(repo: Repository) -> str:
    sdk = "gradio" if repo.kind == "space" else None
    private = repo.private or None
    return str(HfApi().create_repo(repo.repo_id, repo_type=repo.kind, space_sdk=sdk, private=private, exist_ok=True))


def _commit(directory: Path, files: Sequence[str], repo: Repository, message: str, sent: list[Changes]) -> str:
    """Return the commit that has the files, and append the changes of a new commit to `sent`."""
    head = HfApi().repo_info(repo.repo_id, repo_type=repo.kind).sha
    fix = "expected a repository with a commit: delete it on the Hub and try again"
    check(head is not None, repo.key, repo.repo_id, fix)
    head = str(head)
    changes = _changes(directory, files, repo, head)
    if changes == Changes():
        return head
    sent.append(changes)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str((directory / name).resolve())) for name in changes.added),
        *(CommitOperationDelete(name) for name in changes.deleted),
    ]
    # Not `upload_folder`: if a commit keeps failing, huggingface_hub 2.4 splits it into commits of 20 files, so users
    # could load an incomplete model. With `parent_commit`, `create_commit` fails, and is repeated, if the repository
    # has changed since its files were compared.
    commit = HfApi().create_commit(
        repo.repo_id, operations, commit_message=message, repo_type=repo.kind, parent_commit=head
    )
    left = _changes(directory, files, repo, commit.oid)
    if left != Changes():
        raise RunError(
            f"{repo.key}: {repo.repo_id} differs from the pushed files at commit {commit.oid}: "
            f"{', '.join(left.added + left.deleted)}. Run the same command again; if that does not help, delete these "
            "files on the Hub first"
        )
    return str(commit.oid)


def _changes(directory: Path, files: Sequence[str], repo: Repository, revision: str) -> Changes:
    """Compare the hashes of a commit's files with those of `files` of a directory; return the differences."""
    api, where = HfApi(), {"repo_type": repo.kind, "revision": revision}
    compared = api.verify_repo_checksums(repo.repo_id, local_dir=directory, **where)
    differing = {*(mismatch["path"] for mismatch in compared.mismatches), *compared.extra_paths}  # extra: local only
    stored = api.list_repo_files(repo.repo_id, **where)
    return Changes(
        added=tuple(name for name in files if name in differing),
        deleted=tuple(name for name in stored if name not in files and _is_managed(name, repo)),
    )


def _is_managed(name: str, repo: Repository) -> bool:
    """Return whether a push deletes a file of that name if the directory lacks it."""
    path = Path(name)
    if repo.kind == "model" and name in {f"{onnx.FOLDER}/{file}" for file in onnx.FILES}:
        return True
    folders = (".", ADAPTER) if repo.kind == "model" else (".",)
    matches = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _MANAGED[repo.kind])
    return path.parent.as_posix() in folders and matches


def _is_new_tag(repo: Repository, tag: str, directory: Path, files: Sequence[str]) -> bool:
    """Return whether a tag is new. Check that the commit of an existing tag has these files."""

    def find() -> tuple[str | None, bool]:
        refs = HfApi().list_repo_refs(repo.repo_id, repo_type=repo.kind)
        target = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        return target, target is None or _changes(directory, files, repo, target) == Changes()

    target, same = repeat(find, f"reading the tag {tag} of {repo.repo_id}", repo.key)
    check(same, "tag", tag, f"this release exists, at commit {target}, with other files: choose a new name")
    return target is None


def _grants(rights: dict[str, Any], repo_id: str) -> bool:
    """Return whether a fine-grained token may write to a repository or its namespace."""
    names = {repo_id, repo_id.split("/")[0]}
    scopes = [scope for scope in rights.get("scoped", []) if scope.get("entity", {}).get("name") in names]
    granted = {right for scope in scopes for right in scope.get("permissions", [])} | set(rights.get("global", []))
    return bool(granted & {"repo.write", "repo.content.write"})


def push_space(source: Path, repo: Repository, model_id: str, message: str) -> Pushed:
    """Make a Space show a model of the Hub; create a missing Space, and change nothing if it is up to date.

    `source` is the directory of the app, `message` the commit's first line.

    Raises:
        ConfigError: `source` has no app, or the Hub refuses.
        RunError: the Hub does not answer. The Space is unchanged or complete.
    """
    files = sorted(path.name for path in source.glob("*") if path.suffix in (".py", ".md", ".txt"))
    needed = ("app.py", "requirements.txt", CARD)
    check(set(needed) <= set(files), "space", str(source), f"expected a directory with {', '.join(needed)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            shutil.copy(source / name, folder)
        if checkout := installation.checkout():
            _pin(Path(folder) / "requirements.txt", checkout)
        card = SpaceCard.load(Path(folder) / CARD)
        card.data.title, card.data.models = repo.repo_id.split("/")[1], [model_id]
        card.save(Path(folder) / CARD)
        pushed = push(Path(folder), files, repo, message)
    repeat(lambda: _name_model(repo.repo_id, model_id), f"setting {MODEL} of {repo.repo_id}", repo.key)
    return pushed


def _pin(requirements: Path, checkout: Path) -> None:
    """Pin koclip in the Space's requirements to the commit of the checkout, if a remote has that commit."""
    git = ["git", "-C", str(checkout)]
    pushed = [*git, "for-each-ref", "refs/remotes", "--contains", "HEAD", "--count=1"]
    if shutil.which("git") and subprocess.run(pushed, capture_output=True, check=False).stdout:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        text = requirements.read_text(encoding="utf-8")
        pinned = re.sub(r"(@ git\+https://[^\s@]+)$", rf"\g<1>@{head}", text, flags=re.MULTILINE)
        requirements.write_text(pinned, encoding="utf-8")


def _name_model(space_id: str, model_id: str) -> None:
    """Set the variable `MODEL` if its value is different; setting it restarts the Space."""
    variable = HfApi().get_space_variables(space_id).get(MODEL)
    if variable is None or variable.value != model_id:
        HfApi().add_space_variable(space_id, MODEL, model_id)


def repeat(call: Callable[[], Answer], action: str, key: str = "repo_id") -> Answer:
    """Call the Hub; after a temporary failure, wait and call again, `TRIES` times in total.

    `action` describes the call in messages, and `key` is the configuration key there.

    Raises:
        ConfigError: the Hub refuses, or a local file cannot be read.
        RunError: every try failed.
    """
    for number in range(1, TRIES + 1):
        try:
            return call()
        except OfflineModeIsEnabled as error:
            raise ConfigError(f"HF_HUB_OFFLINE: {action} needs the Hub; unset this variable") from error
        except (ConfigError, RunError):
            raise
        except (HTTPError, HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
            _raise_lasting(error, action, key)
            if number == TRIES:
                raise RunError(
                    f"{key}: {action} failed {TRIES} times: {_line(error)}. Commits are atomic, so the repository is "
                    "unchanged or complete: run the same command again"
                ) from error
            wait = _WAIT * 2 ** (number - 1)
            tqdm.write(f"{action}: {_line(error)}; next try in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _raise_lasting(error: Exception, action: str, key: str) -> None:
    """Raise a `ConfigError` if another try cannot help."""
    status = _status(error)
    if status is None and _is_local(error):
        raise ConfigError(f"{action}: {_line(error)}. Make the file readable and run the command again") from error
    if status is not None and status not in _TEMPORARY:
        raise ConfigError(f"{key}: {action}: the Hub answered {_line(error)}") from error
    # A web page of a proxy instead of JSON is temporary; the client or the Hub refuses other wrong values for good.
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError) and status is None:
        raise ConfigError(f"{key}: {action}: {_line(error)}") from error


def _is_local(error: Exception) -> bool:
    """Return whether a local file is the reason: errors of the network have other classes, or name no file."""
    # Not their subclasses, which hf_xet uses for errors of the network.
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return type(error) in kinds or (type(error) is OSError and error.filename is not None)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error or of its cause."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    return _status(error.__cause__) if error.__cause__ is not None else None


def _line(error: BaseException) -> str:
    """Return an error's text in one line, without the token."""
    token = get_token()
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(token, "<token>") if token else text
