"""The `Encoder`: the interface of all dual encoders, and functions that its subclasses share.

To embed with a new kind of model, add one file to this folder: a subclass of `Encoder` with the abstract methods below,
and `FORM` and `open_spec` for `koclip.load` (see `koclip.encoders`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm
from xxhash import xxh3_128

from koclip import distributed
from koclip.config import DataConfig, check_pixels
from koclip.data.transforms import BROKEN, ImageError, decode, to_rgb
from koclip.text.normalize import normalize

Item = TypeVar("Item")
Picture: TypeAlias = Image.Image | str | Path

_ANY_TEXT = "a picture"  # embedded to find D when the list of texts is empty
_ANY_SIZE = (64, 64)  # pixels; size of the image that is embedded to find D when the list of images is empty
_PROGRESS_FROM = 10  # batches; shorter work shows no progress bar
# Settings of a configuration that do not change the embeddings.
_NAMES = {"model_type", "architectures", "_name_or_path", "transformers_version", "dtype"}


class NoPatchesError(ValueError):
    """The model has no patch embeddings that can be compared with a text."""


class Processor(NamedTuple):
    """An image processor and a tokenizer, for libraries that have no processor class."""

    image_processor: Any
    tokenizer: Any


class Encoder(ABC):
    """A dual encoder that embeds images and texts with its own preprocessing. `koclip.load` opens it.

    Letters in shapes: N images, M texts, B items in one batch, D embedding width, W width before the projection.

    Args:
        model: The network, or a `ModuleDict` of two networks. Its device and mode do not change.
        processor: An object with an `image_processor` and a `tokenizer`.
        name: Path, Hub id or spec of the model.
    """

    def __init__(self, model: nn.Module, processor: Any, name: str = "") -> None:
        self.model: Any = model
        self.processor: Any = processor
        self.name = name

    def encode_images(
        self,
        images: Sequence[Picture],
        batch_size: int = 64,
        max_image_pixels: int = DataConfig.max_image_pixels,
        spread: bool = False,
    ) -> torch.Tensor:
        """Return unit-norm float32 embeddings (N, D) of N images, in order, on the CPU.

        Args:
            images: PIL images or file paths. They are rotated by their EXIF orientation and decoded as in training and
                evaluation (`koclip.data.transforms`).
            batch_size: Images per forward pass.
            max_image_pixels: Largest width x height of an image file, pixels.
            spread: Split the batches over the processes of a distributed run. Every process gets all embeddings.

        Raises:
            OSError: a file cannot be read.
            ImageError: an image cannot be used. The message names the image and the reason.
        """
        return self._over_images(
            lambda batch: unit(self._embed_images(batch)), images, batch_size, max_image_pixels, spread
        )

    def encode_texts(
        self, texts: Sequence[str], batch_size: int = 256, raw: bool = False, spread: bool = False
    ) -> torch.Tensor:
        """Return unit-norm float32 embeddings (M, D) of M texts, in order, on the CPU.

        Texts are cleaned like captions in training: NFC, single spaces, no invisible characters
        (`koclip.text.normalize`). Texts that are too long for the model are cut. A text that is blank after cleaning is
        embedded as the empty text; if the model's tokenizer adds a prefix (`tokenizer.prefix`), it adds none to it.

        Args:
            texts: The texts.
            batch_size: Texts per forward pass. Texts of similar length share a batch.
            raw: Do not clean the texts. Evaluation uses this to measure, for example, decomposed (NFD) text.
            spread: Split the batches over the processes of a distributed run. Every process gets all embeddings.
        """

        def embed(batch: list[str]) -> torch.Tensor:
            with evaluating(self.model):
                return unit(self._embed_texts(batch))

        texts = texts if raw else [normalize(text) for text in texts]
        return texts_in_batches(embed, texts, batch_size, spread) if len(texts) else embed([_ANY_TEXT])[:0]

    def image_features(
        self,
        images: Sequence[Picture],
        batch_size: int = 64,
        max_image_pixels: int = DataConfig.max_image_pixels,
        spread: bool = False,
    ) -> torch.Tensor:
        """Return float32 features (N, W) of N images: the input of the projection. Linear probes train on them.

        Arguments and errors: see `encode_images`.
        """
        return self._over_images(
            lambda batch: self._image_features(batch).float().cpu(), images, batch_size, max_image_pixels, spread
        )

    def similarity(self, images: Sequence[Picture] | torch.Tensor, texts: Sequence[str] | torch.Tensor) -> torch.Tensor:
        """Return the logits (N, M) of N images and M texts, float32, on the CPU: scale * cosine + bias.

        For a model trained with a softmax loss, the softmax over the texts gives the probability of each text for an
        image (Radford et al. 2021, CLIP). For a model trained with a sigmoid loss, the sigmoid of a logit is the
        probability that image and text match (Zhai et al. 2023, SigLIP).

        `images` and `texts` may also be embeddings (N, D) and (M, D).
        """
        image = images if isinstance(images, torch.Tensor) else self.encode_images(images)
        text = texts if isinstance(texts, torch.Tensor) else self.encode_texts(texts)
        return self.scale * (image.float().cpu() @ text.float().cpu().T) + self.bias

    @property
    def scale(self) -> float:
        """The factor of the cosines: exp of the model's logit scale."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def bias(self) -> float:
        """The bias of the sigmoid loss; 0.0 if the model has none."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    @property
    def view(self) -> tuple[float, float] | None:
        """Width and height of the centre crop that the model sees, as shares of the shorter side. None: no crop."""
        return None

    def patches(self, image: Image.Image) -> torch.Tensor:
        """Return the unit-norm embeddings (R, C, D) of an image's R x C patches, on the CPU.

        Raises:
            NoPatchesError: the model has no patch embeddings.
        """
        raise NoPatchesError(f"a {type(self.model).__name__} has no patch embeddings to compare with a text")

    @abstractmethod
    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of everything that changes the embeddings: weights, configuration, preprocessing."""

    def image_fingerprint(self) -> str:
        """Return a hash of everything that changes the embeddings of images; by default `fingerprint`."""
        return self.fingerprint()

    @abstractmethod
    def _embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Return embeddings (B, D) of one batch of RGB images, with any norm, on any device."""

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Return embeddings (B, D) of one batch of texts, with any norm, on any device."""

    @abstractmethod
    def _image_features(self, images: list[Image.Image]) -> torch.Tensor:
        """Return features (B, W) of one batch of RGB images, on any device."""

    def _over_images(
        self,
        forward: Callable[[list[Image.Image]], torch.Tensor],
        images: Sequence[Picture],
        batch_size: int,
        max_pixels: int,
        spread: bool,
    ) -> torch.Tensor:
        """Run `forward` on every batch of images."""
        check_pixels("max_image_pixels", max_pixels)

        def read_and_embed(indices: list[int]) -> torch.Tensor:
            batch = [_open(images[index], index, max_pixels) for index in indices]
            with evaluating(self.model):
                return forward(batch)

        if len(images):
            return in_batches(read_and_embed, range(len(images)), batch_size, "images", spread)
        with evaluating(self.model):
            return forward([Image.new("RGB", _ANY_SIZE)])[:0]


class TextSide(Protocol):
    """A text model that embeds into the image space of another model (`TwoModels`)."""

    model: Any
    tokenizer: Any

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return embeddings (B, D) of one batch of texts, with any norm, on any device."""

    def fingerprint(self) -> str:
        """Return a hash of everything that changes the embeddings."""


class TwoModels(Encoder):
    """A text model and an image model with one space. The logit scale and bias are those of the image model."""

    def __init__(self, texts: TextSide, images: Encoder, name: str) -> None:
        processor = Processor(images.processor.image_processor, texts.tokenizer)
        super().__init__(nn.ModuleDict({"text": texts.model, "image": images.model}), processor, name)
        self._texts, self._images = texts, images

    @property
    def scale(self) -> float:
        """The image model's factor of the cosines."""
        return self._images.scale

    @property
    def bias(self) -> float:
        """The image model's bias."""
        return self._images.bias

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""
        return unknown_share(self.processor.tokenizer, texts)

    def fingerprint(self) -> str:
        """Return a hash of everything that changes the embeddings of either model."""
        return fingerprint(self._texts.fingerprint(), self._images.fingerprint())

    def _embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return self._images._embed_images(images)

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        return self._texts.embed(texts)

    def _image_features(self, images: list[Image.Image]) -> torch.Tensor:
        return self._images._image_features(images)


def in_batches(
    embed: Callable[[list[Item]], torch.Tensor],
    items: Sequence[Item],
    batch_size: int,
    unit: str,
    spread: bool = False,
) -> torch.Tensor:
    """Embed N >= 1 items batch by batch and return their rows (N, ...), in order. `unit` is for the progress bar.

    With `spread`, the batches are split over the processes. They stay the same, so the rows are the same bit for bit.
    """
    batches = [range(len(items))[start : start + batch_size] for start in range(0, len(items), batch_size)]
    rank, world_size = (distributed.rank(), distributed.world_size()) if spread else (0, 1)
    quiet = len(batches) < _PROGRESS_FROM or rank > 0
    own = len(batches[rank::world_size])
    with tqdm(desc=f"embedding {unit}", total=own, leave=False, disable=quiet) as bar:

        def embed_batch(indices: Sequence[int]) -> torch.Tensor:
            rows = embed([items[index] for index in indices])
            bar.update()
            return rows

        parts = distributed.share(embed_batch, batches) if spread else [embed_batch(batch) for batch in batches]
    return torch.cat(parts)


def texts_in_batches(
    embed: Callable[[list[str]], torch.Tensor], texts: Sequence[str], batch_size: int, spread: bool = False
) -> torch.Tensor:
    """Embed texts like `in_batches`, but sorted by length, so that batches have little padding."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows = in_batches(embed, [texts[index] for index in order], batch_size, "texts", spread)
    return rows[torch.tensor(order).argsort()]


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Put every module in evaluation mode, and restore each module's own mode afterwards.

    `gradients`: whether autograd records what is computed.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(not gradients):
            yield
    finally:
        for module in training:
            module.training = True


def unit(features: torch.Tensor) -> torch.Tensor:
    """Return features (B, D) in float32, with norm 1, on the CPU."""
    return F.normalize(features.float(), dim=-1).cpu()


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the share of tokens of `texts` that are the unknown token of a transformers tokenizer, 0 to 1.

    CLIP's unknown token is its end token. A text that contains this token's name is split: it is not unknown.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids = [token for text in texts for token in tokenizer(text, **options)["input_ids"]]
    return ids.count(tokenizer.unk_token_id) / max(1, len(ids))


def tokenizer_rules(tokenizer: Any) -> str:
    """Return everything that changes a tokenizer's ids, but not its folder or the state that earlier calls left."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        pieces = getattr(tokenizer, "sp_model", None)
        rules: Any = [tokenizer.get_vocab(), pieces.serialized_model_proto().hex() if pieces else None]
        rules.append(getattr(tokenizer, "do_lower_case", None))
    else:
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    sides = tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length
    return json.dumps([type(tokenizer).__name__, rules, sides, tokenizer.special_tokens_map], default=str)


def fingerprint(*parts: nn.Module | str) -> str:
    """Return a hash of modules and strings. A module counts with its weights and the settings that change results."""
    digest = xxh3_128()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        config: Any = getattr(part, "config", None)
        if hasattr(config, "to_diff_dict"):
            settings = {name: _unnamed(value) for name, value in config.to_diff_dict().items() if name not in _NAMES}
            digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(cast(Any, tensor.detach().float().cpu().contiguous().numpy()))
    return digest.hexdigest()


def _unnamed(setting: Any) -> Any:
    """Remove `_NAMES` from a nested configuration, except its type: BERT and RoBERTa name their weights alike."""
    if not isinstance(setting, dict):
        return setting
    return {name: _unnamed(value) for name, value in setting.items() if name == "model_type" or name not in _NAMES}


def _open(image: Picture, index: int, max_pixels: int) -> Image.Image:
    """Return an image as RGB. Errors name its path or its index in the list."""
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except BROKEN as error:
            raise ImageError(f"images[{index}]: {error}") from error
    encoded = Path(image).read_bytes()
    try:
        picture: Image.Image = to_pil_image(decode(encoded, max_pixels, "max_image_pixels"))
    except ImageError as error:
        raise ImageError(f"{image}: {error}") from error
    return picture
