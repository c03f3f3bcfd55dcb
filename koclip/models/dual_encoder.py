"""Build stock dual encoders from random weights and embed pairs with them. The published layout is decided here.

A ViT with CLIP's text transformer is a `CLIPModel`; any other image tower (the paper's ResNets among them) goes with
it into a `VisionTextDualEncoderModel`, the stock class that holds any pair.

Letters in shape comments: B pairs per process, N pairs in the global batch, L tokens, D embedding width, H W pixels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TimmWrapperConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from koclip.config import ModelConfig
from koclip.models.patch_dropout import drop_patches
from koclip.models.presets import Preset, resolve

MAX_LOGIT_SCALE = math.log(100)  # the paper's cap on the temperature
LEGACY_EOS_ID = 2  # transformers' CLIP pools at the largest id, not at the end token, when the end token is 2


class Embeddings(NamedTuple):
    """A batch in the shared space."""

    image: torch.Tensor  # (B, D) unit norm
    text: torch.Tensor  # (B, D) unit norm
    logit_scale: torch.Tensor  # () already exponentiated: the inverse temperature
    logit_bias: torch.Tensor | None  # () of the sigmoid loss


class DualEncoder(nn.Module):
    """A stock dual encoder as training sees it: uint8 pixels in, `Embeddings` out.

    The sigmoid loss learns a bias that no stock class has a place for. It lives here, beside the model, and is
    published as `logit_bias` in config.json, which rankings do not need and probabilities do.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, logit_bias: float | None = None) -> None:
        super().__init__()
        self.model = model
        images = processor.image_processor
        self.register_buffer("pixel_mean", 255 * torch.tensor(images.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(images.image_std).view(3, 1, 1), persistent=False)
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> Embeddings:
        """Embed B pairs: pixels (B, 3, H, W) uint8, ids and mask (B, L)."""
        pixels = (pixel_values.float() - self.pixel_mean) / self.pixel_std
        return Embeddings(
            image=encode_images(self.model, pixels),
            text=encode_texts(self.model, input_ids, attention_mask),
            logit_scale=self.model.logit_scale.exp(),
            logit_bias=self.logit_bias,
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature at 0.01 or above, as the paper does after every step."""
        self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def encode_images(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return unit-norm image embeddings (B, D) of normalised pixels (B, 3, H, W)."""
    features = model.get_image_features(pixel_values=pixel_values).pooler_output
    return F.normalize(features, dim=-1)


def encode_texts(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Return unit-norm text embeddings (B, D) of ids and mask (B, L)."""
    features = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
    return F.normalize(features, dim=-1)


def from_scratch(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a stock dual encoder with random weights, and its processor.

    Raises:
        ConfigError: the sizes do not fit together.
        ValueError: the tokenizer and CLIP's text tower would disagree.
    """
    preset = resolve(config)
    text = text_config(preset, tokenizer)
    logit_scale = math.log(1 / config.temperature)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if preset.image_tower == "vit":
            model: PreTrainedModel = CLIPModel(_clip_config(preset, text, logit_scale))
        else:
            model = _around_image_tower(preset, text, logit_scale)
        _initialize(model)
    if config.patch_dropout:
        drop_patches(model.vision_model, config.patch_dropout)
    for tower, recompute in (
        (model.vision_model, config.image_gradient_checkpointing),
        (model.text_model, config.text_gradient_checkpointing),
    ):
        if recompute:
            tower.gradient_checkpointing_enable()
    return model, _processor(preset, model, tokenizer)


def text_config(preset: Preset, tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    """Return the text tower's config with the tokenizer's own ids.

    Raises:
        ValueError: ids that would silently ruin the text embedding.
    """
    if tokenizer.eos_token_id == LEGACY_EOS_ID:
        raise ValueError(
            "the tokenizer's end token has id 2, for which transformers' CLIP pools at the largest id instead of at "
            "the end: train a tokenizer (leave tokenizer.path out) or give its end token another id"
        )
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.text_width,
        intermediate_size=4 * preset.text_width,
        num_hidden_layers=preset.text_layers,
        num_attention_heads=preset.text_width // preset.head_width,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=preset.embed_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if a model and a tokenizer disagree on ids or on the longest text."""
    text = model.config.text_config
    for name in ("eos_token_id", "pad_token_id"):
        ours, theirs = getattr(text, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ValueError(f"the model's text_config.{name} is {ours}, the tokenizer's is {theirs}; they must be equal")
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary {text.vocab_size}")
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise ValueError(
            f"the tokenizer lets {tokenizer.model_max_length} tokens pass, the model has "
            f"{text.max_position_embeddings} positions; lower tokenizer.max_tokens"
        )


def _clip_config(preset: Preset, text: CLIPTextConfig, logit_scale: float) -> CLIPConfig:
    vision = {
        "hidden_size": preset.image_width,
        "intermediate_size": 4 * preset.image_width,
        "num_hidden_layers": preset.image_layers,
        "num_attention_heads": preset.image_width // preset.head_width,
        "image_size": preset.image_size,
        "patch_size": preset.patch_size,
        "projection_dim": preset.embed_dim,
    }
    return CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        projection_dim=preset.embed_dim,
        logit_scale_init_value=logit_scale,
    )


def _around_image_tower(preset: Preset, text: CLIPTextConfig, logit_scale: float) -> VisionTextDualEncoderModel:
    """Build CLIP's text transformer beside any image tower with a pooled output."""
    if preset.image_tower.startswith("auto:"):
        vision_config = AutoConfig.from_pretrained(preset.image_tower.removeprefix("auto:"))
    else:
        vision_config = TimmWrapperConfig(architecture=preset.image_tower, do_pooling=True)
    image_tower = AutoModel.from_config(vision_config)
    if isinstance(vision_config, TimmWrapperConfig):
        # The joint class sizes its projection by hidden_size, which this config does not have by itself.
        vision_config.hidden_size = image_tower.timm_model.head_hidden_size
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision_config, text, projection_dim=preset.embed_dim, logit_scale_init_value=logit_scale
    )
    return VisionTextDualEncoderModel(config=config, vision_model=image_tower, text_model=CLIPTextModel(text))


@torch.no_grad()
def _initialize(model: PreTrainedModel) -> None:
    """Initialise as the paper's code does: residual branches shrink with depth, projections with width.

    transformers swaps the standard deviations of the layers that read the residual stream and those that write it.
    Source: github.com/openai/CLIP, clip/model.py, `CLIP.initialize_parameters`.
    """
    for tower in (model.vision_model, model.text_model):
        layers = [module for module in tower.modules() if type(module).__name__ == "CLIPEncoderLayer"]
        for layer in layers:
            width = layer.embed_dim
            write = width**-0.5 * (2 * len(layers)) ** -0.5
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.normal_(layer.self_attn.out_proj.weight, std=write)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(layer.mlp.fc2.weight, std=write)
    for projection in (model.visual_projection, model.text_projection):
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)


def _processor(preset: Preset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    size = preset.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    if isinstance(model, CLIPModel):
        return CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    return VisionTextDualEncoderProcessor(image_processor=images, tokenizer=tokenizer)
