"""A small tokenizer of each kind of model, trained on Korean and English text."""

import io
from collections.abc import Callable

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.kobert_files import CORPUS

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def as_fast(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **tokens)


def wordpiece() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.WordPiece(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    return as_fast(trained)


def unigram() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    return as_fast(trained)


def byte_level() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    return as_fast(trained)


def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE of sentencepiece, as Gemma's: a piece has every merge of two pieces that gives it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, character_coverage=0.98, num_threads=1, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(number) for number in range(len(processor))]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    splits = ((piece[:place], piece[place:]) for piece in vocab for place in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    built = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return as_fast(built)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "WordPiece": wordpiece,
    "Unigram": unigram,
    "byte-level BPE": byte_level,
    "BPE with byte fallback": byte_fallback,
}
