"""Configurations of the recipes that train: the sections that each one uses."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from koclip.config.alignment import METHODS, AdapterConfig, AlignMethodConfig, DistillConfig, Stage, SwapConfig
from koclip.config.data import DataConfig, TokenizerConfig
from koclip.config.errors import all_faults, check
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

    @all_faults()
    def __post_init__(self) -> None:
        _check_run(self)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The only stage: all steps, both towers, no teacher."""
        return (Stage("training", 0, self.train.num_steps, self.optim.lr, trains_image=True),)


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

    @all_faults()
    def __post_init__(self) -> None:
        first, steps = self.align.first_steps, self.train.num_steps
        check(first < steps, "align.first_steps", first, f"expected fewer than train.num_steps ({steps})")
        _check_run(self)
        cached = self.align.cache and any(stage.images and not stage.trains_image for stage in self.stages)
        kept = self.data.num_crops >= 1 or not cached
        check(kept, "data.num_crops", self.data.num_crops, "expected 1 or more, whose embeddings align.cache keeps")
        language = self.distill.language if self.taught else None
        missing = [source.short_name for source in self.data.sources if language and language not in source.captions]
        check(not missing, "data.sources[].captions", missing, f"the teacher needs captions in {language}")
        random_text = self.model.text_encoder is None or self.model.text_encoder.startswith("auto:")
        adapted = METHODS[self.align.method].adapters and random_text
        fix = "a pretrained encoder, or `same`: adapters of random weights that stay frozen learn little"
        check(not adapted, "model.text_encoder", self.model.text_encoder, f"{self.align.method} expects {fix}")
        same = self.model.text_encoder == "same"
        distilled = same and not any(stage.images for stage in self.stages)
        check(not distilled, "model.text_encoder", "same", "a text tower cannot be distilled from itself")

    @property
    def text_tokenizer(self) -> TokenizerConfig:
        """The tokenizer, that of the text encoder where `tokenizer.path` names none."""
        own = self.model.clip if self.model.text_encoder == "same" else self.model.text_encoder
        path = self.tokenizer.path or (own.removeprefix("auto:") if own else None)
        return dataclasses.replace(self.tokenizer, path=path)

    @property
    def taught(self) -> bool:
        """Whether any stage needs the teacher's features."""
        return any(stage.distill for stage in self.stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of `align.method`, with their steps, learning rates and teacher."""
        method = METHODS[self.align.method]
        plans = method.stages if self.align.first_steps or not method.stages[0].optional else method.stages[1:]
        bounds = [0, *([self.align.first_steps] if len(plans) > 1 else []), self.train.num_steps]
        image_adapters = method.adapters and self.lora.target != "text"
        stages = []
        for number, plan in enumerate(plans):
            lr = (self.align.second_lr if number else None) or self.optim.lr
            stages.append(
                Stage(
                    plan.name,
                    start=bounds[number],
                    end=bounds[number + 1],
                    lr=lr,
                    images=plan.images,
                    distill=self.distill if plan.distills or self.distill.anchor else None,
                    trains_image=plan.trains_image or image_adapters,
                    layer_decay=self.align.layer_decay,
                )
            )
        return tuple(stages)


def _check_run(config: PretrainConfig | AlignConfig) -> None:
    """Check what every training recipe's sections must agree on."""
    warmup, num_steps = config.optim.warmup_steps, min(stage.end - stage.start for stage in config.stages)
    check(
        warmup < num_steps,
        "optim.warmup_steps",
        warmup,
        f"expected fewer than train.num_steps ({num_steps}, of the shortest stage)",
    )
    resumable = config.resume == "no" or config.output_dir is not None
    check(resumable, "resume", config.resume, "set output_dir to the run directory that should go on")
