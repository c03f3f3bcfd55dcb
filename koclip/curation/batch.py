"""Batches: columns of rows, and how a step drops rows and edits captions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from koclip.data.formats import Row

Batch = dict[str, list[Any]]
KEY, IMAGE, REASON, DETAIL, NOTES = "key", "image", "reason", "detail", "notes"
LOST = "lost"  # column: for each note, the caption before it
PATIENCE = 5  # seconds before the bar of a comparison is shown
_CAPTIONS = "captions_"
NO_CAPTION = "no caption"


class Rows(Protocol):
    """The rows after the last step."""

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield all rows in order, in batches without pictures; with the number of their source."""
        ...

    def batches_with(self, keys: set[str]) -> Iterator[Batch]:
        """Yield the batches that have one of these keys."""
        ...

    def pictures(self, keys: set[str]) -> Iterator[Row]:
        """Yield the rows of these keys as they are in their sources."""
        ...


def caption_column(language: str) -> str:
    """Return the name of the column of a language's captions."""
    return _CAPTIONS + language


def languages_of(batch: Batch) -> list[str]:
    """Return the languages of a batch."""
    return [name.removeprefix(_CAPTIONS) for name in batch if name.startswith(_CAPTIONS)]


def batch_of(rows: Iterable[Row], languages: Sequence[str]) -> Batch:
    """Return rows as columns: key, image, the captions of each language, reason, detail of the reason, notes.

    A note names a caption and what happened to it: `ko/0: URL`.
    """
    rows = list(rows)
    batch: Batch = {KEY: [row.key for row in rows], IMAGE: [row.image for row in rows]}
    batch |= {caption_column(name): [row.captions.get(name, []) for row in rows] for name in languages}
    empty = {name: [""] * len(rows) for name in (REASON, DETAIL)}
    batch |= {**empty, NOTES: [[] for _ in rows], LOST: [[] for _ in rows]}
    missing = [not any(row.captions.values()) for row in rows]
    return drop(batch, {place: (NO_CAPTION, "") for place, is_missing in enumerate(missing) if is_missing})


def kept_places(batch: Batch) -> list[int]:
    """Return the places of the rows that no step has dropped."""
    return [place for place, reason in enumerate(batch[REASON]) if not reason]


def drop(batch: Batch, reasons: dict[int, tuple[str, str]]) -> Batch:
    """Return the batch with a reason and its detail for the rows at these places."""
    changed = {**batch, REASON: list(batch[REASON]), DETAIL: list(batch[DETAIL])}
    for place, (reason, detail) in reasons.items():
        changed[REASON][place], changed[DETAIL][place] = reason, detail
    return changed


def captions_at(batch: Batch, place: int) -> Iterator[tuple[str, int, str]]:
    """Yield (language, position, caption) for the captions of a row that are not empty."""
    for language in languages_of(batch):
        for position, caption in enumerate(batch[caption_column(language)][place]):
            if caption:
                yield language, position, caption


def edit_captions(batch: Batch, edit: Callable[[str, str], tuple[str, list[str]]]) -> Batch:
    """Return the batch with edited captions. Positions stay: "" stands for a dropped caption.

    `edit` takes a caption and its language. It returns the new caption and notes: what was removed from the caption, or
    last the reason why it is dropped. A row without captions is dropped, for the reason of its first dropped caption.
    """
    columns = [caption_column(language) for language in languages_of(batch)]
    changed: Batch = batch | {name: list(batch[name]) for name in (NOTES, LOST, *columns)}
    reasons = {}
    for place in kept_places(batch):
        notes: list[str] = []
        lost: list[str] = []
        dropped: list[str] = []
        for language, position, caption in captions_at(batch, place):
            edited, remarks = edit(caption, language)
            if not remarks:
                continue
            captions = list(changed[caption_column(language)][place])
            captions[position] = edited
            changed[caption_column(language)][place] = captions
            notes += [f"{language}/{position}: {remark}" for remark in remarks]
            lost += [caption] * len(remarks)
            dropped += [] if edited else remarks[-1:]
        changed[NOTES][place] = [*batch[NOTES][place], *notes]
        changed[LOST][place] = [*batch[LOST][place], *lost]
        if dropped and not any(any(changed[name][place]) for name in columns):
            reasons[place] = (dropped[0], "")
    return drop(changed, reasons)
