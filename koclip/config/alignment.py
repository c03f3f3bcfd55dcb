"""Alignment: the methods, their stages and the teacher. `koclip.align` applies a method to a model."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from koclip.config.checks import all_faults, check, check_languages, check_least


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The text tower of `model.clip` as a teacher: it embeds translations of the captions in its language.

    If a row has equally many captions in both languages, caption i corresponds to caption i (empty captions count); a
    caption whose translation is empty is not used. If the numbers differ, any caption of the row is used as the
    translation. The start of training prints how often each case occurs. Captions in the teacher's language are also
    trained on.

    Args:
        language: The teacher's language.
        contrastive: Weight of the contrastive loss between texts and the teacher's embeddings.
        cosine: Weight of 1 - cosine similarity to the teacher's embedding.
        mse: Weight of the mean squared error to the teacher's features, before normalisation (as in M-CLIP).
        anchor: Weight of the three terms above in the methods with images, next to the contrastive loss with images. It
            preserves retrieval in the teacher's language. 0: no teacher in these methods.
    """

    language: str = "en"
    contrastive: float = 1.0
    cosine: float = 8.0
    mse: float = 0.0
    anchor: float = 0.0

    @all_faults()
    def __post_init__(self) -> None:
        check_languages("distill.language", [self.language])
        check_least(self, "distill.", 0, "contrastive", "cosine", "mse", "anchor")
        weights = self.contrastive, self.cosine, self.mse
        check(any(weights), "distill", weights, "expected contrastive, cosine or mse above 0")


class Stage(NamedTuple):
    """A part of a run with its own optimizer and schedule, from step `start` to step `end` of the run."""

    name: str
    start: int
    end: int
    lr: float  # peak learning rate
    images: bool = True  # the loss contrasts texts with images
    distill: DistillConfig | None = None  # weights of the teacher's terms in the loss; None without a teacher
    trains_image: bool = False
    layer_decay: float = 1.0  # learning rate of a layer relative to the layer above it


class StagePlan(NamedTuple):
    """A stage of a method, without the steps and the learning rate, which a run sets."""

    name: str
    images: bool = True  # the loss contrasts texts with images
    distills: bool = False  # needs the teacher; `distill.anchor` adds a teacher to stages with images, too
    trains_image: bool = False
    optional: bool = False  # `align.first_steps: 0` leaves it out


class Method(NamedTuple):
    """A way to align: its stages, one or two, and whether it trains adapters (`lora` section) instead of weights."""

    stages: tuple[StagePlan, ...]
    adapters: bool = False


_DISTILL = StagePlan("distill", images=False, distills=True)
_FROZEN = StagePlan("frozen_image")

METHODS = {
    "frozen_image": Method((_FROZEN,)),
    "lora": Method((StagePlan("lora"),), adapters=True),
    "full": Method((_FROZEN._replace(optional=True), StagePlan("full", trains_image=True))),
    "distill": Method((_DISTILL,)),
    "two_stage": Method((_DISTILL, _FROZEN)),
}


@dataclass(frozen=True, kw_only=True)
class AlignMethodConfig:
    """The method: what is trained, in which stages.

    Args:
        method: `frozen_image`: train the text tower against the frozen image tower (LiT, Zhai et al. 2022). `lora`:
            train adapters and the text projection. `full`: train both towers. `distill`: without images, the source's
            text tower teaches the new text tower. `two_stage`: `distill` for `first_steps`, then `frozen_image`.
        first_steps: Steps of the first stage. `two_stage`: steps of `distill`. `full`: steps with a frozen image tower.
        second_lr: Peak learning rate of the second stage. Default: optim.lr.
        image_layers: `full` trains only this many layers of the image tower, from the top. Default: all layers and the
            embeddings.
        layer_decay: In `full`, the learning rate of a layer relative to the layer above it, in both towers.
        wise_ft: Share of the trained weights in the published model; the rest are the source's weights (WiSE-FT,
            Wortsman et al. 2022). Weights that the source does not have are not mixed.
        cache: Cache the embeddings of a frozen image tower, so that each image is decoded and encoded once.
        cache_dir: Directory of that cache and of the teacher's features. Default: features/ in the run directory. Runs
            with the same source and data may share it.
        cache_dtype: `fp32`, or `fp16`, which needs half the disk and keeps three digits.
    """

    method: str = "frozen_image"
    first_steps: int = 0
    second_lr: float | None = None
    image_layers: int | None = None
    layer_decay: float = 1.0
    wise_ft: float = 1.0
    cache: bool = True
    cache_dir: str | None = None
    cache_dtype: Literal["fp16", "fp32"] = "fp16"

    @all_faults()
    def __post_init__(self) -> None:
        check(self.method in METHODS, "align.method", self.method, f"expected one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        self._check_stages(len(method.stages) > 1, method.stages[0].optional)
        of_image = [name for name, method in METHODS.items() if any(stage.trains_image for stage in method.stages)]
        for name, default in (("image_layers", None), ("layer_decay", 1.0)):
            value, fix = getattr(self, name), f"remove it: {self.method} does not use it, only {' or '.join(of_image)}"
            check(self.method in of_image or value == default, f"align.{name}", value, fix)
        check_least(self, "align.", 0, "first_steps")
        check_least(self, "align.", 1, "image_layers")
        check(0 < self.layer_decay <= 1, "align.layer_decay", self.layer_decay, "expected more than 0, at most 1")
        check(0 < self.wise_ft <= 1, "align.wise_ft", self.wise_ft, "expected more than 0, at most 1")
        whole = not method.adapters or self.wise_ft == 1
        check(whole, "align.wise_ft", self.wise_ft, "expected 1 with adapters; set lora.alpha instead")

    def _check_stages(self, staged: bool, optional: bool) -> None:
        """Check the steps of the first of two stages, which may be `optional`."""
        first, key = self.first_steps, "align.first_steps"
        check(staged or not first, key, first, f"expected 0, because {self.method} has only one stage")
        check(not staged or optional or first > 0, key, first, f"expected the steps of {self.method}'s first stage")
        check(self.second_lr is None or self.second_lr > 0, "align.second_lr", self.second_lr, "expected more than 0")
