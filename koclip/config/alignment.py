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
        preserve: Weight of a preservation term in the methods with images: the divergence of the similarities of images
            and texts from the source's, over the pairs of the batch whose captions are in `language`. `languages` of a
            data source must mix such captions in. Unlike `anchor`, it keeps what the source confuses, too. It also
            works with `model.text_encoder: same`. 0: no such term.
    """

    language: str = "en"
    contrastive: float = 1.0
    cosine: float = 8.0
    mse: float = 0.0
    anchor: float = 0.0
    preserve: float = 0.0

    @all_faults()
    def __post_init__(self) -> None:
        check_languages("distill.language", [self.language])
        check_least(self, "distill.", 0, "contrastive", "cosine", "mse", "anchor", "preserve")
        weights = self.contrastive, self.cosine, self.mse
        check(any(weights), "distill", weights, "expected contrastive, cosine or mse above 0")

    @property
    def in_stages_with_images(self) -> bool:
        """Whether the stages with images have a teacher, too."""
        return bool(self.anchor or self.preserve)


class Stage(NamedTuple):
    """A part of a run with its own optimizer and schedule, from step `start` to step `end` of the run."""

    name: str
    start: int
    end: int
    lr: float  # peak learning rate
    images: bool = True  # the loss contrasts texts with images
    distill: DistillConfig | None = None  # weights of the teacher's terms in the loss; None without a teacher
    trains_image: bool = False
    text_layers: int | None = None  # layers of the text tower that train, from the top; 0: its projection only
    image_decay: float | None = None  # weight decay of the image projection, if it trains without its tower
    layer_decay: float = 1.0  # learning rate of a layer relative to the layer above it

    @property
    def preserves(self) -> bool:
        """Whether the loss has the preservation term."""
        return self.images and self.distill is not None and self.distill.preserve > 0


class StagePlan(NamedTuple):
    """A stage of a method, without the steps and the learning rate, which a run sets."""

    name: str
    images: bool = True  # the loss contrasts texts with images
    distills: bool = False  # needs the teacher; `distill.anchor` and `preserve` add a teacher to stages with images
    trains_image: bool = False
    text: Literal["projection", "layers", "all"] = "layers"  # what trains of the text side; `align.text_layers` layers
    optional: bool = False  # `align.first_steps: 0` leaves it out


class Method(NamedTuple):
    """A way to align: its stages, one to three, and whether it trains adapters (`lora` section) instead of weights."""

    stages: tuple[StagePlan, ...]
    adapters: bool = False


_DISTILL = StagePlan("distill", images=False, distills=True)
_FROZEN = StagePlan("frozen_image")
_PROJECTION = StagePlan("projection", text="projection")

METHODS = {
    "projection": Method((_PROJECTION,)),
    "frozen_image": Method((_FROZEN,)),
    "lora": Method((StagePlan("lora"),), adapters=True),
    "full": Method((_FROZEN._replace(optional=True), StagePlan("full", trains_image=True))),
    "distill": Method((_DISTILL,)),
    "two_stage": Method((_DISTILL, _FROZEN)),
    "unfreeze": Method((_PROJECTION, StagePlan("top_layers"), StagePlan("all_layers", text="all"))),
}


@dataclass(frozen=True, kw_only=True)
class AlignMethodConfig:
    """The method: what is trained, in which stages.

    Args:
        method: `projection`: train only the text projection, on cached features of both frozen towers; takes a minute.
            `frozen_image`: train the text tower against the frozen image tower (LiT, Zhai et al. 2022). `lora`:
            train adapters and the text projection. `full`: train both towers. `distill`: without images, the source's
            text tower teaches the new text tower. `two_stage`: `distill` for `first_steps`, then `frozen_image`.
            `unfreeze`: `projection` for `first_steps`, then also the top `text_layers` for `second_steps`, then, if
            steps are left, the whole text tower.
        first_steps: Steps of the first stage. `two_stage`: steps of `distill`. `full`: steps with a frozen image tower.
            `unfreeze`: steps of `projection`.
        second_steps: Steps of the second of three stages.
        second_lr: Peak learning rate of the second stage. Default: optim.lr.
        third_lr: Peak learning rate of the third stage. Default: second_lr.
        text_layers: Train only this many layers of the text tower, from the top, and what is above them. Frozen layers
            cost no memory for gradients, and have no dropout. Default: all layers and the embeddings.
        freeze_embeddings: Keep the token embeddings of the text tower, which often are most of its weights. Default:
            true if the text encoder is pretrained and has more than 50,000 pieces; the start of the run prints it.
        image_projection_decay: `projection` and `unfreeze` also train the image projection, with this weight decay.
            This changes the image embeddings. Default: it is not trained.
        image_layers: `full` trains only this many layers of the image tower, from the top. Default: all layers and the
            embeddings.
        layer_decay: In `full`, the learning rate of a layer relative to the layer above it, in both towers.
        wise_ft: Share of the trained weights in the published model; the rest are the source's weights (WiSE-FT,
            Wortsman et al. 2022). Weights that the source does not have are not mixed: a new text encoder, and the
            projection and the scale if the source is an image tower alone.
        cache: Cache the embeddings of a frozen image tower, so that each image is decoded and encoded once. In
            `projection`, also the text features.
        cache_dir: Directory of that cache and of the teacher's features. Default: features/ in the run directory. Runs
            with the same source may share it, also on parts of the data: images and captions in it are not computed
            again.
        cache_dtype: `fp32`, or `fp16`, which needs half the disk and keeps three digits.
        compare_source: At the end, evaluate the source, too, and report what the model has kept, forgotten and gained.
            Embeds the captions of `eval.sets` once more with the source; also the images, if the image tower has
            changed. `cache_dir` caches these embeddings. A source without a text tower is not compared.
    """

    method: str = "frozen_image"
    first_steps: int = 0
    second_steps: int = 0
    second_lr: float | None = None
    third_lr: float | None = None
    text_layers: int | None = None
    freeze_embeddings: bool | None = None
    image_projection_decay: float | None = None
    image_layers: int | None = None
    layer_decay: float = 1.0
    wise_ft: float = 1.0
    cache: bool = True
    cache_dir: str | None = None
    cache_dtype: Literal["fp16", "fp32"] = "fp16"
    compare_source: bool = True

    @all_faults()
    def __post_init__(self) -> None:
        check(self.method in METHODS, "align.method", self.method, f"expected one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        self._check_stages(len(method.stages), method.stages[0].optional)
        self._check_text(method)
        projects = [name for name, own in METHODS.items() if any(stage.text == "projection" for stage in own.stages)]
        decay, fix = self.image_projection_decay, f"remove it: only {' or '.join(projects)} uses it"
        check(self.method in projects or decay is None, "align.image_projection_decay", decay, fix)
        of_image = [name for name, method in METHODS.items() if any(stage.trains_image for stage in method.stages)]
        for name, default in (("image_layers", None), ("layer_decay", 1.0)):
            value, fix = getattr(self, name), f"remove it: {self.method} does not use it, only {' or '.join(of_image)}"
            check(self.method in of_image or value == default, f"align.{name}", value, fix)
        check_least(self, "align.", 0, "image_projection_decay")
        check_least(self, "align.", 1, "image_layers", "text_layers")
        check(0 < self.layer_decay <= 1, "align.layer_decay", self.layer_decay, "expected more than 0, at most 1")
        check(0 < self.wise_ft <= 1, "align.wise_ft", self.wise_ft, "expected more than 0, at most 1")
        whole = not method.adapters or self.wise_ft == 1
        check(whole, "align.wise_ft", self.wise_ft, "expected 1 with adapters; set lora.alpha instead")

    def _check_stages(self, count: int, optional: bool) -> None:
        """Check the steps and learning rates of the `count` stages; the first may be `optional`."""
        for number, name in enumerate(("first_steps", "second_steps"), start=1):
            steps, key, more = getattr(self, name), f"align.{name}", number > 1 or not optional
            check(steps >= 0, key, steps, "expected 0 or more")
            fix = f"expected 0, because stage {number} is the last of {self.method}, or it has no such stage"
            check(count > number or steps <= 0, key, steps, fix)
            check(
                count <= number or not more or steps > 0,
                key,
                steps,
                f"expected the steps of stage {number} of {self.method}",
            )
        for number, name in enumerate(("second_lr", "third_lr"), start=2):
            lr, key = getattr(self, name), f"align.{name}"
            check(lr is None or lr > 0, key, lr, "expected more than 0")
            check(lr is None or number == 2 or count >= number, key, lr, f"remove it: {self.method} has {count} stages")

    def _check_text(self, method: Method) -> None:
        """Check what trains of the text tower."""
        towers = not method.adapters and any(stage.text != "projection" for stage in method.stages)
        for name in ("text_layers", "freeze_embeddings"):
            value, fix = getattr(self, name), f"remove it: {self.method} trains no weights of the text tower"
            check(towers or value is None, f"align.{name}", value, fix)
        named = self.text_layers is not None or not any(stage.text == "all" for stage in method.stages)
        check(named, "align.text_layers", None, f"set the number of layers of {self.method}'s second stage")
