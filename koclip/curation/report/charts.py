"""Pictures of the report: what remains after each reason, the lengths of captions, and the sizes of queries."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from koclip.evaluation.report.charts import GREY, WORSE, colour

WATERFALL, LENGTHS, QUERIES = "waterfall.png", "lengths.png", "balance.png"
_BINS = 40  # of lengths
_LONGEST = 0.99  # quantile of the lengths where the axis ends

Lengths = Mapping[str, Counter[int]]  # by language: the number of captions by their number of characters


def waterfall(rows: Mapping[str, Any]) -> Figure:
    """Draw the number of rows that remain after each reason."""
    names, counts = ["read", *rows["dropped"], "kept"], [rows["read"], *rows["dropped"].values(), rows["kept"]]
    starts, left = [0], rows["read"]
    for count in rows["dropped"].values():
        left -= count
        starts.append(left)
    colours = [GREY, *[WORSE] * len(rows["dropped"]), GREY]
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.barh(places, counts, left=[*starts, 0], color=colours)
    for place, start, count in zip(places, [*starts, 0], counts, strict=True):
        axes.text(start + count, place, f" {count:,}", va="center")
    axes.set(yticks=places, yticklabels=names, xlabel="rows", xlim=(0, 1.15 * max(1, rows["read"])))
    axes.invert_yaxis()
    return figure


def lengths(before: Lengths, after: Lengths) -> Figure:
    """Draw histograms of the lengths of captions by language; the longest of a hundred are left out."""
    figure = Figure(figsize=(7, 0.5 + 2 * len(before)), layout="constrained")
    for axes, language in zip(figure.subplots(len(before), 1, squeeze=False)[:, 0], before, strict=True):
        ordered = sorted(before[language].items())
        totals = np.cumsum([count for _, count in ordered])
        longest = ordered[int(np.searchsorted(totals, _LONGEST * totals[-1]))][0]
        edges = np.linspace(0.5, longest + 0.5, min(_BINS, longest) + 1).round(6)
        for label, counts, shade in (("read", before, GREY), ("kept", after, colour(language))):
            own = counts.get(language, Counter())
            axes.hist(list(own), edges, weights=list(own.values()), color=shade, label=label)
        axes.set(title=f"{language}", xlabel="characters", ylabel="captions", xlim=(0, longest + 1))
        axes.legend(frameon=False)
    return figure


def queries(balance: Mapping[str, Any]) -> Figure:
    """Draw the number of pairs of each query, the largest first, before and after, with the cap."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for when, shade, width in (("before", WORSE, 1.5), ("after", colour("ko"), 2.5)):
        points = list(itertools.takewhile(lambda point: point[1] > 0, balance[when]["curve"]))
        if points:
            axes.plot(*zip(*points, strict=True), color=shade, linewidth=width, marker=".", label=when)
    cap = balance["max_per_query"]
    axes.axhline(cap, color="black", linewidth=1, linestyle=":", label=f"cap: {cap:,}")
    axes.set(xscale="log", yscale="log", xlabel="queries, the largest first", ylabel="pairs of the query")
    for axis in (axes.xaxis, axes.yaxis):  # matplotlib writes powers as formulas, which the style shows as text
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    return figure


def all_of(content: Mapping[str, Any], before: Lengths, after: Lengths) -> Iterator[tuple[str, Figure]]:
    """Yield (file name, picture) for all pictures that the content of report.json and the lengths of captions allow."""
    yield WATERFALL, waterfall(content["rows"])
    shown = {language: before[language] for language in content["lengths"]}
    if shown:
        yield LENGTHS, lengths(shown, after)
    if "balance" in content:
        yield QUERIES, queries(content["balance"])
