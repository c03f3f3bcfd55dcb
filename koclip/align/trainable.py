"""Which parameters a stage of an alignment trains, and how far below the output each of them is."""

from torch import nn
from transformers import PreTrainedModel

from koclip.config import AlignConfig, ConfigError, Stage
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import StockModel, is_stock, layout_of, parts


def select(encoder: DualEncoder, config: AlignConfig, stage: Stage, clip: StockModel | PreTrainedModel) -> None:
    """Set which parameters are trained in a stage of any method but `lora`, whose adapters say so themselves.

    Args:
        encoder: The dual encoder.
        config: The method, and how many layers of the image tower it trains.
        stage: The stage.
        clip: The source. Its logit scale stays but in `full`; an image tower alone has none, the new one is trained.

    Raises:
        ConfigError: the image tower has fewer layers than `align.image_layers` names.
    """
    model = parts(encoder.model)
    for module in (model.text_tower, model.text_projection):
        module.requires_grad_(True)
    model.image_projection.requires_grad_(stage.trains_image)
    contrasted = stage.images or bool(config.distill.contrastive)
    model.logit_scale.requires_grad_(contrasted and (stage.trains_image or not is_stock(clip)))
    if encoder.logit_bias is not None:
        encoder.logit_bias.requires_grad_(contrasted)
    depths, top = depth(model.image_tower), config.align.image_layers
    if top is not None and top >= max(depths.values()):
        most = max(depths.values()) - 1
        raise ConfigError(f"align.image_layers: got {top}, the image tower has {most} layers; leave it out for all")
    for name, parameter in model.image_tower.named_parameters():
        wanted = stage.trains_image and (top is None or depths[name] <= top)
        # DDP stops at parameters without a gradient: this one is of masked-image training.
        parameter.requires_grad_(wanted and not name.endswith("mask_token"))


def depth(tower: nn.Module) -> dict[str, int]:
    """Return how deep below a tower's output each parameter is: 0 above its layers, 1 in the top one, and so on.

    Its layers are the longest list of modules in it; embeddings are below the lowest.
    """
    lists = {
        name: module for name, module in tower.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    if not lists:
        return {name: 0 for name, _ in tower.named_parameters()}
    prefix = max(lists, key=lambda name: len(list(lists[name].children())))
    count = len(list(lists[prefix].children()))
    depths, below = {}, True
    for name, _ in tower.named_parameters():
        inside = name.startswith(f"{prefix}.")
        below = below and not inside
        number = int(name[len(prefix) + 1 :].split(".")[0]) if inside else 0
        depths[name] = count - number if inside else (count + 1 if below else 0)
    return depths


def layer_rates(encoder: DualEncoder, decay: float) -> dict[str, float]:
    """Return each parameter's learning rate as a share of the peak: decay ** depth, in both towers (as in BEiT)."""
    rates: dict[str, float] = {}
    layout = layout_of(encoder.model)
    for side in (layout.image_tower, layout.text_tower):
        depths = depth(encoder.model.get_submodule(side))
        rates |= {f"model.{side}.{name}": decay**below for name, below in depths.items()}
    return rates
