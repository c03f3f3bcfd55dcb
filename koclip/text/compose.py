"""Make a tokenizer give decomposed text (NFD, as macOS writes Korean) the ids of composed text (NFC)."""

import unicodedata
from functools import cache

from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_KEPT = (
    *("model_max_length", "padding_side", "truncation_side", "model_input_names", "extra_special_tokens"),
    *("clean_up_tokenization_spaces", "split_special_tokens"),
)


def composing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or one like it, that gives NFC and NFD text the same ids wherever it is loaded.

    NFC text keeps its ids. A tokenizer that composes, such as CLIP's, is returned as it is. Any other becomes a stock
    `PreTrainedTokenizerFast` with NFC in front of its normalizer: that class reads the whole of tokenizer.json, while
    `BertTokenizer`, `XLMRobertaTokenizer`, `CamembertTokenizer` and `RobertaTokenizer` build a normalizer of their own
    when they are loaded.

    Two kinds of text keep different ids: a mark that composes with the end of a special token ("<mask>" and U+0338),
    and characters beyond the Basic Multilingual Plane that decompose only since Unicode 12.
    """
    if _composes(tokenizer):
        return tokenizer
    made = PreTrainedTokenizerFast(  # with a copy of the backend
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: getattr(tokenizer, name) for name in _KEPT},
        **tokenizer.special_tokens_map,
    )
    backend = made.backend_tokenizer
    theirs = backend.normalizer
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), *([] if theirs is None else [theirs])])
    return made


def _composes(tokenizer: PreTrainedTokenizerBase) -> bool:
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return False
    composed, decomposed = (normalizer.normalize_str(unicodedata.normalize(form, _probe())) for form in ("NFC", "NFD"))
    return bool(composed == decomposed)


@cache
def _probe() -> str:
    """Return the characters that decompose in the Basic Multilingual Plane; `tokenizers` knows not all beyond it."""
    return " ".join(chr(code) for code in range(0x10000) if unicodedata.normalize("NFD", chr(code)) != chr(code))
