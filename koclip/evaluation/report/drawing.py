"""What all pictures share: a font with Hangul, colours, whiskers, a way to disk."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

from koclip.metrics import Metric

COLOURS = {"ko": "#2f6db5", "en": "#d9822b"}
OTHER_COLOUR = "#4b9b6e"
MORE_COLOURS = ("#7a4fa3", "#2a9d8f", "#8c6d46", "#c0507e", "#5b6470", "#9aa62b")  # of what is no language
GREY = "#c9ced6"
FEWER = "#b5432f"  # a number that is worse for sure
_DPI = 110


@contextmanager
def korean_style() -> Iterator[None]:
    """Make matplotlib draw Hangul, which its own fonts lack: koreanize-matplotlib brings NanumGothic.

    A dollar sign is one, not the start of a formula: captions may hold any text.
    """
    package = importlib.util.find_spec("koreanize_matplotlib")
    folders: Sequence[str] = (package.submodule_search_locations or []) if package else []
    for folder in folders:
        font_manager.fontManager.addfont(str(Path(folder) / "fonts" / "NanumGothic.ttf"))
    fonts = ["NanumGothic", "DejaVu Sans"] if folders else ["DejaVu Sans"]
    options: dict[Any, Any] = {
        "font.family": fonts,
        "font.size": 9.5,
        "text.parse_math": False,
        "axes.unicode_minus": False,  # NanumGothic has no such sign
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(options):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a picture; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def colour(language: str) -> str:
    """Return the colour that a language has in every picture."""
    return COLOURS.get(language, OTHER_COLOUR)


def whiskers(metrics: Sequence[Metric]) -> Any:
    """Return the 95 % intervals in percent as matplotlib takes error bars: [below, above]."""
    below = [100 * max(0.0, metric.value - metric.ci95[0]) for metric in metrics]
    above = [100 * max(0.0, metric.ci95[1] - metric.value) for metric in metrics]
    return [below, above]


def percents(metrics: Sequence[Metric]) -> list[float]:
    """Return values in percent."""
    return [100 * metric.value for metric in metrics]
