"""Multilingual-CLIP's text models, built from stock classes of transformers.

The layout is that of github.com/FreddeFrallan/Multilingual-CLIP (multilingual_clip/pt_multilingual_clip.py): an encoder
`transformer` with the architecture of `modelBase`, the mean of its last hidden states over the attention mask, and a
`LinearTransformation` with bias into a CLIP's image space. koclip does not use that package: transformers 5 cannot load
it, and its embeddings are not normalised.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from koclip import encoders
from koclip.config import ConfigError, check
from koclip.encoders.base import TwoModels, fingerprint, tokenizer_rules
from koclip.encoders.sentence_transformers import two_paths
from koclip.encoders.transformers import encode
from koclip.models.pretrained import UNREADABLE, unreadable

FORM = "mclip:<text model>+<any of these, for images>"
_EXPECTED = "config.json (modelBase, numDims, transformerDimensions), model.safetensors and the tokenizer of an M-CLIP"


def open_spec(spec: str, device: torch.device) -> TwoModels:
    """Open the two models that `FORM` describes.

    Raises:
        ConfigError: the spec is not of that form, or a model cannot be loaded.
    """
    texts, images = two_paths(spec, FORM)
    return TwoModels(MClipTexts(texts, device), encoders.open_spec(images, device), spec)


class MClipTexts:
    """An M-CLIP text model, which embeds texts into the image space of a CLIP.

    Args:
        path: Directory or Hub id with config.json, model.safetensors and the tokenizer. The directory or Hub id
            `modelBase` gives the configuration of the encoder; its weights are not read.
        device: Device of the model.

    Raises:
        ConfigError: the model cannot be loaded, or weights are missing, unexpected or of other sizes.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            settings = json.loads(Path(str(cached_file(path, "config.json"))).read_text())
            base = AutoConfig.from_pretrained(settings["modelBase"], trust_remote_code=False)
            weights = load_file(str(cached_file(path, "model.safetensors")))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model = _MClip(base, settings["transformerDimensions"], settings["numDims"])
        except KeyError as error:
            raise ConfigError(f"model: {path}, config.json lacks {error}. Expected {_EXPECTED}") from error
        except UNREADABLE as error:
            raise unreadable(path, "model", _EXPECTED, error) from error
        _load_weights(path, self.model, weights)
        self.model.eval().to(device)
        self._device = device

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return embeddings (B, D) of B texts."""
        encoded = encode(self.tokenizer, texts, self.model.transformer)
        inputs = {name: encoded[name].to(self._device) for name in ("input_ids", "attention_mask")}
        return self.model(**inputs)  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Return a hash of the weights, the architecture and the tokenizer."""
        return fingerprint(self.model.transformer, self.model, tokenizer_rules(self.tokenizer))


class _MClip(nn.Module):
    """A module whose parts have the names of M-CLIP's checkpoints."""

    def __init__(self, base: Any, width: int, embed_dim: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # initial weights must not use the caller's random numbers
            self.transformer: Any = AutoModel.from_config(base, dtype=torch.float32, trust_remote_code=False)
            self.LinearTransformation = nn.Linear(width, embed_dim)
        self.transformer.pooler = None  # not used

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return embeddings (B, D) of ids and mask (B, L)."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, W)
        mask = attention_mask.unsqueeze(2)
        return self.LinearTransformation((hidden * mask).sum(dim=1) / mask.sum(dim=1))  # type: ignore[no-any-return]


def _load_weights(path: str, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    unused = ("transformer.pooler.", "transformer.embeddings.position_ids")  # the latter: a buffer of transformers 4
    weights = {name: value for name, value in weights.items() if not name.startswith(unused)}
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of other sizes": [name for name in own if name in weights and weights[name].shape != own[name].shape],
    }
    problems = {fault: names for fault, names in problems.items() if names}
    check(not problems, f"model: the weights of {path}", problems, f"expected the weights of an M-CLIP: {_EXPECTED}")
    model.load_state_dict(weights)
