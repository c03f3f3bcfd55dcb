"""Build stock dual encoders with random weights, and embed pairs with them.

A ViT and CLIP's text transformer form a `CLIPModel`. Any other image tower, such as the paper's ResNets, goes into a
`VisionTextDualEncoderModel`, which holds any pair.

Letters in shape comments: B pairs per process, N pairs in the global batch, L tokens, D embedding width, H W pixels.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from koclip.config import ConfigError, ModelConfig, check
from koclip.losses.contrastive import Embeddings
from koclip.models.presets import Preset, initialize, resolve, tower_config
from koclip.models.stock import StockModel, bias_of, layout_of, parts, positions, set_part
from koclip.text import tokenizers

MAX_LOGIT_SCALE = math.log(100)  # the paper's cap on the temperature


class DualEncoder(nn.Module):
    """A stock dual encoder for training: uint8 pixels in, `Embeddings` out.

    The sigmoid loss learns a bias. Most stock classes have no parameter for it, so it is a parameter of this module and
    is saved to `Layout.logit_bias`. Probabilities depend on it, rankings do not. `logit_bias` is its initial value if
    the model has none; None: a loss without bias.

    Raises:
        ConfigError: the ids or the longest text of the model and the processor's tokenizer differ.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: StockModel, processor: ProcessorMixin, logit_bias: float | None = None) -> None:
        super().__init__()
        check_tokenizer(model, processor.tokenizer)
        self.model = model
        layout = layout_of(model)  # its paths are stored here because `forward` is compiled
        self._scale_name = layout.logit_scale
        self._projections = {"image": layout.image_projection or "", "text": layout.text_projection or ""}
        # A source may have a larger scale; SigLIP's is about 117.
        self.max_logit_scale = max(MAX_LOGIT_SCALE, parts(model).logit_scale.item())
        images = processor.image_processor
        self.register_buffer("pixel_mean", 255 * torch.tensor(images.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(images.image_std).view(3, 1, 1), persistent=False)
        self.logit_bias: nn.Parameter | None = None
        if logit_bias is not None:
            own = bias_of(model)
            self.logit_bias = nn.Parameter(torch.tensor(logit_bias if own is None else own))
        if layout.has_bias_parameter:
            model.logit_bias.requires_grad_(False)  # the parameter of this module replaces it

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_norm: torch.Tensor | None = None,
        image_pooled: torch.Tensor | None = None,
        text_pooled: torch.Tensor | None = None,
    ) -> Embeddings:
        """Embed B pairs.

        Args:
            pixel_values: (B, 3, H, W) uint8; None without images, or if `image` is given.
            input_ids: (B, L).
            attention_mask: (B, L).
            image: (B, D) unit-norm embeddings. If given, the image tower does not run.
            text: (B, D) unit-norm embeddings. If given, the text tower does not run.
            text_norm: (B,) norms of the text features; needed if `text` is given.
            image_pooled: (B, W) inputs of the image projection. If given, only the projection runs.
            text_pooled: (B, W) inputs of the text projection. If given, only the projection runs.
        """
        if image is None and image_pooled is not None:
            image = F.normalize(self._project("image", image_pooled), dim=-1)
        elif image is None and pixel_values is not None:
            image = encode_images(self.model, self.normalized(pixel_values))
        if text is None:
            if text_pooled is None:
                features = text_features(self.model, input_ids, attention_mask)
            else:
                features = self._project("text", text_pooled)
            text, text_norm = F.normalize(features, dim=-1), features.norm(dim=-1)
        return Embeddings(
            image=text.new_empty(len(text), 0) if image is None else image,
            text=text,
            logit_scale=getattr(self.model, self._scale_name).exp().reshape(()),
            logit_bias=None if self.logit_bias is None else self.logit_bias.reshape(()),
            text_norm=text_norm,
        )

    def normalized(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, 3, H, W) uint8, normalised for the image tower."""
        return (pixel_values.float() - self.pixel_mean) / self.pixel_std

    def _project(self, side: Literal["image", "text"], pooled: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.get_submodule(self._projections[side])(pooled)
        return features.float()

    def trains(self, side: Literal["image", "text"]) -> bool:
        """Return whether any parameter of the image or the text side is trained."""
        layout = layout_of(self.model)
        modules = map(self.model.get_submodule, layout.image_side if side == "image" else layout.text_side)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def trains_tower(self, side: Literal["image", "text"]) -> bool:
        """Return whether any parameter of the image or the text tower is trained, without its projection."""
        towers = parts(self.model)
        tower = towers.image_tower if side == "image" else towers.text_tower
        return any(parameter.requires_grad for parameter in tower.parameters())

    def trains_projection(self, side: Literal["image", "text"]) -> bool:
        """Return whether the projection is trained, but not its tower."""
        return self.trains(side) and not self.trains_tower(side)

    def train(self, mode: bool = True) -> "DualEncoder":
        """Set training mode. Frozen towers and frozen layers stay in evaluation mode, without dropout."""
        super().train(mode)
        for tower in (parts(self.model).image_tower, parts(self.model).text_tower):
            for module in tower.modules():
                weights = list(module.parameters())
                if weights and not any(weight.requires_grad for weight in weights):
                    module.eval()
        return self

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Limit the scale to 100, as in the paper, or to the source's scale if it is larger. Call it each step."""
        parts(self.model).logit_scale.clamp_(max=self.max_logit_scale)

    @torch.no_grad()
    def logit_scale(self) -> float:
        """Return the inverse temperature. Call it on every process: under FSDP2, only one process stores the value."""
        value: Any = parts(self.model).logit_scale
        return float((value.full_tensor() if isinstance(value, DTensor) else value).exp().item())

    def lift_scalars(self) -> None:
        """Give the logit scale and bias one dimension, because FSDP2 cannot shard scalars."""
        scale, bias = parts(self.model).logit_scale, self.logit_bias
        lifted = nn.Parameter(scale.detach().reshape(1), scale.requires_grad)
        set_part(self.model, layout_of(self.model).logit_scale, lifted)
        if bias is not None:
            self.logit_bias = nn.Parameter(bias.detach().reshape(1), bias.requires_grad)


def encode_images(model: StockModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return unit-norm float32 image embeddings (B, D) of normalised pixels (B, 3, H, W)."""
    features = model.get_image_features(pixel_values=pixel_values).pooler_output
    return F.normalize(features.float(), dim=-1)


def encode_texts(model: StockModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return unit-norm float32 text embeddings (B, D) of ids and mask (B, L)."""
    return F.normalize(text_features(model, input_ids, attention_mask), dim=-1)


def text_features(model: StockModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return float32 text features (B, D) of ids and mask (B, L), not normalised."""
    mask = attention_mask if layout_of(model).reads_mask else None
    features: torch.Tensor = model.get_text_features(input_ids=input_ids, attention_mask=mask).pooler_output
    return features.float()


def pooled_images(model: StockModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the float32 inputs of the image projection (B, W) for normalised pixels (B, 3, H, W)."""
    return _input_of(parts(model).image_projection, lambda: model.get_image_features(pixel_values=pixel_values))


def pooled_texts(model: StockModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the float32 inputs of the text projection (B, W) for ids and mask (B, L)."""
    return _input_of(parts(model).text_projection, lambda: text_features(model, input_ids, attention_mask))


def _input_of(projection: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """Return what a projection gets while `run` embeds. A hook, because each class pools in its own way."""
    inputs: list[torch.Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        run()
    finally:
        hook.remove()
    return inputs[0].float()


def from_scratch(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[StockModel, ProcessorMixin]:
    """Return a stock dual encoder with random weights, and its processor. The same seed gives the same weights.

    Raises:
        ConfigError: the sizes do not fit together, or CLIP's text tower cannot use the tokenizer.
    """
    preset = resolve(config)
    text = text_config(preset, tokenizer)
    logit_scale = math.log(1 / config.temperature)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if preset.image_tower == "vit":
            model, image_size = _clip(preset, text, logit_scale), preset.image_size
        else:
            model, image_size = _around_image_tower(preset, text, logit_scale)
        initialize(model)
    if config.patch_dropout:
        drop_patches(parts(model).image_tower, config.patch_dropout)
    checkpoint_gradients(model, config.image_gradient_checkpointing, config.text_gradient_checkpointing)
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    kind: Any = layout_of(model).processor_class
    return model, kind(image_processor=images, tokenizer=tokenizer)


def checkpoint_gradients(model: StockModel, image: bool, text: bool) -> None:
    """Make towers recompute their activations in the backward pass.

    Raises:
        ConfigError: a tower does not support this.
    """
    for name, tower, recompute in (("image", parts(model).image_tower, image), ("text", parts(model).text_tower, text)):
        if recompute:
            key, expected = f"model.{name}_gradient_checkpointing", f"a {type(tower).__name__} needs false"
            check(tower.supports_gradient_checkpointing, key, recompute, expected)
            tower.activation_checkpointing_enable({"use_reentrant": False})


def text_config(preset: Preset, tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    """Return the text tower's config with the tokenizer's ids.

    Raises:
        ConfigError: the ids would give wrong text embeddings without an error.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name in ("eos_token_id", "pad_token_id"):
        if ids[name] is None:
            raise ConfigError(f"tokenizer.path: the tokenizer has no {name}, expected one for CLIP's text tower")
    if ids["eos_token_id"] == tokenizers.LEGACY_EOS_ID:
        raise ConfigError(
            "tokenizer.path: the tokenizer's end token has id 2, expected another id: with 2, CLIP of transformers "
            "reads the largest id instead of the end token. Leave tokenizer.path out to train a tokenizer"
        )
    return CLIPTextConfig(
        vocab_size=1 + max(tokenizer.get_vocab().values()),
        hidden_size=preset.text_width,
        intermediate_size=4 * preset.text_width,
        num_hidden_layers=preset.text_layers,
        num_attention_heads=preset.text_width // preset.head_width,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=preset.embed_dim,
        **ids,
    )


def check_tokenizer(model: StockModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model and a tokenizer have the same ids and that the longest text fits.

    Otherwise embeddings would be wrong without an error.

    Raises:
        ConfigError: they do not fit together.
    """
    text: Any = model.config.text_config
    problems = tokenizers.differing_ids(tokenizer, text)
    if problems:
        raise ConfigError(f"the model and the tokenizer differ: {'; '.join(problems)}. Make them equal")
    # T5 has no limit; RoBERTa has fewer positions than its configuration says, because it does not use the first rows.
    limits = [getattr(text, "max_position_embeddings", None), *map(len, positions(parts(model).text_tower).values())]
    longest = min((limit for limit in limits if limit is not None), default=tokenizer.model_max_length)
    if tokenizer.model_max_length > longest:
        raise ConfigError(
            f"the tokenizer allows {tokenizer.model_max_length} tokens, the model has {longest} positions; lower "
            "tokenizer.max_tokens"
        )


def _clip(preset: Preset, text: CLIPTextConfig, logit_scale: float) -> StockModel:
    vision = {
        "hidden_size": preset.image_width,
        "intermediate_size": 4 * preset.image_width,
        "num_hidden_layers": preset.image_layers,
        "num_attention_heads": preset.image_width // preset.head_width,
        "image_size": preset.image_size,
        "patch_size": preset.patch_size,
        "projection_dim": preset.embed_dim,
    }
    shared: dict[str, Any] = {"projection_dim": preset.embed_dim, "logit_scale_init_value": logit_scale}
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, **shared))


def _around_image_tower(preset: Preset, text: CLIPTextConfig, logit_scale: float) -> tuple[StockModel, int]:
    """Build CLIP's text transformer beside any image tower. Also return the image size, pixels."""
    vision, image_size = tower_config(preset.image_tower, preset.image_size)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=preset.embed_dim, logit_scale_init_value=logit_scale
    )
    image_tower = AutoModel.from_config(vision)
    for name, parameter in image_tower.named_parameters():
        if name.endswith("mask_token"):  # for masked-image training; DDP fails on parameters without a gradient
            parameter.requires_grad_(False)
    return VisionTextDualEncoderModel(config, vision_model=image_tower, text_model=CLIPTextModel(text)), image_size


def drop_patches(vision_model: nn.Module, share: float) -> None:
    """Make a CLIP ViT drop random patches in training mode. In evaluation mode it sees all patches.

    This makes steps faster, and regularises on small data (FLIP, Li et al. 2023). A forward hook on the embeddings of
    the `CLIPVisionModel` drops a `share` of 0 to 1 of the patches. The class token and at least one patch stay.
    """
    vision_model.get_submodule("embeddings").register_forward_hook(partial(_keep_some, share))


def _keep_some(share: float, module: nn.Module, _: object, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the class token and a random subset of the patches (B, 1 + kept, D), another subset for each image."""
    if not module.training:
        return None
    batch, length, width = tokens.shape
    kept = max(1, round((length - 1) * (1 - share)))
    chosen = torch.rand(batch, length - 1, device=tokens.device).argsort(dim=1)[:, :kept] + 1
    with_class = torch.cat([chosen.new_zeros(batch, 1), chosen], dim=1)
    return tokens.gather(1, with_class[..., None].expand(-1, -1, width))
