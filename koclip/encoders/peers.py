"""Open any dual encoder that evaluation takes, by its name, as an `Encoder` with its own rules for text and pictures.

`open_encoder` takes

- a directory or Hub id of CLIP, ChineseCLIP, AltCLIP, SigLIP, SigLIP 2, MetaCLIP 2, VisionTextDualEncoder;
- `open_clip:<model name>@<pretrained tag or file.safetensors>`, `open_clip:hf-hub:<id>`, `open_clip:local-dir:<path>`;
- `sentence_transformers:<text model>+<image model>`;
- `mclip:<text model>+<any of the above>`, the second for pictures.

Weights are safetensors. Of what open_clip and sentence-transformers publish, some is in pickles only: those libraries
read it with `torch.load(weights_only=True)`, which runs no code. A file named here must be safetensors.
"""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from koclip.config import ConfigError, check
from koclip.data.transforms import to_rgb
from koclip.encoders.base import (
    DUAL_ENCODERS,
    Encoder,
    TransformersEncoder,
    evaluating,
    tokenizer_rules,
    unit,
    unknown_share,
)
from koclip.encoders.fingerprint import fingerprint
from koclip.encoders.inference import usable
from koclip.encoders.mclip import MClipTexts
from koclip.encoders.sentence_transformers import SentenceImages, SentenceTexts, package
from koclip.models.pretrained import read, read_processor, refuse

_LARGEST_IS_END = 2  # what the first published CLIPs say; transformers then reads the largest id
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy"}
_KOREAN, _ENGLISH = "kor_Hang", "eng_Latn"  # NLLB's tokens for languages
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
# What a model that does not hang together raises when it is tried.
_FAULTS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)


class TextSide(Protocol):
    """Embeds texts into the space of somebody else's images."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor: ...  # noqa: D102
    def unknown_share(self, texts: Sequence[str]) -> float: ...  # noqa: D102
    def fingerprint(self) -> str: ...  # noqa: D102


class ImageSide(Protocol):
    """Embeds images."""

    @property
    def scale(self) -> float: ...  # noqa: D102
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor: ...  # noqa: D102
    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor: ...  # noqa: D102
    def fingerprint(self) -> str: ...  # noqa: D102


def open_encoder(spec: str, device: str | torch.device | None = None) -> Encoder:
    """Open a dual encoder, in fp32 and evaluation mode, and embed a picture and a text to see that it can.

    Args:
        spec: What and where; see above.
        device: Where to put the model; default: a GPU if there is one.

    Raises:
        ConfigError: nothing that can be loaded is there, weights are missing or left over, it is no dual encoder, its
            parts do not fit together, or the package that it needs is not installed.
    """
    encoder = _open(spec, usable(device))
    picture = [Image.new("RGB", (64, 48), (200, 40, 90))]
    try:
        made = encoder.encode_images(picture), encoder.encode_texts(["a picture"]), encoder.image_features(picture)
    except _FAULTS as error:
        raise ConfigError(
            f"model: {spec} does not embed a picture and a text: {type(error).__name__}: {_first_line(error)}. "
            "Expected a model, a tokenizer and an image processor that belong together: take another"
        ) from error
    shapes = [tuple(one.shape) for one in made]
    fits = len(shapes[0]) == len(shapes[2]) == 2 and shapes[0] == shapes[1]
    expected = "expected (1, D), (1, D), (1, W): texts and images in one space. Take parts that belong together"
    check(fits, f"model: {spec}, shapes of an image's and a text's embedding and an image's features", shapes, expected)
    return encoder


def _open(spec: str, device: torch.device) -> Encoder:
    kind, found, rest = spec.partition(":")
    if found and kind in _OPENERS:
        return _OPENERS[kind](rest, device, spec)
    here = not found or Path(spec).is_dir()
    check(here, "model", spec, f"expected a directory, a Hub id or one of {', '.join(_FORMS.values())}")
    model, problems = read(spec, "model")
    taken = ", ".join(one.__name__ for one in DUAL_ENCODERS)
    check(isinstance(model, DUAL_ENCODERS), "model", spec, f"a {type(model).__name__}: expected one of {taken}")
    refuse(spec, "model", model, problems)
    processor: Any = read_processor(spec, "model")
    _check_end(spec, model, processor.tokenizer)
    return TransformersEncoder(model.to(device), processor, spec)


def _check_end(spec: str, model: Any, tokenizer: Any) -> None:
    """Make sure that texts have the end token that CLIP and MetaCLIP 2 read: without one they read the first token."""
    if model.config.model_type not in ("clip", "metaclip_2"):
        return
    end = model.config.text_config.eos_token_id
    ids = tokenizer("a picture")["input_ids"]
    oldest = model.config.model_type == "clip" and end == _LARGEST_IS_END
    expected = f"expected the end token {end} of its config.json in it: take the tokenizer that it was trained with"
    check(oldest or end in ids, f"model: {spec}, its tokenizer's ids of a text", ids, expected)


def _open_mclip(rest: str, device: torch.device, spec: str) -> Encoder:
    texts, images = _two(rest, spec)
    return TwoModels(MClipTexts(texts, device), _open(images, device), spec)


def _open_sentence_transformers(rest: str, device: torch.device, spec: str) -> Encoder:
    texts, images = _two(rest, spec)
    return TwoModels(SentenceTexts(texts, device), SentenceImages(images, device), spec)


def _open_clip(rest: str, device: torch.device, spec: str) -> Encoder:
    name, _, pretrained = rest.partition("@")
    own = name.startswith(("hf-hub:", "local-dir:"))  # these bring their weights
    check(own != bool(pretrained), "model", spec, f"expected {_FORMS['open_clip']}")
    file = Path(pretrained).suffix in _PICKLES or Path(pretrained).is_file()
    safe = not file or Path(pretrained).suffix == ".safetensors"
    check(safe, "model", spec, "expected a pretrained tag or a .safetensors file: no pickles")
    return OpenClipEncoder(name, pretrained or None, device, spec)


def _two(rest: str, spec: str) -> tuple[str, str]:
    texts, _, images = rest.partition("+")
    check(bool(texts and images), "model", spec, f"expected {_FORMS[spec.partition(':')[0]]}")
    return texts, images


_OPENERS: dict[str, Callable[[str, torch.device, str], Encoder]] = {
    "open_clip": _open_clip,
    "sentence_transformers": _open_sentence_transformers,
    "mclip": _open_mclip,
}
_FORMS = {
    "open_clip": "open_clip:<model name>@<pretrained tag or file.safetensors>, open_clip:hf-hub:<Hub id> or "
    "open_clip:local-dir:<directory>",
    "sentence_transformers": "sentence_transformers:<text model>+<image model>",
    "mclip": "mclip:<text model>+<any of these, for images>",
}


class TwoModels:
    """Texts by one model, images by another, in the images' space, whose logit scale holds for both."""

    def __init__(self, texts: TextSide, images: ImageSide, name: str) -> None:
        self.name, self._texts, self._images = name, texts, images
        self.encode_texts, self.unknown_share = texts.encode_texts, texts.unknown_share
        self.encode_images, self.image_features = images.encode_images, images.image_features

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before a softmax."""
        return self._images.scale

    def fingerprint(self) -> str:
        """Return a hash of all that its embeddings depend on."""
        return fingerprint(self._texts.fingerprint(), self._images.fingerprint())


class OpenClipEncoder:
    """A model of open_clip with its own tokenizer and preprocessing, see `koclip.encoders.base.Encoder`.

    Two rules that open_clip leaves to its caller are kept: weights whose tag says QuickGELU get it under any model name
    (`ViT-B-32@openai`; open_clip only warns), and NLLB's tokenizer is told the language, Korean where there is Hangul
    and English elsewhere.

    Args:
        model_name: As open_clip names it.
        pretrained: Its tag, or a safetensors file.
        device: Where to put the model.
        name: Where it came from.
    """

    def __init__(self, model_name: str, pretrained: str | None, device: torch.device, name: str) -> None:
        open_clip = package("open_clip")
        self.name, self._device = name, device
        tag = open_clip.get_pretrained_cfg(model_name.replace("/", "-"), pretrained) if pretrained else {}
        options = {"precision": "fp32", "weights_only": True, "force_quick_gelu": tag.get("quick_gelu", False)}
        try:
            made = open_clip.create_model_from_pretrained(model_name, pretrained, device=device, **options)
            self._model, self._preprocess = made
            self._tokenizer = open_clip.get_tokenizer(model_name)
        except (*_FAULTS, OSError) as error:
            raise ConfigError(
                f"model: {name} cannot be loaded by open_clip: {_first_line(error)}. Expected {_FORMS['open_clip']}"
            ) from error
        self._model.eval()
        vocabulary: dict[str, int] = getattr(getattr(self._tokenizer, "tokenizer", None), "get_vocab", dict)()
        self._asks_language = vocabulary.keys() >= {_KOREAN, _ENGLISH}

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU."""
        with evaluating(self._model):
            return unit(self._model.encode_image(self._pixels(images)))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU."""
        with evaluating(self._model):
            return unit(self._model.encode_text(self._tokens(texts).to(self._device)))

    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return float32 features (B, W), on the CPU: what the projection reads, or else the tower's own output."""
        with evaluating(self._model):
            return _before_projection(self._model.visual, self._pixels(images)).float().cpu()

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before a softmax."""
        return float(self._model.logit_scale.detach().exp())

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of unknown tokens, 0 to 1; open_clip's own tokenizer is byte-level and has none."""
        tokenizer = getattr(self._tokenizer, "tokenizer", None)
        return unknown_share(tokenizer, [self._tokenizer.clean_fn(text) for text in texts]) if tokenizer else 0.0

    def fingerprint(self) -> str:
        """Return a hash of the weights, the modules with their settings, the tokenizer and the preprocessing."""
        tokenizer = getattr(self._tokenizer, "tokenizer", None)
        ranks = getattr(self._tokenizer, "bpe_ranks", None)
        rules = [tokenizer_rules(tokenizer) if tokenizer else repr(ranks), _settings(self._tokenizer)]
        modules = [
            f"{name} {type(module).__name__} {_settings(module)}" for name, module in self._model.named_modules()
        ]
        return fingerprint(self._model, _ADDRESS.sub("", repr(self._preprocess)), *rules, *modules)

    def _tokens(self, texts: Sequence[str]) -> torch.Tensor:
        if not self._asks_language:
            return self._tokenizer(list(texts))  # type: ignore[no-any-return]
        rows = []
        for text in texts:
            # Not by open_clip's `set_language`: transformers 5 goes back to `src_lang` in every call.
            self._tokenizer.tokenizer.src_lang = _KOREAN if _HANGUL.search(text) else _ENGLISH
            rows.append(self._tokenizer([text]))
        self._tokenizer.tokenizer.src_lang = _ENGLISH  # as it was
        return torch.cat(rows)

    def _pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([self._preprocess(to_rgb(image)) for image in images]).to(self._device)


def _before_projection(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return an image tower's features (B, W) before its projection. A pool that projects stays, as CLIP's ResNets'."""
    made: Any
    if not hasattr(tower, "trunk"):
        bare = copy.copy(tower)  # shares every part
        bare._parameters = dict(tower._parameters)
        if "proj" in bare._parameters:
            bare.proj = None
        made = bare(pixels)
    elif len(tower.head):  # of timm
        made = tower.trunk(pixels)
        made = tower.head.pool(made) if hasattr(tower.head, "pool") else made
    else:  # of timm; the trunk's classifier, if there is one, projects
        made = tower.trunk.forward_head(tower.trunk.forward_features(pixels), pre_logits=True)
    features: torch.Tensor = made[0] if isinstance(made, tuple) else made  # CoCa gives its tokens too
    return features


def _settings(thing: object) -> str:
    """Return the plain values among an object's attributes: numbers of heads, epsilons, lengths, rules by name."""
    kept = {name: one for name, one in vars(thing).items() if isinstance(one, str | int | float | bool | tuple)}
    kept |= {name: one.__name__ for name, one in vars(thing).items() if hasattr(one, "__name__")}
    return repr(sorted((name, _ADDRESS.sub("", repr(one))) for name, one in kept.items() if name != "training"))


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, in what Python prints


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
