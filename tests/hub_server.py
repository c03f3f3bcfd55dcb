"""A Hub on localhost that speaks what the installed huggingface_hub client calls, with faults on demand.

It holds models, data sets and Spaces in memory: commits, tags, small files by git's hash, large ones by sha256.
Clients find it by HF_ENDPOINT; large files come by Xet, or by LFS from those that have HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

import yaml
from hub_http import RefusedError
from hub_repos import Fault, Repo
from hub_rules import entry, metadata_problems, space_problems
from hub_xet import XetRequests
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils.sha import git_hash

SMALL = 10_000  # bytes; larger files, and weights, go by LFS


class HubServer(ThreadingHTTPServer):
    """Serve on a free port of localhost until `shutdown`.

    Args:
        tokens: Role by token: `read`, `write`.
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, tokens: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.orgs = {"org": "admin", "readers": "read"}
        self.repos: dict[str, Repo] = {}  # by name; others by spaces/name, datasets/name
        self.large: dict[str, bytes] = {}
        self.xorbs: dict[str, list[bytes]] = {}
        self.faults: list[Fault] = []
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.broken: set[str] = set()  # files whose download has broken off once
        self.killer: Callable[[], None] = lambda: None
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take_fault(self, where: str) -> str | None:
        """Return the kind of fault that this call suffers."""
        with self.lock:
            for fault in self.faults:
                if fault.where == where and fault.times > 0:
                    fault.times -= 1
                    return fault.kind
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a killed client left."""


REPO = r"(?P<repo>(?:spaces/|datasets/)?[^/]+/[^/]+)"
API = rf"/api/(?:models/)?{REPO}"
ROUTES: list[tuple[str, str, str]] = [  # method, pattern, name of the handler's method
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", API, "info"),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
    ("GET", rf"{API}/variables", "variables"),
    ("POST", rf"{API}/variables", "set_variable"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "tag"),
    ("GET", rf"{API}/xet-write-token/(?P<revision>[^/]+)", "xet_token"),
    ("GET", r"/cas/v1/chunks/default-merkledb/(?P<name>\w+)", "chunk"),
    ("POST", r"/cas/v1/xorbs/default/(?P<name>\w+)", "xorb"),
    ("POST", r"/cas/v1/shards", "shard"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large/(?P<oid>\w+)", "upload"),
    ("POST", r"/large/(?P<oid>\w+)/verify", "verify"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(XetRequests):
    """What the client asks for."""

    server: HubServer
    routes = ROUTES

    def role(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    def writer(self) -> None:
        if self.role() != "write":
            raise RefusedError(403, "this token may not write")

    def repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.role() is None):
            raise RefusedError(404 if self.role() else 401, f"Repository {name} not found", "RepoNotFound")
        return repo

    def tree_of(self, repo: str, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]]:
        oid = self.repo(repo).find(revision)
        if oid is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.repo(repo).trees[oid]

    def whoami(self) -> dict[str, Any]:
        role = self.role()
        if role is None:
            raise RefusedError(401, "no token")
        orgs = [{"name": name, "roleInOrg": right} for name, right in self.server.orgs.items()]
        return {"name": "someone", "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role}}}

    def create(self) -> dict[str, Any] | None:
        self.writer()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked.get("type") == "space":
            if asked.get("sdk") not in ("gradio", "docker", "static"):
                raise RefusedError(400, '"sdk" must be one of gradio, docker, static')
            name = f"spaces/{name}"
        elif asked.get("type") == "dataset":
            name = f"datasets/{name}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            self.answer(409, {"error": "You already created this repo", **url})
            return None
        repo = self.server.repos[name] = Repo(asked.get("visibility") == "private")
        repo.commit({".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        return url

    def validate(self) -> dict[str, Any] | None:
        asked = json.loads(self.body)
        look = space_problems if asked["repoType"] == "space" else metadata_problems
        problems = look(asked["content"])
        if problems:
            self.answer(400, {"errors": [{"message": problem} for problem in problems], "warnings": []})
            return None
        return {"errors": [], "warnings": []}

    def info(self, repo: str, revision: str = "main") -> dict[str, Any]:
        oid, tree = self.tree_of(repo, revision)
        block = REGEX_YAML_BLOCK.search(tree["README.md"][0].decode()) if "README.md" in tree else None
        card = yaml.safe_load(block[2]) if block else {}
        return {"id": repo, "modelId": repo, "sha": oid, "private": self.repo(repo).private, "cardData": card} | {
            "siblings": [{"rfilename": path} for path in tree],
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def refs(self, repo: str) -> dict[str, Any]:
        here = self.repo(repo)
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in here.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": here.commits[-1]}
        return {"branches": [main], "converts": [], "tags": tags}

    def tree(self, repo: str, revision: str, folder: str) -> list[dict[str, Any]]:
        inside = folder.strip("/")
        _, tree = self.tree_of(repo, revision)
        if inside and not any(path.startswith(f"{inside}/") for path in tree):
            raise RefusedError(404, f"{inside} does not exist", "EntryNotFound")
        return [entry(path, *content) for path, content in sorted(tree.items()) if path.startswith(inside)]

    def variables(self, repo: str) -> dict[str, Any]:
        self.writer()
        return {key: {"key": key, "value": value} for key, value in self.repo(repo).variables.items()}

    def set_variable(self, repo: str) -> dict[str, Any]:
        self.writer()
        asked = json.loads(self.body)
        self.repo(repo).variables[asked["key"]] = asked["value"]
        return self.variables(repo)

    def preupload(self, repo: str, revision: str) -> dict[str, Any]:
        self.writer()
        _, tree = self.tree_of(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] > SMALL or file["path"].endswith(".safetensors")
            there = tree.get(file["path"])
            known = {"oid": entry("", *there)["lfs"]["oid"] if there[1] else git_hash(there[0])} if there else {}
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": files}

    def batch(self, repo: str) -> dict[str, Any]:
        self.writer()
        self.repo(repo)
        objects = []
        for item in json.loads(self.body)["objects"]:
            href = f"{self.server.url}/large/{item['oid']}"
            actions = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            there = hashlib.sha256(self.server.large.get(item["oid"], b"")).hexdigest() == item["oid"]
            objects.append(item | ({} if there else actions))
        return {"objects": objects, "transfer": "basic"}

    def upload(self, oid: str) -> dict[str, Any]:
        content = self.body[:-1] + b"?" if self.fault == "wrong_hash" else self.body
        self.server.large[oid] = content
        return {}

    def verify(self, oid: str) -> dict[str, Any]:
        self.writer()
        if hashlib.sha256(self.server.large.get(oid, b"")).hexdigest() != oid:
            self.server.large.pop(oid, None)
            raise RefusedError(422, "the uploaded bytes have another hash")
        return {}

    def commit(self, repo: str, revision: str) -> dict[str, Any]:
        self.writer()
        here = self.repo(repo)
        head, before = self.tree_of(repo, revision)
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head) != head:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(before)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                if self.fault == "wrong_hash":
                    content += b" "
                tree[value["path"]] = (content, False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                tree[value["path"]] = (self.server.large[value["oid"]], True)
            else:
                del tree[value["path"]]
        oid = here.commit(tree)
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid}

    def tag(self, repo: str, revision: str) -> dict[str, Any]:
        self.writer()
        oid, _ = self.tree_of(repo, revision)
        name = json.loads(self.body)["tag"]
        if name in self.repo(repo).tags:
            raise RefusedError(409, "tag exists")
        self.repo(repo).tags[name] = oid
        return {}

    def resolve(self, repo: str, revision: str, path: str) -> None:
        oid, tree = self.tree_of(repo, revision)
        if path not in tree:
            self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        content, large = tree[path]
        known = entry(path, content, large)
        tag = known["lfs"]["oid"] if large else known["oid"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if ranged:
            start = int(ranged[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], headers)
        if self.fault == "half" and self.command == "GET" and path not in self.server.broken:
            self.server.broken.add(path)
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self.hang_up()
        return self.answer(200, content, headers)
