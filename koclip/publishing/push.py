"""Push a directory to the Hub, by huggingface_hub alone: one atomic commit, or none.

A push can be repeated at any time. It asks what the repository holds, sends what differs and looks again afterwards;
what had been uploaded before a connection broke is not uploaded twice. The token is what `huggingface_hub.get_token`
finds; it is handed to the client and to nobody else.
"""

import fnmatch
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from tqdm.auto import tqdm

from koclip.config import ConfigError, RunError, check
from koclip.publishing.files import ADAPTER, BUILT, LICENCE
from koclip.publishing.formats import onnx

Made = TypeVar("Made")

TRIES = 4
_WAIT = 1.0  # seconds before the second try, doubled each time
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # 409 and 412: somebody else's commit came between
# What loaders or koclip's card read; of these a model's repository holds what the directory does, all else stays.
_OURS = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack"),
    *("config.json", "generation_config.json", "*processor_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model", "adapter_*", LICENCE),
)


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub: a model's or a Space's, made private if it is new and that is asked for."""

    repo_id: str
    kind: Literal["model", "space"] = "model"
    private: bool = False

    @property
    def key(self) -> str:
        """What the configuration calls it."""
        return "space" if self.kind == "space" else "repo_id"


@dataclass(frozen=True)
class Pushed:
    """What came of a push: the repository's newest commit, and the files that it changed."""

    url: str
    commit: str
    added: list[str]
    deleted: list[str]


def check_rights(repo_id: str, key: str = "repo_id") -> None:
    """Make sure that there is a token and that it may write to `repo_id`, which the configuration calls `key`.

    Raises:
        ConfigError: there is none, it is not valid, or it may only read, or not write there.
        RunError: the Hub does not answer.
    """
    login = "log in with `hf auth login` or set HF_TOKEN; tokens are made at hf.co/settings/tokens"
    check(get_token() is not None, "token", None, f"expected one with write rights: {login}")
    namespace = repo_id.split("/")[0]
    who = repeat(lambda: HfApi().whoami(), "asking who the token belongs to", key)
    mine = {who["name"]: "admin"} | {one["name"]: one.get("roleInOrg", "write") for one in who.get("orgs", [])}
    named = f"a namespace of {who['name']}: {', '.join(sorted(mine))}"
    check(namespace in mine, key, repo_id, f"expected {named}; take one, or the token of a member")
    may = mine[namespace] != "read"
    check(may, key, repo_id, f"{who['name']} may only read in {namespace}: ask an admin for write rights")
    access = who.get("auth", {}).get("accessToken", {})
    role = access.get("role")
    writes = role == "write" or (role == "fineGrained" and _grants(access.get("fineGrained", {}), repo_id))
    check(writes or role is None, "token", f"one of role {role}", f"expected write rights to {repo_id}: {login}")


def check_base(directory: Path) -> None:
    """Make sure that the Hub has the base that adapter/ names, if there is an adapter and it names one.

    Raises:
        ConfigError: it has not, or not for this token.
        RunError: the Hub does not answer.
    """
    file = directory / ADAPTER / "adapter_config.json"
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    if base not in (None, BUILT):
        repeat(lambda: HfApi().model_info(base), f"looking for {base}, the base of {ADAPTER}/")


def push(directory: Path, files: Sequence[str], repo: Repository, message: str, tag: str | None = None) -> Pushed:
    """Make the repository hold `files` of `directory`, by one commit, or by none if it does already.

    Args:
        directory: Where they are.
        files: Relative to it.
        repo: Where to; it is made if it is missing.
        message: The commit's first line.
        tag: Name of the release.

    Raises:
        ConfigError: the tag names another commit; or the Hub refuses the token, the name or the files.
        RunError: it could not be done; the repository is as it was, or complete. The message says which.
    """
    url = repeat(lambda: _create(repo), f"making {repo.repo_id}", repo.key)
    if tag:
        _check_tag(repo, tag, directory, files)
    sent: list[tuple[list[str], list[str]]] = []
    commit = repeat(lambda: _commit(directory, files, repo, message, sent), f"pushing to {repo.repo_id}", repo.key)
    if tag:
        repeat(lambda: _set_tag(repo, tag, commit), f"setting the tag {tag} of {repo.repo_id}", repo.key)
    added, deleted = sent[-1] if sent else ([], [])
    return Pushed(url, commit, added, deleted)


def _create(repo: Repository) -> str:
    sdk = "gradio" if repo.kind == "space" else None
    made = HfApi().create_repo(
        repo.repo_id, repo_type=repo.kind, space_sdk=sdk, private=repo.private or None, exist_ok=True
    )
    return str(made)


def _commit(
    directory: Path, files: Sequence[str], repo: Repository, message: str, sent: list[tuple[list[str], list[str]]]
) -> str:
    """Return the commit that holds the files, made now or there already; note in `sent` what one is asked to change."""
    head = _head(repo)
    added, deleted = _differences(directory, files, repo, head)
    if not added and not deleted:
        return head
    sent.append((added, deleted))
    operations: list[Any] = [CommitOperationAdd(name, str((directory / name).resolve())) for name in added]
    operations += [CommitOperationDelete(name) for name in deleted]
    # The parent makes it fail, and be repeated, if the repository has changed since its files were compared.
    made = HfApi().create_commit(
        repo.repo_id, operations, commit_message=message, repo_type=repo.kind, parent_commit=head
    )
    left = _differences(directory, files, repo, made.oid)
    if any(left):
        raise RunError(
            f"{repo.key}: {repo.repo_id} does not hold what was pushed, its hashes differ: "
            f"{', '.join(left[0] + left[1])} at commit {made.oid}. Run the same command again; if it stays so, "
            "delete these files on the Hub first"
        )
    return str(made.oid)


def _differences(directory: Path, files: Sequence[str], repo: Repository, revision: str) -> tuple[list[str], list[str]]:
    """Return the files that a commit lacks or holds otherwise, and those that loaders would read but must not."""
    tree = HfApi().list_repo_tree(repo.repo_id, recursive=True, revision=revision, repo_type=repo.kind)
    there = {one.path: one for one in tree if isinstance(one, RepoFile)}
    added = [name for name in files if name not in there or not _same(directory / name, there[name])]
    deleted = [name for name in there if name not in files and _is_ours(name, repo)]
    return added, deleted


def _same(file: Path, remote: RepoFile) -> bool:
    if file.stat().st_size != remote.size:
        return False
    if remote.lfs is None:
        return bool(git_hash(file.read_bytes()) == remote.blob_id)
    with file.open("rb") as content:
        return bool(sha_fileobj(content).hex() == remote.lfs.sha256)


def _is_ours(name: str, repo: Repository) -> bool:
    path = Path(name)
    if name in {f"{onnx.FOLDER}/{file}" for file in onnx.FILES}:
        return repo.kind == "model"  # graphs of other weights than those beside them
    here = repo.kind == "model" and path.parent.as_posix() in (".", ADAPTER)
    return here and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _OURS)


def _head(repo: Repository) -> str:
    head = HfApi().repo_info(repo.repo_id, repo_type=repo.kind).sha
    mend = "expected a repository with a commit: delete it on the Hub and try again"
    check(head is not None, repo.key, repo.repo_id, mend)
    return str(head)


def _check_tag(repo: Repository, tag: str, directory: Path, files: Sequence[str]) -> None:
    """Make sure, before anything is pushed, that a tag is new or that the repository already is what it names."""

    def look() -> tuple[str | None, bool]:
        target = _target(repo, tag)
        same = target is None or not any(_differences(directory, files, repo, target))
        return target, same

    target, same = repeat(look, f"looking for the tag {tag} of {repo.repo_id}", repo.key)
    check(same, "tag", tag, f"it names commit {target}, of other files: releases are not moved, choose a new name")


def _set_tag(repo: Repository, tag: str, commit: str) -> None:
    if _target(repo, tag) is None:
        HfApi().create_tag(repo.repo_id, tag=tag, revision=commit, repo_type=repo.kind)


def _target(repo: Repository, tag: str) -> str | None:
    refs = HfApi().list_repo_refs(repo.repo_id, repo_type=repo.kind)
    return next((one.target_commit for one in refs.tags if one.name == tag), None)


def _grants(rights: dict[str, Any], repo_id: str) -> bool:
    """Return whether a fine-grained token may write to a repository or its namespace."""
    wanted = {repo_id, repo_id.split("/")[0]}
    scopes = [one for one in rights.get("scoped", []) if one.get("entity", {}).get("name") in wanted]
    granted = {right for one in scopes for right in one.get("permissions", [])} | set(rights.get("global", []))
    return bool(granted & {"repo.write", "repo.content.write"})


def repeat(do: Callable[[], Made], what: str, key: str = "repo_id") -> Made:
    """Do something with the Hub, which the configuration calls `key`; again, a few times, after faults that pass.

    Raises:
        ConfigError: the Hub refuses it, or a file here cannot be read.
        RunError: it does not work.
    """
    for number in range(1, TRIES + 1):
        try:
            return do()
        except OfflineModeIsEnabled as error:
            raise ConfigError(f"HF_HUB_OFFLINE: {what} needs the Hub; unset it") from error
        except (HTTPError, HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, ConfigError | RunError):
                raise
            status = _status(error)
            if status is None and _is_local(error):
                raise ConfigError(f"{what}: {_line(error)}. Make the file readable, and run it again") from error
            if status is not None and status not in _PASSING:
                raise ConfigError(f"{key}: {what}: the Hub says {_line(error)}") from error
            # A proxy's page in the place of JSON passes; other wrong values are what the client or the Hub refuse.
            if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError) and status is None:
                raise ConfigError(f"{key}: {what}: {_line(error)}") from error
            if number == TRIES:
                raise RunError(
                    f"{key}: {what} did not work, {TRIES} times: {_line(error)}. A commit is whole or not there at "
                    "all, so the repository is as it was, or complete: run the same command again"
                ) from error
            tqdm.write(f"{what}: {_line(error)}; again in {_WAIT * 2 ** (number - 1):.0f} s", file=sys.stderr)
            time.sleep(_WAIT * 2 ** (number - 1))
    raise AssertionError("unreachable")


def _is_local(error: Exception) -> bool:
    """Return whether a file here is the reason; errors of the network are classes of their own, or name no file."""
    kinds = (
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
    )  # not their subclasses: hf_xet's
    return type(error) in kinds or (type(error) is OSError and error.filename is not None)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error, or what it was raised from, was made of."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    return _status(error.__cause__) if error.__cause__ is not None else None


def _line(error: BaseException) -> str:
    """Return an error's text in one line, without what might be a secret."""
    token = get_token()
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(token, "<token>") if token else text
