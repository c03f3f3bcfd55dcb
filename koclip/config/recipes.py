"""Configurations of whole recipes: the sections that each one uses."""

from dataclasses import dataclass, field
from typing import Literal

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
        resume_with: Keys that a resumed run may change although its model then comes out different, as `[optim.lr]`.
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
        warmup, steps = self.optim.warmup_steps, self.train.num_steps
        check(warmup < steps, "optim.warmup_steps", warmup, f"expected fewer than train.num_steps ({steps})")
        check(
            self.resume == "no" or self.output_dir is not None,
            "resume",
            self.resume,
            "set output_dir to the run directory that should go on",
        )
