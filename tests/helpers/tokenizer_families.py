"""A small tokenizer of every family of text encoders, and Korean and English strings to try them with."""

import io
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from helpers.kobert_files import CORPUS
from helpers.kobert_files import write as write_kobert
from koclip.text import kobert, tokenizers

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KLUE = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
LENGTH = 64  # tokens


def settle(folder: Path, model_type: str, **settings: object) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def wordpiece(folder: Path, special: tuple[str, ...], model_type: str, **settings: object) -> None:
    trainer = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    trainer.train_from_iterator(CORPUS, vocab_size=500, show_progress=False, special_tokens=list(special))
    vocab = trainer.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n", encoding="utf-8")
    settle(folder, model_type, **{"do_lower_case": False} | settings)


def unigram(folder: Path, model_type: str, tokenizer_class: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, vocab_size=400, hard_vocab_limit=False,
        character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    settle(folder, model_type, tokenizer_class=tokenizer_class)


def byte_bpe(folder: Path) -> None:
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(CORPUS, vocab_size=600, show_progress=False, special_tokens=list(ROBERTA))
    trainer.save_model(str(folder))
    settle(folder, "roberta")


class Family(NamedTuple):
    write: Callable[[Path], object]
    config: PreTrainedConfig | None
    composes: bool = False  # by itself


FAMILIES = {
    "klue": Family(
        lambda folder: wordpiece(folder, KLUE, "roberta", tokenizer_class="BertTokenizer", model_max_length=512),
        RobertaConfig(vocab_size=500),
    ),
    "bert": Family(lambda folder: wordpiece(folder, BERT, "bert"), BertConfig()),
    "electra": Family(
        lambda folder: wordpiece(folder, BERT, "electra", tokenizer_class="ElectraTokenizer"), ElectraConfig()
    ),
    "distilbert": Family(
        lambda folder: wordpiece(folder, BERT, "distilbert", tokenizer_class="DistilBertTokenizer"), DistilBertConfig()
    ),
    "xlm-roberta": Family(lambda folder: unigram(folder, "xlm-roberta", "XLMRobertaTokenizer"), XLMRobertaConfig()),
    "camembert": Family(
        lambda folder: unigram(folder, "camembert", "CamembertTokenizer"),
        CamembertConfig(bos_token_id=5, eos_token_id=6),
    ),
    "roberta": Family(byte_bpe, RobertaConfig()),
    "kobert": Family(
        lambda folder: kobert.convert(write_kobert(folder / "original", "monologg")).save_pretrained(folder),
        BertConfig(pad_token_id=1),
        composes=True,
    ),
    "clip": Family(
        lambda folder: tokenizers.train_bpe(CORPUS, 700, LENGTH).save_pretrained(folder), None, composes=True
    ),
}


def strings(count: int = 1_000) -> list[str]:
    """Return NFC strings: pieces of captions, Hangul words, accents, other scripts, digits, emoji."""
    rng = random.Random(0)
    words = [word for line in CORPUS for word in line.split()]
    others = [
        *("👩\u200d👧 가족", "❤\ufe0f", "🇰🇷", "👍🏽", "café", "Tiếng Việt", "Ångström", "Dvořák", "ガラスの靴", "学校"),
        *(
            "Ελλάδα",
            "Киев, йод",
            "हिन्दी",
            "ไทย",
            "2013년 7월",
            "3.5kg",
            "USB-C",
            "[photo]",
            "1,234원",
            "ㅋㅋㅋ",
            "q\u0323\u0307",
        ),
    ]

    def part() -> str:
        kind = rng.randrange(9)
        if kind < 5:
            return rng.choice(words)
        if kind < 7:
            return rng.choice(words)[: rng.randrange(1, 5)]
        if kind == 7:
            return "".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(rng.randrange(1, 4)))
        return rng.choice(others)

    texts = ["".join(part() + rng.choice(["", " ", " "]) for _ in range(rng.randrange(1, 9))) for _ in range(count)]
    return [unicodedata.normalize("NFC", text).strip() for text in texts]
