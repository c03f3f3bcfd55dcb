"""Train a byte-level BPE in CLIP's layout; load and check any tokenizer."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from koclip.config import ConfigError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Characters that together hold every byte that UTF-8 text can hold.
_EVERY_BYTE = [chr(code) for code in (*range(0x21, 0x7F), *range(0xC0, 0x100), *range(0xA1, 0x800, 0x40))]
_EVERY_BYTE += [chr(code) for code in range(0x800, 0x10000, 0x800) if not 0xD800 <= code < 0xE000]
_EVERY_BYTE += [chr(code) for code in (0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)]


def train_bpe(captions: Iterable[str], vocab_size: int, max_tokens: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `captions` and return it as a stock `CLIPTokenizer`.

    The vocabulary holds at most `vocab_size` entries: 256 bytes, 256 word-final bytes, merges, two special tokens.
    All 512 byte symbols are always present. `tokenizers` keeps only those it saw; a missing one would become the
    unknown token, which in CLIP is the end-of-text token, and CLIP pools the text at the first of those.
    """
    stock = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    trained = Tokenizer(BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2,  # the special tokens are added below
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    pairs: Any = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    merges = pairs[: vocab_size - len(symbols) - 2]
    entries = dict.fromkeys([*symbols, *(left + right for left, right in merges), BOS, EOS])
    vocab = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def load(path: str, max_tokens: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer in directory or Hub repository `path` and check that a text tower can rely on it.

    Raises:
        ConfigError: there is none, or `check` finds a defect.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"tokenizer.path: no tokenizer can be loaded from {path!r}: {reason}") from error
    check(tokenizer, path)
    tokenizer.model_max_length = max_tokens
    return tokenizer


def check(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Make sure that a CLIP text tower, which reads the embedding at the first end token, can rely on `tokenizer`.

    Raises:
        ConfigError: it has no padding or end token, pads on the left, or puts an end token anywhere but at the end.
    """
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ConfigError(f"tokenizer {path!r} has no {name}, which CLIP's text tower needs: set it and save again")
    if tokenizer.padding_side != "right":
        raise ConfigError(f"tokenizer {path!r} pads on the left; CLIP text towers need padding_side='right'")
    probes = ["고양이", *_EVERY_BYTE, *(character * 2 for character in _EVERY_BYTE)]
    for probe, ids in zip(probes, tokenizer(probes)["input_ids"], strict=True):
        if ids.count(tokenizer.eos_token_id) != 1 or ids[-1] != tokenizer.eos_token_id:
            raise ConfigError(
                f"tokenizer {path!r} turns {probe!r} into {ids}; expected exactly one end token "
                f"({tokenizer.eos_token_id}), at the end, because CLIP reads the text's embedding at the first one"
            )


def encode(tokenizer: PreTrainedTokenizerBase, captions: list[str], **options: Any) -> Any:
    """Tokenize `captions` cut to the tokenizer's longest length; `options` go to the tokenizer."""
    return tokenizer(captions, truncation=True, max_length=tokenizer.model_max_length, **options)


def forget_call_state(tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop the padding and truncation of the last call, which `save_pretrained` would write into tokenizer.json."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
