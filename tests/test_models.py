"""Dual encoders from random weights: sizes, initial weights, image towers, refusals, recomputation."""

import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from tiny import paper_tokenizer, tiny_batch, tiny_config, tiny_dual_encoder, tiny_tokenizer
from torch import nn
from transformers import (
    BertConfig,
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    Dinov2Config,
    ResNetConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

import koclip
from koclip.config import ConfigError, ModelConfig
from koclip.models.dual_encoder import DualEncoder, check_tokenizer, from_scratch
from koclip.models.presets import PRESETS
from koclip.models.stock import save_stock_model

# Parameters of OpenAI's released models (open_clip builds the ResNets to the same counts).
VIT_COUNTS = {
    "vit_b32": 151_277_313,
    "vit_b16": 149_620_737,
    "vit_l14": 427_616_513,
    "vit_l14_336": 427_944_193,
}
RESNET_COUNTS = {
    "rn50": 102_007_137,
    "rn101": 119_688_033,
    "rn50x4": 178_300_601,
    "rn50x16": 290_979_217,
    "rn50x64": 623_258_305,
}
TINY_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("preset", "count"), VIT_COUNTS.items())
def test_vit_presets_have_the_papers_parameters(preset: str, count: int) -> None:
    with torch.device("meta"):
        model, processor = from_scratch(ModelConfig(preset=preset), paper_tokenizer())
    assert isinstance(model, CLIPModel)
    assert parameters(model) == count
    assert processor.image_processor.crop_size["height"] == PRESETS[preset].image_size


@pytest.mark.parametrize(("preset", "count"), RESNET_COUNTS.items())
def test_resnet_presets_lack_only_the_bias_of_the_attention_pools_projection(preset: str, count: int) -> None:
    with torch.device("meta"):
        model, _ = from_scratch(ModelConfig(preset=preset), paper_tokenizer())
    assert isinstance(model, VisionTextDualEncoderModel)
    assert parameters(model) == count - PRESETS[preset].embed_dim
    side = PRESETS[preset].image_size // 32
    assert model.vision_model.timm_model.head.pos_embed.shape[0] == side**2 + 1


def test_initial_weights_follow_the_papers_code() -> None:
    model, _ = from_scratch(
        tiny_config(image_width=128, image_layers=3, text_width=128, text_layers=2), tiny_tokenizer()
    )
    expected = {"visual_projection": 128**-0.5, "text_projection": 128**-0.5}
    for tower, depth in (("vision_model", 3), ("text_model", 2)):
        for layer in range(depth):
            block = f"{tower}.encoder.layers.{layer}"
            write = 128**-0.5 * (2 * depth) ** -0.5
            expected |= {f"{block}.self_attn.{name}_proj": 128**-0.5 for name in "qkv"}
            expected |= {f"{block}.self_attn.out_proj": write, f"{block}.mlp.fc2": write}
            expected |= {f"{block}.mlp.fc1": 256**-0.5}
    expected |= {
        "text_model.embeddings.token_embedding": 0.02,
        "text_model.embeddings.position_embedding": 0.01,
        "vision_model.embeddings.position_embedding": 128**-0.5,
        "vision_model.embeddings.patch_embedding": (3 * 3 * 8 * 8) ** -0.5,
    }
    weights = model.state_dict()
    for name, std in expected.items():
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.08), name
    assert weights["vision_model.embeddings.class_embedding"].std().item() == pytest.approx(128**-0.5, rel=0.25)


def test_temperature_starts_at_the_papers_and_is_clamped_at_ln_100() -> None:
    dual_encoder = tiny_dual_encoder()
    assert dual_encoder.logit_scale() == pytest.approx(1 / 0.07)
    dual_encoder.model.logit_scale.data.fill_(5.0)
    dual_encoder.clamp_logit_scale()
    assert dual_encoder.model.logit_scale.item() == pytest.approx(math.log(100))


def test_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = tiny_dual_encoder(seed=3).state_dict()
    torch.manual_seed(2)
    again, other = tiny_dual_encoder(seed=3).state_dict(), tiny_dual_encoder(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.visual_projection.weight"], other["model.visual_projection.weight"])


def test_resnet_starts_from_timms_weights_and_takes_other_image_sizes() -> None:
    config = tiny_config(preset="rn50", image_size=64)
    model, processor = from_scratch(config, tiny_tokenizer())
    assert processor.image_processor.crop_size["height"] == 64
    tower = model.vision_model.timm_model
    assert tower.head.pos_embed.shape[0] == 2 * 2 + 1
    torch.manual_seed(0)
    fresh = timm.create_model("resnet50_clip", num_classes=0, img_size=64)
    for (name, got), wanted in zip(tower.named_parameters(), fresh.parameters(), strict=True):
        assert got.std().item() == pytest.approx(wanted.std().item(), rel=0.25, abs=1e-6), name
    assert all(block.conv3_1x1.bn.weight.abs().max() == 0 for block in tower.stages[3])
    first, second = torch.randn(2, 2, 3, 64, 64)
    difference = model.get_image_features(first).pooler_output - model.get_image_features(second).pooler_output
    assert difference.abs().max() > 0.01


def save_config(kind: str, directory: Path) -> str:
    config = {
        "vit": ViTConfig(**TINY_VIT, image_size=32, patch_size=8),
        "dinov2": Dinov2Config(**{**TINY_VIT, "image_size": 28, "patch_size": 14}),
        "convnext": ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32]),
        "resnet": ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], embedding_size=8),
        "bert": BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32),
    }[kind]
    config.save_pretrained(directory)
    return f"auto:{directory}"


@pytest.mark.parametrize(
    ("tower", "image_size", "expected_size"),
    [
        ("vit", None, 32),
        ("vit", 48, 48),
        ("dinov2", None, 28),
        ("convnext", 32, 32),
        ("timm:test_vit", 32, 32),
        ("timm:test_byobnet", 64, 64),
    ],
)
def test_other_image_towers_train_publish_and_load(
    tower: str, image_size: int | None, expected_size: int, tmp_path: Path
) -> None:
    preset = tower if ":" in tower else save_config(tower, tmp_path / "tower")
    config = ModelConfig(preset=preset, image_size=image_size, text_width=64, text_layers=1, embed_dim=16)
    model, processor = from_scratch(config, tiny_tokenizer())
    dual_encoder = DualEncoder(model, processor)
    batch = tiny_batch(4, image_size=expected_size)
    image = dual_encoder(**batch).image
    assert (image - image[0]).abs().amax(dim=1)[1:].min() > 1e-3
    image[0, 0].backward()
    trained = [name for name, parameter in model.vision_model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if model.vision_model.get_parameter(name).grad is None]

    save_stock_model(tmp_path / "model", model, processor, dual_encoder.state_dict())
    loaded = koclip.load(tmp_path / "model", device="cpu").model
    pixels = torch.randn(2, 3, expected_size, expected_size)
    model.eval()
    with torch.no_grad():
        trained, reloaded = (clip.get_image_features(pixel_values=pixels).pooler_output for clip in (model, loaded))
    assert torch.equal(trained, reloaded)
    stored = loaded.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "vit_b31"}, "model.preset: got 'vit_b31'"),
        ({"image_size": 33}, "model.image_size: got 33"),
        ({"text_width": 100}, "model.text_width: got 100"),
        ({"image_width": 100}, "model.image_width: got 100"),
        ({"preset": "timm:nothing"}, "no such architecture"),
        ({"preset": "auto:./nowhere"}, "model.preset: auto:./nowhere cannot be read"),
        ({"preset": "rn50", "image_width": 64}, "model.image_width: got 64"),
        ({"preset": "rn50", "image_size": 100}, "expected a multiple of 32"),
        ({"preset": "rn50", "patch_dropout": 0.5}, "model.patch_dropout"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_scratch(tiny_config(**changes), tiny_tokenizer())


@pytest.mark.parametrize("kind", ["resnet", "bert"])
def test_towers_without_a_pooled_image_are_refused(kind: str, tmp_path: Path) -> None:
    config = ModelConfig(preset=save_config(kind, tmp_path), text_width=64, embed_dim=16)
    with pytest.raises(ConfigError, match=r"model.preset: .*(pooled output|does not embed)"):
        from_scratch(config, tiny_tokenizer())


def test_end_token_2_is_refused() -> None:
    vocab = {"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    with pytest.raises(ConfigError, match="id 2"):
        from_scratch(tiny_config(), CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16))


def test_tokenizer_that_differs_from_the_model_is_refused() -> None:
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    check_tokenizer(model, tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"\b25\b.*\b24\b"):
        check_tokenizer(model, tiny_tokenizer(max_tokens=25))
    model.config.text_config.eos_token_id -= 1
    with pytest.raises(ConfigError, match="eos_token_id"):
        DualEncoder(model, processor)
    model.config.text_config.eos_token_id += 1
    model.config.text_config.vocab_size -= 1
    with pytest.raises(ConfigError, match=str(model.config.text_config.vocab_size)):
        DualEncoder(model, processor)


@pytest.mark.parametrize("preset", ["tiny", "timm:test_vit"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(preset: str) -> None:
    own = {} if preset == "tiny" else {"preset": preset, "image_size": 32}

    def gradients(recompute: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
        keys = {f"{tower}_gradient_checkpointing": recompute for tower in ("image", "text")}
        dual_encoder = tiny_dual_encoder(**own, **keys).train()
        vision = dual_encoder.model.vision_model
        layers = [
            vision.encoder.layers[0] if preset == "tiny" else vision.timm_model.blocks[0],
            dual_encoder.model.text_model.encoder.layers[0],
        ]
        calls = [0, 0]
        for place, layer in enumerate(layers):
            linear = next(module for module in layer.modules() if isinstance(module, nn.Linear))
            linear.register_forward_pre_hook(lambda *_, place=place: calls.__setitem__(place, calls[place] + 1))
        image, text, scale = dual_encoder(**tiny_batch(4))[:3]
        (scale * image @ text.T).logsumexp(dim=1).sum().backward()
        gradients = {name: parameter.grad for name, parameter in dual_encoder.named_parameters()}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}, calls

    plain, once = gradients(False)
    recomputed, twice = gradients(True)
    assert (once, twice) == ([1, 1], [2, 2])
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_pixels_are_normalised_as_the_saved_processor_does() -> None:
    dual_encoder = tiny_dual_encoder()
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    batch = tiny_batch(2)
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in batch["pixel_values"]]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        got = dual_encoder(**batch).image
    torch.testing.assert_close(got, nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=0)
