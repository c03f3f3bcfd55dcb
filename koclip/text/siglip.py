"""Convert the tokenizer of the first SigLIP, which is slow and needs sentencepiece, to a stock fast one with equal ids.

Steps of the original (transformers, `SiglipTokenizer`): lower case; no ASCII punctuation; white space collapsed; "▁"
before the text; sentencepiece without a change of its own at the start; the end token.
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from koclip.config import check
from koclip.text.unigram import UNIGRAM, PreTrainedTokenizerFast, any_of, cut, matched, read

_CLASS, _FILE = "SiglipTokenizer", "spiece.model"
_DEFAULTS = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
_TOKENS = 64  # the default of the class
_CASED = r"[\p{Ll}\p{Lu}\p{Lt}]"
_PRIVATE = [chr(code) for code in range(0xE000, 0xF900)]  # characters without a meaning


def load(path: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a directory or Hub repository as a fast one; None if it is not a `SiglipTokenizer`.

    Raises:
        ConfigError: see `convert`.
        OSError: the files cannot be read or downloaded.
    """
    settings = get_tokenizer_config(path)
    if settings.get("tokenizer_class") != _CLASS:
        return None
    file = cached_file(path, _FILE, _raise_exceptions_for_missing_entries=False)
    return convert(Path(file), settings) if file else None


def convert(file: Path, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a sentencepiece model as a fast tokenizer with the same ids.

    `settings` is the content of tokenizer_config.json. Ids are the same for texts in NFC without special tokens, but
    for two cases: a Greek capital sigma beside an apostrophe or an accent; texts with two segmentations of equal score.

    Raises:
        ConfigError: the model would get other ids.
    """
    proto = read(file)
    names = {name: _content(settings.get(name) or default) for name, default in _DEFAULTS.items()}
    tokens, scores = [piece.piece for piece in proto.pieces], matched(proto)
    _check(proto, tokens, scores, names, f"the tokenizer in {str(file)!r}")
    unmatched = [token for token in tokens if token not in scores]
    alphabet = set("".join(scores))
    unknown = {token[0] for token in unmatched} - alphabet
    backend = Tokenizer(
        Unigram([(token, scores.get(token, 0.0)) for token in tokens], unk_id=tokens.index(names["unk_token"]))
    )
    # Without its first character, a special token in a text is not matched. Any character without a piece is unknown.
    stand_in = next(character for character in _PRIVATE if character not in alphabet)
    hidden = [normalizers.Replace(character, stand_in) for character in sorted(unknown)]
    steps = _normalizer(proto.normalizer_spec.precompiled_charsmap, bool(settings.get("do_lower_case", True)))
    backend.normalizer = normalizers.Sequence([*steps, *hidden])
    overlapping = [token for token in unmatched if token[0] in alphabet]
    if overlapping:
        backend.pre_tokenizer = cut(overlapping, scores, file)
    end = names["eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokens.index(end))]
    )
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        padding_side="right",
        model_max_length=settings.get("model_max_length", _TOKENS),
        model_input_names=["input_ids"],
        **names,
    )


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _check(proto: Any, tokens: list[str], scores: dict[str, float], names: dict[str, str], where: str) -> None:
    """Refuse a model that the conversion would silently give other ids."""
    fix = "which cannot be converted to the same ids; expected the file of a SigLIP"
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    check(trainer.model_type == UNIGRAM, f"{where}: model_type", trainer.model_type, fix)
    for name in ("treat_whitespace_as_suffix", "byte_fallback"):
        check(not getattr(trainer, name), f"{where}: {name}", True, fix)
    for name in ("remove_extra_whitespaces", "escape_whitespaces"):
        check(getattr(spec, name), f"{where}: {name}", False, fix)
    absent = sorted(set(names.values()) - set(tokens)) + [piece for piece in ("▁",) if piece not in scores]
    check(not absent, f"{where}: pieces", absent, "which are missing; " + fix)
    # The original puts the unknown token before each text and removes its pieces: no piece may cross that place.
    crossing = [piece for piece in scores if "▁" in piece[1:]]
    check(not crossing, f"{where}: pieces of several words", crossing[:10], fix)


def _normalizer(charsmap: bytes, lower_case: bool) -> list[normalizers.Normalizer]:
    """Return the steps of the original and of sentencepiece; white space becomes "▁"."""
    lower = [
        # Python's lower() knows the sigma at the end of a word, `Lowercase` does not.
        normalizers.Replace(Regex(f"(?<={_CASED})Σ(?!{_CASED})"), "ς"),
        normalizers.Lowercase(),
    ]
    return [
        normalizers.Replace("▁", " "),
        *(lower if lower_case else []),
        normalizers.Replace(any_of(lambda character: character in string.punctuation), ""),
        normalizers.Replace(any_of(str.isspace), " "),
        normalizers.Prepend("▁"),  # most maps make it a space, which is joined with a space after it
        normalizers.NFC(),  # sentencepiece's map composes Hangul, but `Precompiled` applies it to a few bytes at a time
        normalizers.Precompiled(charsmap),
        normalizers.Replace(Regex(" +"), "▁"),
        normalizers.Replace(Regex(r"▁+\z"), ""),
    ]
