"""The stock classes that koclip trains and publishes, and where their parts are.

**The StockModel protocol.** A class of transformers can be trained and published if it has

- an image tower and a text tower, each a `PreTrainedModel` with a `pooler_output` (B, W); W may differ;
- a bias-free linear projection of each, to the same width D; or none, if the pooled outputs are the embeddings;
- a logit scale: a parameter with one number, the logarithm of the factor of the cosines;
- `get_image_features(pixel_values=...)` and `get_text_features(input_ids=..., attention_mask=...)`, whose
  `pooler_output` is the projected embedding (B, D), not normalised;
- a place for the bias of a sigmoid loss, a parameter or in its `config`, and a `config` with the number of text
  positions;
- `save_pretrained(directory, state_dict=...)`, and a processor class that holds an image processor and a tokenizer.

To add a class, add it to `StockModel` and its `Layout` to `LAYOUTS`. `koclip.models.swap` selects the class for a
swapped text tower.
"""

import json
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import nn
from transformers import (
    AltCLIPModel,
    AltCLIPProcessor,
    ChineseCLIPModel,
    CLIPModel,
    CLIPProcessor,
    MetaClip2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from koclip.models.first_token import fold
from koclip.models.router import RouterModel, save_preprocessing
from koclip.text.tokenizers import forget_call_state

StockModel: TypeAlias = (
    CLIPModel
    | ChineseCLIPModel
    | AltCLIPModel
    | MetaClip2Model
    | SiglipModel
    | VisionTextDualEncoderModel
    | RouterModel
)


@dataclass(frozen=True)
class Layout:
    """Attribute paths of the parts of a class, from the model.

    A projection is None if the tower's pooled output is the embedding. `reads_mask` is False if the class was trained
    on texts padded to the maximum length, without an attention mask. `nested_towers` are model types whose weights
    early versions of transformers 5 expect one level deeper, under the tower's name twice. `num_positions` is None if
    the positions are never cut. `loaded_by` is for messages.
    """

    model_class: type[PreTrainedModel]
    processor_class: type[ProcessorMixin] = CLIPProcessor
    image_tower: str = "vision_model"
    text_tower: str = "text_model"
    image_projection: str | None = "visual_projection"
    text_projection: str | None = "text_projection"
    logit_scale: str = "logit_scale"
    logit_bias: str = "config.logit_bias"  # of the sigmoid loss; most classes have no parameter for it
    num_positions: str | None = "config.text_config.max_position_embeddings"
    reads_mask: bool = True
    scalar_shape: tuple[int, ...] = ()  # of the logit scale and of a bias parameter
    nested_towers: tuple[str, ...] = ()
    loaded_by: str = "AutoModel and AutoProcessor load it"

    @property
    def image_side(self) -> tuple[str, ...]:
        """Paths of the modules that compute image embeddings."""
        return (self.image_tower, self.image_projection) if self.image_projection else (self.image_tower,)

    @property
    def text_side(self) -> tuple[str, ...]:
        """Paths of the modules that compute text embeddings."""
        return (self.text_tower, self.text_projection) if self.text_projection else (self.text_tower,)

    @property
    def has_bias_parameter(self) -> bool:
        """Whether the bias of the sigmoid loss is a parameter of the class."""
        return not self.logit_bias.startswith("config.")


LAYOUTS = (
    Layout(CLIPModel),
    Layout(ChineseCLIPModel),
    Layout(AltCLIPModel, AltCLIPProcessor),
    Layout(MetaClip2Model),
    Layout(
        SiglipModel,
        SiglipProcessor,
        image_projection=None,
        text_projection=None,
        logit_bias="logit_bias",
        reads_mask=False,
        scalar_shape=(1,),
    ),
    Layout(
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
        nested_towers=("clip_vision_model", "clip_text_model", "siglip_vision_model"),
    ),
    Layout(
        RouterModel,
        VisionTextDualEncoderProcessor,
        num_positions=None,  # not every encoder has absolute positions
        loaded_by="SentenceTransformer, MTEB and koclip.load load it; AutoModel does not",
    ),
)


class Parts(NamedTuple):
    """The parts of one model."""

    image_tower: Any
    text_tower: Any
    image_projection: Any  # nn.Linear (D, W), or nn.Identity
    text_projection: Any
    logit_scale: nn.Parameter  # () or (1,)


def is_stock(model: object) -> TypeGuard[StockModel]:
    """Return whether koclip can train and publish a model of this class."""
    return any(isinstance(model, layout.model_class) for layout in LAYOUTS)


def layout_of(model: object) -> Layout:
    """Return the layout of a model's class.

    Raises:
        TypeError: the class is not in `LAYOUTS`.
    """
    for layout in LAYOUTS:
        if isinstance(model, layout.model_class):
            return layout
    raise TypeError(f"a {type(model).__name__} has no entry in koclip.models.stock.LAYOUTS")


def parts(model: object) -> Parts:
    """Return the parts of a stock model."""
    paths = [getattr(layout_of(model), name) for name in Parts._fields]
    modules: list[Any] = [attrgetter(path)(model) if path else nn.Identity() for path in paths]
    return Parts(*modules)


def bias_of(model: PreTrainedModel) -> float | None:
    """Return the bias of the sigmoid loss: the model's parameter (SigLIP), else `logit_bias` of its config.json.

    None: the model was trained without a bias.
    """
    bias: Any = getattr(model, "logit_bias", None)
    if bias is None:
        bias = getattr(model.config, "logit_bias", None)
    return bias.item() if isinstance(bias, torch.Tensor) else bias


def set_part(model: object, path: str, value: object) -> None:
    """Set the attribute of a model at a path of its `Layout`."""
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(model) if owner else model, name, value)


def longest_text(tokenizer: Any, text_tower: nn.Module) -> int:
    """Return the largest number of tokens that both the tokenizer and the tower's positions allow."""
    return min([int(tokenizer.model_max_length), *map(len, positions(text_tower).values())])


def positions(text_tower: nn.Module) -> dict[str, range]:
    """Return the rows of each position table of a text tower that a text's tokens use, by the table's name.

    RoBERTa's first token uses the row after the padding token's id.
    """
    return {
        name: range(0 if module.padding_idx is None else module.padding_idx + 1, module.num_embeddings)
        for name, module in text_tower.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith(("position_embedding", "position_embeddings"))
    }


# Names in transformers 4. There, `ChineseCLIPProcessor` takes BERT's tokenizer only and does not resize by the shorter
# side. `CLIPProcessor` takes any tokenizer and does the same as `ChineseCLIPProcessor` of transformers 5.
_NAMES_IN_4 = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "ChineseCLIPProcessor": "CLIPProcessor",
    "ChineseCLIPImageProcessor": "CLIPImageProcessor",
}


def save_stock_model(
    directory: Path, model: PreTrainedModel, processor: ProcessorMixin, weights: dict[str, torch.Tensor]
) -> None:
    """Write a stock model directory from a `DualEncoder`'s state dict.

    The text tower gets as many positions as the tokenizer's longest text has tokens. Training used no others, and
    every class fails on a longer text that is not cut; sentence-transformers (`RouterModel`) cuts all texts.
    """
    layout = layout_of(model)
    stock = {
        name.removeprefix("model."): value.float() if value.is_floating_point() else value
        for name, value in weights.items()
        if name != "logit_bias"
    }
    if "logit_bias" in weights and layout.has_bias_parameter:
        stock[layout.logit_bias] = weights["logit_bias"].float().reshape(layout.scalar_shape)
    elif "logit_bias" in weights:
        set_part(model, layout.logit_bias, weights["logit_bias"].item())
    stock[layout.logit_scale] = stock[layout.logit_scale].reshape(layout.scalar_shape)  # (1,) under FSDP2
    _cut_positions(model, stock, processor.tokenizer)
    if not isinstance(model, RouterModel):
        stock = fold(model, stock)
    stock = {_name_for_all(model, name): value for name, value in stock.items()}
    config: Any = model.config
    config.text_config.name_or_path = config.vision_config.name_or_path = ""  # may be paths of this machine
    model.save_pretrained(directory, state_dict=stock)
    forget_call_state(processor.tokenizer)
    if isinstance(model, RouterModel):
        save_preprocessing(directory, processor)
    processor.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)  # older versions read preprocessor_config.json
    _let_transformers_4_read(directory)


def _cut_positions(model: Any, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut the positions of the text tower to the longest text, in the configuration and in `weights`."""
    layout, tower = layout_of(model), parts(model).text_tower
    if layout.num_positions is None:
        return
    longest = longest_text(tokenizer, tower)
    for table, rows in positions(tower).items():
        name = f"{layout.text_tower}.{table}.weight"
        weights[name] = weights[name][: rows.start + longest]
        set_part(model, layout.num_positions, rows.start + longest)


def _name_for_all(model: Any, name: str) -> str:
    """Return the name of a weight that every version of transformers reads.

    In a `VisionTextDualEncoderModel`, early versions (5.5, but not 5.10) expect the weights of `nested_towers` one
    level deeper, and give weights that they do not find random values. Later versions read both names.
    """
    side, _, rest = name.partition(".")
    layout = layout_of(model)
    is_tower = side in (layout.image_tower, layout.text_tower)
    nested = is_tower and model.get_submodule(side).config.model_type in layout.nested_towers
    if not nested or rest.startswith(f"{side}."):
        return name
    return f"{side}.{side}.{rest}"


def _let_transformers_4_read(directory: Path) -> None:
    """Use the names of transformers 4 in the settings files. transformers 5 reads them too."""
    names = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    for file in [file for name in names for file in directory.rglob(name)]:
        values = json.loads(file.read_text(encoding="utf-8"), object_hook=_renamed)
        if isinstance(values.get("extra_special_tokens"), list):  # a dictionary in transformers 4
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the class names of transformers 4."""
    classes = ("tokenizer_class", "processor_class", "image_processor_type")
    return {key: _NAMES_IN_4.get(value, value) if key in classes else value for key, value in values.items()}
