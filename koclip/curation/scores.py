"""Pair scores: how well a picture and its captions fit, by a named model. Rows with a low score are dropped.

The score of a row is the mean of the cosines of its picture and its captions. Training draws a caption of the row at
random, so the mean is the expected score of the pair that is trained on; and the mean over several captions is less
noisy than the best, which also rises with their number. `pairs.languages` names the captions that count.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm

from koclip.config import CurateConfig, check
from koclip.curation.batch import IMAGE, PATIENCE, REASON, Batch, captions_at, drop, kept_places
from koclip.data.survey import single_threaded
from koclip.data.transforms import decode, read
from koclip.encoders import Encoder, load, usable

SCORE = "score"  # column: the mean cosine, -1 to 1; None for rows without a score
EMBEDDING = "embedding"  # column: the picture's embedding, (D,) float32, as bytes; only for `duplicates.min_cosine`
LOW = "low score"
_TILE = 4_096  # embeddings that are compared with as many at a time
_BATCH = 32  # pictures that are decoded and embedded at a time
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)


@functools.lru_cache(maxsize=1)
def _encoder(spec: str, device: str | None) -> Encoder:
    """Open the model once in each process."""
    return load(spec, device)


def scorer(config: CurateConfig) -> str:
    """Open the model of the scores, and return its fingerprint; "" without a model.

    Worker processes that start afterwards share its memory.

    Raises:
        ConfigError: the model cannot be opened, or several workers would share a GPU.
    """
    _encoder.cache_clear()  # the model may have changed since an earlier call
    rules = config.pairs
    if rules.model is None:
        return ""
    if config.num_workers > 1:
        single_threaded()
    on_cpu = usable(rules.device).type == "cpu"
    check(on_cpu or config.num_workers == 1, "num_workers", config.num_workers, "expected 1 with a model on a GPU")
    return _encoder(rules.model, rules.device).fingerprint()


def add_scores(batch: Batch, config: CurateConfig) -> Batch:
    """Add the score of each kept row that has captions in `pairs.languages`, and the embeddings if they are compared.

    Batches of pictures and texts depend on the rows of the batch alone, so the scores do not depend on the workers.
    """
    rules, compared = config.pairs, config.duplicates.min_cosine is not None
    scores: list[float | None] = [None] * len(batch[REASON])
    embeddings = [b""] * len(scores)
    texts = {place: _captions(batch, place, rules.languages) for place in kept_places(batch)} if rules.model else {}
    embedded = [place for place, captions in texts.items() if captions or compared]
    for start in range(0, len(embedded), _BATCH):
        encoder, places = _encoder(str(rules.model), rules.device), embedded[start : start + _BATCH]
        images = encoder.encode_images([_picture(batch[IMAGE][place], config) for place in places]).numpy()
        scored = [number for number, place in enumerate(places) if texts[place]]
        values = pair_scores(encoder, images[scored], [texts[places[number]] for number in scored])
        for number, value in zip(scored, values.tolist(), strict=True):
            scores[places[number]] = value
        if compared:
            for place, image in zip(places, images, strict=True):
                embeddings[place] = image.astype(np.float32).tobytes()
    return batch | {SCORE: scores, EMBEDDING: embeddings}


def pair_scores(
    encoder: Encoder, images: npt.NDArray[np.floating[Any]], captions: list[list[str]]
) -> npt.NDArray[np.float32]:
    """Return the mean cosine (N,) of each of N image embeddings (N, D) and its captions (one or more each)."""
    if not captions:
        return np.empty(0, np.float32)
    counts = [len(texts) for texts in captions]
    texts = encoder.encode_texts([text for row in captions for text in row]).numpy()  # (M, D)
    rows = np.repeat(np.arange(len(counts)), counts)
    cosines = (images[rows].astype(np.float64) * texts).sum(1)
    return (np.bincount(rows, cosines) / counts).astype(np.float32)


def close_embeddings(embeddings: npt.NDArray[np.float32], min_cosine: float) -> npt.NDArray[np.int64]:
    """Return the places (P, 2) of embeddings (N, D), of length 1, that have at least this cosine; the first is less."""
    pairs = [np.empty((0, 2), np.int64)]
    tiles = [(row, column) for row in range(0, len(embeddings), _TILE) for column in range(row, len(embeddings), _TILE)]
    for row, column in tqdm(tiles, "compare embeddings", unit=" tiles", leave=False, delay=PATIENCE):
        cosines = embeddings[row : row + _TILE] @ embeddings[column : column + _TILE].T
        close = np.add(np.argwhere(cosines >= min_cosine), [row, column])
        pairs.append(close[close[:, 0] < close[:, 1]])
    return np.concatenate(pairs)


def _captions(batch: Batch, place: int, languages: list[str]) -> list[str]:
    captions = captions_at(batch, place)
    return [caption for language, _, caption in captions if not languages or language in languages]


def _picture(image: Any, config: CurateConfig) -> Any:
    return to_pil_image(decode(read(image), config.pictures.max_pixels, "pictures.max_pixels"))


class Threshold(NamedTuple):
    """The decision: rows with a score below `least` are dropped. The numbers are for the report."""

    least: float
    numbers: dict[str, Any]


def collect_scores(batch: Batch, config: CurateConfig) -> npt.NDArray[np.float32]:
    """Return the scores of the kept rows; not a number for rows without a score."""
    scores = (batch[SCORE][place] for place in kept_places(batch))
    return np.array([np.nan if score is None else score for score in scores], np.float32)


def decide_threshold(facts: Iterable[npt.NDArray[np.float32]], config: CurateConfig) -> Threshold:
    """Return the larger of `pairs.min_score` and the score that a share `pairs.drop_share` of the rows is below.

    The quantile is exact: it does not depend on the order of the rows. Rows whose score equals the threshold stay.
    """
    rules = config.pairs
    collected = np.concatenate([np.empty(0, np.float32), *facts])
    scores = np.sort(collected[~np.isnan(collected)])
    least = -np.inf if rules.min_score is None else rules.min_score
    if rules.drop_share and len(scores):
        least = max(least, float(scores[int(rules.drop_share * len(scores))]))
    quantiles = {f"{share:g}": float(scores[int(share * len(scores))]) for share in _QUANTILES} if len(scores) else {}
    numbers = {"model": rules.model, "scored": len(scores), "without_score": len(collected) - len(scores)}
    return Threshold(least, numbers | {"threshold": None if np.isinf(least) else least, "quantiles": quantiles})


def drop_low_scores(batch: Batch, threshold: Threshold, config: CurateConfig) -> Batch:
    """Drop the rows with a score below the threshold; the detail is the score. Rows without a score stay."""
    scores = {place: batch[SCORE][place] for place in kept_places(batch)}
    low = {place: score for place, score in scores.items() if score is not None and score < threshold.least}
    return drop(batch, {place: (LOW, f"{score:.4f}") for place, score in low.items()})
