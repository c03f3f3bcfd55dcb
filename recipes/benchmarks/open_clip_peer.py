"""open_clip as it trains: its model, ClipLoss, schedule and `train_one_epoch`, on koclip's batches."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch
from pairs import normalized, padded
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from koclip.config import OptimConfig
from koclip.data.batches import Batch

try:
    import open_clip
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch
except ImportError as error:
    raise SystemExit(
        f"this benchmark measures against open_clip, which is not here ({error}). In a venv of its own, so that koclip "
        "does not come to depend on it: pip install -c constraints.txt -e . open_clip_torch"
    ) from error

VERSION = open_clip.__version__


class OpenClip:
    """open_clip's training of a model with random weights, of the same shape as a `CLIPModel`.

    `losses` holds the loss of every step. With `accum_freq` it takes so many batches together for one step.
    """

    def __init__(
        self,
        shape: CLIPConfig,
        optim: OptimConfig,
        num_steps: int,
        precision: str = "fp32",
        accum_freq: int = 1,
        device: str = "cpu",
    ) -> None:
        self.model = build(shape).to(device)
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

    def train(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take one step per (images, texts) batch. Every call must bring as many: the schedule counts by epochs."""
        data = {"train": SimpleNamespace(dataloader=_Loader(batches), set_epoch=lambda epoch: None)}
        model, args = self.model, self._args
        train_one_epoch(model, data, self._loss, self._epoch, self._optimizer, None, self._schedule, None, args)
        self._epoch += 1

    def _loss(self, **features: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self._clip_loss(**features)
        self.losses.append(losses["contrastive_loss"].detach())
        return losses


class _Loader(list[tuple[Tensor, Tensor]]):
    """Batches with the two counts that open_clip asks a data loader for."""

    num_batches = property(len)
    num_samples = property(lambda self: sum(len(images) for images, _ in self))


def build(shape: CLIPConfig) -> torch.nn.Module:
    """Return an `open_clip.CLIP` with the sizes of a `CLIPModel`'s config and random weights."""
    vision, text = shape.vision_config, shape.text_config
    return open_clip.CLIP(
        embed_dim=shape.projection_dim,
        vision_cfg={
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
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


def adamw(model: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW with the groups of open_clip_train/main.py, which builds them inside its `main`."""

    def undecayed(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    groups = [
        {"params": [one for name, one in named if undecayed(name, one)], "weight_decay": 0.0},
        {"params": [one for name, one in named if not undecayed(name, one)], "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def as_pairs(batch: Batch, images: CLIPImageProcessor) -> tuple[Tensor, Tensor]:
    """Return a batch as open_clip's loader gives it: normalised float32 images, ids padded with 0 to its context."""
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, 0)
    return normalized(batch, images), padded(ids, 0)


train_transform = partial(open_clip.image_transform, is_train=True)
