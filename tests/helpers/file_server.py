"""A local HTTP server of files in memory, which answers ranges and can break off."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class FileServer(http.server.ThreadingHTTPServer):
    """Serves `files` by path.

    Attributes:
        files: Content by path, such as `/a/b.zip`.
        etags: Value of the header ETag by path.
        break_after: After this many bytes the connection ends; None: never.
        announces: Whether answers have a Content-Length.
        requests: Path and header Range of every request.
    """

    def __init__(self) -> None:
        """Listen on a free port of this machine."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.break_after: int | None = None
        self.announces = True
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        """The address, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        """Answer with a file, or with the rest of it that a Range asks for if it is the same (If-Range)."""
        asked, etag = self.headers.get("Range"), self.server.etags.get(self.path)
        self.server.requests.append((self.path, asked))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0  # type: ignore[index]
        if self.headers.get("If-Range", etag) != etag:
            start = 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if etag:
            self.send_header("ETag", etag)
        if self.server.announces:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = None if self.server.break_after is None else start + self.server.break_after
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving() -> Iterator[FileServer]:
    """Run a server in a thread."""
    server = FileServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
