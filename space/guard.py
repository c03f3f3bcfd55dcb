"""The limits of the Space: sizes of images and texts, and the requests that it accepts."""

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

MAX_BYTES = 8 * 2**20  # of an image file
MAX_PIXELS = 25_000_000
MIN_SIDE = 8  # pixels
MAX_RATIO = 20  # longer side over shorter side; resizing a narrow image needs very much memory
MAX_LABELS = 200
MAX_LABEL = 200  # characters
MAX_TEXT = 10_000  # characters
MAX_BODY = MAX_BYTES + 2**20  # bytes of an upload
MAX_CALL = 3 * 2**20  # bytes of any other request
MAX_NESTED = 5_000  # lists and objects in a request; an empty list takes fifty times its bytes in memory
KEPT = 3_600  # seconds until an upload is deleted
MAX_KEPT = 2 * 2**30  # bytes of all uploads in that time; more could fill the disk
SWEPT = 600  # seconds between two searches for old uploads
_LEAST = 8_192  # smallest number of bytes that an upload takes on disk: a folder and a file
_COMMAS = ",，、"
_COMMA = re.compile(rf"(?!(?<=\d),\d{{3}}(?!\d))[{_COMMAS}]")  # not the comma in a number: 1,000
_KINDS = ("JPEG", "PNG", "WEBP", "GIF")
_FETCHING = ("http:", "https:", "proxy=")  # gradio would download an address in the path of a request


def read_picture(path: str | Path) -> tuple[Image.Image, bool]:
    """Return an image in RGB, upright, and whether it is animated. Only its first frame is read.

    Raises:
        RefusedError: the image is broken, its file is too large, or it has too many or too few pixels or is too narrow.
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
    """Check an image by its header, before anything is decoded; return whether it is animated."""
    try:
        with Image.open(io.BytesIO(data), formats=_KINDS) as picture:
            width, height = picture.size
            # A phone's JPEG may contain several images (MPO). It is not an animation.
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
        RefusedError: the text is empty (`empty` is the key of the reason) or too long.
    """
    text = text if isinstance(text, str) else ""
    if len(text) > MAX_TEXT:
        raise RefusedError("long_text", limit=MAX_TEXT)
    cleaned = normalize(text)
    if not cleaned:
        raise RefusedError(empty)
    return cleaned


def read_labels(text: object) -> list[str]:
    """Return the clean labels in a text, without duplicates: its lines, or the parts of a single line between commas.

    Raises:
        RefusedError: as `read_list`.
    """
    text = text if isinstance(text, str) else ""
    lines = [line for line in (part.strip(f"{_COMMAS} \t\r\u200b\ufeff") for part in text.split("\n")) if line]
    return read_list("\n".join(lines if len(lines) > 1 else _COMMA.split("".join(lines))), "no_labels")


def read_list(text: object, empty: str) -> list[str]:
    """Return the clean lines of a text, without duplicates.

    Raises:
        RefusedError: there are no lines (`empty` is the key of the reason) or too many, or a line is too long.
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
    """ASGI middleware: refuses requests that are too large, too many uploads, and requests to download an address."""

    def __init__(self, app: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._uploads: deque[list[float]] = deque()  # time and bytes of each

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse a request, or pass it to the app."""
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
        upload = self._admit(int(length) or MAX_BODY) if uploads else None  # 0: the length is unknown
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
            # The app sees a broken connection instead of the rest.
            return {"type": "http.disconnect"} if seen > most or nested > MAX_NESTED else message

        try:
            await self._app(scope, counted, send)
        finally:
            if upload is not None:
                upload[1] = min(max(seen, _LEAST), upload[1])

    def _admit(self, size: int) -> list[float] | None:
        """Count an upload; return its time and bytes, or None if all uploads together are too large."""
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
    """Delete uploads (also incomplete ones) and answers before they are older than `KEPT`. Files in `kept` stay."""
    old = time.time() - (KEPT - SWEPT)
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folder
        with contextlib.suppress(OSError):  # a folder may not be empty, a file may be deleted already
            if path not in kept and path.lstat().st_ctime < old:
                path.rmdir() if path.is_dir() else path.unlink()
