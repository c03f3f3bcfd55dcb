"""Pictures that need embeddings: captions with their nearest images, and confusion matrices of classes."""

import textwrap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from koclip.evaluation.embed import Embedder, collect, search
from koclip.evaluation.report.charts import COLOURS, GREY, OTHER_COLOUR, WORSE
from koclip.evaluation.sets import EvalSet
from koclip.text.classes import ClassName

_SHOWN = 6  # images per query
_OF_A_KIND = 2  # hits per language, and as many misses
_TRIED = 512  # captions per language to choose from
_THUMBNAIL = 200  # pixels
_LINE, _LINES = 26, 5  # of a caption: letters per line, lines
_ALL_CLASSES = 12  # the most classes in a matrix

Counts = npt.NDArray[np.int64]


class Query(NamedTuple):
    """A caption, its images and its nearest images, as indices, the nearest first."""

    language: str
    text: str
    owners: list[int]
    rank: int  # of the nearest owner, from 1
    nearest: list[int]


def queries(embedder: Embedder, eval_set: EvalSet) -> Figure:
    """Draw captions of every language, hits and misses, with their nearest images; right images are framed."""
    eval_set = eval_set.captioned
    images = embedder.images(eval_set.images)
    chosen = [query for language in eval_set.languages for query in _queries_of(embedder, eval_set, language, images)]
    columns = min(_SHOWN, len(eval_set.images))
    widths = [2.6, *[1] * columns, 0.12, 1]  # text, images, a gap, the right image
    figure = Figure(figsize=(1.3 * sum(widths), 1.5 * len(chosen) + 0.5), layout="constrained")
    axes = figure.subplots(len(chosen), len(widths), squeeze=False, width_ratios=widths)
    for row, query in zip(axes, chosen, strict=True):
        text = "\n".join(textwrap.wrap(query.text, _LINE, max_lines=_LINES, placeholder=" ..."))
        row[0].text(1.0, 0.5, text, ha="right", va="center", fontsize=10, linespacing=1.3)
        row[0].axis("off")
        row[-2].axis("off")
        for axis, place in zip(row[1:-2], query.nearest, strict=True):
            _show(axis, eval_set.images[place], place in query.owners)
        _show(row[-1], eval_set.images[query.owners[0]], True)
        row[-1].set_title(f"rank {query.rank:,}", fontsize=9, color="black" if query.rank == 1 else WORSE)
    title = f"{eval_set.name}: captions, their nearest images, and the right image (framed)"
    figure.suptitle(title, fontsize=11)
    return figure


def confusion(counts: Counts, eval_set: EvalSet, language: str) -> Figure:
    """Draw the numbers of images `counts` (C, C) by class and answer, in percent of each class's images."""
    chosen = most_confused(counts, _ALL_CLASSES)
    names = [_both_names(eval_set.classes[place]) for place in chosen]
    some = len(chosen) < len(counts)
    totals = counts[chosen].sum(axis=1, keepdims=True)
    shares = 100 * counts[np.ix_(chosen, chosen)] / np.maximum(totals, 1)
    if some:
        names.append("any other")
        shares = np.hstack([shares, np.where(totals > 0, 100 - shares.sum(axis=1, keepdims=True), 0)])
    figure = Figure(figsize=(0.52 * len(names) + 3.2, 0.46 * len(chosen) + 3.0), layout="constrained")
    axis = figure.subplots()
    coloured = np.where(np.arange(len(names)) < len(chosen), shares, 0)  # no colour for "any other"
    axis.imshow(coloured, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for place in range(len(chosen)):
        axis.add_patch(Rectangle((place - 0.5, place - 0.5), 1, 1, fill=False, edgecolor=OTHER_COLOUR, linewidth=1.5))
    for row, column in np.argwhere(np.round(shares) > 0):
        ink = "white" if coloured[row, column] > 55 else "black"
        text = f"{shares[row, column]:.0f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(chosen)), names[: len(chosen)])
    axis.set(xlabel="answer", ylabel="class")
    which = f"the {len(chosen)} most confused of {len(counts)} classes" if some else f"{len(counts)} classes"
    axis.set_title(f"{eval_set.name}, {language}: {which}\n% of a class's images; framed: right", fontsize=10)
    return figure


def most_confused(counts: Counts, most: int) -> list[int]:
    """Return the `most` (an even number) classes that are confused most often in `counts` (C, C), the worst first."""
    if len(counts) <= most:
        return list(range(len(counts)))
    mistakes = counts - np.diag(np.diag(counts))
    pairs = np.argsort(-(mistakes + mistakes.T)[np.triu_indices(len(counts), 1)], kind="stable")
    rows, columns = (places[pairs] for places in np.triu_indices(len(counts), 1))
    chosen: list[int] = []
    for pair in zip(rows.tolist(), columns.tolist(), strict=True):
        new = [place for place in pair if place not in chosen]
        if len(chosen) + len(new) <= most:
            chosen += new
        if len(chosen) == most:
            break
    return chosen


def _queries_of(embedder: Embedder, eval_set: EvalSet, language: str, images: torch.Tensor) -> list[Query]:
    """Return captions whose nearest image is right, and captions without a right image among those shown."""
    captions = collect(eval_set.texts(language), [])
    tried = list(range(0, len(captions.texts), max(1, len(captions.texts) // _TRIED)))
    if not tried:
        return []
    texts = embedder.texts([captions.texts[place] for place in tried])
    ranks = search(texts, images, [captions.images[place] for place in tried], embedder.spread)[0]
    wanted = torch.cat([_spread(ranks < 1), _spread(ranks >= _SHOWN)])
    if not len(wanted):
        wanted = _spread(ranks >= 0)
    chosen = []
    for at in wanted.tolist():
        scores = images @ texts[at]  # (I,)
        own = captions.images[tried[at]]
        owners = [own[place] for place in scores[own].argsort(descending=True, stable=True).tolist()]
        nearest = scores.topk(min(_SHOWN, len(images))).indices.tolist()
        chosen.append(Query(language, captions.texts[tried[at]], owners, int(ranks[at]) + 1, nearest))
    return chosen


def _spread(chosen: torch.Tensor) -> torch.Tensor:
    """Return the indices of a few true entries of (Q,), evenly spaced."""
    places = chosen.nonzero()[:, 0]
    step = max(1, len(places) // _OF_A_KIND)
    return places[step // 2 :: step][:_OF_A_KIND]


def _show(axis: Any, image: Image.Image, framed: bool) -> None:
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    axis.imshow(image, interpolation="nearest" if max(image.size) < _THUMBNAIL else "antialiased")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(visible=True, color=OTHER_COLOUR if framed else GREY, linewidth=3.5 if framed else 1)


def _both_names(name: ClassName) -> str:
    """Return a class's Korean and English names, as far as they exist, or its key."""
    known = [name.names[language] for language in COLOURS if language in name.names]
    return " · ".join(dict.fromkeys(known)) or name.key
