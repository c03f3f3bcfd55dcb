"""The pieces the Space is laid out of: pictures that are only uploaded, texts that change their language, errors."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from answers import WAYS, Hit
from gradio import route_utils
from gradio.blocks import Block
from guard import MAX_TEXT, read_picture
from texts import RefusedError, say

_log = logging.getLogger("koclip.space")


class Picture(gr.Image):
    """A picture that is uploaded: never fetched from an address, and read by `guard.read_picture` alone."""

    is_template = True  # looks like gr.Image

    def preprocess(self, payload: Any) -> str | None:
        """Return the path of an uploaded file without opening it."""
        return None if payload is None else payload.path


_move = Block.async_move_resource_to_block_cache


async def _move_without_fetching(self: Block, path: str | Path | None) -> str | None:
    """Leave an address as it is: gradio fetches what any input, also a text, names as a file."""
    return str(path) if "://" in str(path) else await _move(self, path)


Block.async_move_resource_to_block_cache = _move_without_fetching


class OneFile(route_utils.GradioMultiPartParser):
    """Takes one file per upload: each takes a folder and a file on the disk, however small it is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "max_files": 1})


route_utils.GradioMultiPartParser = OneFile


class Texts:
    """Remembers which component says what, so that all of them can change their language."""

    def __init__(self) -> None:
        self._told: list[tuple[Any, dict[str, str]]] = []

    def __call__(self, component: Any, **keys: str) -> Any:
        """Let `keys` (property -> text) of a component follow the language; return the component."""
        self._told.append((component, keys))
        return component

    @property
    def components(self) -> list[Any]:
        """The components."""
        return [component for component, _ in self._told]

    @property
    def tables(self) -> list[gr.Dataframe]:
        """Those of them that are tables: their headers come with what is in them."""
        return [component for component in self.components if isinstance(component, gr.Dataframe)]

    def updates(self, language: str, rows: list[list[list[Any]]]) -> list[dict[str, Any]]:
        """Return what the components must be told in a language; `rows` of the tables."""
        left = iter(rows)
        updates = [gr.update(**{name: say(key, language) for name, key in keys.items()}) for _, keys in self._told]
        for update, component in zip(updates, self.components, strict=True):
            if component.elem_id == "way":
                update["choices"] = ways(language)
            elif isinstance(component, gr.Dataframe):
                update["value"] = {"headers": headers(language), "data": next(left)}
        return updates


def ways(language: str) -> list[tuple[str, str]]:
    """Return the ways of showing where an answer lies, as a radio takes them."""
    return [(say(f"way_{way}", language), way) for way in WAYS]


def headers(language: str) -> list[str]:
    """Return the headers of a table of captions."""
    return [say("caption_column", language), say("score_column", language)]


def picture_box(texts: Texts, key: str) -> Picture:
    """Return where a picture is uploaded."""
    said = {"label": say(key, "ko"), "placeholder": say("drop", "ko")}
    image = Picture(**said, type="filepath", sources=["upload", "clipboard"], height=280, buttons=[])
    return texts(image, label=key, placeholder="drop")


def gallery_box(texts: Texts, key: str) -> gr.Gallery:
    """Return where pictures are shown."""
    gallery = gr.Gallery(
        label=say(key, "ko"), columns=4, height="auto", object_fit="contain", buttons=[], elem_classes="gallery"
    )
    return texts(gallery, label=key)


def text_box(texts: Texts, key: str, hint: str, most: int = MAX_TEXT, info: bool = True, **options: Any) -> gr.Textbox:
    """Return where a text of up to `most` characters is written."""
    told = {"label": key, ("info" if info else "placeholder"): hint}
    said = {name: say(text, "ko") for name, text in told.items()}
    # One more than is taken, so that who writes too much is told instead of cut short.
    return texts(gr.Textbox(**said, max_lines=8, max_length=most + 1, **options), **told)


def add_examples(
    texts: Texts, rows: list[list[Any]], shown: list[Any], inputs: list[Any], outputs: list[Any], fn: Callable[..., Any]
) -> None:
    """Put examples under a tab: a click fills their values into `shown`, some of `inputs`, and runs."""
    # gr.Examples would set every other property of the inputs, too, and so undo the language.
    visible = [component for component in shown if isinstance(component, Picture | gr.Textbox)]
    samples = [row[: len(visible)] for row in rows]
    label = say("examples", "ko")
    made = gr.Dataset(
        components=visible, samples=samples, label=label, type="index", elem_classes="examples", show_label=True
    )
    texts(made, label="examples")
    chosen = made.click(
        lambda row: rows[row] if len(shown) > 1 else rows[row][0], made, shown, api_visibility="private"
    )
    chosen.success(fn, inputs, outputs, api_visibility="private", concurrency_id="model")


def opened(path: str | None, language: str) -> Any:
    """Return an uploaded picture; tell who sent one that moves that it is not seen moving."""
    if path is None:
        raise RefusedError("no_image")
    if "://" in path:
        raise RefusedError("no_url")
    picture, moves = read_picture(path)
    if moves:
        gr.Info(say("first_frame", language))
    return picture


def captioned(hits: list[Hit]) -> list[Any]:
    """Return what a gallery shows of some hits."""
    return [(hit.picture, f"{hit.score:.2f} {hit.caption}") for hit in hits if hit.picture is not None]


def answering(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what goes wrong in a call into a short message in its language, the last argument."""

    @functools.wraps(fn)
    def answered(*args: Any) -> Any:
        language = args[-1]
        try:
            return fn(*args)
        except RefusedError as error:
            raise gr.Error(error.told(language), title="koclip", print_exception=False) from None
        except Exception:
            _log.exception("%s failed", fn.__name__)
            raise gr.Error(say("internal", language), title="koclip", print_exception=False) from None

    return answered
