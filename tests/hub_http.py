"""The plumbing of the Hub on localhost: requests, answers, refusals and faults."""

import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit


class RefusedError(Exception):
    """An answer that is no success: status, the client's error code and a message."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Requests(BaseHTTPRequestHandler):
    """One request: finds the method that answers it, by `routes`, and lets it suffer its fault."""

    server: Any  # a HubServer
    routes: ClassVar[list[tuple[str, str, str]]]  # method, pattern, name of the handler's method
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing to the console."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        matches = (
            (re.fullmatch(pattern, parts.path), name) for method, pattern, name in self.routes if method == self.command
        )
        match, name = next(((match, name) for match, name in matches if match), (None, "nothing"))
        self.server.calls[name] += 1
        self.server.log.append(f"{self.command} {self.path}")
        self.fault = self.server.take_fault(name) or ""
        if self.fault == "kill":
            self.server.killer()
        if self.fault in ("drop", "kill"):
            return self.hang_up()
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault == "cut":
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if len(self.body) < length:  # the client died
            return self.hang_up()
        if self.fault.isdigit():
            return self.answer(int(self.fault), {"error": f"fault {self.fault}"})
        groups = {key: unquote(value or "") for key, value in match.groupdict().items()} if match else {}
        return self.act(name, groups)

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815  # the names that http.server calls

    def act(self, name: str, groups: dict[str, str]) -> None:
        try:
            with self.server.lock:
                result = getattr(self, name)(**groups)
        except RefusedError as refused:
            return self.answer(refused.status, {"error": str(refused)}, {"X-Error-Code": refused.code})
        if self.fault == "kill_after":
            self.server.killer()
        if self.fault in ("drop_after", "kill_after"):
            return self.hang_up()
        if result is not None:
            self.answer(200, result)
        return None

    def nothing(self) -> None:
        raise RefusedError(404, "no such page")

    def chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
