"""Faster ways through a stock model: the same weights, the same embeddings and gradients, less work.

The state dict, the saved config and the class of the model stay stock. `train.fast: false` turns this off.

It replaces layers of transformers and reads their attributes, which other versions may rename. pyproject.toml limits
the version, and tests/test_fast.py checks that every name that is read here exists.
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

SHORT_SEQUENCE = 128  # tokens; on a CPU plain attention beats the fused kernel below this


def speed_up(model: PreTrainedModel, device: torch.device) -> None:
    """Switch `model` to what is fastest on `device`, in place; a second call changes nothing.

    Its towers then give embeddings only: the other tokens of their `last_hidden_state` mean nothing.
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
    """Return whether plain attention is faster than PyTorch's fused kernel on a CPU: where sequences are short."""
    if isinstance(tower, ChineseCLIPTextModel):
        return True  # captions are short, whatever the number of positions; and the kernel has no attention dropout
    if isinstance(tower, CLIPTextModel):
        return int(tower.config.max_position_embeddings) <= SHORT_SEQUENCE
    return int((tower.config.image_size // tower.config.patch_size) ** 2 + 1) <= SHORT_SEQUENCE


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel, as a reshape and a matrix product (slow as a convolution on CPUs)."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed (B, C, H, W) as (B, D, H // patch, W // patch); pixels left over at the edges are not used."""
        batch, channels, height, width = pixel_values.shape
        side = self.kernel_size[0]
        rows, columns = height // side, width // side
        whole = pixel_values[:, :, : rows * side, : columns * side]
        patches = whole.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch, rows, columns, channels * side * side)
        return F.linear(flat, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class QuickGELU(QuickGELUActivation):
    """x * sigmoid(1.702 x), which is silu(1.702 x) / 1.702, keeping one tensor for the backward pass."""

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
    """A tower's last layer, computed for the one token that CLIP reads: the class token or the end of the text.

    Of a layer's matrix products only two in twelve parts, the keys and the values, need the other tokens.
    """

    needs_end = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Return that token in every place, (B, L, D), for hidden states (B, L, D).

        Args:
            hidden_states: (B, L, D) from the layer before.
            attention_mask: Not used: a text's end sees every token up to itself, and padding comes after it.
            end: (B,) where each text ends; None for images.

        Raises:
            RuntimeError: this is a text's layer, and `end` did not arrive. Without it the first token would be read.
        """
        if end is None and self.needs_end:
            version = transformers.__version__
            raise RuntimeError(f"train.fast: transformers {version} did not pass `end` to the text layers: set false")
        attention, normed = self.self_attn, self.layer_norm1(hidden_states)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        place = 0 if end is None else end
        query = attention.q_proj(normed[rows, place]).unsqueeze(1)  # (B, 1, D)
        query, keys, values = (
            tensor.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for tensor in (query, attention.k_proj(normed), attention.v_proj(normed))
        )  # (B, heads, 1 or L, head width)
        seen = None
        if end is not None:
            places = torch.arange(hidden_states.shape[1], device=end.device)
            seen = (places <= end[:, None])[:, None, None]  # (B, 1, 1, L)
        dropout = (attention.dropout or 0.0) if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, keys, values, seen, dropout, scale=attention.scale)
        token: torch.Tensor = hidden_states[rows, place] + attention.out_proj(mixed.flatten(1))  # (B, D)
        token = token + self.mlp(self.layer_norm2(token))
        return token.unsqueeze(1).expand_as(hidden_states)


class LastEndLayer(LastLayer):
    """The last layer of CLIP's text tower, computed for the end of each text."""

    needs_end = True


class LastImageLayer(LastLayer, ChineseCLIPVisionLayer):  # type: ignore[misc]  # equal attributes
    """The same of the image tower of a `ChineseCLIPModel`, which is CLIP's under other names."""


class LastTextLayer(ChineseCLIPTextLayer):
    """The last layer of a BERT text tower, computed for the first token only, which alone is projected."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> torch.Tensor:
        """Return the first token in every place, (B, L, D), for hidden states (B, L, D).

        Args:
            hidden_states: (B, L, D) from the layer before.
            attention_mask: (B, 1, L, L), bool or added to the scores; None where there is no padding.
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
    """Pass the place where each text ends to the layers, as CLIP's own pooling computes it."""
    input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    is_end = input_ids if text_model.eos_token_id == LEGACY_EOS_ID else (input_ids == text_model.eos_token_id).int()
    return args, kwargs | {"end": is_end.argmax(dim=-1)}


def _is_patch_embedding(conv: nn.Conv2d) -> bool:
    square = conv.kernel_size == conv.stride and len(set(conv.kernel_size)) == 1
    plain = conv.groups == 1 and conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1)
    return square and plain and conv.kernel_size[0] > 1
