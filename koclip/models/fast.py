"""Faster layers for stock models: the same weights, embeddings and gradients with less computation.

The state dict, the saved config and the class of the model stay stock. `train.fast: false` turns this off.

This module replaces layers of transformers and reads their attributes, which other versions may rename. pyproject.toml
limits the version, and tests/test_fast.py checks that every attribute used here exists.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    ChineseCLIPTextModel,
    ChineseCLIPVisionModel,
    CLIPTextModel,
    CLIPVisionModel,
    PreTrainedModel,
)
from transformers.activations import QuickGELUActivation
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextLayer, ChineseCLIPVisionLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from koclip.text.tokenizers import LEGACY_EOS_ID

SHORT_SEQUENCE = 128  # tokens; up to this length, plain attention is faster than the fused kernel on a CPU


def speed_up(model: PreTrainedModel, device: torch.device) -> None:
    """Replace layers of `model` by faster layers for `device`, in place. A second call changes nothing.

    The embeddings stay correct, but the `last_hidden_state` of the towers is valid for the embedded token only.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_patch_embedding(module):
            module.__class__ = PatchEmbedding
        elif isinstance(module, QuickGELUActivation):
            module.__class__ = QuickGELU
        elif isinstance(module, CLIPTextModel | CLIPVisionModel | ChineseCLIPTextModel | ChineseCLIPVisionModel):
            _compute_one_token(module)
            if device.type == "cpu" and _prefers_plain_attention(module):
                module.set_attn_implementation("eager")


def _compute_one_token(tower: Any) -> None:
    layers = tower.encoder.layer if isinstance(tower, ChineseCLIPTextModel) else tower.encoder.layers
    if isinstance(layers[-1], LastLayer | LastTextLayer):
        return
    kinds = {
        CLIPTextModel: LastEndLayer,
        ChineseCLIPTextModel: LastTextLayer,
        ChineseCLIPVisionModel: LastImageLayer,
    }
    layers[-1].__class__ = kinds.get(type(tower), LastLayer)
    if isinstance(tower, CLIPTextModel):
        tower.register_forward_pre_hook(_name_the_end, with_kwargs=True)


def _prefers_plain_attention(tower: Any) -> bool:
    """Return whether sequences are so short that plain attention is faster than PyTorch's fused kernel on a CPU."""
    if isinstance(tower, ChineseCLIPTextModel):
        return True  # captions are short for any number of positions; the fused kernel has no attention dropout
    if isinstance(tower, CLIPTextModel):
        return int(tower.config.max_position_embeddings) <= SHORT_SEQUENCE
    return int((tower.config.image_size // tower.config.patch_size) ** 2 + 1) <= SHORT_SEQUENCE


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride equals its kernel, as a reshape and a matrix product, which is faster on CPUs."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed (B, C, H, W) as (B, D, H // patch, W // patch). Incomplete patches at the edges are ignored."""
        batch, channels, height, width = pixel_values.shape
        side = self.kernel_size[0]
        rows, columns = height // side, width // side
        whole = pixel_values[:, :, : rows * side, : columns * side]
        patches = whole.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch, rows, columns, channels * side * side)
        return F.linear(flat, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class QuickGELU(QuickGELUActivation):
    """x * sigmoid(1.702 x) = silu(1.702 x) / 1.702. It saves one tensor for the backward pass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply it to a tensor of any shape."""
        activated: torch.Tensor = _QuickGELU.apply(input)
        return activated


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        scaled = 1.702 * input
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (scaled,) = ctx.saved_tensors
        gradient: torch.Tensor = torch.ops.aten.silu_backward(gradients[0], scaled)  # the factors 1.702 cancel
        return gradient


class LastLayer(CLIPEncoderLayer):
    """A tower's last layer, computed only for the token that CLIP embeds: the class token or the end token.

    Keys and values need all tokens; they are two twelfths of a layer's matrix products.
    """

    needs_end = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Return the token's output (B, D), repeated to (B, L, D), for hidden states (B, L, D).

        `end` (B,) is the position of each text's end token; None for images. `attention_mask` is not used: the end
        token attends to all tokens before it, and padding comes after it.

        Raises:
            RuntimeError: this is a text layer, and transformers did not pass `end` on.
        """
        if end is None and self.needs_end:
            version = transformers.__version__
            raise RuntimeError(f"train.fast: transformers {version} did not pass `end` to the text layers: set false")
        attention, normed = self.self_attn, self.layer_norm1(hidden_states)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        index = 0 if end is None else end
        query = attention.q_proj(normed[rows, index]).unsqueeze(1)  # (B, 1, D)
        query, keys, values = (
            tensor.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for tensor in (query, attention.k_proj(normed), attention.v_proj(normed))
        )  # (B, heads, 1 or L, head width)
        seen = None
        if end is not None:
            indices = torch.arange(hidden_states.shape[1], device=end.device)
            seen = (indices <= end[:, None])[:, None, None]  # (B, 1, 1, L)
        dropout = (attention.dropout or 0.0) if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, keys, values, seen, dropout, scale=attention.scale)
        token: torch.Tensor = hidden_states[rows, index] + attention.out_proj(mixed.flatten(1))  # (B, D)
        token = token + self.mlp(self.layer_norm2(token))
        return token.unsqueeze(1).expand_as(hidden_states)


class LastEndLayer(LastLayer):
    """The last layer of CLIP's text tower, computed for the end token."""

    needs_end = True


class LastImageLayer(LastLayer, ChineseCLIPVisionLayer):  # type: ignore[misc]  # equal attributes
    """The last layer of a `ChineseCLIPModel`'s image tower, which computes the same as CLIP's."""


class LastTextLayer(ChineseCLIPTextLayer):
    """The last layer of a BERT text tower, computed for the first token only, which is the embedded token."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> torch.Tensor:
        """Return the first token's output (B, D), repeated to (B, L, D), for hidden states (B, L, D).

        `attention_mask` is (B, 1, L, L), bool or added to the scores; None without padding.
        """
        attention, first = self.attention.self, hidden_states[:, :1]
        query, keys, values = (
            tensor.unflatten(-1, (attention.num_attention_heads, attention.attention_head_size)).transpose(1, 2)
            for tensor in (attention.query(first), attention.key(hidden_states), attention.value(hidden_states))
        )  # (B, heads, 1 or L, head width)
        seen = None if attention_mask is None else attention_mask[:, :, :1]  # (B, 1, 1, L)
        dropout = attention.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, keys, values, seen, dropout, scale=attention.scaling)
        token: torch.Tensor = self.attention.output(mixed.transpose(1, 2).flatten(2), first)  # (B, 1, D)
        token = self.output(self.intermediate(token), token)
        return token.expand_as(hidden_states)


def _name_the_end(
    text_model: CLIPTextModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the position of each text's end token to the layers, computed as in CLIP's pooling."""
    input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    is_end = input_ids if text_model.eos_token_id == LEGACY_EOS_ID else (input_ids == text_model.eos_token_id).int()
    return args, kwargs | {"end": is_end.argmax(dim=-1)}


def _is_patch_embedding(conv: nn.Conv2d) -> bool:
    square = conv.kernel_size == conv.stride and len(set(conv.kernel_size)) == 1
    plain = conv.groups == 1 and conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1)
    return square and plain and conv.kernel_size[0] > 1
