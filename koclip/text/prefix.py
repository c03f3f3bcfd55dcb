"""A prefix that every text gets, such as `query: ` for multilingual-e5, as a part of the tokenizer.

The tokenizer adds the prefix itself, after it has cleaned the text and before all its other rules. So training,
evaluation, the published model and every library that reads its tokenizer.json use it alike, and images never see it.
A blank text gets no prefix.
"""

import json

from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from koclip.config import check
from koclip.text.cleaning import cleaning_steps

_WORD_START = "▁"  # some tokenizers, Llama's among them, prepend it: it marks a word, and is no prefix


def add_prefix(tokenizer: PreTrainedTokenizerBase, prefix: str) -> PreTrainedTokenizerBase:
    """Make a tokenizer of `koclip.text.tokenizers` begin every text with `prefix`, in place.

    A text that is empty, or empty after it is cleaned, stays empty. A tokenizer that already has this prefix does not
    change.

    Raises:
        ConfigError: the tokenizer has another prefix.
    """
    own = prefix_of(tokenizer)
    fix = f"the tokenizer adds {own!r} already: leave tokenizer.prefix out, or name a tokenizer without a prefix"
    check(not own or prefix in ("", own), "tokenizer.prefix", prefix, fix)
    if prefix and not own:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([*cleaning_steps(), normalizers.Prepend(prefix), backend.normalizer])
    return tokenizer


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prefix that `add_prefix` has given to a tokenizer; "" without one."""
    normalizer = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] or {}
    steps = normalizer.get("normalizers") or []
    prepended = [str(step["prepend"]) for step in steps if step["type"] == "Prepend"]
    return next((text for text in prepended if text != _WORD_START), "")
