"""What the Space lets in, and what it deletes: requests by size and number, addresses, files that visitors left."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "space"))

import guard


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [
        ("/gradio_api/file=http://169.254.169.254/", b"0", 404),
        ("/gradio_api/FILE=HTTPS://example.org/a", b"0", 404),
        ("/gradio_api/proxy=https://example.org", b"0", 404),
        ("/gradio_api/file/http://192.0.2.1/a", b"0", 404),
        ("/gradio_api/file/https:/192.0.2.1/a", b"0", 404),
        ("/gradio_api/queue/join", str(guard.MAX_CALL + 1).encode(), 413),
        ("/gradio_api/upload", str(guard.MAX_BODY + 1).encode(), 413),
        ("/gradio_api/upload", b"-1", 413),
        ("/gradio_api/upload", b"10", 200),
        ("/", b"0", 200),
    ],
)
def test_the_gate(path, length, status):
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", length)]}
    asyncio.run(guard.Gate(app)(scope, None, send))
    assert sent[0]["status"] == status


def test_the_gate_takes_no_more_uploads_in_an_hour_than_it_may_keep(monkeypatch):
    monkeypatch.setattr(guard, "MAX_KEPT", 20_000)
    now, statuses = [0.0], []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        statuses.extend([message["status"]] if "status" in message else [])

    gate = guard.Gate(app, clock=lambda: now[0])

    def ask(seconds, length, path="/gradio_api/upload", with_length=True):
        async def receive():
            return {"type": "http.request", "body": b"x" * length}

        now[0] = seconds
        headers = [(b"content-length", str(length).encode())] if with_length else []
        asyncio.run(gate({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send))
        return statuses[-1]

    assert ask(0, 10_000) == 200
    assert ask(10, 11_000) == 503  # together more than 20,000
    assert ask(20, 1) == 200  # 8,192 on disk
    assert ask(30, 1) == 503
    assert ask(40, 10_000, with_length=False) == 503
    assert ask(50, 100_000, "/gradio_api/queue/join") == 200  # leaves nothing on disk
    assert ask(guard.KEPT + 1, 10_000) == 200  # the first is deleted
    monkeypatch.setattr(guard, "MAX_KEPT", 2 * guard.MAX_BODY)
    assert ask(guard.KEPT + 2, 10, with_length=False) == 200
    assert ask(guard.KEPT + 3, 10, with_length=False) == 200  # what it did not say is charged as it was


def test_what_would_take_much_memory_is_cut_off():
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())

    async def receive():
        return {"type": "http.request", "body": b"[]," * (guard.MAX_NESTED + 1)}

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": []}
    asyncio.run(guard.Gate(app)(scope, receive, None))
    assert seen == [{"type": "http.disconnect"}]


def test_what_visitors_left_is_deleted_in_time(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/b/upload.png", "tmpcut", "example.png"):
        (tmp_path / name).write_bytes(b"x")
    guard.sweep(tmp_path, {tmp_path / "example.png"})
    assert len(list(tmp_path.rglob("*"))) == 5  # all of it is new
    monkeypatch.setattr(guard, "KEPT", guard.SWEPT - 1)
    guard.sweep(tmp_path, {tmp_path / "example.png"})
    assert {path.name for path in tmp_path.rglob("*")} <= {"example.png", "a"}
    guard.sweep(tmp_path, {tmp_path / "example.png"})
    assert [path.name for path in tmp_path.rglob("*")] == ["example.png"]


def test_a_body_without_a_length_is_cut_off():
    seen = []

    async def app(scope, receive, send):
        for _ in range(20):
            seen.append(await receive())

    async def receive():
        return {"type": "http.request", "body": b"x" * 2**20, "more_body": True}

    asyncio.run(guard.Gate(app)({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, None))
    assert sum(len(event.get("body", b"")) for event in seen) <= guard.MAX_BODY
    assert seen[-1] == {"type": "http.disconnect"}
