"""Models of open_clip, with open_clip's own tokenizer and preprocessing. They need the extra `peers`."""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from koclip.config import ConfigError, peer
from koclip.encoders import FAULTS, first_line
from koclip.encoders.base import Encoder, Processor, fingerprint, tokenizer_rules, unknown_share
from koclip.models.open_clip import FORM, parse

_KOREAN, _ENGLISH = "kor_Hang", "eng_Latn"  # NLLB's language tokens
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of a function


def open_spec(spec: str, device: torch.device) -> "OpenClipEncoder":
    """Open a model that `FORM` describes.

    Raises:
        ConfigError: the spec names no weights, or a pickle; or open_clip is not installed or cannot load the model.
    """
    name, weights = parse(spec, "model")
    return OpenClipEncoder(name, weights or None, device, spec)


class OpenClipEncoder(Encoder):
    """A model of open_clip with its own tokenizer and preprocessing.

    Two things that open_clip leaves to its caller are done here. Weights whose tag needs QuickGELU get it under any
    model name (`ViT-B-32@openai`; open_clip only warns). NLLB's tokenizer is given the language of each text: Korean if
    the text has Hangul, otherwise English.
    """

    def __init__(self, model_name: str, pretrained: str | None, device: torch.device, name: str) -> None:
        open_clip = peer("open_clip", "model")
        tag = open_clip.get_pretrained_cfg(model_name.replace("/", "-"), pretrained) if pretrained else {}
        options = {"precision": "fp32", "weights_only": True, "force_quick_gelu": tag.get("quick_gelu", False)}
        try:
            model, preprocess = open_clip.create_model_from_pretrained(model_name, pretrained, device=device, **options)
            tokenizer = open_clip.get_tokenizer(model_name)
        except (*FAULTS, OSError) as error:
            raise ConfigError(
                f"model: {name} cannot be loaded by open_clip: {first_line(error)}. Expected {FORM}"
            ) from error
        super().__init__(model.eval(), Processor(preprocess, tokenizer), name)
        self._device = device
        vocabulary: dict[str, int] = getattr(getattr(tokenizer, "tokenizer", None), "get_vocab", dict)()
        self._asks_language = vocabulary.keys() >= {_KOREAN, _ENGLISH}

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of unknown tokens, 0 to 1. It is 0 for open_clip's own tokenizer, which is byte-level."""
        tokenizer = getattr(self.processor.tokenizer, "tokenizer", None)
        if tokenizer is None:
            return 0.0
        return unknown_share(tokenizer, [self.processor.tokenizer.clean_fn(text) for text in texts])

    def fingerprint(self) -> str:
        """Return a hash of the weights, the modules with their settings, the tokenizer and the preprocessing."""
        outer = self.processor.tokenizer
        tokenizer = getattr(outer, "tokenizer", None)
        ranks = getattr(outer, "bpe_ranks", None)
        rules = [tokenizer_rules(tokenizer) if tokenizer else repr(ranks), _settings(outer)]
        modules = [f"{name} {type(part).__name__} {_settings(part)}" for name, part in self.model.named_modules()]
        return fingerprint(self.model, _ADDRESS.sub("", repr(self.processor.image_processor)), *rules, *modules)

    def _embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model.encode_image(self._pixels(images))  # type: ignore[no-any-return]

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self._tokens(texts).to(self._device))  # type: ignore[no-any-return]

    def _image_features(self, images: list[Image.Image]) -> torch.Tensor:
        return _before_projection(self.model.visual, self._pixels(images))

    def _tokens(self, texts: Sequence[str]) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        if not self._asks_language:
            return tokenizer(list(texts))  # type: ignore[no-any-return]
        rows = []
        for text in texts:
            # open_clip's `set_language` has no effect: transformers 5 reads `src_lang` in every call.
            tokenizer.tokenizer.src_lang = _KOREAN if _HANGUL.search(text) else _ENGLISH
            rows.append(tokenizer([text]))
        tokenizer.tokenizer.src_lang = _ENGLISH  # the default
        return torch.cat(rows)

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([self.processor.image_processor(image) for image in images]).to(self._device)


def _before_projection(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return an image tower's features (B, W) before its projection; with an attention pool (ResNet), its output."""
    output: Any
    if not hasattr(tower, "trunk"):
        bare = copy.copy(tower)  # shares all modules
        bare._parameters = dict(tower._parameters)
        if "proj" in bare._parameters:
            bare.proj = None
        output = bare(pixels)
    elif len(tower.head):  # a tower of timm with a head
        output = tower.trunk(pixels)
        output = tower.head.pool(output) if hasattr(tower.head, "pool") else output
    else:  # a tower of timm whose classifier, if any, is the projection
        output = tower.trunk.forward_head(tower.trunk.forward_features(pixels), pre_logits=True)
    features: torch.Tensor = output[0] if isinstance(output, tuple) else output  # CoCa also returns tokens
    return features


def _settings(part: object) -> str:
    """Return an object's plain attributes, such as numbers of heads, epsilons, lengths and names of functions."""
    plain = (str, int, float, bool, tuple)
    settings = {name: value for name, value in vars(part).items() if isinstance(value, plain)}
    settings |= {name: value.__name__ for name, value in vars(part).items() if hasattr(value, "__name__")}
    return repr(sorted((name, _ADDRESS.sub("", repr(value))) for name, value in settings.items() if name != "training"))
