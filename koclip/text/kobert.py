"""Convert KoBERT's tokenizer, which needs remote code and sentencepiece, to a stock fast tokenizer with the same ids.

Two publications can be read: `monologg/kobert` and its copies (tokenizer_78b3253a26.model, ids in vocab.txt), and
`skt/kobert-base-v1` (spiece.model, ids in the model). Their steps: split off special tokens; collapse white space;
replace `` and '' by "; NFKD without combining marks; sentencepiece; [CLS] and [SEP] around the text. The package
sentencepiece is not needed. Sources: monologg/KoBERT-Transformers, kobert_transformers/tokenization_kobert.py;
SKTBrain/KoBERT, kobert_hf/kobert_tokenizer/kobert_tokenizer.py.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from koclip.config import ConfigError, check
from koclip.text.unigram import UNIGRAM, PreTrainedTokenizerFast, any_of, cut, matched, read

_MODEL, _VOCABULARY, _SKT_MODEL = "tokenizer_78b3253a26.model", "vocab.txt", "spiece.model"
_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
_POSITIONS = 512  # of both models


def convert(directory: str | Path) -> PreTrainedTokenizerBase:
    """Return the KoBERT tokenizer in `directory` as a stock fast tokenizer with the same ids.

    Composed (NFC) and decomposed (NFD) text get the same ids. Ids differ from the original ids in two cases: characters
    of Unicode 12.1 or later that NFKD changes, such as U+32FF (`tokenizers` has older tables); and texts with two
    segmentations of equal score, where sentencepiece's choice depends on the rounding of float32.

    Raises:
        ConfigError: the files are missing, or would give other ids.
    """
    folder = Path(directory)
    proto, tokens = _read(folder)
    _check(proto, tokens, folder)
    scores = matched(proto)  # other pieces never match a text: see `cut`
    backend = Tokenizer(
        Unigram([(token, scores.get(token, 0.0)) for token in tokens], unk_id=tokens.index(_SPECIAL["unk_token"]))
    )
    backend.normalizer = _normalizer(proto.normalizer_spec.precompiled_charsmap)
    backend.pre_tokenizer = cut([token for token in tokens if token not in scores], scores, folder)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        padding_side="right",
        model_max_length=_POSITIONS,
        bos_token=_SPECIAL["cls_token"],  # as in skt's; CLIP's text tower needs an end token
        eos_token=_SPECIAL["sep_token"],
        **_SPECIAL,
    )


def _read(folder: Path) -> tuple[Any, list[str]]:
    """Return the sentencepiece model and the tokens in the order of their ids."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    model = next((name for name in (_MODEL, _SKT_MODEL) if name in names), None)
    if model is None or (model == _MODEL and _VOCABULARY not in names):
        raise ConfigError(
            f"no KoBERT tokenizer in {str(folder)!r}: got {sorted(names)}, expected {_MODEL} and {_VOCABULARY} "
            f"(of monologg/kobert) or {_SKT_MODEL} (of skt/kobert-base-v1); download its files to this folder"
        )
    proto = read(folder / model)
    if model == _SKT_MODEL:
        return proto, [piece.piece for piece in proto.pieces]
    with (folder / _VOCABULARY).open(encoding="utf-8") as lines:  # str.splitlines would also split at U+2028
        return proto, [line.strip() for line in lines]


def _check(proto: Any, tokens: list[str], folder: Path) -> None:
    """Refuse files that the conversion would silently give other ids."""
    where = f"the tokenizer in {str(folder)!r}"
    fix = "which cannot be converted to the same ids; expected KoBERT's own files"
    settings = folder / "tokenizer_config.json"
    options = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    for name, expected in (("do_lower_case", False), ("keep_accents", False), ("remove_space", True)):
        got = options.get(name, expected)
        check(got == expected, f"{where}: {name}", got, fix)
    spec = proto.normalizer_spec
    check(proto.trainer_spec.model_type == UNIGRAM, f"{where}: model_type", proto.trainer_spec.model_type, fix)
    check(spec.name in ("nmt_nfkc", "nfkc"), f"{where}: normalizer", spec.name, fix)  # they compose, as NFC below does
    check(not proto.trainer_spec.treat_whitespace_as_suffix, f"{where}: treat_whitespace_as_suffix", True, fix)
    for name in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        check(getattr(spec, name), f"{where}: {name}", False, fix)

    pieces = list(matched(proto))
    absent = sorted({*_SPECIAL.values(), *pieces, ","} - set(tokens))
    check(not absent, f"{where}: tokens without an id", absent[:10], "which the model can produce or needs; " + fix)
    check(len(set(tokens)) == len(tokens), f"{where}: tokens", "duplicates", fix)
    # The original splits such a piece again, in any context, which Unigram cannot do.
    numbers = [piece for piece in pieces if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()]
    check(not numbers, f"{where}: pieces of a digit and a comma", numbers[:10], fix)


def _normalizer(charsmap: bytes) -> normalizers.Normalizer:
    """Return the normalisation of the original and of sentencepiece; white space becomes "▁"."""
    steps = [
        normalizers.Replace(any_of(str.isspace), " "),
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.Replace(any_of(lambda character: unicodedata.combining(character) > 0), ""),
        normalizers.NFC(),  # sentencepiece's map composes Hangul, but `Precompiled` applies it to a few bytes at a time
        normalizers.Precompiled(charsmap),
        normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""),
        normalizers.Prepend("▁"),
        normalizers.Replace(Regex(" +"), "▁"),
    ]
    return normalizers.Sequence(steps)
