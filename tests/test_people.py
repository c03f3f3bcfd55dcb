"""Agreement with people's ratings, and the file they come in."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_encoder import COLOURS, ColourEncoder
from scipy.stats import kendalltau

from koclip.config import ConfigError, RatingsConfig
from koclip.data.sources import Row
from koclip.evaluation.embed import Embedder, Images
from koclip.evaluation.tasks.ratings import open_ratings, read_ratings, run


@pytest.fixture
def rated(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Return ratings of every colour's name for every colour's picture: 4 for the right one, 2 and 1 for others."""
    lines = []
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.png").write_bytes(encoded(colour))
        lines += [f"{name}.png\t{other}\t{4 if other == name else 1}\t{3 if other == name else 2}" for other in COLOURS]
    (tmp_path / "ratings.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "ratings.tsv"


def test_every_rating_counts(rated: Path) -> None:
    embedder, config = Embedder(ColourEncoder(), 8), RatingsConfig(path=str(rated), language="ko")
    metrics = run(embedder, open_ratings(config), "ko")
    lines = read_ratings(config)
    files, texts = sorted({file for file, _, _ in lines}), list(COLOURS)
    similarity = embedder.images(Images([Row(file, {}, "") for file in files])) @ embedder.texts(texts).T
    scores = [round(similarity[files.index(file), texts.index(caption)].item(), 5) for file, caption, _ in lines]
    ratings = [rating for _, _, rating in lines]
    assert len(scores) == 32
    for variant in ("b", "c"):
        expected = kendalltau(scores, ratings, variant=variant).statistic
        tau = metrics[f"agreement/kendall_tau_{variant}"]
        assert tau.value == pytest.approx(expected, abs=0.02)  # fp32 breaks some ties
        assert metrics[f"agreement/kendall_tau_{variant}"].n == 32
    assert metrics["agreement/kendall_tau_b"].ci95[0] > 0


def test_captions_are_composed(rated: Path) -> None:
    import unicodedata

    decomposed = rated.with_name("decomposed.tsv")
    decomposed.write_text(unicodedata.normalize("NFD", rated.read_text(encoding="utf-8")), encoding="utf-8")
    for file in rated.parent.glob("*.png"):
        file.with_name(unicodedata.normalize("NFD", file.name)).write_bytes(file.read_bytes())
    composed, from_nfd = (read_ratings(RatingsConfig(path=str(path), language="ko")) for path in (rated, decomposed))
    assert [caption for _, caption, _ in composed] == [caption for _, caption, _ in from_nfd]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("빨강.png\t빨강", "line 1: got 2 cells"),
        ("빨강.png\t \t3", "line 1: got 3 cells"),
        ("빨강.png\t빨강\tgood", "line 1: got ratings .*good"),
        ("빨강.png\t빨강\tnan", "line 1: got ratings .*nan"),
        ("없는.png\t빨강\t3", "line 1: .*없는.png"),
        ("", r"ratings\[\]\.path: .*bad\.tsv"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(line: str, word: str, rated: Path) -> None:
    bad = rated.with_name("bad.tsv")
    bad.write_text(line + "\n" if line else "", encoding="utf-8")
    with pytest.raises(ConfigError, match=word):
        read_ratings(RatingsConfig(path=str(bad), language="ko"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ratings\[\]\.path: .*nowhere\.tsv"):
        read_ratings(RatingsConfig(path=str(tmp_path / "nowhere.tsv"), language="ko"))
