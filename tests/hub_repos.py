"""What the Hub on localhost holds, and what goes wrong there."""

import secrets
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong: where, how, and how many times.

    Kinds: `drop` closes the connection before anything is done, `cut` while the body is read, `drop_after` when it is
    done; a number is an HTTP status; `wrong_hash` stores other bytes; `kill`, `kill_after` call the server's `killer`;
    `half` breaks the first download of each file off in its middle.
    """

    where: str
    kind: str
    times: int = 1


@dataclass
class Repo:
    """Commits, oldest first, as {path: (content, is large)}."""

    private: bool = False
    commits: list[str] = field(default_factory=list)
    trees: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of a Space

    @property
    def files(self) -> dict[str, bytes]:
        """What the newest commit holds, but for what the Hub itself put there."""
        newest = self.trees[self.commits[-1]]
        return {path: content for path, (content, _) in newest.items() if path != ".gitattributes"}

    def commit(self, tree: dict[str, tuple[bytes, bool]]) -> str:
        oid = secrets.token_hex(20)
        self.commits.append(oid)
        self.trees[oid] = tree
        return oid

    def find(self, revision: str) -> str | None:
        named = {"main": self.commits[-1], **self.tags}.get(revision, revision)
        return named if named in self.trees else None
