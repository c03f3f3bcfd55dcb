"""The training of open_clip: its model, ClipLoss, schedule and `train_one_epoch`, on koclip's batches."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from clip_shapes import integer, towers
from open_clip_weights import to_open_clip
from pairs import normalized, padded
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from koclip.config import OptimConfig
from koclip.data.batches import Batch

try:
    import open_clip
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch
except ImportError as error:
    raise SystemExit(
        f"this benchmark needs open_clip, which is not installed ({error}). In a separate venv, so that koclip "
        "does not come to depend on it: pip install -c constraints.txt -e . open_clip_torch"
    ) from error

VERSION = open_clip.__version__


class OpenClip:
    """open_clip's training of `shape`: a model, or random weights of the same shape as a `CLIPModel`.

    `losses` has the loss of every step. With `accum_freq`, a step uses this many batches.
    """

    def __init__(
        self,
        shape: CLIPConfig | torch.nn.Module,
        optim: OptimConfig,
        num_steps: int,
        precision: str = "fp32",
        accum_freq: int = 1,
        device: str = "cpu",
    ) -> None:
        self.model = (shape if isinstance(shape, torch.nn.Module) else build(shape)).to(device)
        self.losses: list[Tensor] = []
        self._optimizer = adamw(self.model, optim)
        self._schedule = cosine_lr(self._optimizer, optim.lr, optim.warmup_steps, num_steps)
        self._clip_loss = open_clip.ClipLoss(cache_labels=True)
        self._epoch = 0
        self._args = SimpleNamespace(
            device=device, rank=0, world_size=1, distributed=False, horovod=False, precision=precision,
            accum_freq=accum_freq, distill=False, skip_scheduler=False, grad_clip_norm=optim.max_grad_norm or None,
            log_every_n_steps=100, batch_size=0, wandb=False,
        )  # fmt: skip

    def train(self, batches: Sequence[tuple[Tensor, Tensor]] | DataLoader[Any]) -> None:
        """Take one step per (images, texts) batch. Every call needs equally many: the schedule counts epochs."""
        loader = batches if isinstance(batches, DataLoader) else _Loader(batches)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        model, args = self.model, self._args
        train_one_epoch(model, data, self._loss, self._epoch, self._optimizer, None, self._schedule, None, args)
        self._epoch += 1

    def _loss(self, **features: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self._clip_loss(**features)
        self.losses.append(losses["contrastive_loss"].detach())
        return losses


class _Loader(list[tuple[Tensor, Tensor]]):
    """Batches with the two counts that open_clip reads from a data loader."""

    num_batches = property(len)
    num_samples = property(lambda self: sum(len(images) for images, _ in self))


class Photos(Dataset[tuple[Tensor, Tensor]]):
    """(photo, text) pairs as in `CsvDataset` of open_clip_train/data.py, which needs more packages."""

    def __init__(self, files: Sequence[Path], captions: Sequence[str], image_size: int, tokenizer: Any) -> None:
        self._files, self._captions = files, captions
        self._transform, self._tokenize = train_transform(image_size), tokenizer

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(Image.open(self._files[index])), self._tokenize([self._captions[index]])[0]

    def loader(self, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of `get_csv_dataset`."""
        return _CountedLoader(self, batch_size, shuffle=True, drop_last=True)


class _CountedLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A loader with the two counts that open_clip reads."""

    @property
    def num_samples(self) -> int:
        """The data set's, as `get_csv_dataset` sets it."""
        return len(cast(Photos, self.dataset))

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return len(self)


def build(shape: CLIPConfig) -> torch.nn.Module:
    """Return an `open_clip.CLIP` with the sizes of a `CLIPModel`'s config and random weights."""
    text = towers(shape).text
    model: torch.nn.Module = open_clip.CLIP(
        embed_dim=shape.projection_dim,
        vision_cfg=_vision_cfg(shape),
        text_cfg={
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
        },
        quick_gelu=True,
        output_dict=True,
    )
    return model


def locked(clip: CLIPModel, encoder: Path, projection: Tensor) -> torch.nn.Module:
    """Return open_clip's model with a CLIP's image tower and another text encoder, as for `--lock-image`.

    The logit scale is locked too, as in koclip.

    Args:
        clip: Source of the image tower and the logit scale.
        encoder: Directory of a text encoder that transformers loads.
        projection: (D, width) from the first token to the embedding.
    """
    shape = clip.config
    model: Any = open_clip.CustomTextCLIP(
        embed_dim=shape.projection_dim,
        vision_cfg=_vision_cfg(shape),
        text_cfg={
            "hf_model_name": str(encoder),
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_proj_type": "linear",
        },
        quick_gelu=True,
        output_dict=True,
    )
    weights = to_open_clip(clip.state_dict())
    model.visual.load_state_dict(
        {name.removeprefix("visual."): tensor for name, tensor in weights.items() if name.startswith("visual.")}
    )
    with torch.no_grad():
        model.text.proj.weight.copy_(projection)
        model.logit_scale.copy_(clip.logit_scale)
    model.lock_image_tower()
    model.logit_scale.requires_grad_(False)
    trained: torch.nn.Module = model
    return trained


def _vision_cfg(shape: CLIPConfig) -> dict[str, int]:
    vision = towers(shape).vision
    return {
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": integer(vision.patch_size),
        "image_size": integer(vision.image_size),
    }


def adamw(model: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW with the parameter groups of open_clip_train/main.py."""

    def undecayed(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if undecayed(name, parameter)], "weight_decay": 0.0},
        {
            "params": [parameter for name, parameter in named if not undecayed(name, parameter)],
            "weight_decay": config.weight_decay,
        },
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def as_pairs(batch: Batch, images: CLIPImageProcessor) -> tuple[Tensor, Tensor]:
    """Return a batch in the form of open_clip's loader: normalised float32 images, ids padded with 0 to its context."""
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, 0)
    return normalized(batch, images), padded(ids, 0)


@torch.no_grad()
def clip_loss(model: torch.nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """Return the loss of a batch."""
    loss: Tensor = open_clip.ClipLoss()(**model(images, texts))
    return loss


train_transform = partial(open_clip.image_transform, is_train=True)
hf_tokenizer = open_clip.tokenizer.HFTokenizer
