"""Train a small text encoder on text files alone: a WordPiece tokenizer, and a BERT by masked language modelling.

python recipes/benchmarks/masked_lm.py korean/*.txt --output_dir runs/korean_encoder        # minutes on one CPU core

The result is a directory for `model.text_encoder`: a stock BertModel with its tokenizer. Lines with Latin letters are
left out, so that the encoder has read no English word. Its tokenizer still has a piece for each Latin letter.
Masked language modelling: Devlin et al. 2019 (BERT), without the prediction of the next sentence.
"""

import argparse
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from tqdm.auto import trange
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from koclip import storage
from koclip.text.normalize import usable
from koclip.text.tokenizers import forget_call_state

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
LATIN = re.compile("[A-Za-z]")


def main(words: Sequence[str] | None = None) -> None:
    """Train the tokenizer and the encoder, and save both."""
    args = parser().parse_args(words)
    lines = read_lines(args.texts)
    tokenizer = train_tokenizer(lines, args.vocab_size, args.max_tokens)
    model = train(lines, tokenizer, args)
    forget_call_state(tokenizer)
    with storage.atomic(Path(args.output_dir)) as folder:
        model.bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"Saved {args.output_dir}: {len(tokenizer):,} pieces, trained on {len(lines):,} lines")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cli.add_argument("texts", nargs="+", help="text files, one text per line")
    cli.add_argument("--output_dir", default="runs/korean_encoder", help="default: %(default)s")
    cli.add_argument("--vocab_size", type=int, default=8_000, help="pieces (default: %(default)s)")
    cli.add_argument("--max_tokens", type=int, default=64, help="of a line; longer lines are cut (%(default)s)")
    cli.add_argument("--width", type=int, default=192, help="a multiple of 64 (default: %(default)s)")
    cli.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    cli.add_argument("--num_steps", type=int, default=1_500, help="default: %(default)s")
    cli.add_argument("--batch_size", type=int, default=64, help="lines (default: %(default)s)")
    cli.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    cli.add_argument("--seed", type=int, default=0)
    return cli


def read_lines(files: Sequence[str]) -> list[str]:
    """Return the distinct clean lines without Latin letters.

    Raises:
        SystemExit: there is no such line.
    """
    texts = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in dict.fromkeys(usable(texts)) if not LATIN.search(line)]
    if not lines:
        raise SystemExit(f"{', '.join(files)}: got no line without Latin letters, expected Korean text")
    return lines


def train_tokenizer(lines: Sequence[str], vocab_size: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """Train WordPiece on the lines. Every lower-case Latin letter is a piece, at the start and inside of words."""
    backend: Any = Tokenizer(WordPiece(unk_token=SPECIAL["unk_token"]))
    backend.normalizer, backend.pre_tokenizer = BertNormalizer(strip_accents=False), BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator([*lines, *(2 * letter for letter in string.ascii_lowercase)], trainer)
    ends = [(SPECIAL[name], backend.token_to_id(SPECIAL[name])) for name in ("cls_token", "sep_token")]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_tokens, **SPECIAL)


def train(lines: Sequence[str], tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> BertForMaskedLM:
    """Train a BERT to predict 15 % of the pieces from the others."""
    torch.manual_seed(args.seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        max_position_embeddings=args.max_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.num_steps // 10, args.num_steps)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    encoded: Any = tokenizer(list(lines), truncation=True, return_special_tokens_mask=True)
    batches = in_batches(encoded, args.batch_size, args.seed)
    bar, average = trange(args.num_steps, desc="masked language modelling"), 0.0
    for step in bar:
        loss = masked_loss(model, collate(next(batches)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average += (loss.item() - average) / min(step + 1, 100)
        bar.set_postfix(loss=f"{average:.2f}", refresh=False)
    model.eval()
    return model


def masked_loss(model: BertForMaskedLM, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss of the pieces to predict. The head, most of the cost, runs at their positions only."""
    labels = batch["labels"]  # (B, L), -100 where nothing is predicted
    states = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state  # (B, L, W)
    predicted = labels != -100
    total = F.cross_entropy(model.cls(states[predicted]), labels[predicted], reduction="sum")
    return total / predicted.sum().clamp(min=1)  # in a batch of very short lines there may be none


def in_batches(encoded: Any, size: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of texts of similar length, in another order in each epoch, without end."""
    rng, ids = random.Random(seed), encoded["input_ids"]
    while True:
        order = sorted(range(len(ids)), key=lambda place: (len(ids[place]), rng.random()))
        starts = list(range(0, len(order), size))
        rng.shuffle(starts)
        for start in starts:
            yield [{name: encoded[name][place] for name in encoded} for place in order[start : start + size]]


if __name__ == "__main__":
    main()
