"""Parts of a sentencepiece Unigram model as parts of `tokenizers`. The package sentencepiece is not needed."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import import_protobuf

from koclip import installation
from koclip.config import ConfigError, check

installation.require("train")
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: E402

_NORMAL, _USER_DEFINED = 1, 4  # ModelProto.SentencePiece.Type: pieces that sentencepiece finds in a text
UNIGRAM = 1  # TrainerSpec.ModelType


class PreTrainedTokenizerFast(transformers.PreTrainedTokenizerFast):
    """The stock class. Its old name is saved, because transformers 4 refuses the new name, "TokenizersBackend"."""


def read(file: Path) -> Any:
    """Return the content of a sentencepiece model.

    Raises:
        ConfigError: the file is something else.
    """
    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ConfigError(f"{str(file)!r} is not a sentencepiece model; is it a Git LFS pointer?") from error
    return proto


def matched(proto: Any) -> dict[str, float]:
    """Return the pieces that sentencepiece finds in a text, with their scores; -0.1 for user-defined pieces."""
    return {
        piece.piece: piece.score if piece.type == _NORMAL else -0.1
        for piece in proto.pieces
        if piece.type in (_NORMAL, _USER_DEFINED)
    }


def any_of(condition: Callable[[str], Any]) -> Regex:
    """Return a pattern for a run of characters that meet a condition, for which Oniguruma has no class."""
    characters = filter(condition, map(chr, range(sys.maxunicode + 1)))
    return Regex("[" + "".join(rf"\x{{{ord(character):X}}}" for character in characters) + "]+")


def cut(unmatched: list[str], scores: dict[str, float], folder: Path) -> pre_tokenizers.PreTokenizer:
    """Return a split after the first character of each token in `unmatched`, so that Unigram does not match it.

    Special tokens are split off before normalisation, which turns "[SEP]" in full-width letters into "[SEP]": five
    characters for sentencepiece, but one token for Unigram. Other ids stay the same if no piece crosses the split.
    """
    for token in unmatched:
        safe = len(token) > 1 and token[0] in scores and not any(token[:2] in piece for piece in scores)
        check(
            safe, f"the tokenizer in {str(folder)!r}: control token", token, "which overlaps the text of other tokens"
        )
    cuts = "|".join(rf"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in unmatched)
    return pre_tokenizers.Split(Regex(cuts), behavior="merged_with_previous")
