"""What the Space takes: sizes of pictures and texts, and requests that are answered at all."""

import io
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from texts import RefusedError
from torchvision.transforms.v2.functional import to_pil_image

from koclip.data.transforms import BROKEN, FORMATS, ImageError, decode
from koclip.text.normalize import normalize

MAX_BYTES = 8 * 2**20  # of a picture's file
MAX_PIXELS = 25_000_000
MIN_SIDE = 8  # pixels
MAX_RATIO = 20  # of the sides: resizing the shorter one makes the longer one huge
MAX_LABELS = 200
MAX_LABEL = 200  # characters
MAX_TEXT = 10_000  # characters
MAX_BODY = MAX_BYTES + 2**20  # bytes of a request
KEPT = 3_600  # seconds that what is uploaded is kept
MAX_KEPT = 2 * 2**30  # bytes of all requests in that time: more could fill the disk
_LEAST = 4_096  # bytes that a file takes on disk, at least
_FETCHING = ("/file=http:", "/file=https:", "/proxy=")  # gradio would fetch what these name


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
    _check_sides(data)
    try:
        picture: Image.Image = to_pil_image(decode(data, MAX_PIXELS))
    except ImageError:
        raise RefusedError("broken_image") from None
    return picture, _moves(data)


def _check_sides(data: bytes) -> None:
    """Look at a picture's header only: nothing is decoded that is refused."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
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


def _moves(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as picture:
        return bool(getattr(picture, "is_animated", False))


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


def read_list(text: object, separators: str, empty: str) -> list[str]:
    """Return the clean, different parts of a text that these characters separate.

    Raises:
        RefusedError: there is none, there are too many, or one is too long.
    """
    text = text if isinstance(text, str) else ""
    if len(text) > MAX_LABELS * (MAX_LABEL + 2):
        raise RefusedError("many_labels", limit=MAX_LABELS)
    for separator in separators[1:]:
        text = text.replace(separator, separators[0])
    parts = list(dict.fromkeys(filter(None, map(normalize, text.split(separators[0])))))
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
        self._received: deque[tuple[float, int]] = deque()  # when, and bytes
        self._sum = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope.get("path", "").lower()
        if any(part in path for part in _FETCHING):
            await _answer(send, 404)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > MAX_BODY:
            await _answer(send, 413)
            return
        if scope["method"] == "POST" and not self._has_room(int(told)):
            await _answer(send, 503)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            # A body without a length: what is too much is cut off, and nothing can be made of the rest.
            return {"type": "http.disconnect"} if seen > MAX_BODY else message

        await self._app(scope, counted, send)

    def _has_room(self, size: int) -> bool:
        """Return whether a request of so many bytes is taken, and remember it if so; 0 means that it does not say."""
        now = self._clock()
        while self._received and self._received[0][0] < now - KEPT:
            self._sum -= self._received.popleft()[1]
        size = max(size or MAX_BODY, _LEAST)
        if self._sum + size > MAX_KEPT:
            return False
        self._received.append((now, size))
        self._sum += size
        return True


async def _answer(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"refused"})
