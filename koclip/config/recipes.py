"""Configurations of the recipes that train: the sections that each one uses."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from koclip.config.alignment import AdapterConfig, AlignMethodConfig, DistillConfig, SwapConfig
from koclip.config.data import DataConfig, TokenizerConfig
from koclip.config.errors import check
from koclip.config.evaluation import EvalConfig
from koclip.config.model import LossConfig, ModelConfig
from koclip.config.training import OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a CLIP from random weights on (image, caption) pairs.

    Args:
        output_dir: Run directory; default: runs/pretrain-<date and time>.
        resume: `auto` continues from the newest intact checkpoint in output_dir, `no` refuses a directory that has one.
        resume_with: Keys that a resumed run may change although its model then comes out different, as `[optim.lr]`;
            `data.sources` stands for the rows too, if the data has changed.
    """

    output_dir: str | None = None
    resume: Literal["auto", "no"] = "no"
    resume_with: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _check_run(self, self.train.num_steps)


class Stage(NamedTuple):
    """A part of an alignment with an optimizer of its own."""

    name: str
    start: int  # steps done before it
    end: int
    lr: float
    images: bool  # texts are contrasted with images
    taught: bool  # the teacher's features are part of the loss
    trains_image: bool


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Give a CLIP another text encoder, or adapt its own, and keep its image space.

    Args:
        output_dir: Run directory; default: runs/align-<date and time>.
        resume: `auto` continues from the newest intact checkpoint in output_dir, `no` refuses a directory that has one.
        resume_with: Keys that a resumed run may change although its model then comes out different, as `[optim.lr]`;
            `data.sources` stands for the rows too, if the data has changed.
    """

    output_dir: str | None = None
    resume: Literal["auto", "no"] = "no"
    resume_with: tuple[str, ...] = ()
    model: SwapConfig
    align: AlignMethodConfig = field(default_factory=AlignMethodConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        first, steps = self.align.first_steps, self.train.num_steps
        check(first < steps, "align.first_steps", first, f"expected fewer than train.num_steps ({steps})")
        _check_run(self, min(stage.end - stage.start for stage in self.stages))
        cached = self.align.cache and any(stage.images and not stage.trains_image for stage in self.stages)
        kept = self.data.num_crops >= 1 or not cached
        check(kept, "data.num_crops", self.data.num_crops, "expected 1 or more, whose embeddings align.cache keeps")
        missing = [
            one.short_name for one in self.data.sources if self.taught and self.distill.language not in one.captions
        ]
        check(not missing, "data.sources[].captions", missing, f"the teacher needs captions in {self.distill.language}")
        random_text = self.model.text_encoder is None or self.model.text_encoder.startswith("auto:")
        wanted = "a pretrained encoder, or `same`: adapters of random weights that stay frozen learn little"
        adapted = self.align.method == "lora" and random_text
        check(not adapted, "model.text_encoder", self.model.text_encoder, f"lora expects {wanted}")
        nothing = self.model.text_encoder == "same" and self.align.method == "distill"
        check(not nothing, "model.text_encoder", "same", "a text tower cannot be distilled from itself")

    @property
    def text_tokenizer(self) -> TokenizerConfig:
        """The tokenizer, that of the text encoder where `tokenizer.path` names none."""
        own = self.model.clip if self.model.text_encoder == "same" else self.model.text_encoder
        path = self.tokenizer.path or (own.removeprefix("auto:") if own else None)
        return dataclasses.replace(self.tokenizer, path=path)

    @property
    def taught(self) -> bool:
        """Whether any stage needs the teacher's features."""
        return any(stage.taught for stage in self.stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that `align.method` stands for."""
        method, first, end = self.align.method, self.align.first_steps, self.train.num_steps
        anchored, lr = self.distill.anchor > 0, self.optim.lr
        second_lr = self.align.second_lr or lr
        if method == "distill":
            return (Stage("distill", 0, end, lr, images=False, taught=True, trains_image=False),)
        last_lr = second_lr if first else lr
        trains_image = method == "full" or (method == "lora" and self.lora.target != "text")
        last = Stage(method, first, end, last_lr, images=True, taught=anchored, trains_image=trains_image)
        if method == "two_stage":
            distill = Stage("distill", 0, first, lr, images=False, taught=True, trains_image=False)
            return distill, last._replace(name="frozen_image")
        if first:
            return Stage("frozen_image", 0, first, lr, images=True, taught=anchored, trains_image=False), last
        return (last,)


def _check_run(config: PretrainConfig | AlignConfig, num_steps: int) -> None:
    """Check what every training recipe's sections must agree on; `num_steps` are those of its shortest stage."""
    warmup = config.optim.warmup_steps
    check(
        warmup < num_steps,
        "optim.warmup_steps",
        warmup,
        f"expected fewer than train.num_steps ({num_steps}, of the shortest stage)",
    )
    resumable = config.resume == "no" or config.output_dir is not None
    check(resumable, "resume", config.resume, "set output_dir to the run directory that should go on")
