"""The methods of alignment: how each method changes a model before, during and after training.

`koclip.config.METHODS` has the stages of each method. A new method needs an entry in both tables; a test compares their
names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from koclip.align import lora
from koclip.align.unused import freeze_unused
from koclip.config import AlignConfig, ConfigError, Stage, SwapConfig, check
from koclip.models.dual_encoder import DualEncoder, checkpoint_gradients, text_config
from koclip.models.presets import HEAD_WIDTH, Preset, initialize_tower
from koclip.models.pretrained import load_text_encoder, own_pooling, take_padding
from koclip.models.router import Pooling
from koclip.models.stock import StockModel, bias_of, is_stock, layout_of, parts, save_stock_model
from koclip.models.swap import swap_text_tower
from koclip.optim import depth
from koclip.text import tokenizers

MANY_PIECES = 50_000  # a pretrained text encoder with more keeps its token embeddings, unless a run says otherwise
Source: TypeAlias = StockModel | PreTrainedModel  # a dual encoder, or an image tower alone
Weights: TypeAlias = dict[str, torch.Tensor]


def text_encoder(config: SwapConfig, clip: Source) -> PreTrainedModel | None:
    """Return the text encoder of `config`; None: a new text transformer.

    Raises:
        ConfigError: the encoder cannot be loaded, or it is `same` and the source is an image tower alone.
    """
    if config.text_encoder is None:
        return None
    if config.text_encoder != "same":
        return load_text_encoder(config.text_encoder, config.seed)
    if not is_stock(clip):
        raise ConfigError(f"model.text_encoder: got `same`, but {_alone(config.clip, clip)}: name a text encoder")
    own: PreTrainedModel = parts(clip).text_tower
    return own


def text_pooling(config: SwapConfig) -> Pooling:
    """Return the pooling of a new text encoder: that of `config`, else the encoder's own, else `first`.

    Raises:
        ConfigError: the encoder's own pooling is another.
    """
    if config.text_encoder in (None, "same"):
        return "first"
    return config.pooling or own_pooling(config.text_encoder) or "first"


def pooling_report(config: SwapConfig) -> str | None:
    """Return one line with the pooling of a new text encoder and where it comes from; None without a new encoder."""
    if config.text_encoder in (None, "same"):
        return None
    own = None if config.pooling else own_pooling(config.text_encoder)
    origin = "model.pooling" if config.pooling else f"as {config.text_encoder} says" if own else "the default"
    return f"Pooling of texts: {config.pooling or own or 'first'} ({origin})"


def adapt(
    config: SwapConfig,
    clip: Source,
    encoder: PreTrainedModel | None,
    image_processor: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[StockModel, ProcessorMixin]:
    """Return the dual encoder to train, and its processor. `encoder` is what `text_encoder` returned.

    Raises:
        ConfigError: no stock class can hold this pair.
    """
    if encoder is not None:
        take_padding(encoder, tokenizer.pad_token_id)
    if config.text_encoder == "same":
        model: Any = clip
    else:
        model = swap_text_tower(
            clip, encoder or new_text_tower(config, clip, tokenizer), config.seed, text_pooling(config)
        )
    checkpoint_gradients(model, config.image_gradient_checkpointing, config.text_gradient_checkpointing)
    kind: Any = layout_of(model).processor_class
    return model, kind(image_processor=image_processor, tokenizer=tokenizer)


def load_teacher(clip: Source, path: str) -> tuple[StockModel, PreTrainedTokenizerBase]:
    """Return the source and the tokenizer of its text tower, as the teacher.

    Raises:
        ConfigError: `clip` is an image tower alone, or its tokenizer is wrong.
    """
    if not is_stock(clip):
        raise ConfigError(
            f"model.clip: {_alone(path, clip)}, but a teacher needs a text tower: name a CLIP, or set distill.anchor "
            "and distill.preserve to 0 and align.method to a method without a teacher"
        )
    text: Any = clip.config.text_config
    return clip, tokenizers.load(path, text.max_position_embeddings, text, probes=["a photo of a cat"])


def _alone(path: str, tower: PreTrainedModel) -> str:
    return f"{path} is an image tower alone, a {type(tower).__name__}"


def new_text_tower(config: SwapConfig, clip: Source, tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """Return CLIP's text transformer with random weights. Sizes that `config` leaves out are the source's."""
    source: Any = getattr(clip.config, "text_config", None)
    width = config.text_width or getattr(source, "hidden_size", None)
    layers = config.text_layers or getattr(source, "num_hidden_layers", None)
    if width is None or layers is None:
        raise ConfigError(f"model.text_width, model.text_layers: set both, because {_alone(config.clip, clip)}")
    head_width = HEAD_WIDTH if source is None else source.hidden_size // source.num_attention_heads
    check(width % head_width == 0, "model.text_width", width, f"expected a multiple of {head_width}")
    sizes = Preset(image_size=0, embed_dim=width, text_width=width, text_layers=layers, head_width=head_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tower = CLIPTextModel(text_config(sizes, tokenizer))
        initialize_tower(tower)
    return tower


class Method(NamedTuple):
    """The functions of a method."""

    # Called once before training. Returns a text to print, or None.
    attach: Callable[[StockModel, AlignConfig], str | None]
    # Called at the start of each stage.
    set_trainable: Callable[[DualEncoder, AlignConfig, Stage, Source], None]
    # Called when the model is saved into a directory. Returns the weights without the parts that `attach` added.
    stock_weights: Callable[[Path, StockModel, ProcessorMixin, Weights, AlignConfig], Weights]


def set_trainable(encoder: DualEncoder, config: AlignConfig, stage: Stage, clip: Source) -> None:
    """Set `requires_grad` for a stage that trains weights. Not for adapters: PEFT sets it.

    The logit scale of the source `clip` is trained only if the image side is trained. If the source is an image tower
    alone, the logit scale is new, and is trained. Weights that texts do not use are frozen.

    Raises:
        ConfigError: a tower has fewer layers than `align.image_layers` or `align.text_layers`, or `align.method` trains
            a projection that the source does not have.
    """
    model = parts(encoder.model)
    _train_layers(model.text_tower, stage.text_layers, "align.text_layers")
    if freezes_embeddings(encoder.model, config):
        model.text_tower.get_input_embeddings().requires_grad_(False)
    model.text_projection.requires_grad_(True)
    model.image_projection.requires_grad_(_trains_image_side(stage))
    _check_projections(encoder, config, stage)
    contrasted = stage.images or bool(stage.distill and stage.distill.contrastive)
    model.logit_scale.requires_grad_(contrasted and (_trains_image_side(stage) or not is_stock(clip)))
    _set_bias_trainable(encoder, stage, clip)
    _train_layers(model.image_tower, config.align.image_layers, "align.image_layers")
    if not stage.trains_image:
        model.image_tower.requires_grad_(False)
    freeze_unused(encoder.model)


def _train_layers(tower: nn.Module, top: int | None, key: str) -> None:
    """Train the `top` layers of a tower and what is above them; None: all; 0: nothing."""
    depths = depth(tower)
    if top is not None and top >= max(depths.values()):
        most = max(depths.values()) - 1
        raise ConfigError(f"{key}: got {top}, expected at most {most}; leave it out to train all layers")
    for name, parameter in tower.named_parameters():
        trained = top is None or (top > 0 and depths[name] <= top)
        # The mask token, for masked-image training, gets no gradient, and DDP fails on such parameters.
        parameter.requires_grad_(trained and not name.endswith("mask_token"))


def freezes_embeddings(model: StockModel, config: AlignConfig) -> bool:
    """Return whether the token embeddings of the text tower are frozen: `align.freeze_embeddings` or its default."""
    chosen, encoder = config.align.freeze_embeddings, config.model.text_encoder
    if chosen is not None:
        return chosen
    pieces = parts(model).text_tower.get_input_embeddings().num_embeddings
    return bool(encoder and not encoder.startswith("auto:") and pieces > MANY_PIECES)


def _report_embeddings(model: StockModel, config: AlignConfig) -> str | None:
    """Return the text to print if the token embeddings of a trained text tower are frozen."""
    if all(stage.text_layers == 0 for stage in config.stages) or not freezes_embeddings(model, config):
        return None
    tower = parts(model).text_tower
    table = tower.get_input_embeddings().weight
    total = sum(parameter.numel() for parameter in tower.parameters())
    return (
        f"Token embeddings: {len(table):,} pieces, {table.numel() / 1e6:.1f} of {total / 1e6:.1f} million weights of "
        "the text tower; they are frozen (align.freeze_embeddings)"
    )


def _trains_image_side(stage: Stage) -> bool:
    return stage.trains_image or stage.image_decay is not None


def _check_projections(encoder: DualEncoder, config: AlignConfig, stage: Stage) -> None:
    model, kind = parts(encoder.model), type(encoder.model).__name__
    if stage.text_layers == 0 and isinstance(model.text_projection, nn.Identity):
        raise ConfigError(
            f"align.method: got {config.align.method}, but a {kind} has no text projection: use another method, or "
            "name another text encoder in model.text_encoder"
        )
    if stage.image_decay is not None and isinstance(model.image_projection, nn.Identity):
        raise ConfigError(
            f"align.image_projection_decay: got {stage.image_decay}, but a {kind} has no image projection: remove it"
        )


def _set_bias_trainable(encoder: DualEncoder, stage: Stage, clip: Source) -> None:
    """Train a new bias. The source's own bias is trained if the image side is."""
    if encoder.logit_bias is not None:
        contrasted = stage.images or bool(stage.distill and stage.distill.contrastive)
        is_new = not is_stock(clip) or bias_of(clip) is None
        encoder.logit_bias.requires_grad_(contrasted and (_trains_image_side(stage) or is_new))


def _attach_adapters(model: StockModel, config: AlignConfig) -> str:
    lora.attach(model, config.lora, new_text=config.model.text_encoder != "same", seed=config.model.seed)
    return lora.report(model)


def _set_adapters_trainable(encoder: DualEncoder, config: AlignConfig, stage: Stage, clip: Source) -> None:
    """Set what PEFT has not set: the bias, and adapters of layers that texts do not use."""
    _set_bias_trainable(encoder, stage, clip)
    freeze_unused(encoder.model)


def _save_adapters(
    directory: Path, model: StockModel, processor: ProcessorMixin, weights: Weights, config: AlignConfig
) -> Weights:
    """Write the adapter, and its base model if the text encoder is new; return the merged weights."""
    lora.save(model, weights, directory, config.model.clip, config.model.text_encoder)
    if config.model.text_encoder != "same":
        save_stock_model(directory.with_name(lora.BASE), model, processor, lora.base_weights(weights))
    return lora.merge(model, weights)


_WEIGHTS = Method(_report_embeddings, set_trainable, lambda _, model, processor, weights, config: weights)
_ADAPTERS = Method(_attach_adapters, _set_adapters_trainable, _save_adapters)

METHODS = {
    "frozen_image": _WEIGHTS,
    "full": _WEIGHTS,
    "distill": _WEIGHTS,
    "two_stage": _WEIGHTS,
    "projection": _WEIGHTS,
    "unfreeze": _WEIGHTS,
    "lora": _ADAPTERS,
}


class AlignedModelWriter:
    """Writes the trained stock model, with adapters merged, or with weights averaged with those before training.

    Adapters are also written to `adapter/`. If the text encoder is new, their base model is in the folder
    `koclip.align.lora.BASE` beside the model. `model` is the model before training, without adapters. If
    `align.wise_ft` averages its weights, those that the source `clip` has are copied.
    """

    def __init__(self, config: AlignConfig, model: StockModel, clip: Source) -> None:
        self._config = config
        start = model.state_dict().items() if config.align.wise_ft < 1 else ()
        alone = () if is_stock(clip) else (f"{layout_of(model).image_tower}.",)
        new = () if config.model.text_encoder == "same" else ("text_",)
        self._start = {
            name: value.clone()
            for name, value in start
            if value.is_floating_point() and name.startswith(alone or "") and not name.startswith(new)
        }

    def __call__(self, directory: Path, model: StockModel, processor: ProcessorMixin, weights: Weights) -> None:
        """Write the trained model, with the weights of its `DualEncoder`'s state dict, into `directory`."""
        config = self._config
        weights = METHODS[config.align.method].stock_weights(directory, model, processor, weights, config)
        for name, before in self._start.items():
            after = weights[f"model.{name}"]
            start = before.to(after).reshape(after.shape)
            weights[f"model.{name}"] = torch.lerp(start, after, config.align.wise_ft)
        save_stock_model(directory, model, processor, weights)
