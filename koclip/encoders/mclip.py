"""Multilingual-CLIP's text side, on the stock classes of transformers.

The layout is that of github.com/FreddeFrallan/Multilingual-CLIP (multilingual_clip/pt_multilingual_clip.py): an encoder
`transformer` of the architecture that `modelBase` names, the mean of its last hidden states over the attention mask,
and a `LinearTransformation` with bias into a CLIP's image space. That package does not load with transformers 5: it
loads `modelBase`'s weights while its class is being built. Nor does it normalise, which ranking by cosine needs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from koclip import encoders
from koclip.config import ConfigError, check
from koclip.encoders.base import TwoModels, fingerprint
from koclip.encoders.sentence_transformers import two_paths
from koclip.encoders.transformers import encode, tokenizer_rules, unknown_share
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
    """M-CLIP's text side, which embeds texts into the image space of one CLIP.

    Args:
        path: Directory or Hub id with config.json, model.safetensors in one file, and the tokenizer. `modelBase`, a
            directory or a Hub id, gives the configuration of the architecture; its weights are not read.
        device: Where to put the model.

    Raises:
        ConfigError: nothing that can be loaded is there, or weights are missing, left over or of other sizes.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            settings = json.loads(_file(path, "config.json").read_text())
            base = AutoConfig.from_pretrained(settings["modelBase"], trust_remote_code=False)
            weights = load_file(_file(path, "model.safetensors"))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model = _MClip(base, settings["transformerDimensions"], settings["numDims"])
        except KeyError as error:
            raise ConfigError(f"model: {path}, config.json lacks {error}. Expected {_EXPECTED}") from error
        except UNREADABLE as error:
            raise unreadable(path, "model", _EXPECTED, error) from error
        _fill(path, self.model, weights)
        self.model.eval().to(device)
        self._device = device

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return embeddings (B, D) of B texts."""
        encoded = encode(self.tokenizer, texts, self.model.transformer)
        inputs = {name: encoded[name].to(self._device) for name in ("input_ids", "attention_mask")}
        return self.model(**inputs)  # type: ignore[no-any-return]

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""
        return unknown_share(self.tokenizer, texts)

    def fingerprint(self) -> str:
        """Return a hash of the weights, the architecture and the tokenizer."""
        return fingerprint(self.model.transformer, self.model, tokenizer_rules(self.tokenizer))


class _MClip(nn.Module):
    """Names its parts as M-CLIP's checkpoints do. B texts of L tokens, D wide."""

    def __init__(self, base: Any, width: int, embed_dim: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten: others' random numbers stay
            self.transformer: Any = AutoModel.from_config(base, dtype=torch.float32, trust_remote_code=False)
            self.LinearTransformation = nn.Linear(width, embed_dim)
        self.transformer.pooler = None  # not read

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return (B, D)."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, W)
        mask = attention_mask.unsqueeze(2)
        return self.LinearTransformation((hidden * mask).sum(dim=1) / mask.sum(dim=1))  # type: ignore[no-any-return]


def _file(path: str, name: str) -> Path:
    file = cached_file(path, name)
    assert file is not None  # it raises an OSError instead
    return Path(file)


def _fill(path: str, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    unused = ("transformer.pooler.", "transformer.embeddings.position_ids")  # the latter are a buffer of transformers 4
    weights = {name: value for name, value in weights.items() if not name.startswith(unused)}
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - weights.keys()),
        "left over": sorted(weights.keys() - own.keys()),
        "of other sizes": [name for name in own if name in weights and weights[name].shape != own[name].shape],
    }
    problems = {fault: names for fault, names in problems.items() if names}
    check(not problems, f"model: the weights of {path}", problems, f"expected those of an M-CLIP: {_EXPECTED}")
    model.load_state_dict(weights)
