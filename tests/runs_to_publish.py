"""Tiny training runs as `recipes/publish.py` finds them: a model directory with what lies beside it."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config, tiny_tokenizer
from transformers import BertConfig, BertModel, ChineseCLIPProcessor

from koclip import config
from koclip.align.lora import attach
from koclip.align.methods import AlignedModelWriter
from koclip.encoders import load
from koclip.evaluation.results import Measured, write_results
from koclip.metrics import Metric
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model
from koclip.models.swap import swap_text_tower

ENVIRONMENT = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "python": "3.11.7",
    "packages": {"torch": "2.14.1", "transformers": "5.23.0", "koclip": "0.1.0"},
    "cpu_threads": 2,
    "gpus": [],
    "num_processes": 1,
    "command": ["pretrain.py", "--config", "/home/me/koclip/recipes/configs/pretrain/scenes.yaml", "--train.lr=1e-3"],
}
METRICS = {
    "scenes/ko/text_to_image/recall@1": (0.12345, 0.1, 0.15, 1000),
    "scenes/ko/text_to_image/recall@10": (0.4567, 0.43, 0.48, 1000),
    "scenes/ko/text_to_image/median_rank": (12, 10, 15, 1000),
    "scenes/ko/zero_shot/accuracy": (0.98, 0.963, 0.99, 600),
    "scenes/ko/stress_no_spaces/drop@10": (0.0321, 0.01, 0.05, 1000),
    "scenes/en/text_to_image/recall@10": (0.5123, 0.49, 0.54, 1000),
    "scenes/en/zero_shot/accuracy": (0.972, 0.95, 0.985, 600),
    "scenes/ko-en/languages/gap@10": (-0.0556, -0.09, -0.02, 1000),
    "scenes/images/linear_probe/accuracy": (0.777, 0.75, 0.8, 500),
}
SCENES = config.DataConfig(
    num_crops=1, sources=[config.SourceConfig(path="scenes", captions={"ko": "captions_ko", "en": "captions_en"})]
)


def pretrained(folder: Path, **changes: object) -> Path:
    """Write the run of a CLIP from random weights, or of another image tower's, and return its model directory."""
    torch.manual_seed(0)
    model, processor = from_scratch(tiny_config(**changes), tiny_tokenizer())
    stir(model)
    save_stock_model(folder / "model", model, processor, model.state_dict())
    return beside(folder, config.PretrainConfig(data=SCENES))


def swapped(folder: Path, clip: str, text_encoder: str) -> Path:
    """Write the run of a CLIP that got a BERT, a `ChineseCLIPModel`."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    source, processor = from_scratch(tiny_config(), tokenizer)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    ids: dict[str, Any] = {"pad_token_id": 4, "bos_token_id": 2, "eos_token_id": 3}
    model: Any = swap_text_tower(source, BertModel(BertConfig(**sizes, **ids, vocab_size=len(bert_tokenizer()))))
    stir(model)
    with torch.no_grad():
        model.text_model.embeddings.word_embeddings.weight[ids["pad_token_id"]] = 0  # as training leaves it
    joint = ChineseCLIPProcessor(processor.image_processor, bert_tokenizer())
    save_stock_model(folder / "model", model, joint, model.state_dict())
    return beside(folder, aligned(clip, text_encoder, "frozen_image"))


def adapted(folder: Path, clip: str, source: Path) -> tuple[Path, Any]:
    """Write the run of a CLIP whose own text tower got adapters; return its directory and the model with them."""
    from koclip.encoders import load

    encoder = load(source, device="cpu")
    model, processor = encoder.model, encoder.processor
    settings = aligned(clip, "same", "lora")
    attach(model, settings.lora, new_text=False)
    with torch.no_grad():
        for parameter in (weight for weight in model.parameters() if weight.requires_grad):
            parameter.add_(0.05)
    trained = copy.deepcopy(model).eval()
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    AlignedModelWriter(settings, model, model)(folder / "model", model, processor, weights)
    return beside(folder, settings), trained


def aligned(clip: str, text_encoder: str, method: str) -> config.AlignConfig:
    return config.AlignConfig(
        model=config.SwapConfig(clip=clip, text_encoder=text_encoder),
        align=config.AlignMethodConfig(method=method),
        lora=config.AdapterConfig(rank=4),
        data=SCENES,
    )


def beside(folder: Path, settings: Any) -> Path:
    """Write what training leaves beside model/."""
    config.dump(settings, folder / "config.yaml")
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    log = [{"step": 50, "seconds": 25.0, "loss": 3.0}, {"step": 3000, "seconds": 1234.5, "loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log), encoding="utf-8")
    metrics = {name: Metric(value, (low, high), n) for name, (value, low, high, n) in METRICS.items()}
    source = dataclasses.asdict(SCENES.sources[0])
    model = folder / "model"
    measured = Measured(str(model), load(str(model), "cpu").fingerprint())
    write_results(folder / "results.json", measured, {"scenes": {"source": source}}, metrics, ENVIRONMENT)
    return model


def bert_tokenizer() -> Any:
    from peer_models import LETTERS
    from transformers import BertTokenizer

    from koclip.text.cleaning import cleaning

    special = ["[UNK]", "[MASK]", "[CLS]", "[SEP]", "[PAD]"]
    entries = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {entry: place for place, entry in enumerate(entries)}
    return cleaning(BertTokenizer(vocab=vocab, do_lower_case=False, model_max_length=40))


def stir(model: torch.nn.Module) -> None:
    """Move every weight, so that a part that is lost would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
