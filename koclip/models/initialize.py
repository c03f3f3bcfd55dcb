"""Initial weights as in the paper's code: github.com/openai/CLIP, clip/model.py.

Its `CLIP.initialize_parameters` gives the text transformer's layers below; residual branches shrink with depth. It
leaves the ViT's layers at PyTorch's defaults; here they have the text transformer's, scaled to their own width and
depth. (transformers' `CLIPModel` gives the layers that read the residual stream the deviation of those that write to
it, and the other way round.)
"""

import timm
import torch
from torch import nn
from transformers import TimmWrapperModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextEmbeddings, CLIPVisionEmbeddings

from koclip.models.stock import StockModel, parts


@torch.no_grad()
def initialize(model: StockModel) -> None:
    """Draw the weights of a dual encoder again, in place: CLIP's towers, timm's, and the two projections.

    Other towers keep what transformers gave them.
    """
    image_tower, text_tower, *projections, _ = parts(model)
    initialize_tower(image_tower)
    initialize_tower(text_tower)
    if isinstance(image_tower, TimmWrapperModel):
        _restore_timm(image_tower)
    for projection in projections:
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)


@torch.no_grad()
def initialize_tower(tower: nn.Module) -> None:
    """Draw the weights of a CLIP tower again, in place. Towers of other classes are not changed."""
    layers = [module for module in tower.modules() if isinstance(module, CLIPEncoderLayer)]
    for layer in layers:
        _initialize_layer(layer, depth=len(layers))
    for module in tower.modules():
        _initialize_embeddings(module)


def _initialize_layer(layer: CLIPEncoderLayer, depth: int) -> None:
    width = layer.embed_dim
    write = width**-0.5 * (2 * depth) ** -0.5
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        nn.init.normal_(linear.weight, std=width**-0.5)
    nn.init.normal_(layer.self_attn.out_proj.weight, std=write)
    nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(layer.mlp.fc2.weight, std=write)


def _initialize_embeddings(module: nn.Module) -> None:
    if isinstance(module, CLIPTextEmbeddings):
        nn.init.normal_(module.token_embedding.weight, std=0.02)
        nn.init.normal_(module.position_embedding.weight, std=0.01)
    elif isinstance(module, CLIPVisionEmbeddings):
        module.patch_embedding.reset_parameters()
        nn.init.normal_(module.class_embedding, std=module.embed_dim**-0.5)
        nn.init.normal_(module.position_embedding.weight, std=module.embed_dim**-0.5)


def _restore_timm(tower: TimmWrapperModel) -> None:
    """Give a timm tower timm's own initial weights.

    transformers draws every layer again with a standard deviation of 0.02, under which a deep ResNet hardly learns.
    """
    fresh = timm.create_model(tower.config.architecture, num_classes=0, **(tower.config.model_args or {}))
    tower.timm_model.load_state_dict(fresh.state_dict())
