"""Make a tokenizer clean its texts itself, as `koclip.text.normalize` does, wherever its files are loaded."""

from tokenizers import Regex, decoders, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from koclip.text.normalize import BARE, FILLERS, INVISIBLE, SPACES, SPECIAL, normalize

_KEPT = (
    *("model_max_length", "padding_side", "truncation_side", "model_input_names", "extra_special_tokens"),
    *("clean_up_tokenization_spaces",),
)
# A decomposed syllable, a decomposed accent, all that is left out, and what that could hide.
_PROBE = f"\u1112\u1161\u11ab e\u0301 {FILLERS}a{INVISIBLE}b{SPACES}c<s>d[SEP]<|endoftext|>e[\u200bMASK]"


def cleaning(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or one like it, that gives any text the ids of `koclip.text.normalize.normalize(text)`.

    Texts that are clean, which is how koclip trains, keep their ids. The result is a stock `PreTrainedTokenizerFast`
    with the cleaning in front of its normalizer: that class reads the whole of tokenizer.json, while `BertTokenizer`,
    `CLIPTokenizer`, `XLMRobertaTokenizer` and the like build a normalizer of their own when they are loaded. A
    tokenizer that cleans is returned as it is.

    Special tokens in a text are left out by `split_special_tokens`, which transformers reads in
    tokenizer_config.json: without it they are found before the text is normalised. transformers.js does not know it.

    HTML entities stay what they are; and characters beyond the Basic Multilingual Plane that decompose only since
    Unicode 12 keep other ids when they are decomposed.
    """
    if _cleans(tokenizer):
        return tokenizer
    cleaner = PreTrainedTokenizerFast(  # with a copy of the backend
        tokenizer_object=tokenizer.backend_tokenizer,
        split_special_tokens=True,
        **{name: getattr(tokenizer, name) for name in _KEPT},
        **tokenizer.special_tokens_map,
    )
    backend = cleaner.backend_tokenizer
    own = backend.normalizer
    backend.normalizer = normalizers.Sequence([*_steps(), *([] if own is None else [own])])
    if suffix := getattr(backend.model, "end_of_word_suffix", None):  # `CLIPTokenizer` takes it away in its own code
        ends = (decoders.Replace(suffix, " "), decoders.Strip(" ", 0, 1))
        backend.decoder = decoders.Sequence([backend.decoder, *ends])
    return cleaner


def _steps() -> list[normalizers.Normalizer]:
    """Return `normalize`, step by step."""
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
