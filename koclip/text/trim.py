"""Cut the vocabulary of a tokenizer to the pieces that some texts use.

Ids keep their order and lose their gaps. A text keeps its pieces if all pieces that it uses are kept:

- Unigram takes the split with the highest score. Without some of the other pieces, it stays the highest. The lowest
  score of the vocabulary, from which the score of an unknown character follows, is kept.
- WordPiece takes the longest piece at each position. In a word that becomes the unknown token, the pieces up to the
  first position without a piece are also pieces that the text uses.
- BPE merges in the order of its list. Every kept piece keeps all merges that produce it, with their parts.
"""

import copy
import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from koclip.config import ConfigError, check

KINDS = ("WordPiece", "Unigram", "BPE")
FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
_SPACE = "\u2581"  # stands for a space in the pieces of sentencepiece
_BATCH = 1_000  # texts tokenized at a time


class Encoding(NamedTuple):
    """The ids of a text, with special tokens, and the ids that decide how its unknown words are split."""

    ids: list[int]
    tried: list[int]


class Change(NamedTuple):
    """A text whose pieces a cut vocabulary changes."""

    text: str
    before: list[str]
    after: list[str]


class Vocabulary:
    """The vocabulary of a fast tokenizer.

    Args:
        tokenizer: The tokenizer.
        file: Its tokenizer.json, which stays the same except for its pieces. None: the tokenizer was loaded from other
            files.

    Raises:
        ConfigError: the tokenizer is slow, or its model is not in `KINDS`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: Path | None = None) -> None:
        name = type(tokenizer).__name__
        fix = "which is slow: expected a tokenizer with a tokenizer.json (KoBERT: koclip.text.kobert.convert)"
        check(isinstance(tokenizer, PreTrainedTokenizerFast), "model: tokenizer", name, fix)
        backend: Any = tokenizer.backend_tokenizer if file is None else Tokenizer.from_file(str(file))
        self.tokenizer = tokenizer
        self._spec: dict[str, Any] = json.loads(backend.to_str())
        model = self._spec["model"]
        self.kind: str = model["type"]
        check(self.kind in KINDS, "model: tokenizer", self.kind, f"expected one of {', '.join(KINDS)}")
        pieces = model["vocab"]
        self._ids: dict[str, int] = (
            {piece: number for number, (piece, _) in enumerate(pieces)} if isinstance(pieces, list) else pieces
        )
        self._merges = [
            (self._ids[left], self._ids[right], self._ids[left + right.removeprefix(self._prefix)])
            for left, right in model.get("merges", [])
        ]
        self._parts: dict[int, set[int]] = defaultdict(set)
        for left, right, whole in self._merges:
            self._parts[whole] |= {left, right}

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def _prefix(self) -> str:
        """The beginning of pieces inside a word, such as ##; often empty."""
        return self._spec["model"].get("continuing_subword_prefix") or ""

    def encode(self, texts: Sequence[str]) -> Iterator[Encoding]:
        """Yield the ids that each text uses."""
        for text, ids in zip(texts, _encode(self.tokenizer, texts), strict=True):
            unknown = self.kind == "WordPiece" and self.tokenizer.unk_token_id in ids
            yield Encoding(ids, list(self._tried(text)) if unknown else [])

    def count(self, texts: Sequence[str]) -> Counter[int]:
        """Return how many times texts use each id, in NFC or in NFD, whichever is more."""
        counts = Counter[int]()
        for form in FORMS:
            uses = Counter[int]()
            for ids, tried in self.encode([unicodedata.normalize(form, text) for text in texts]):
                uses.update([*ids, *tried])
            counts |= uses
        return counts

    def _tried(self, text: str) -> Iterator[int]:
        """Yield the pieces that WordPiece finds in each word, also in words that become the unknown token."""
        backend = self.tokenizer.backend_tokenizer
        text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
        for word, _ in words:
            start = 0
            while start < len(word):
                ends = range(len(word), start, -1)
                candidates = ((end, self._prefix * (start > 0) + word[start:end]) for end in ends)
                end, piece = next(((end, piece) for end, piece in candidates if piece in self._ids), (len(word), None))
                if piece is not None:
                    yield self._ids[piece]
                start = end

    def select(
        self,
        counts: Mapping[int, int],
        always: Collection[int],
        scripts: Collection[str],
        num_pieces: int | None = None,
    ) -> list[int]:
        """Return the ids to keep, sorted: special tokens, the fallback, `always`, and the most frequent of `counts`.

        Args:
            counts: How often texts use a piece, by its id. Other pieces are not kept.
            always: More ids to keep.
            scripts: Scripts whose single letters are kept, as `scripts_of` returns them. Not used if the tokenizer
                falls back to bytes.
            num_pieces: Largest number of pieces. Default: no limit.

        Raises:
            ConfigError: the special tokens and the fallback alone are more than `num_pieces`.
        """
        kept = self._closed({*always, *self._special(), *self._fallback(scripts)})
        fits = num_pieces is None or len(kept) <= num_pieces
        check(fits, "num_pieces", num_pieces, f"expected {len(kept)} or more: special tokens and the fallback")
        for piece in sorted(counts, key=lambda piece: (-counts[piece], piece)):
            added = self._closed({piece}) - kept
            if num_pieces is not None and len(kept) + len(added) > num_pieces:
                break
            kept |= added
        return sorted(kept)

    def _closed(self, ids: set[int]) -> set[int]:
        """Return ids with the parts of every merge that produces them."""
        closed: set[int] = set()
        waiting = list(ids)
        while waiting:
            piece = waiting.pop()
            if piece not in closed:
                closed.add(piece)
                waiting += self._parts.get(piece, ())
        return closed

    def _special(self) -> Iterator[int]:
        """Yield the special tokens, and the pieces that the tokenizer's files name."""
        model = self._spec["model"]
        yield from self.tokenizer.all_special_ids
        yield from (token["id"] for token in self._spec["added_tokens"] if token["special"])
        yield from (number for _, number in _named(self._spec["post_processor"]))
        if self._spec["padding"]:
            yield self._spec["padding"]["pad_id"]
        if model.get("unk_token") in self._ids:
            yield self._ids[model["unk_token"]]
        if self.kind == "Unigram":
            scores = [score for _, score in model["vocab"]]
            yield scores.index(min(scores))
            if model["unk_id"] is not None:
                yield model["unk_id"]

    def _fallback(self, scripts: Collection[str]) -> Iterator[int]:
        """Yield the bytes; if the tokenizer has none, the single characters, without letters of other scripts."""
        model = self._spec["model"]
        suffix = model.get("end_of_word_suffix") or ""
        stages = json.dumps([self._spec["normalizer"], self._spec["pre_tokenizer"]])
        if model.get("byte_fallback"):
            symbols = [f"<0x{byte:02X}>" for byte in range(256)]
        elif '"type": "ByteLevel"' in stages:
            symbols = [symbol + end for symbol in ByteLevel.alphabet() for end in ("", suffix)]
        else:
            symbols = [piece for piece in self._ids if _is_fallback(self._character(piece, suffix), scripts)]
        yield from (self._ids[symbol] for symbol in symbols if symbol in self._ids)

    def _character(self, piece: str, suffix: str) -> str:
        """Return a piece without the marks of the beginning and the end of a word."""
        return piece.removeprefix(self._prefix).removesuffix(suffix).removeprefix(_SPACE) or piece

    def cut(self, kept: Sequence[int]) -> str:
        """Return the text of a tokenizer.json with the pieces `kept` only, which are sorted."""
        new = {old: rank for rank, old in enumerate(kept)}
        spec = copy.deepcopy({name: part for name, part in self._spec.items() if name != "model"})
        model, vocab = dict(self._spec["model"]), self._spec["model"]["vocab"]
        if isinstance(vocab, list):
            model["vocab"] = [vocab[piece] for piece in kept if piece < len(vocab)]
            model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
        else:
            model["vocab"] = {piece: new[old] for piece, old in vocab.items() if old in new}
        if "merges" in model:
            pairs = zip(model["merges"], self._merges, strict=True)
            model["merges"] = [merge for merge, (*_, whole) in pairs if whole in new]
        spec["added_tokens"] = [
            token | {"id": new[token["id"]]} for token in spec["added_tokens"] if token["id"] in new
        ]
        for owner, number in list(_named(spec["post_processor"])):
            owner[owner.index(number)] = new[number]
        if spec["padding"]:
            spec["padding"]["pad_id"] = new[spec["padding"]["pad_id"]]
        return json.dumps(spec | {"model": model}, ensure_ascii=False)


def changes(
    before: Vocabulary, after: PreTrainedTokenizerBase, kept: Sequence[int], texts: Sequence[str]
) -> tuple[list[Change], list[str]]:
    """Return the texts whose pieces a cut vocabulary changes, and the texts that use kept pieces only.

    Raises:
        ConfigError: a text that uses only pieces that are kept changes.
    """
    new = {old: rank for rank, old in enumerate(kept)}
    changed: list[Change] = []
    covered: list[str] = []
    for text, (ids, tried), cut in zip(texts, before.encode(texts), _encode(after, texts), strict=True):
        is_covered = all(piece in new for piece in (*ids, *tried))
        covered += [text] * is_covered
        if [new.get(piece) for piece in ids] == cut:
            continue
        change = Change(text, _tokens(before.tokenizer, ids), _tokens(after, cut))
        if is_covered:
            raise ConfigError(
                f"model: the cut tokenizer changes {text!r} from {change.before} to {change.after}, expected no "
                "change, because all of its pieces are kept: tokenizers of this kind cannot be cut"
            )
        changed.append(change)
    return changed, covered


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(piece)) for piece in ids]


def scripts_of(texts: Iterable[str]) -> set[str]:
    """Return the names of the scripts of the letters in texts, such as HANGUL and LATIN."""
    return {_script(letter) for letter in set().union(*texts)} - {""}


def held_out(text: str, share: float) -> bool:
    """Return whether a text belongs to the held-out `share` of all texts. Only its content decides."""
    digest = hashlib.sha256(unicodedata.normalize("NFC", text).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of each text, not cut to a length."""
    for start in range(0, len(texts), _BATCH):
        yield from tokenizer(list(texts[start : start + _BATCH]), verbose=False)["input_ids"]


def _script(character: str) -> str:
    """Return the script of a letter or mark; "" for digits, punctuation and symbols."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    return unicodedata.name(character, "unknown").split()[0]


def _is_fallback(characters: str, scripts: Collection[str]) -> bool:
    return len(characters) == 1 and _script(characters) in {"", *scripts}


def _named(processor: Any) -> Iterator[tuple[list[Any], int]]:
    """Yield each id that a post-processor names, with the list that it is in."""
    if isinstance(processor, list):
        for item in processor:
            yield from _named(item)
    elif isinstance(processor, dict):
        for name, value in processor.items():
            if name in ("sep", "cls"):
                yield value, value[1]
            elif name == "special_tokens":
                for token in value.values():
                    yield from ((token["ids"], number) for number in list(token["ids"]))
            else:
                yield from _named(value)
