"""Train a byte-level BPE in CLIP's layout; load and check any tokenizer."""

import itertools
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from koclip.config import ConfigError, TokenizerConfig
from koclip.text.cleaning import cleaning
from koclip.text.prefix import add_prefix

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Characters that together contain every byte of UTF-8.
_EVERY_BYTE = [chr(code) for code in (*range(0x21, 0x7F), *range(0xC0, 0x100), *range(0xA1, 0x800, 0x40))]
_EVERY_BYTE += [chr(code) for code in range(0x800, 0x10000, 0x800) if not 0xD800 <= code < 0xE000]
_EVERY_BYTE += [chr(code) for code in (0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)]
_KOREAN = ("고양이가 창가에 앉아 밖을 보고 있다", "빨간 자전거 한 대가 나무 옆에 서 있는 사진")
_SYLLABLES, _JAMO = re.compile("[가-힣]+"), re.compile("[\u1100-\u11ff]")  # in NFC; in NFD
# Encoders that count positions from the id of their padding token: with another id, every position is wrong.
COUNT_FROM_PADDING = (
    *("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text"),
    *("longformer", "luke", "ibert", "xmod"),
)
READS_END = ("clip_text_model", "metaclip_2_text_model")  # text towers that read the first end token
# In the config.json of the first CLIPs, also OpenAI's: CLIP's text tower then reads the token with the largest id.
LEGACY_EOS_ID = 2
# Text towers that were trained on lower-case texts, padded to the longest length, without an attention mask.
UNMASKED = ("siglip_text_model",)
SLOW_SIGLIP = "SiglipTokenizer"  # a slow class, which `koclip.text.siglip` converts
UNMARKED = ("t5", "mt5", "umt5")  # encoders whose texts have no token at the start
_NUM_PROBES = 300  # captions that a tokenizer is tested with
_MOST_LOST = 0.5  # share of the letters of a script; a right tokenizer loses almost none, a wrong one almost all
_RARE = 0.1  # share of all letters below which a script may be lost, such as Hanja in Korean captions


def train_bpe(captions: Iterable[str], vocab_size: int, max_tokens: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `captions`; its vocabulary, merges and rules are those of a `CLIPTokenizer`.

    The vocabulary holds at most `vocab_size` entries: 256 bytes, 256 word-final bytes, merges, two special tokens.
    All 512 byte symbols are always present. `tokenizers` keeps only those it saw; a missing symbol would become the
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
    return cleaning(CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens))


def create(
    config: TokenizerConfig, captions: Iterator[str], encoder: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `config` names and test it with some captions, or train one on them; add the prefix.

    `encoder` is the configuration of the tokenizer's text encoder; by default a CLIP text tower.

    Raises:
        ConfigError: as `load`.
    """
    if config.path is not None:
        tokenizer = load(config.path, config.max_tokens, encoder, list(itertools.islice(captions, _NUM_PROBES)))
    else:
        tokenizer = train_bpe(itertools.islice(captions, config.train_captions), config.vocab_size, config.max_tokens)
    return add_prefix(tokenizer, config.prefix)


def load(
    path: str, max_tokens: int, config: PreTrainedConfig | None = None, probes: Sequence[str] | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in directory or Hub repository `path`, and check that a text tower can use it.

    The tokenizer cleans its texts (see `cleaning`), and so do its saved files. Padding and truncation that an earlier
    call left in tokenizer.json are removed, with a warning.

    Args:
        path: Directory or Hub id.
        max_tokens: Length of the longest text, in tokens; longer texts are cut. SigLIP keeps its own length.
        config: Configuration of the text encoder. Default: a CLIP text tower built for this tokenizer.
        probes: Captions in the language of the data, to test the tokenizer with. Default: Korean captions if there is a
            text encoder, else none.

    Raises:
        ConfigError: no tokenizer is there, or `check` finds a defect.
    """
    try:
        tokenizer = read(path)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"tokenizer.path: no tokenizer can be loaded from {path!r}: {reason}") from error
    _drop_leaked_state(tokenizer, path)
    check(tokenizer, path, config, probes)
    if config is not None and config.model_type in UNMASKED:
        return _unmasked(tokenizer, config)
    tokenizer = cleaning(tokenizer)
    tokenizer.model_max_length = max_tokens
    return tokenizer


def read(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or Hub repository as it is; that of the first SigLIP as a fast tokenizer.

    Raises:
        ImportError: SigLIP's needs the extra `train`.
        OSError, ValueError: there is no tokenizer, or it is damaged.
    """
    converted = None
    if get_tokenizer_config(path).get("tokenizer_class") == SLOW_SIGLIP:
        from koclip.text import siglip  # needs the extra `train`, which nothing else here does

        converted = siglip.load(path)
    tokenizer: PreTrainedTokenizerBase = converted or AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer


def _unmasked(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Return a tokenizer for a tower in `UNMASKED`: lower case, no mask, as many tokens as the tower has positions."""
    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    if own is None or own.normalize_str("A") != own.normalize_str("a"):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if own is None else [own])])
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.model_max_length = config.max_position_embeddings
    return cleaning(tokenizer)


def check(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    config: PreTrainedConfig | None = None,
    probes: Sequence[str] | None = None,
) -> None:
    """Check that a text tower can use `tokenizer`. A wrong tokenizer gives no error later, only useless embeddings.

    A CLIP text tower reads the embedding at the first end token, any other encoder (that of `config`) at the first
    token. The arguments are those of `load`.

    Raises:
        ConfigError: the tokenizer is slow (not a `PreTrainedTokenizerFast`); it pads or cuts on the left; it splits the
            Hangul syllables of `probes` into letters, or loses letters; it has no padding token. For CLIP: it has no
            end token, or an end token before the end. For another encoder: its special ids differ from those in
            `config` (the padding id counts only for encoders that count positions from it), or its texts do not begin
            with the cls token.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"tokenizer {path!r} is a {type(tokenizer).__name__}, which is slow; koclip needs a tokenizer.json: "
            "convert it (KoBERT: koclip.text.kobert.convert) or use another encoder"
        )
    for side, what in (("padding_side", "pads"), ("truncation_side", "cuts long texts")):
        if getattr(tokenizer, side) != "right":
            raise ConfigError(
                f"tokenizer {path!r} {what} on the left; text towers need {side}='right': set it in "
                'tokenizer_config.json, and "padding" and "truncation" to null in tokenizer.json'
            )
    encoder = None if config is None or config.model_type in READS_END else config
    if probes is None:
        probes = () if encoder is None else _KOREAN
    for probe in probes:
        _check_hangul(tokenizer, path, probe)
    _check_letters(tokenizer, path, probes)
    if encoder is None:
        _check_end(tokenizer, path)
    elif encoder.model_type in UNMASKED:
        _check_vocabulary(tokenizer, path, encoder)
    else:
        _check_ids(tokenizer, path, encoder)
        _check_vocabulary(tokenizer, path, encoder)
        if encoder.model_type not in UNMARKED:
            _check_start(tokenizer, path)


def _drop_leaked_state(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    backend = tokenizer.backend_tokenizer
    leaked = {"truncation": backend.truncation, "padding": backend.padding}
    leaked = {name: state for name, state in leaked.items() if state is not None}
    if leaked:
        warnings.warn(
            f"tokenizer {path!r}: an earlier call left {leaked} in its tokenizer.json; koclip ignores them. To repair "
            "the file, set them to null",
            stacklevel=3,
        )
        forget_call_state(tokenizer)


def _check_end(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ConfigError(f"tokenizer {path!r} has no {name}, which CLIP's text tower needs: set it and save it")
    probes = ["고양이", *_EVERY_BYTE, *(character * 2 for character in _EVERY_BYTE)]
    for probe, ids in zip(probes, tokenizer(probes)["input_ids"], strict=True):
        if ids.count(tokenizer.eos_token_id) != 1 or ids[-1] != tokenizer.eos_token_id:
            raise ConfigError(
                f"tokenizer {path!r} turns {probe!r} into {ids}; expected exactly one end token "
                f"({tokenizer.eos_token_id}), at the end, because CLIP reads the embedding at the first end token"
            )


def _check_hangul(tokenizer: PreTrainedTokenizerBase, path: str, probe: str) -> None:
    normalizer = tokenizer.backend_tokenizer.normalizer
    for word in () if normalizer is None else _SYLLABLES.findall(unicodedata.normalize("NFC", probe)):
        normalized = normalizer.normalize_str(word)
        if _JAMO.search(normalized):
            raise ConfigError(
                f"tokenizer {path!r} splits Hangul syllables into jamo: {word!r} becomes {' '.join(normalized)!r}; "
                "expected whole syllables. The cause is strip_accents, which do_lower_case turns on: "
                "use a cased encoder; if this encoder was trained on whole syllables, set "
                '"do_lower_case": false or "strip_accents": false in tokenizer_config.json'
            )


def _check_letters(tokenizer: PreTrainedTokenizerBase, path: str, probes: Sequence[str]) -> None:
    """Check each script separately: English captions would hide the loss of Korean letters."""
    counted: list[tuple[Counter[str], Counter[str], str]] = [(*_letters(tokenizer, probe), probe) for probe in probes]
    there = sum((letters for letters, _, _ in counted), Counter[str]())
    lost = sum((missing for _, missing, _ in counted), Counter[str]())
    for script, count in there.items():
        if count < _RARE * there.total() or lost[script] <= _MOST_LOST * count:
            continue
        worst = max(counted, key=lambda row: row[1][script])[2]
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(worst)["input_ids"])
        raise ConfigError(
            f"tokenizer {path!r} loses {lost[script] / count:.0%} of the {script} letters of {len(probes)} captions, "
            f"expected at most {_MOST_LOST:.0%}: {worst!r} becomes {tokens}. It is a {type(tokenizer).__name__} "
            f"with {len(tokenizer)} tokens; if the class is wrong, set tokenizer_class in its tokenizer_config.json "
            '(a KLUE-RoBERTa needs "BertTokenizer"). If it is right, the vocabulary is missing, for another language, '
            "or KoBERT's (convert it with koclip.text.kobert.convert)"
        )


def _letters(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Counter[str], Counter[str]]:
    """Count the letters and digits of a text by script: all, and those that decoding its ids does not return."""
    back = str(tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True))
    there, kept = (  # NFKD separates marks, which are not alphanumeric
        Counter(filter(str.isalnum, unicodedata.normalize("NFKD", each).casefold())) for each in (text, back)
    )
    every, lost = (
        Counter(unicodedata.name(letter, "unknown").split()[0] for letter in letters.elements())
        for letters in (there, there - kept)
    )
    return every, lost


def _check_ids(tokenizer: PreTrainedTokenizerBase, path: str, config: PreTrainedConfig) -> None:
    needed = {"pad_token_id": tokenizer.pad_token_id, "cls_token_id": _start(tokenizer)}
    for name, token in needed.items():
        if token is None and (name != "cls_token_id" or config.model_type not in UNMARKED):
            raise ConfigError(f"tokenizer {path!r} has no {name}, which a text encoder needs: set it and save it")
    sep = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    # A ChineseCLIP does not read these two ids; if its config.json has none, the class gives 0 and 2.
    unread = config.model_type == "chinese_clip_text_model"
    special = {} if unread else {"cls": (_start(tokenizer), "bos_token_id"), "sep": (sep, "eos_token_id")}
    if config.model_type in COUNT_FROM_PADDING:  # for others, `koclip.align.methods` uses the tokenizer's padding token
        special = {"pad": (tokenizer.pad_token_id, "pad_token_id")} | special
    for token, (got, name) in special.items():
        expected = getattr(config, name, None)
        if got != expected and (token == "pad" or None not in (got, expected)):
            raise ConfigError(
                f"tokenizer {path!r}: its {token} token has id {got}, the {config.model_type} encoder's config.json "
                f"says {name} {expected}; expected equal ids. Use the tokenizer that the encoder was trained with, or "
                "correct the wrong id"
                + (f" (a {config.model_type} counts its positions from pad_token_id)" if token == "pad" else "")
            )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str, config: PreTrainedConfig) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ConfigError(
            f"tokenizer {path!r} has ids up to {largest}, but the {config.model_type} encoder's vocabulary has "
            f"{config.vocab_size} entries; use the tokenizer that the encoder was trained with"
        )


def _check_start(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    ids = tokenizer(_KOREAN[0])["input_ids"]
    if ids[:1] != [_start(tokenizer)]:
        raise ConfigError(
            f"tokenizer {path!r} turns {_KOREAN[0]!r} into {ids}; expected the cls token ({_start(tokenizer)}) "
            "first, where the encoder reads the embedding: correct the post-processor in its tokenizer.json"
        )


def _start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token at the start of a text: cls, or bos in tokenizers without cls."""
    start: int | None = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    return start


def differing_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[str]:
    """Return the ids that change embeddings and differ between a tokenizer and the configuration of its text tower.

    Towers that read the end token, and towers without a mask, do not use the configuration's padding id.
    """
    problems = []
    if config.model_type not in (*READS_END, *UNMASKED) and config.pad_token_id != tokenizer.pad_token_id:
        pads = f"{config.pad_token_id}, the tokenizer's is {tokenizer.pad_token_id}"
        problems.append(f"text_config.pad_token_id is {pads}")
    largest = max(tokenizer.get_vocab().values())
    legacy = config.model_type == "clip_text_model" and config.eos_token_id == LEGACY_EOS_ID
    end = largest if legacy else config.eos_token_id
    if config.model_type in READS_END and tokenizer.eos_token_id != end:
        problems.append(f"text_config.eos_token_id is {end}, the tokenizer's is {tokenizer.eos_token_id}")
    if largest >= config.vocab_size:
        problems.append(f"text_config.vocab_size is {config.vocab_size}, the tokenizer has ids up to {largest}")
    return problems


def encode(tokenizer: PreTrainedTokenizerBase, captions: list[str], **options: Any) -> Any:
    """Tokenize captions and cut them to the tokenizer's `model_max_length`.

    The tokenizer of a tower without a mask (`UNMASKED`) pads to its longest length; the mask is 1 everywhere.
    """
    unmasked = "attention_mask" not in tokenizer.model_input_names and options.get("padding")
    if unmasked:
        options |= {"padding": "max_length", "return_attention_mask": True}
    encoded = tokenizer(captions, truncation=True, max_length=tokenizer.model_max_length, **options)
    if unmasked:
        encoded["attention_mask"].fill_(1)
    return encoded


def forget_call_state(tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop the padding and truncation of the last call, which `save_pretrained` would write into tokenizer.json."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
