"""The faster kernels give the stock model's embeddings and gradients, and leave what is saved stock."""

import ast
import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_batch, tiny_dual_encoder
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, ChineseCLIPModel, CLIPModel
from transformers.activations import QuickGELUActivation

from koclip.align import lora
from koclip.config import AdapterConfig
from koclip.models import fast as fast_module
from koclip.models.dual_encoder import DualEncoder
from koclip.models.fast import (
    LastEndLayer,
    LastImageLayer,
    LastLayer,
    LastTextLayer,
    PatchEmbedding,
    QuickGELU,
    speed_up,
)
from koclip.models.swap import swap_text_tower
from koclip.text.tokenizers import LEGACY_EOS_ID

CPU = torch.device("cpu")


def gradients(model: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a loss that every output takes part in, differently."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def embed(model: DualEncoder, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Image and text embeddings in one tensor, and their gradients."""
    embeddings = model(**batch)
    output = torch.cat([embeddings.image, embeddings.text])
    return output.detach(), gradients(model, output)


def with_bert(layers: int = 2, dropout: float = 0.0, attention_dropout: float = 0.0) -> ChineseCLIPModel:
    """A `ChineseCLIPModel`: CLIP's image tower beside a BERT whose biases and norms have random values too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 48}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": attention_dropout}
    encoder = BertModel(BertConfig(vocab_size=560, max_position_embeddings=200, **sizes, **rates))
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = swap_text_tower(tiny_dual_encoder().model, encoder)
    assert isinstance(model, ChineseCLIPModel)
    return model.train()


def features(model: ChineseCLIPModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Features of both sides, (2B, D)."""
    images = model.get_image_features(pixel_values=batch["pixel_values"] / 255).pooler_output
    texts = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return torch.cat([images, model.get_text_features(**texts).pooler_output])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(24, 16), (27, 21)])
def test_patch_embedding_is_the_convolution(bias: bool, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 10, kernel_size=8, stride=8, bias=bias)
    fast = copy.deepcopy(conv)
    fast.__class__ = PatchEmbedding
    pixels = torch.randn(2, 3, *size)
    expected, got = conv(pixels), fast(pixels)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients(fast, got), gradients(conv, expected), atol=1e-5, rtol=1e-5)


def test_quick_gelu_is_the_stock_activation() -> None:
    values = torch.linspace(-12, 12, 481, dtype=torch.float64)
    inputs = [values.clone().requires_grad_() for _ in range(2)]
    outputs = [activation(x) for activation, x in zip((QuickGELUActivation(), QuickGELU()), inputs, strict=True)]
    torch.testing.assert_close(*outputs, atol=1e-14, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for x, y in zip(inputs, outputs, strict=True)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sped_up_model_gives_the_stock_embeddings_and_gradients(attention: str) -> None:
    stock = tiny_dual_encoder()
    batch = tiny_batch(6)
    assert (batch["attention_mask"] == 0).any()
    fast = copy.deepcopy(stock)
    speed_up(fast.model, CPU)
    fast.model.set_attn_implementation(attention)
    (expected, expected_gradients), (got, got_gradients) = embed(stock, batch), embed(fast, batch)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    # fp32 sums differ by the order of their terms, so by a share of the largest gradient and not of each small one.
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    assert scale > 0.1
    torch.testing.assert_close(got_gradients, expected_gradients, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("legacy", [False, True], ids=["", "end token 2 in config.json, as OpenAI's"])
def test_the_end_of_a_text_is_found_without_a_mask_and_without_padding(legacy: bool) -> None:
    stock = tiny_dual_encoder()
    if legacy:  # transformers then reads the largest id
        stock.model.text_model.eos_token_id = LEGACY_EOS_ID
    fast = copy.deepcopy(stock)
    speed_up(fast.model, CPU)
    ids = tiny_batch(6)["input_ids"]
    for texts in (ids, ids[:1, : int((ids[0] == stock.model.config.text_config.eos_token_id).int().argmax()) + 1]):
        expected, got = (model.model.get_text_features(input_ids=texts).pooler_output for model in (stock, fast))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_speeding_up_reaches_every_part() -> None:
    model = tiny_dual_encoder(image_layers=3, text_layers=1).model
    speed_up(model, CPU)
    kinds = [type(module) for module in model.modules()]
    counts = {kind: kinds.count(kind) for kind in (PatchEmbedding, QuickGELU, LastLayer, LastEndLayer)}
    assert counts == {PatchEmbedding: 1, QuickGELU: 4, LastLayer: 1, LastEndLayer: 1}
    assert {model.vision_model.config._attn_implementation, model.text_model.config._attn_implementation} == {"eager"}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sped_up_bert_text_tower_gives_the_stock_features_and_gradients(
    attention: str, padded: bool, adapted: bool
) -> None:
    stock = with_bert()
    if adapted:
        lora.attach(stock, AdapterConfig(target="both", rank=4))
        for name, parameter in stock.named_parameters():
            if "lora_B" in name:  # zeros, which would hide the adapters
                nn.init.normal_(parameter, std=0.1)
    batch = tiny_batch(6)
    if padded:
        assert (batch["attention_mask"] == 0).any()
    else:
        del batch["attention_mask"]
    fast = copy.deepcopy(stock)
    speed_up(fast, CPU)
    fast.set_attn_implementation(attention)
    expected, got = features(stock, batch), features(fast, batch)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    expected_gradients, got_gradients = gradients(stock, expected), gradients(fast, got)
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    assert scale > 0.1
    torch.testing.assert_close(got_gradients, expected_gradients, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"attention_dropout": 0.3}], ids=str)
def test_a_sped_up_bert_layer_drops_out_as_much_as_the_stock_one(rates: dict[str, float]) -> None:
    """The mean and the spread of the features of one text, over many draws."""
    stock = with_bert(layers=1, **rates)
    fast = copy.deepcopy(stock)
    speed_up(fast, CPU)
    ids = tiny_batch(1)["input_ids"].expand(20_000, -1)
    with torch.no_grad():
        expected, got = (model.get_text_features(input_ids=ids).pooler_output for model in (stock, fast))
    spread = expected.std(dim=0)
    assert spread.min() > 0.01
    torch.testing.assert_close(got.mean(dim=0) / spread, expected.mean(dim=0) / spread, atol=0.05, rtol=0)
    torch.testing.assert_close(got.std(dim=0) / spread, torch.ones_like(spread), atol=0.05, rtol=0)


def test_speeding_up_reaches_every_part_of_a_chinese_clip_and_no_more_the_second_time() -> None:
    model = with_bert()
    speed_up(model, CPU)
    speed_up(model, CPU)
    kinds = [type(module) for module in model.modules()]
    counts = {kind: kinds.count(kind) for kind in (PatchEmbedding, QuickGELU, LastImageLayer, LastTextLayer)}
    assert counts == {PatchEmbedding: 1, QuickGELU: 2, LastImageLayer: 1, LastTextLayer: 1}
    assert {model.vision_model.config._attn_implementation, model.text_model.config._attn_implementation} == {"eager"}
    on_gpu = with_bert()
    speed_up(on_gpu, torch.device("cuda"))
    assert on_gpu.text_model.config._attn_implementation == "sdpa"


def test_recomputing_activations_changes_nothing() -> None:
    plain = tiny_dual_encoder(image_layers=2)
    speed_up(plain.model, CPU)
    recomputed = copy.deepcopy(plain)
    for tower in (recomputed.model.vision_model, recomputed.model.text_model):
        tower.gradient_checkpointing_enable()
    batch = tiny_batch(4)
    torch.testing.assert_close(embed(recomputed.train(), batch), embed(plain.train(), batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [CLIPModel, ChineseCLIPModel])
def test_what_is_saved_stays_stock(kind: type, tmp_path: Path) -> None:
    stock = tiny_dual_encoder().model if kind is CLIPModel else with_bert()
    fast = copy.deepcopy(stock)
    speed_up(fast, CPU)
    for name, model in (("stock", stock), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "fast")]
    assert configs[0] == configs[1]
    loaded, info = AutoModel.from_pretrained(tmp_path / "fast", output_loading_info=True)
    assert type(loaded) is kind
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), stock.state_dict(), atol=0, rtol=0)
    assert not any(isinstance(module, LastLayer | LastTextLayer) for module in loaded.modules())


def test_a_text_layer_that_is_not_given_the_end_fails() -> None:
    """It would read the first token: every text would have the same embedding."""
    model = tiny_dual_encoder().model
    speed_up(model, CPU)
    model.text_model._forward_pre_hooks.clear()  # as if transformers no longer passed unknown arguments on
    with pytest.raises(RuntimeError, match=r"train\.fast"):
        model.get_text_features(input_ids=tiny_batch(2)["input_ids"])


def chains(tree: ast.AST, root: str) -> set[tuple[str, ...]]:
    """Return the attributes that are read from the variable `root`: `root.a.b` is ("a", "b")."""
    chains_read = set()
    for node in ast.walk(tree):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if names and isinstance(node, ast.Name) and node.id == root:
            chains_read.add(tuple(reversed(names)))
    return chains_read


def reachable(part: Any, chain: tuple[str, ...]) -> bool:
    """Return whether an object has these attributes, one inside the other, apart from methods of tensors."""
    for name in chain:
        if isinstance(part, torch.Tensor):
            return True
        if not hasattr(part, name):
            return False
        part = getattr(part, name)
    return True


def test_every_name_of_transformers_that_is_used_is_there() -> None:
    clip, bert = tiny_dual_encoder().model, with_bert()
    towers = [clip.vision_model, clip.text_model, bert.vision_model, bert.text_model]
    blocks = [clip.vision_model.encoder.layers[-1], bert.text_model.encoder.layer[-1]]
    speed_up(clip, CPU)
    speed_up(bert, CPU)
    tree = ast.parse(Path(fast_module.__file__).read_text(encoding="utf-8"))
    imported = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "transformers" in str(node.module)
    ]
    for node in imported:
        missing = [
            name.name for name in node.names if not hasattr(importlib.import_module(str(node.module)), name.name)
        ]
        assert not missing, f"transformers {transformers.__version__}: {node.module} has no {missing}: adapt fast.py"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    used = [(chain, towers) for name in functions for chain in chains(functions[name], "tower")]
    used += [(chain, [clip.text_model]) for chain in chains(functions["_name_the_end"], "text_model")]
    for name, block in zip(("LastLayer", "LastTextLayer"), blocks, strict=True):
        attention = getattr(block, "self_attn", None) or block.attention
        inner = attention if name == "LastLayer" else attention.self
        used += [(chain, [block]) for chain in chains(classes[name], "self")]
        used += [(chain, [inner]) for chain in chains(classes[name], "attention")]
    assert len(used) > 25
    for chain, parts in used:
        kinds = ", ".join(type(part).__name__ for part in parts)
        there = any(reachable(part, chain) for part in parts)
        assert there, f"transformers {transformers.__version__}: no {'.'.join(chain)} in {kinds}: adapt fast.py"
