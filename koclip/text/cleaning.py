"""Add the cleaning of texts to the files of a tokenizer, so that every library that reads them cleans alike."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, decoders, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from koclip.text.normalize import BARE, FILLERS, INVISIBLE, SPACES, SPECIAL, normalize

_KEPT = (
    *("model_max_length", "padding_side", "truncation_side", "model_input_names", "extra_special_tokens"),
    *("clean_up_tokenization_spaces",),
)
# A decomposed syllable, a decomposed accent, every removed character, and special tokens with a removed one inside.
_PROBE = f"\u1112\u1161\u11ab e\u0301 {FILLERS}a{INVISIBLE}b{SPACES}c<s>d[SEP]<|endoftext|>e[\u200bMASK]"


def cleaning(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that gives any text the ids of `koclip.text.normalize.normalize(text)`.

    Clean texts keep their ids, and koclip trains on clean texts. The result is a stock `PreTrainedTokenizerFast` whose
    normalizer begins with the cleaning. That class reads all of tokenizer.json; `BertTokenizer`, `CLIPTokenizer`,
    `XLMRobertaTokenizer` and others build their own normalizer when they are loaded. A tokenizer that already cleans
    is returned unchanged.

    `split_special_tokens` in tokenizer_config.json makes transformers remove special tokens from a text; without it,
    transformers finds them before the text is normalised. transformers.js does not know this setting.

    Two differences from `normalize` remain: HTML entities are not replaced, and decomposed characters beyond the Basic
    Multilingual Plane that Unicode 12 or later brought keep other ids.
    """
    if _cleans(tokenizer):
        return tokenizer
    cleaner = with_steps(tokenizer, cleaning_steps(), split_special_tokens=True)
    backend = cleaner.backend_tokenizer
    if suffix := getattr(backend.model, "end_of_word_suffix", None):  # `CLIPTokenizer` removes it in its own code
        ends = (decoders.Replace(suffix, " "), decoders.Strip(" ", 0, 1))
        backend.decoder = decoders.Sequence([backend.decoder, *ends])
    return cleaner


def with_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Iterable[normalizers.Normalizer], **settings: Any
) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer that takes these steps before its own normalizer, with other `settings`.

    It is a `PreTrainedTokenizerFast`: that class reads all of tokenizer.json; others build their own normalizer.
    """
    options = {name: getattr(tokenizer, name) for name in _KEPT} | settings
    backend = tokenizer.backend_tokenizer
    copied = PreTrainedTokenizerFast(tokenizer_object=backend, **options, **tokenizer.special_tokens_map)
    own = copied.backend_tokenizer.normalizer
    copied.backend_tokenizer.normalizer = normalizers.Sequence([*steps, *([] if own is None else [own])])
    return copied


def cleaning_steps() -> list[normalizers.Normalizer]:
    """Return the steps of `normalize`."""
    return [
        normalizers.Replace(Regex(f"[{FILLERS}]"), " "),
        normalizers.Replace(Regex(f"[{INVISIBLE}]"), ""),
        normalizers.NFC(),
        normalizers.Replace(Regex(SPECIAL), " "),
        normalizers.Replace(Regex(f"[{SPACES}]+"), " "),
        normalizers.Strip(),
        normalizers.Replace(Regex(f"^[ {BARE}]+$"), ""),
    ]


def _cleans(tokenizer: PreTrainedTokenizerBase) -> bool:
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or not tokenizer.split_special_tokens:
        return False
    dirty, clean = (normalizer.normalize_str(text) for text in (_PROBE, normalize(_PROBE)))
    return bool(dirty == clean)
