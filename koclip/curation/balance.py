"""Query balance: at most `balance.max_per_query` pairs for each query, as in the data of CLIP.

CLIP's makers searched pairs for 500,000 queries and took at most 20,000 pairs for each (Radford et al. 2021, section
2.2: https://arxiv.org/abs/2103.00020). Their queries were words that occur at least 100 times in the English Wikipedia,
pairs of words that often stand together, and other names. Here, queries are frequent words and frequent pairs of
adjacent words. A pair belongs to the rarest query in its captions.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from koclip.config.curation import BalanceRules, CurateConfig
from koclip.curation.batch import KEY, Batch, captions_at, drop, kept_places
from koclip.curation.captions import Hashes, text_hash
from koclip.curation.pictures import PICTURE
from koclip.data.texts import read_texts
from koclip.text.korean.particles import drop_particles

OVER, UNMATCHED = "query is full", "no query"
_LISTED = 100  # queries whose share is reported
_POINTS = 100  # of a curve, at most


class Balanced(NamedTuple):
    """The decision: dropped rows by key, with the reason and the hash of the query; the numbers for the report."""

    dropped: dict[str, tuple[str, int]]
    numbers: dict[str, Any]


def words_of(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without Korean particles and punctuation."""
    words = ("".join(filter(str.isalnum, word)) for word in drop_particles(caption).casefold().split())
    return [word for word in words if word]


def queries_in(caption: str) -> Iterator[str]:
    """Yield the words and the pairs of adjacent words of a caption."""
    words = words_of(caption)
    yield from words
    yield from map(" ".join, itertools.pairwise(words))


class Queries(NamedTuple):
    """The possible queries of some rows, as hashes, so that millions of rows fit into memory."""

    keys: list[str]
    contents: Hashes  # a hash of the content of each row
    counts: npt.NDArray[np.int64]  # number of queries of each row
    queries: Hashes  # of all rows, one after the other


def collect_queries(batch: Batch, config: CurateConfig) -> Queries:
    """Return the facts of the kept rows."""
    places = kept_places(batch)
    contents: list[int] = []
    counts: list[int] = []
    queries: list[int] = []
    for place in places:
        captions = list(captions_at(batch, place))
        own = {text_hash(query) for _, _, caption in captions for query in queries_in(caption)}
        contents.append(text_hash(repr((batch[PICTURE][place], captions))))
        counts.append(len(own))
        queries += own
    return Queries(
        [batch[KEY][place] for place in places],
        np.array(contents, np.uint64),
        np.array(counts, np.int64),
        np.array(queries, np.uint64),
    )


def decide_balance(facts: Iterable[Queries], config: CurateConfig) -> Balanced:
    """Choose the pairs of each query by the hash of their content: the order of the rows does not matter."""
    parts = [part for part in facts if part.keys]
    if not parts:
        return Balanced({}, {})
    rules = config.balance
    keys = list(itertools.chain.from_iterable(part.keys for part in parts))
    known = _queries(rules, parts)
    owners = np.concatenate([_owners(part, known) for part in parts])
    order = np.lexsort((np.concatenate([part.contents for part in parts]), owners))
    starts = np.searchsorted(owners[order], owners[order])
    turns = np.empty(len(keys), np.int64)
    turns[order] = np.arange(len(keys)) - starts  # how many pairs of the same query come before
    unmatched = owners == len(known)
    full = ~unmatched & (turns >= rules.max_per_query)
    dropped = {keys[place]: (OVER, int(known[owners[place]])) for place in np.flatnonzero(full)}
    if not rules.keep_unmatched:
        dropped |= {keys[place]: (UNMATCHED, 0) for place in np.flatnonzero(unmatched)}
    kept = ~full & (~unmatched | rules.keep_unmatched)
    numbers = {"queries": len(known), "max_per_query": rules.max_per_query}
    return Balanced(
        dropped, numbers | {"before": _shares(owners, len(known)), "after": _shares(owners[kept], len(known))}
    )


def drop_unbalanced(batch: Batch, decision: Balanced, config: CurateConfig) -> Batch:
    """Drop the rows of the decision; the detail is the query."""
    reasons = {}
    for place, key in enumerate(batch[KEY]):
        if key in decision.dropped:
            reason, owner = decision.dropped[key]
            queries = (query for _, _, caption in captions_at(batch, place) for query in queries_in(caption))
            reasons[place] = (reason, next((query for query in queries if text_hash(query) == owner), ""))
    return drop(batch, reasons)


def _queries(rules: BalanceRules, parts: Sequence[Queries]) -> Hashes:
    """Return the queries by their number of pairs, the rarest first: what is frequent in the corpus or the captions."""
    hashes, counts = np.unique(np.concatenate([part.queries for part in parts]), return_counts=True)
    frequent = counts >= rules.min_count
    if rules.corpus:
        texts = read_texts(rules.corpus)
        in_corpus = Counter(text_hash(query) for text in texts for query in set(queries_in(text)))
        frequent = np.array([in_corpus[number] >= rules.min_count for number in hashes.tolist()], bool)
    hashes, counts = hashes[frequent], counts[frequent]
    return hashes[np.lexsort((hashes, counts))]


def _owners(part: Queries, known: Hashes) -> npt.NDArray[np.int64]:
    """Return the place in `known` of each row's rarest query; the length of `known` for rows without a query."""
    order = np.argsort(known)
    places = np.searchsorted(known, part.queries, sorter=order).clip(max=max(0, len(known) - 1))
    ranks = np.full(len(part.queries), len(known), np.int64)
    if len(known):
        candidates = order[places]
        matches = known[candidates] == part.queries
        ranks[matches] = candidates[matches]
    owners = np.full(len(part.keys), len(known), np.int64)
    np.minimum.at(owners, np.repeat(np.arange(len(part.keys)), part.counts), ranks)
    return owners


def _shares(owners: npt.NDArray[np.int64], num_queries: int) -> dict[str, Any]:
    """Return the number of pairs, of those without a query, the largest query, and the share of the 100 largest.

    `curve` has [rank, pairs] of some queries, the largest first, for a picture with logarithmic axes.
    """
    counts = np.bincount(owners, minlength=num_queries + 1)
    largest = np.sort(counts[:num_queries])[::-1]
    ranks = np.unique(np.geomspace(1, max(1, num_queries), _POINTS).round().astype(np.int64))[:num_queries]
    return {
        "pairs": len(owners),
        "without_query": int(counts[num_queries]),
        "largest_query": int(largest[0]) if num_queries else 0,
        f"share_of_{_LISTED}_largest": round(float(largest[:_LISTED].sum()) / max(1, len(owners)), 6),
        "curve": [[rank, int(largest[rank - 1])] for rank in ranks.tolist()],
    }
