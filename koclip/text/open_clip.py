"""Tokenizers of open_clip's models, as fast tokenizers of transformers with the same ids.

open_clip cleans texts before it tokenizes them (open_clip/tokenizer.py, `get_clean_fn`). Here these steps are part of
the tokenizer. What open_clip repairs beyond that is not: wrongly decoded characters (ftfy) and HTML entities.
"""

import re
import string
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from koclip.config import ConfigError, check, peer
from koclip.text.cleaning import with_steps

_KEY = "model.clip"
_SPACE = (normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip())
_PUNCTUATION = Regex(f"[{re.escape(string.punctuation)}]+")
_STEPS: dict[str, tuple[normalizers.Normalizer, ...]] = {
    "whitespace": _SPACE,
    "lower": (*_SPACE, normalizers.Lowercase()),
    "canonicalize": (
        normalizers.Replace("_", " "),
        normalizers.Replace(_PUNCTUATION, ""),
        normalizers.Lowercase(),
        *_SPACE,
    ),
}
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"  # in transformers; in open_clip <start_of_text>, <end_of_text>


def load(spec: str, path: str | None, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an open_clip model.

    Args:
        spec: The model's name, for error messages.
        path: Directory or Hub id of a tokenizer of transformers; None: open_clip's own BPE.
        settings: `text_cfg` of the model.

    Raises:
        ConfigError: the tokenizer cannot be loaded or is slow, or `settings` changes texts in another way.
    """
    options = dict(settings.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace" if settings.get("hf_tokenizer_name") else "lower")
    mode = settings.get("tokenizer_mode")
    check(not mode, f"{_KEY}: {spec}, text_cfg.tokenizer_mode", mode, "no fast tokenizer does this")
    check(not options, f"{_KEY}: {spec}, text_cfg.tokenizer_kwargs", options, "no fast tokenizer does this")
    check(clean in _STEPS, f"{_KEY}: {spec}, text_cfg.tokenizer_kwargs.clean", clean, f"expected {', '.join(_STEPS)}")
    tokenizer = _own(spec) if path is None else _load(spec, path)
    if clean != "lower" or not isinstance(tokenizer, CLIPTokenizer):  # which does `lower` itself
        # Without a causal mask, padding is seen. A stock model would hide it if the tokenizer returned a mask.
        masked = [] if settings.get("no_causal_mask") else ["attention_mask"]
        tokenizer = with_steps(tokenizer, _STEPS[clean], model_input_names=["input_ids", *masked])
    tokenizer.model_max_length = settings.get("context_length", 77)  # open_clip's default
    return tokenizer


def is_in(path: str) -> bool:
    """Return whether a directory or Hub repository has a tokenizer of transformers."""
    names = ("tokenizer.json", "vocab.json")
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(path, name, **options) for name in names)


def _load(spec: str, path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{_KEY}: {spec}: no tokenizer can be loaded from {path!r}: {reason}") from error
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    check(fast, f"{_KEY}: {spec}, tokenizer", type(tokenizer).__name__, "expected a fast tokenizer: tokenizer.json")
    return tokenizer


def _own(spec: str) -> CLIPTokenizer:
    """Return open_clip's own BPE (OpenAI's), from its package."""
    own = peer("open_clip", f"{_KEY}: {spec}").tokenizer.SimpleTokenizer()
    vocab = {token: place for token, place in own.encoder.items() if place not in own.all_special_ids}
    vocab |= {_BOS: own.sot_token_id, _EOS: own.eot_token_id}
    return CLIPTokenizer(vocab=vocab, merges=list(own.bpe_ranks))
