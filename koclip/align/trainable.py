"""Which parameters a stage of an alignment trains."""

from transformers import PreTrainedModel

from koclip.config import AlignConfig, ConfigError, Stage
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import StockModel, is_stock, parts
from koclip.optim import depth


def set_trainable(encoder: DualEncoder, config: AlignConfig, stage: Stage, clip: StockModel | PreTrainedModel) -> None:
    """Set `requires_grad` for a stage that trains weights. Adapters need no such call: PEFT sets it.

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
    contrasted = stage.images or bool(stage.distill and stage.distill.contrastive)
    model.logit_scale.requires_grad_(contrasted and (stage.trains_image or not is_stock(clip)))
    if encoder.logit_bias is not None:
        encoder.logit_bias.requires_grad_(contrasted)
    depths, top = depth(model.image_tower), config.align.image_layers
    if top is not None and top >= max(depths.values()):
        most = max(depths.values()) - 1
        raise ConfigError(f"align.image_layers: got {top}, the image tower has {most} layers; leave it out for all")
    for name, parameter in model.image_tower.named_parameters():
        trained = stage.trains_image and (top is None or depths[name] <= top)
        # DDP stops at parameters without a gradient: this one is of masked-image training.
        parameter.requires_grad_(trained and not name.endswith("mask_token"))
