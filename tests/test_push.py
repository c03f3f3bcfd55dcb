"""Pushing to a Hub on localhost: complete and correct, or untouched with a clear error, whatever happens on the way."""

import json
import os
import shutil
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from helpers import warm_python
from hf_xet import XetAuthenticationError, XetObjectNotFoundError
from hub_repos import Fault
from hub_server import HubServer
from huggingface_hub.errors import HTTPError

from koclip.config import ConfigError, RunError
from koclip.publishing import push
from koclip.publishing.push import _grants

TOKEN, READER = "hf_" + "writes" * 6, "hf_" + "reads" * 7
CARD = "---\nlicense: apache-2.0\nlanguage:\n- ko\n---\n# A model\n"
WORKER = Path(__file__).with_name("push_worker.py")
LIBRARIES = ["koclip.publishing.push"]  # of the worker


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    server = HubServer({TOKEN: "write", READER: "read"})
    yield server
    server.shutdown()
    server.server_close()


class Worker:
    """A process that pushes, large files by Xet or by LFS."""

    def __init__(self, hub: HubServer, home: Path, token: str | None = TOKEN, way: str = "xet") -> None:
        self.way = way
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
        environment |= {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"} | ({"HF_TOKEN": token} if token else {})
        environment |= {"HF_HUB_DISABLE_XET": "1"} if way == "lfs" else {}
        self.errors = (home / f"{time.monotonic_ns()}.err").open("w+", encoding="utf-8")
        self.said: list[str] = []
        jobs, answers = os.pipe(), os.pipe()
        streams = jobs[0], answers[1], self.errors
        self.process = warm_python.start([str(WORKER)], environment, streams=streams, libraries=LIBRARIES)
        os.close(jobs[0])
        os.close(answers[1])
        self.jobs, self.answers = os.fdopen(jobs[1], "w"), os.fdopen(answers[0])

    def push(self, directory: Path, repo_id: str, **options: object) -> dict[str, Any]:
        """Return the worker's answer; nothing if it was killed."""
        self.jobs.write(json.dumps({"directory": str(directory), "repo_id": repo_id, **options}) + "\n")
        self.jobs.flush()
        self.said.append(self.answers.readline())
        if not self.said[-1]:
            self.process.wait()
            return {}
        return dict(json.loads(self.said[-1]))

    def stop(self) -> str:
        self.process.kill()
        self.process.wait()
        self.errors.seek(0)
        return "".join(self.said) + self.errors.read()


@pytest.fixture(scope="module")
def workers(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Worker]]:
    """Return a function that gives a worker: the one before if it lives. At the end no token is anywhere."""
    folder = tmp_path_factory.mktemp("home")
    started: list[Worker] = []

    def worker(token: str | None = TOKEN, fresh: bool = False, way: str = "xet") -> Worker:
        if fresh or not started or started[-1].process.poll() is not None or started[-1].way != way:
            started.append(Worker(hub, folder, token, way))
        hub.killer = started[-1].process.kill
        return started[-1]

    yield worker
    for worker_process in started:
        said = worker_process.stop()
        assert "Traceback" not in said
        assert TOKEN not in said
        assert READER not in said
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file
    assert not any(TOKEN in line for line in hub.log)
    assert not any(TOKEN.encode() in content for repo in hub.repos.values() for content in repo.files.values())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a directory with small and large files, an adapter, and one file that is not for others."""
    directory = tmp_path / "model"
    write(directory, "1")
    (directory / ".hidden").write_text("mine")
    return directory


def write(directory: Path, version: str) -> None:
    (directory / "adapter").mkdir(parents=True, exist_ok=True)
    (directory / "README.md").write_text(CARD + version)
    (directory / "config.json").write_text(json.dumps({"version": version}))
    (directory / "tokenizer.json").write_text("{}" + " " * 20_000)  # large; the same in every version
    (directory / "model.safetensors").write_bytes(version.encode() * 50_000)
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter" + version.encode())


def contents(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_a_push_makes_the_repository_and_the_next_one_does_nothing(hub, workers, model):
    worker = workers()
    first = worker.push(model, "org/plain", tag="v1")
    assert hub.repos["org/plain"].files == contents(model)
    assert first["url"] == f"{hub.url}/org/plain"
    assert "adapter/adapter_model.safetensors" in first["added"]
    calls = dict(hub.calls)
    again = worker.push(model, "org/plain", tag="v1")
    assert again == {"commit": first["commit"], "added": [], "deleted": [], "url": first["url"]}
    repo = hub.repos["org/plain"]
    assert len(repo.commits) == 2  # the Hub's own and ours
    assert repo.tags == {"v1": first["commit"]}
    assert all(hub.calls[name] == calls[name] for name in ("preupload", "xet_token", "xorb", "shard", "commit", "tag"))


def test_only_what_changed_is_sent_and_what_a_loader_would_read_is_deleted(hub, workers, model):
    worker = workers()
    (model / "model-00001-of-00002.safetensors").write_bytes(b"shard")
    worker.push(model, "org/changed")
    repo = hub.repos["org/changed"]
    foreign = {"pictures/a.png": b"png", "handler.py": b"x", "notes.txt": b"x", "onnx/model.bin": b"x"}
    stale = {"pytorch_model.bin": b"old", "onnx/text_model.onnx": b"graph of the old weights"}
    added = {name: (content, False) for name, content in (foreign | stale).items()}
    repo.commit(repo.trees[repo.commits[-1]] | added)
    (model / "model-00001-of-00002.safetensors").unlink()
    (model / "config.json").write_text("{}")
    pushed = worker.push(model, "org/changed")
    assert pushed["added"] == ["config.json"]
    assert sorted(pushed["deleted"]) == sorted(["model-00001-of-00002.safetensors", *stale])
    assert repo.files == contents(model) | foreign


def test_a_release_is_not_moved(hub, workers, model):
    worker = workers()
    worker.push(model, "org/release", tag="v1")
    before = list(hub.repos["org/release"].commits)
    write(model, "2")
    refused = worker.push(model, "org/release", tag="v1")
    assert refused["error"] == "ConfigError"
    assert "tag: got 'v1'" in refused["message"]
    assert hub.repos["org/release"].commits == before
    assert worker.push(model, "org/release", tag="v2")["added"]
    assert len(hub.repos["org/release"].tags) == 2


def test_a_new_repository_is_private_if_asked(hub, workers, model):
    workers().push(model, "org/private", private=True)
    assert hub.repos["org/private"].private


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "org/none", "token: got None, expected a token with write rights: log in with `hf auth login`"),
        (READER, "org/none", "token: got 'role read', expected write rights to org/none"),
        ("hf_" + "wrong" * 7, "org/none", "Invalid user token"),
        (TOKEN, "others/none", "repo_id: got 'others/none', expected a namespace of someone: org, readers, someone"),
        (TOKEN, "readers/none", "someone may only read in readers"),
    ],
)
def test_rights_are_checked_before_any_work(hub, workers, model, token, repo_id, message):
    hub.calls.clear()
    refused = workers(token, fresh=True).push(model, repo_id)
    assert refused["error"] == "ConfigError"
    assert message in refused["message"]
    assert set(hub.calls) <= {"whoami", "nothing"}  # nothing: the client's question for agent harnesses
    workers(fresh=True)


@pytest.mark.parametrize(
    ("rights", "may"),
    [
        ({"scoped": [{"entity": {"type": "org", "name": "org"}, "permissions": ["repo.write"]}]}, True),
        ({"scoped": [{"entity": {"type": "model", "name": "org/a"}, "permissions": ["repo.write"]}]}, True),
        ({"scoped": [{"entity": {"type": "org", "name": "org"}, "permissions": ["repo.content.read"]}]}, False),
        ({"scoped": [{"entity": {"type": "org", "name": "other"}, "permissions": ["repo.write"]}]}, False),
        ({"global": ["discussion.write"], "scoped": []}, False),
        ({}, False),
    ],
)
def test_rights_of_fine_grained_tokens(rights, may):
    assert _grants(rights, "org/a") == may


def test_the_base_of_an_adapter_must_be_on_the_hub(hub, workers, model):
    settings = model / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    refused = workers().push(model, "org/with_adapter")
    assert refused["error"] == "ConfigError"
    assert "reading org/base, the base of adapter/: the Hub answered 404" in refused["message"]
    assert "org/with_adapter" not in hub.repos
    settings.rename(model / "kept.json")
    workers().push(model, "org/base")
    (model / "kept.json").rename(settings)
    assert "adapter/adapter_config.json" in workers().push(model, "org/with_adapter")["added"]


def test_metadata_that_the_hub_refuses_are_named(hub, workers, model):
    (model / "README.md").write_text(CARD.replace("apache-2.0", "my own"))
    refused = workers().push(model, "org/refused")
    assert refused["error"] == "ConfigError"
    assert '"license" must be one of' in refused["message"]
    assert hub.repos["org/refused"].files == {}


LFS = ("batch", "upload", "verify")  # calls that only clients without Xet make
PASSING = [
    *((where, kind) for where in ("create", "info", "tree", "preupload", "batch") for kind in ("drop", "500")),
    *((where, kind) for where in ("whoami", "upload", "commit", "tag") for kind in ("drop", "429", "500")),
    *((where, kind) for where in ("xet_token", "xorb", "shard") for kind in ("drop", "429", "500")),
    *((where, "drop_after") for where in ("create", "upload", "xorb", "shard", "commit", "tag")),
    *((where, "cut") for where in ("upload", "xorb", "commit")),
    *((where, "500") for where in ("verify", "validate", "refs")),
]
LASTING = [
    *((where, "403", 9) for where in ("whoami", "preupload", "batch", "upload", "commit", "tag")),
    *((where, "403", 9) for where in ("xet_token", "xorb", "shard")),
    ("commit", "drop", 4),
    ("commit", "500", 4),
    ("shard", "500", 99),
    ("upload", "wrong_hash", 1),
    ("commit", "wrong_hash", 1),
    *((where, kind, 1) for where in ("upload", "xorb", "shard", "commit", "tag") for kind in ("kill", "kill_after")),
    *((where, "kill", 1) for where in ("create", "preupload", "batch", "verify", "xet_token")),
]
assert len(PASSING) + len(LASTING) >= 30


def way_of(where: str) -> str:
    return "lfs" if where in LFS else "xet"


def start(hub: HubServer, worker: Worker, model: Path, name: str) -> dict[str, bytes]:
    """Publish version 1, and write version 2; return what the repository holds."""
    worker.push(model, name, tag="v1")
    write(model, "2" + name)  # new large files, which nobody has uploaded yet
    return hub.repos[name].files


def check(hub: HubServer, model: Path, name: str, done: dict[str, Any]) -> None:
    """The repository holds version 2, made by one commit, tagged."""
    repo = hub.repos[name]
    assert repo.files == contents(model)
    assert repo.commits[-1] == done["commit"] == repo.tags["v2"]


@pytest.mark.parametrize(("where", "kind"), PASSING)
def test_faults_that_pass_are_outlived(hub, workers, model, where, kind):
    worker, name = workers(way=way_of(where)), f"org/{where}-{kind}"
    start(hub, worker, model, name)
    hub.faults = [Fault(where, kind)]
    done = worker.push(model, name, tag="v2")
    assert hub.faults[0].times == 0
    assert "error" not in done
    assert "model.safetensors" in done["added"]
    check(hub, model, name, done)
    assert len(hub.repos[name].commits) == 3  # no commit is made twice


@pytest.mark.parametrize(("where", "kind", "times"), LASTING)
def test_after_faults_that_last_the_repository_is_untouched_or_complete_and_a_retry_completes_it(
    hub, workers, model, where, kind, times
):
    worker, name = workers(way=way_of(where)), f"org/{where}-{kind}-{times}"
    before = start(hub, worker, model, name)
    hub.faults = [Fault(where, kind, times)]
    failed = worker.push(model, name, tag="v2")
    assert hub.faults[0].times < times
    hub.faults = []
    if kind.startswith("kill"):
        assert failed == {}
    else:
        assert failed["error"] in ("ConfigError", "RunError")
        assert len(failed["message"].splitlines()) == 1
        assert name in failed["message"] or where == "whoami"
    wrong = (where, kind) == ("commit", "wrong_hash")  # the Hub itself is at fault: it is noticed, and mended below
    assert wrong or hub.repos[name].files in (before, contents(model))
    uploaded = hub.calls["upload"], hub.calls["xorb"]
    done = workers(way=way_of(where)).push(model, name, tag="v2")
    check(hub, model, name, done)
    if where in ("commit", "tag") and not wrong:
        assert (hub.calls["upload"], hub.calls["xorb"]) == uploaded  # nothing is uploaded twice
        assert len(hub.repos[name].commits) == 3


@pytest.mark.parametrize(("kind", "times"), [("500", 1), ("drop", 3), ("500", 99), ("413", 6)])
def test_a_commit_of_many_files_that_fails_is_never_public_in_part(hub, workers, model, kind, times):
    """`upload_folder` of huggingface_hub 2.4 splits it after six refusals (413): 20 files, then 5."""
    for number in range(20):
        (model / f"model-{number:05d}-of-00020.safetensors").write_bytes(f"{kind} {times} {number}".encode() * 10)
    files, name = contents(model), f"org/many-{kind}-{times}"
    assert len(files) == 25
    hub.faults = [Fault("commit", kind, times)]
    done = workers().push(model, name)
    hub.faults = []
    repo = hub.repos[name]
    public = [len(tree.keys() - {".gitattributes"}) for tree in repo.trees.values()]
    assert public == ([0, 25] if times < push.TRIES else [0])
    assert ("error" in done) == (times >= push.TRIES)
    workers().push(model, name)
    assert repo.files == files
    assert len(repo.commits) == 2


def test_a_commit_that_came_between_is_kept(hub, workers, model):
    worker = workers()
    start(hub, worker, model, "org/between")
    repo = hub.repos["org/between"]
    hub.faults = [Fault("commit", "kill")]
    hub.killer = lambda: repo.commit(repo.trees[repo.commits[-1]] | {"notes.md": (b"theirs", False)}) and None
    done = worker.push(model, "org/between", tag="v2")
    assert repo.files == contents(model) | {"notes.md": b"theirs"}
    assert repo.tags["v2"] == done["commit"]


def test_what_is_told_is_what_the_last_try_sent(hub, workers, model):
    worker = workers()
    start(hub, worker, model, "org/told")
    repo = hub.repos["org/told"]
    same = {"config.json": ((model / "config.json").read_bytes(), False)}
    hub.faults = [Fault("commit", "kill")]
    hub.killer = lambda: repo.commit(repo.trees[repo.commits[-1]] | same) and None
    done = worker.push(model, "org/told", tag="v2")
    assert repo.files == contents(model)
    assert "model.safetensors" in done["added"]
    assert "config.json" not in done["added"]


def test_a_file_is_served_from_where_a_download_broke_off(hub, workers, model):
    """The client goes on there in pieces of 10 MB only, which no test has."""
    workers().push(model, "org/ranges")
    url = f"{hub.url}/org/ranges/resolve/main/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=49990-"})) as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == "bytes 49990-49999/50000"
        assert answer.headers["ETag"] == answer.headers["X-Linked-Etag"]
        assert answer.read() == b"1" * 10


def missing() -> None:
    Path("no/such/file").read_bytes()


def raising(error: Exception) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


def counted(do: Callable[[], None], key: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Exception]:
    """Return how often `repeat` tries, and what it raises."""
    tries: list[int] = []
    monkeypatch.setattr(push, "_WAIT", 0)

    def attempt() -> None:
        tries.append(1)
        do()

    with pytest.raises((ConfigError, RunError)) as raised:
        push.repeat(attempt, "pushing", key)
    return len(tries), raised.value


@pytest.mark.parametrize("do", [missing, raising(PermissionError(13, "Permission denied", "no/such/file"))])
def test_a_file_that_cannot_be_read_is_told_at_once(monkeypatch, do):
    tries, error = counted(do, "repo_id", monkeypatch)
    assert (tries, type(error)) == (1, ConfigError)
    assert "no/such/file" in str(error)
    assert "repo_id" not in str(error)


@pytest.mark.parametrize(
    "error",
    [
        *(XetObjectNotFoundError("lost"), XetAuthenticationError("expired"), RuntimeError("xet")),
        *(requests.ConnectionError("cut"), requests.exceptions.SSLError("bad"), HTTPError("cut")),
        *(ConnectionResetError(104, "reset"), TimeoutError("slow"), socket.gaierror(-3, "no name")),
        *(ssl.SSLError("bad"), OSError(101, "Network is unreachable")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_the_network_are_tried_again_and_told_of_what_was_asked(monkeypatch, error):
    tries, raised = counted(raising(error), "space", monkeypatch)
    assert (tries, type(raised)) == (4, RunError)
    assert str(raised).startswith("space: pushing failed 4 times")


def test_a_space_is_told_by_its_own_key():
    assert push.Repository("org/a").key == "repo_id"
    assert push.Repository("org/a", "space").key == "space"


def test_without_a_hub_it_says_so(tmp_path, model):
    server = HubServer({TOKEN: "write"})
    server.shutdown()
    server.server_close()
    (tmp_path / "home").mkdir()
    worker = Worker(server, tmp_path / "home")
    refused = worker.push(model, "org/nowhere")
    assert refused["error"] == "RunError"
    assert "reading the owner of the token failed 4 times" in refused["message"]
    assert TOKEN not in worker.stop()
    shutil.rmtree(tmp_path / "home")
