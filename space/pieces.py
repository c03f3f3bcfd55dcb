"""Components of the Space: safe image uploads, texts in two languages, examples, short errors."""

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from answers import WAYS, Hit
from gradio import route_utils
from gradio.blocks import Block
from guard import MAX_TEXT, read_picture
from PIL import Image
from texts import RefusedError, say

Component = TypeVar("Component")
Choices = Callable[[str], list[tuple[str, Any]]]
SHOWN = 256  # pixels of the longer side of an image in a gallery
_log = logging.getLogger("koclip.space")


class Picture(gr.Image):
    """An image box. Its image is uploaded, never downloaded from an address; only `guard.read_picture` opens it."""

    is_template = True  # looks like gr.Image

    def preprocess(self, payload: Any) -> str | None:
        """Return the path of an uploaded file without opening it."""
        return None if payload is None else payload.path


_move = Block.async_move_resource_to_block_cache


async def _move_without_fetching(self: Block, path: str | Path | None) -> str | None:
    """Do not download an address. gradio would download each address that an input, even a text, names as a file."""
    return str(path) if "://" in str(path) else await _move(self, path)


# gradio has no setting for this, so its method is replaced. The same is true of the parser below.
Block.async_move_resource_to_block_cache = _move_without_fetching  # type: ignore[assignment,method-assign]


class OneFile(route_utils.GradioMultiPartParser):
    """Accepts one file per upload. Each file takes a folder on the disk, however small it is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "max_files": 1})


route_utils.GradioMultiPartParser = OneFile  # type: ignore[misc]


class Texts:
    """Remembers the texts of each component, so that all of them can change their language."""

    def __init__(self) -> None:
        self._keys: list[tuple[Any, dict[str, str]]] = []
        self._choices: dict[int, Choices] = {}  # by the id of the component

    def __call__(self, component: Component, choices: Choices | None = None, /, **keys: str) -> Component:
        """Register a component with the keys of its texts (property -> key in `texts`); return the component.

        `choices` returns those of a radio in a language.
        """
        self._keys.append((component, keys))
        if choices:
            self._choices[id(component)] = choices
        return component

    @property
    def components(self) -> list[Any]:
        """The components."""
        return [component for component, _ in self._keys]

    @property
    def tables(self) -> list[gr.Dataframe]:
        """The components that are tables. gradio updates the headers of a table together with its rows."""
        return [component for component in self.components if isinstance(component, gr.Dataframe)]

    def updates(self, language: str, rows: list[list[list[Any]]]) -> list[dict[str, Any]]:
        """Return the updates of all components for a language. `rows` are the rows of the tables."""
        remaining = iter(rows)
        updates: list[dict[str, Any]] = []
        for _, keys in self._keys:
            said: dict[str, Any] = {name: say(key, language) for name, key in keys.items()}
            updates.append(gr.update(**said))
        for update, component in zip(updates, self.components, strict=True):
            if choices := self._choices.get(id(component)):
                update["choices"] = choices(language)
            elif isinstance(component, gr.Dataframe):
                update["value"] = {"headers": headers(language), "data": next(remaining)}
        return updates


def ways(language: str) -> list[tuple[str, Any]]:
    """Return the methods of a heat map as (label, value) pairs of a radio."""
    return [(say(f"way_{way}", language), way) for way in WAYS]


def headers(language: str) -> list[str]:
    """Return the headers of a table of captions."""
    return [say("caption_column", language), say("score_column", language)]


def picture_box(texts: Texts, key: str) -> Picture:
    """Return a box to upload an image to."""
    image = Picture(
        label=say(key, "ko"),
        placeholder=say("drop", "ko"),
        type="filepath",
        sources=["upload", "clipboard"],
        height=280,
        buttons=[],
    )
    return texts(image, label=key, placeholder="drop")


def gallery_box(texts: Texts, key: str) -> gr.Gallery:
    """Return a gallery to show images in."""
    gallery = gr.Gallery(
        label=say(key, "ko"), columns=4, height="auto", object_fit="contain", buttons=[], elem_classes="gallery"
    )
    return texts(gallery, label=key)


def matches_box(texts: Texts, promises: dict[str, list[float]]) -> gr.Radio:
    """Return the choice of the share of queries without a match that may show something; 0 shows all images.

    `promises` are those of the index (`koclip.search.ImageIndex`). Without any, the choice is not visible.
    """
    alphas = sorted({alpha for own in promises.values() for alpha in own})

    def choices(language: str) -> list[tuple[str, Any]]:
        return [(say("matches_off", language), 0), *((f"{100 * alpha:g} %", alpha) for alpha in alphas)]

    box = gr.Radio(
        choices("ko"),
        value=0,
        label=say("matches", "ko"),
        info=say("matches_hint", "ko"),
        visible=bool(alphas),
        elem_id="matches",
    )
    return texts(box, choices, label="matches", info="matches_hint")


def text_box(texts: Texts, key: str, hint: str, most: int = MAX_TEXT, info: bool = True, **options: Any) -> gr.Textbox:
    """Return a box for a text of up to `most` characters."""
    keys = {"label": key, ("info" if info else "placeholder"): hint}
    said: dict[str, Any] = {name: say(text, "ko") for name, text in keys.items()}
    # One character more than the limit: a text that is too long gives an error and is not cut silently.
    return texts(gr.Textbox(**said, max_lines=8, max_length=most + 1, **options), **keys)


def add_examples(
    texts: Texts, rows: list[list[Any]], shown: list[Any], inputs: list[Any], outputs: list[Any], fn: Callable[..., Any]
) -> None:
    """Add examples to a tab. A click fills the values into `shown`, which are among `inputs`, and runs `fn`."""
    # gr.Examples would also set all other properties of the inputs, and so reset their language.
    visible = [component for component in shown if isinstance(component, Picture | gr.Textbox)]
    samples = [row[: len(visible)] for row in rows]
    label = say("examples", "ko")
    dataset = gr.Dataset(
        components=visible, samples=samples, label=label, type="index", elem_classes="examples", show_label=True
    )
    texts(dataset, label="examples")
    chosen = dataset.click(
        lambda row: rows[row] if len(shown) > 1 else rows[row][0], dataset, shown, api_visibility="private"
    )
    chosen.success(fn, inputs, outputs, api_visibility="private", concurrency_id="model")


def opened(path: str | None, language: str) -> Any:
    """Return an uploaded image. Of an animation this is the first frame, and the page shows a notice.

    Raises:
        RefusedError: there is no image, it is an address, or `guard.read_picture` refuses it.
    """
    if path is None:
        raise RefusedError("no_image")
    if "://" in path:
        raise RefusedError("no_url")
    picture, moves = read_picture(path)
    if moves:
        gr.Info(say("first_frame", language))
    return picture


def enlarged(picture: Image.Image) -> Image.Image:
    """Return a small image enlarged: gradio compresses it, and a browser would enlarge the traces of that too."""
    factor = SHOWN / max(picture.size)
    if factor <= 1:
        return picture
    return picture.resize((round(factor * picture.width), round(factor * picture.height)), Image.Resampling.BICUBIC)


def captioned(hits: list[Hit]) -> list[Any]:
    """Return (image, caption) pairs for a gallery. A caption begins with the similarity."""
    return [(enlarged(hit.picture), f"{hit.score:.2f} {hit.caption}") for hit in hits if hit.picture is not None]


def answering(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function: its errors become short messages in its argument `language`."""
    place = list(inspect.signature(fn).parameters).index("language")

    @functools.wraps(fn)
    def answered(*args: Any) -> Any:
        language = args[place]
        try:
            return fn(*args)
        except RefusedError as error:
            raise gr.Error(error.message(language), title="koclip", print_exception=False) from None
        except Exception:  # whatever it is, a visitor sees no traceback; the Space's log has it
            _log.exception("%s failed", fn.__name__)
            raise gr.Error(say("internal", language), title="koclip", print_exception=False) from None

    return answered
