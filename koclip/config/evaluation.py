"""What a model is evaluated on."""

from dataclasses import dataclass, field
from typing import Literal

from koclip.config.data import SourceConfig
from koclip.config.errors import check


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One data set to evaluate on.

    Args:
        source: Its images and captions; `scenes` brings tasks of its own along.
        tasks: `retrieval` ranks captions and images against each other; `zero_shot` takes the distinct captions as
            class names and each image's caption as its class.
        gallery: Further sources whose captions join the candidates (and whose images do not).
        templates: Prompts of `zero_shot` by language, `{}` stands for the class name, `{을/를}` for the particle that
            fits what stands before it; default: the bare name.
        max_images: Images used, the first ones; 0 uses all.
    """

    source: SourceConfig = field(default_factory=lambda: SourceConfig(scenes_part="test", scenes_size=1_000))
    tasks: list[Literal["retrieval", "zero_shot"]] = field(default_factory=lambda: ["retrieval"])
    gallery: list[SourceConfig] = field(default_factory=list)
    templates: dict[str, list[str]] = field(default_factory=dict)
    max_images: int = 0

    def __post_init__(self) -> None:
        check(self.max_images >= 0, "eval.sets[].max_images", self.max_images, "expected 0 or more")
        unknown = sorted(set(self.templates) - set(self.source.captions))
        check(not unknown, "eval.sets[].templates", unknown, f"the source's languages are {list(self.source.captions)}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during and after training.

    Args:
        sets: What to evaluate on.
        batch_size: Images or texts encoded at once.
    """

    sets: list[EvalSetConfig] = field(default_factory=lambda: [EvalSetConfig()])
    batch_size: int = 256

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "eval.batch_size", self.batch_size, "expected 1 or more")
