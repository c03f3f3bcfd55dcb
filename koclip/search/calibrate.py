"""Calibrate an index: from which score on is an image a match? The thresholds stay in the facts of the index.

Captions of images that are not in the index are queries without a match. The best score of each of them gives the
thresholds (`koclip.classifiers.conformal`): with `alpha` 0.1, a tenth of new queries without a match shows something.
If the image of a caption is in the index (same digest), or another image with the same caption, it is left out of the
best score. The promise is for queries that resemble these captions, in the same language.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from koclip.classifiers.conformal import TooFewScoresError, highest_without_match, smallest_alpha
from koclip.config import IndexConfig, SourceConfig, check, to_dict
from koclip.data.sources import Skip, open_source
from koclip.data.transforms import ImageError, digest_of, read
from koclip.embeddings.store import Store
from koclip.encoders import Encoder
from koclip.search.index import ImageIndex, open_index
from koclip.text.normalize import usable

_QUERIES = 256  # scored at a time


class Query(NamedTuple):
    """A caption of the calibration set."""

    text: str
    image: bytes  # the digest of its image; without images, the number of its row


class Calibration(NamedTuple):
    """What a calibration has kept in the facts of the index."""

    facts: dict[str, Any]  # by language: numbers of queries and images, and the thresholds by alpha
    too_small: list[str]  # the promises that cannot be given, and those that can
    left_out: list[Skip]  # rows that the source leaves out, or whose image cannot be read


def calibrate(config: IndexConfig, encoder: Encoder, directory: Path) -> Calibration:
    """Score the captions of `config.calibration` against a finished index, and keep the thresholds in its facts.

    Raises:
        ConfigError: the calibration set has no usable caption, or the index has no image besides those of a query.
    """
    assert config.calibration is not None
    index = open_index(directory)
    by_language, left_out = _read_queries(config.calibration)
    languages, too_small = dict[str, Any](), list[str]()
    for language, queries in by_language.items():
        images = {digest: place for place, digest in enumerate(dict.fromkeys(query.image for query in queries))}
        scores = best_scores(index, encoder, queries)
        groups = torch.tensor([images[query.image] for query in queries])
        thresholds: dict[str, float | None] = {}
        for alpha in config.alphas:
            try:
                thresholds[f"{alpha:g}"] = highest_without_match(scores, alpha, groups, language)
            except TooFewScoresError as error:
                thresholds[f"{alpha:g}"] = None
                too_small.append(str(error))
        languages[language] = {
            "queries": len(queries),
            "images": len(images),
            "images_in_index": len(images.keys() & set(index.digests)),
            "smallest_alpha": smallest_alpha(len(images)),
            "thresholds": thresholds,
        }
    facts = {"source": to_dict(config.calibration), "embeddings": index.checksum, "left_out": len(left_out)}
    calibration = {**facts, "languages": languages}
    Store(directory, "output_dir").write_facts({**index.facts, "calibration": calibration})
    return Calibration(calibration, too_small, left_out)


def best_scores(index: ImageIndex, encoder: Encoder, queries: list[Query]) -> torch.Tensor:
    """Return each query's best score (Q,) among the images of the index that are not its own.

    Its own images are those with the digest of an image that has this caption. All images are scored, also with an
    approximate index: that can only find lower scores, so the promise holds for it too.

    Raises:
        ConfigError: the index has no other image.
    """
    owners, rows = defaultdict[str, set[bytes]](set), defaultdict[bytes, list[int]](list)
    for query in queries:
        owners[query.text].add(query.image)
    for row, digest in enumerate(index.digests):
        rows[digest].append(row)
    own = {text: [row for image in images for row in rows.get(image, [])] for text, images in owners.items()}
    texts = list(own)
    best: dict[str, float] = {}
    for start in tqdm(range(0, len(texts), _QUERIES), desc="calibrating", unit=f" x {_QUERIES} queries", leave=False):
        part = texts[start : start + _QUERIES]
        results = index.exact(encoder.encode_texts(part), 1 + max(len(own[text]) for text in part))
        for text, scores, places in zip(part, results.scores, results.places, strict=True):
            others = scores[~torch.isin(places, torch.tensor(own[text], dtype=torch.long))]
            check(len(others) > 0, "calibration", text, "its images are the whole index; expected an index with others")
            best[text] = float(others[0])
    return torch.tensor([best[query.text] for query in queries])


def _read_queries(source: SourceConfig) -> tuple[dict[str, list[Query]], list[Skip]]:
    """Return the usable captions by language, and the rows that are left out.

    Raises:
        ConfigError: there is no usable caption.
    """
    queries, left_out = defaultdict[str, list[Query]](list), list[Skip]()
    opened, with_images = open_source(source), source.image is not None
    for number, row in enumerate(opened.iter_rows(images=with_images)):
        try:
            image = digest_of(read(row.image)) if with_images else str(number).encode()
        except ImageError as error:
            left_out.append(Skip(row.key, str(error), source.path))
            continue
        for language, texts in row.captions.items():  # a language without a usable caption is absent
            queries[language] += [Query(text, image) for text in usable(texts)]
    left_out += opened.left_out
    fix = f"expected captions in {list(source.captions)}; {len(left_out)} rows left out, the first: {left_out[:1]}"
    check(bool(queries), "calibration", source.path, fix)
    return queries, left_out
