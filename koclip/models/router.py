"""Pairs of towers that no class of transformers holds, published as a `Router` of sentence-transformers.

`RouterModel` trains such a pair: two stock towers, a pooling of the text tower's last hidden states (the first token's
state, or the mean over the attention mask), and bias-free projections. It is saved as a directory that
`SentenceTransformer` (5.4 and newer) loads without any code of koclip, and that `koclip.load` opens:

| file or folder | content |
|---|---|
| `modules.json`, `router_config.json`, `config_sentence_transformers.json` | the modules and how inputs reach them |
| `text_0_Transformer`, `image_0_Transformer` | the towers, stock models of transformers, with their preprocessing |
| `text_1_Pooling`, `text_2_Dense`, `image_1_Dense` | pooling, projections; an identity has no `Dense` |
| `1_Normalize` | unit norm |
| `config.json` | for koclip: both configurations, the pooling, the logit scale and bias. `AutoModel` refuses its type |
| `tokenizer.json`, `preprocessor_config.json`, ... | preprocessing again, for `AutoProcessor` |
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, ProcessorMixin, VisionTextDualEncoderConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.hub import cached_file

from koclip.models.first_token import read_first_token, stock_pooler

Pooling: TypeAlias = Literal["first", "mean"]

FILE = "router_config.json"
TEXT, IMAGE = "text_0_Transformer", "image_0_Transformer"
_POOLING, _TEXT_DENSE, _IMAGE_DENSE, _NORMALIZE = "text_1_Pooling", "text_2_Dense", "image_1_Dense", "1_Normalize"
FOLDERS = (TEXT, IMAGE, _POOLING, _TEXT_DENSE, _IMAGE_DENSE, _NORMALIZE)
_MODULES = "sentence_transformers.sentence_transformer.modules"
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Encoder-decoders whose encoder is a class of its own.
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


class RouterConfig(VisionTextDualEncoderConfig):
    """Configurations of both towers, the width of the embeddings (`projection_dim`) and the pooling of texts."""

    model_type = "sentence_transformers_router"
    pooling: str = "mean"


class RouterModel(PreTrainedModel):
    """A stock image tower and a stock text tower with pooling and projections. See the module's docstring.

    Letters in shapes: B items, L tokens, W width of a tower, D embedding width.

    Args:
        config: Width and pooling. Its two tower configurations become those of the towers.
        vision_model: A tower with a pooled output (B, W), and W as its `config.hidden_size`.
        text_model: An encoder with a `last_hidden_state` (B, L, W).
    """

    config_class = RouterConfig
    _supports_sdpa = True

    def __init__(self, config: RouterConfig, vision_model: PreTrainedModel, text_model: PreTrainedModel) -> None:
        super().__init__(config)
        config.vision_config, config.text_config = vision_model.config, text_model.config
        read_first_token(text_model)  # its pooler is not used
        self.vision_model, self.text_model = vision_model, text_model
        width = config.projection_dim
        self.visual_projection = nn.Linear(vision_model.config.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(text_model.config.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        """Return the projected embeddings (B, D) of pixels (B, 3, H, W) as `pooler_output`, not normalised."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return BaseModelOutputWithPooling(pooler_output=self.visual_projection(pooled))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """Return the projected embeddings (B, D) of ids (B, L) as `pooler_output`, not normalised."""
        pooled = self.pooled_texts(input_ids, attention_mask)
        return BaseModelOutputWithPooling(pooler_output=self.text_projection(pooled))

    def pooled_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the pooled states (B, W) of ids (B, L): the input of the text projection."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states: torch.Tensor = self.text_model(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (B, L, W)
        if self.config.pooling == "first":
            return states[:, 0]
        weights = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(dim=1, dtype=torch.float32) / weights.sum(dim=1, dtype=torch.float32).clamp(1e-9)
        return mean.to(states.dtype)

    def save_pretrained(  # type: ignore[override]
        self, directory: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write the weights and settings of the sentence-transformers model, without its preprocessing.

        `state_dict` has the weights to write; default: this model's.
        """
        folder = Path(directory)
        weights = self.state_dict() if state_dict is None else state_dict
        for path, side, tower in ((TEXT, "text_model.", self.text_model), (IMAGE, "vision_model.", self.vision_model)):
            own = {name.removeprefix(side): value for name, value in weights.items() if name.startswith(side)}
            tower.save_pretrained(folder / path, state_dict=own | stock_pooler(tower))
        projections = {_TEXT_DENSE: "text_projection.weight", _IMAGE_DENSE: "visual_projection.weight"}
        dense = {path: weights[name] for path, name in projections.items() if not _is_identity(weights[name])}
        for path, settings in _settings(self.config.text_config.hidden_size, self.config.pooling, dense).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for path, weight in dense.items():
            save_file({"linear.weight": weight.contiguous()}, folder / path / "model.safetensors", {"format": "pt"})
        self.config.logit_scale_init_value = weights["logit_scale"].item()
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        config: RouterConfig | None = None,
        output_loading_info: bool = False,
        subfolder: str = "",
        **options: Any,
    ) -> Self | tuple[Self, dict[str, set[str]]]:
        """Load a directory or Hub repository that `save_pretrained` wrote. sentence-transformers is not needed.

        `options` are those of transformers' `from_pretrained`, such as `dtype`. With `output_loading_info`, also
        return the problems of the weights: kind of problem -> names.
        """
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        if config is None:
            config = RouterConfig.from_pretrained(path, subfolder=subfolder, **hub)
        towers, problems = [], dict[str, set[str]]()
        for folder, side in ((IMAGE, "vision_model"), (TEXT, "text_model")):
            kind = tower_class(getattr(config, f"{side.partition('_')[0]}_config"))
            place = "/".join(filter(None, (subfolder, folder)))
            tower, info = kind.from_pretrained(path, subfolder=place, output_loading_info=True, **options)
            towers.append(tower)
            for fault, names in info.items():
                problems.setdefault(fault, set()).update(f"{side}.{name}" for name in names)
        model = cls(config, *towers)
        structure = read_json(path, FILE, subfolder, **hub)["structure"]
        with torch.no_grad():
            for folder, linear in ((_IMAGE_DENSE, model.visual_projection), (_TEXT_DENSE, model.text_projection)):
                if folder in structure[folder.partition("_")[0]]:
                    file = cached_file(path, f"{folder}/model.safetensors", subfolder=subfolder, **hub)
                    linear.weight.copy_(load_file(str(file))["linear.weight"])
                else:
                    nn.init.eye_(linear.weight)
        model = model.to(towers[1].dtype).eval()
        return (model, problems) if output_loading_info else model


AutoConfig.register(RouterConfig.model_type, RouterConfig)
AutoModel.register(RouterConfig, RouterModel)


def tower_class(config: Any) -> Any:
    """Return the class that loads a tower of this configuration: `AutoModel`, or the encoder alone of a T5."""
    return getattr(transformers, ENCODERS.get(config.model_type, "AutoModel"))


def save_preprocessing(directory: Path, processor: ProcessorMixin) -> None:
    """Write a tokenizer and an image processor into the folders of their towers."""
    parts: Any = processor
    parts.tokenizer.save_pretrained(directory / TEXT)
    parts.image_processor.save_pretrained(directory / IMAGE)
    for file in (directory / TEXT / "tokenizer_config.json", directory / IMAGE / "preprocessor_config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("processor_class", None)  # each folder has one part only
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, name: str, subfolder: str = "", **hub: Any) -> Any:
    """Return the content of a JSON file of a directory or Hub repository; raises an `OSError` without such a file."""
    file = Path(str(cached_file(path, name, subfolder=subfolder, **hub)))
    return json.loads(file.read_text(encoding="utf-8"))


def _is_identity(weight: torch.Tensor) -> bool:
    rows, columns = weight.shape
    return rows == columns and torch.equal(weight, torch.eye(rows).to(weight))


def _settings(width: int, pooling: str, dense: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any] | list[Any]]:
    """Return the settings of the modules of sentence-transformers, by file."""
    types = {TEXT: "Transformer", _POOLING: "Pooling", IMAGE: "Transformer"} | dict.fromkeys(dense, "Dense")
    inputs = {
        TEXT: ("text", "last_hidden_state", "token_embeddings"),
        IMAGE: ("image", "pooler_output", "sentence_embedding"),
    }
    settings: dict[str, dict[str, Any] | list[Any]] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.Router"},
            {"idx": 1, "name": "1", "path": _NORMALIZE, "type": f"{_MODULES}.Normalize"},
        ],
        FILE: {
            "types": {path: f"{_MODULES}.{kind}" for path, kind in types.items()},
            "structure": {
                side: [path for path in sorted(types) if path.startswith(side)] for side in ("text", "image")
            },
            "parameters": {
                "default_route": None,
                "allow_empty_key": False,
                "route_mappings": {"(None, 'text')": "text", "(None, 'image')": "image"},
            },
        },
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
        f"{_NORMALIZE}/config.json": {},
        f"{_POOLING}/config.json": {
            "embedding_dimension": width,
            "pooling_mode": "cls" if pooling == "first" else pooling,
            "include_prompt": True,
        },
    }
    for path, (modality, name, output) in inputs.items():
        settings[f"{path}/sentence_bert_config.json"] = {
            "transformer_task": "feature-extraction",
            "modality_config": {modality: {"method": "forward", "method_output_name": name}},
            "module_output_name": output,
        }
    for path, weight in dense.items():
        settings[f"{path}/config.json"] = {
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    return settings
