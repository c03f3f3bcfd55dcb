"""Small runs of recipes/align.py: a source CLIP, photos with captions in two languages, text encoders."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import tiny_config
from transformers import AutoConfig, AutoModel

from koclip import config
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model
from koclip.text.tokenizers import train_bpe

RECIPE = Path(__file__).parents[1] / "recipes" / "align.py"
KOREAN = ["빨간 공", "파란 상자 두 개", "노란 별이 하늘에 있다", "초록 나무 아래 개"]
ENGLISH = ["a red ball", "two blue boxes", "a yellow star in the sky", "a dog under a green tree"]


def write_pairs(path: Path, count: int = 24) -> Path:
    """Write photos of noise, each with two captions in each language that correspond to each other."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file, "JPEG", quality=90)
        places = [(number + place) % len(KOREAN) for place in (0, 1)]
        rows.append(
            {
                "image": file.getvalue(),
                "captions_ko": [f"{KOREAN[place]} {number}" for place in places],
                "captions_en": [f"{ENGLISH[place]} {number}" for place in places],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_source(folder: Path, **sizes: object) -> Path:
    """Write a tiny CLIP that has learnt nothing; its logit scale is not the initial one."""
    tokenizer = train_bpe(ENGLISH, 560, 24)
    model, processor = from_scratch(tiny_config(**{"text_width": 32, "text_layers": 1, **sizes}), tokenizer)
    torch.nn.init.constant_(model.logit_scale, 3.21)
    save_stock_model(folder, model, processor, model.state_dict())
    return folder


def arguments(source: Path | str, pairs: Path, *more: str) -> list[str]:
    """Return a command line of six steps without dropout of words; `more` comes last."""
    rows = f"path: {pairs}, captions: {{ko: captions_ko, en: captions_en}}"
    return [
        *("--model.clip", str(source), "--data.sources", f"[{{{rows}, languages: {{ko: 1.0}}}}]"),
        *(
            "--data.num_crops",
            "1",
            "--data.length_pool",
            "2",
            "--eval.sets",
            f"[{{source: {{{rows}}}, max_images: 8}}]",
        ),
        *("--tokenizer.max_tokens", "24", "--tokenizer.vocab_size", "600", "--optim.warmup_steps", "1"),
        *("--train.num_steps", "6", "--train.batch_size", "8", "--train.log_every", "1", "--train.tracker", "none"),
        *("--train.num_threads", "1", *more),
    ]


def align(*args: str, reported: bool = False) -> None:
    """Run the recipe's main() in this process; the evaluation at its end takes longer than the rest."""
    spec = importlib.util.spec_from_file_location("align", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        if not reported:
            patch.setattr("koclip.runs.session.report", lambda *_: None)
        recipe.main(config.parse(config.AlignConfig, list(args)))


def write_encoder(folder: Path, kind: str, vocab_size: int, **settings: object) -> None:
    """Write a text encoder with random weights beside its tokenizer, as its repository would."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    torch.manual_seed(1)
    encoder = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, vocab_size=vocab_size, **settings))
    encoder.save_pretrained(folder)
