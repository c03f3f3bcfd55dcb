"""The stock classes that koclip trains and publishes, and where their parts are.

**The StockModel protocol.** A class of transformers can be trained and published if it has

- an image tower and a text tower, each a `PreTrainedModel` with a `pooler_output` (B, W) of its own width W;
- a bias-free linear projection of each, to the same width D;
- a logit scale: a scalar parameter, the logarithm of the factor of cosines;
- `get_image_features(pixel_values=...)` and `get_text_features(input_ids=..., attention_mask=...)`, whose
  `pooler_output` is the projected embedding (B, D), not normalised;
- a `config` with a place for the bias of a sigmoid loss and with the number of text positions;
- `save_pretrained(directory, state_dict=...)`, and a processor class that holds an image processor and a tokenizer.

To add such a class, add it to `StockModel` and add a `Layout` of it to `LAYOUTS`. Which classes a swapped text tower
goes into is decided in `koclip.models.swap`.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from torch import nn
from transformers import (
    ChineseCLIPModel,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    ProcessorMixin,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

StockModel: TypeAlias = CLIPModel | ChineseCLIPModel | VisionTextDualEncoderModel


@dataclass(frozen=True)
class Layout:
    """Where the parts of a class are: paths of attributes, from the model.

    `nested_towers` are model types whose weights early versions of transformers 5 look for one level deeper, under the
    tower's name twice.
    """

    model_class: type[PreTrainedModel]
    processor_class: type[ProcessorMixin] = CLIPProcessor
    image_tower: str = "vision_model"
    text_tower: str = "text_model"
    image_projection: str = "visual_projection"
    text_projection: str = "text_projection"
    logit_scale: str = "logit_scale"
    logit_bias: str = "config.logit_bias"  # of the sigmoid loss; these classes have no parameter for it
    num_positions: str = "config.text_config.max_position_embeddings"  # rows for a text's tokens
    nested_towers: tuple[str, ...] = ()

    @property
    def image_side(self) -> tuple[str, str]:
        """The modules that image embeddings are computed by."""
        return self.image_tower, self.image_projection

    @property
    def text_side(self) -> tuple[str, str]:
        """The modules that text embeddings are computed by."""
        return self.text_tower, self.text_projection


LAYOUTS = (
    Layout(CLIPModel),
    Layout(ChineseCLIPModel),
    Layout(
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
        nested_towers=("clip_vision_model", "clip_text_model", "siglip_vision_model"),
    ),
)


class Parts(NamedTuple):
    """The parts of one model."""

    image_tower: Any
    text_tower: Any
    image_projection: nn.Linear  # (D, W)
    text_projection: nn.Linear  # (D, W)
    logit_scale: nn.Parameter  # ()


def is_stock(model: object) -> TypeGuard[StockModel]:
    """Return whether koclip can train and publish a model of this class."""
    return any(isinstance(model, layout.model_class) for layout in LAYOUTS)


def layout_of(model: object) -> Layout:
    """Return the entry of a model's class.

    Raises:
        TypeError: there is none.
    """
    for layout in LAYOUTS:
        if isinstance(model, layout.model_class):
            return layout
    raise TypeError(f"a {type(model).__name__} has no entry in koclip.models.stock.LAYOUTS")


def parts(model: object) -> Parts:
    """Return the parts of a stock model."""
    layout = layout_of(model)
    return Parts(*(attrgetter(getattr(layout, name))(model) for name in Parts._fields))


def set_part(model: object, path: str, value: object) -> None:
    """Set an attribute of a model, or of its configuration, that a `Layout` names."""
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(model) if owner else model, name, value)


def longest_text(tokenizer: Any, text_tower: nn.Module) -> int:
    """Return the most tokens that both the tokenizer and the tower's positions allow."""
    return min([int(tokenizer.model_max_length), *map(len, positions(text_tower).values())])


def positions(text_tower: nn.Module) -> dict[str, range]:
    """Return the rows for a text's tokens in each table of positions of a tower, by the table's name.

    RoBERTas count from the row after the padding token's id.
    """
    return {
        name: range(0 if module.padding_idx is None else module.padding_idx + 1, module.num_embeddings)
        for name, module in text_tower.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith(("position_embedding", "position_embeddings"))
    }
