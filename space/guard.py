"""What the Space takes: sizes of pictures and texts, and requests that are answered at all."""

import contextlib
import io
import re
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from PIL import Image
from texts import RefusedError
from torchvision.transforms.v2.functional import to_pil_image

from koclip.data.transforms import BROKEN, ImageError, decode
from koclip.text.normalize import normalize

MAX_BYTES = 8 * 2**20  # of a picture's file
MAX_PIXELS = 25_000_000
MIN_SIDE = 8  # pixels
MAX_RATIO = 20  # of the sides: resizing the shorter one makes the longer one huge
MAX_LABELS = 200
MAX_LABEL = 200  # characters
MAX_TEXT = 10_000  # characters
MAX_BODY = MAX_BYTES + 2**20  # bytes of an upload
MAX_CALL = 3 * 2**20  # bytes of any other request
MAX_NESTED = 5_000  # lists and objects in one: an empty one takes fifty times its bytes in memory
KEPT = 3_600  # seconds that what is uploaded is kept
MAX_KEPT = 2 * 2**30  # bytes of all uploads in that time: more could fill the disk
SWEPT = 600  # seconds between two looks for what must be deleted
_LEAST = 8_192  # bytes that an upload takes on disk, at least: a folder and a file
_COMMAS = ",，、"
_COMMA = re.compile(rf"(?!(?<=\d),\d{{3}}(?!\d))[{_COMMAS}]")  # but that of a number: 1,000
_KINDS = ("JPEG", "PNG", "WEBP", "GIF")
_FETCHING = ("http:", "https:", "proxy=")  # gradio would fetch what a path with one of these names


def read_picture(path: str | Path) -> tuple[Image.Image, bool]:
    """Return a picture in RGB, upright, and whether it moves (its first frame is taken).

    Raises:
        RefusedError: it is broken, or too heavy, large, small or narrow.
    """
    try:
        size = Path(path).stat().st_size
        data = Path(path).read_bytes() if size <= MAX_BYTES else b""
    except OSError:
        raise RefusedError("broken_image") from None
    if size > MAX_BYTES:
        raise RefusedError("heavy_image", limit=MAX_BYTES >> 20)
    moves = _look(data)
    try:
        picture: Image.Image = to_pil_image(decode(data, MAX_PIXELS))
    except ImageError:
        raise RefusedError("broken_image") from None
    return picture, moves


def _look(data: bytes) -> bool:
    """Look at a picture's header only, so that nothing is decoded that is refused; return whether it moves."""
    try:
        with Image.open(io.BytesIO(data), formats=_KINDS) as picture:
            width, height = picture.size
            # A phone's JPEG may hold further pictures (MPO): it does not move.
            moves = bool(getattr(picture, "is_animated", False)) and picture.format in _KINDS
    except Image.DecompressionBombError:
        raise RefusedError("large_image", limit=MAX_PIXELS // 10**6) from None
    except BROKEN:
        raise RefusedError("broken_image") from None
    if width * height > MAX_PIXELS:
        raise RefusedError("large_image", limit=MAX_PIXELS // 10**6)
    if min(width, height) < MIN_SIDE:
        raise RefusedError("small_image", limit=MIN_SIDE)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise RefusedError("narrow_image", limit=MAX_RATIO)
    return moves


def read_text(text: object, empty: str = "no_text") -> str:
    """Return a clean text.

    Raises:
        RefusedError: there is none (`empty` names the reason), or it is too long.
    """
    text = text if isinstance(text, str) else ""
    if len(text) > MAX_TEXT:
        raise RefusedError("long_text", limit=MAX_TEXT)
    cleaned = normalize(text)
    if not cleaned:
        raise RefusedError(empty)
    return cleaned


def read_labels(text: object) -> list[str]:
    """Return the clean, different labels of a text: its lines, or the parts of a single line between commas.

    Raises:
        RefusedError: as `read_list`.
    """
    text = text if isinstance(text, str) else ""
    lines = [line for line in (part.strip(f"{_COMMAS} \t\r\u200b\ufeff") for part in text.split("\n")) if line]
    return read_list("\n".join(lines if len(lines) > 1 else _COMMA.split("".join(lines))), "no_labels")


def read_list(text: object, empty: str) -> list[str]:
    """Return the clean, different lines of a text.

    Raises:
        RefusedError: there is none (`empty` names the reason), there are too many, or one is too long.
    """
    text = text if isinstance(text, str) else ""
    if len(text) > MAX_LABELS * (MAX_LABEL + 2):
        raise RefusedError("many_labels", limit=MAX_LABELS)
    parts = list(dict.fromkeys(filter(None, map(normalize, text.split("\n")))))
    if not parts:
        raise RefusedError(empty)
    if len(parts) > MAX_LABELS:
        raise RefusedError("many_labels", limit=MAX_LABELS)
    if max(map(len, parts)) > MAX_LABEL:
        raise RefusedError("long_label", limit=MAX_LABEL)
    return parts


class Gate:
    """ASGI middleware: refuses requests that are too large or too many, and those that would make the server fetch."""

    def __init__(self, app: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._uploads: deque[list[float]] = deque()  # when, and bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope.get("path", "").lower()
        if any(part in path for part in _FETCHING):
            await _answer(send, 404)
            return
        uploads = path.rstrip("/").endswith("/upload")
        length, most = dict(scope["headers"]).get(b"content-length", b"0"), MAX_BODY if uploads else MAX_CALL
        if not length.isdigit() or int(length) > most:
            await _answer(send, 413)
            return
        upload = self._admit(int(length) or MAX_BODY) if uploads else None  # 0: it does not say
        if uploads and upload is None:
            await _answer(send, 503)
            return
        seen = nested = 0

        async def counted() -> Any:
            nonlocal seen, nested
            message = await receive()
            body = message.get("body", b"")
            seen += len(body)
            nested += 0 if uploads else body.count(b"[") + body.count(b"{")
            # What is too much is cut off, and nothing can be made of the rest.
            return {"type": "http.disconnect"} if seen > most or nested > MAX_NESTED else message

        try:
            await self._app(scope, counted, send)
        finally:
            if upload is not None:
                upload[1] = min(max(seen, _LEAST), upload[1])

    def _admit(self, size: int) -> list[float] | None:
        """Return when an upload came and its bytes, which count from now on; None if there is no room for it."""
        now = self._clock()
        while self._uploads and self._uploads[0][0] < now - KEPT:
            self._uploads.popleft()
        upload = [now, float(max(size, _LEAST))]
        if sum(taken for _, taken in self._uploads) + upload[1] > MAX_KEPT:
            return None
        self._uploads.append(upload)
        return upload


async def _answer(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"refused"})


def sweep(folder: Path, kept: Collection[Path]) -> None:
    """Delete uploads, whole or broken off, and answers before they are as old as `KEPT`; leave what is in `kept`."""
    old = time.time() - (KEPT - SWEPT)
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        with contextlib.suppress(OSError):  # a folder that is not empty; a file that is gone
            if path not in kept and path.lstat().st_ctime < old:
                path.rmdir() if path.is_dir() else path.unlink()
