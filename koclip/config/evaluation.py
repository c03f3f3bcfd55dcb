"""What a model is evaluated on."""

from dataclasses import dataclass, field
from typing import Literal

from koclip.config.data import SourceConfig
from koclip.config.errors import all_faults, check

Task = Literal["retrieval", "languages", "stress", "zero_shot", "shift", "linear_probe", "few_shot"]
LABELLED = ("linear_probe", "few_shot")  # tasks that need classes, which captions are not


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One data set to evaluate on.

    Args:
        source: Its images and captions, or their classes (`label`); `scenes` brings tasks of its own along.
        tasks: `retrieval` ranks captions and images against each other; `languages` compares the same captions in two
            languages; `stress` ranks images by Korean captions rewritten in 14 ways; `zero_shot` classifies images by
            the names of the classes; `shift` does on `shifted` sets and `corruptions` too; `linear_probe` and
            `few_shot` fit a logistic regression on image features.
        gallery: Further sources whose captions join the candidates (and whose images do not).
        classes: Names of the classes: `cifar10`, `cifar100`, `stl10`, `tiny_imagenet` or a YAML file of yours
            (koclip/text/classes.py); default: each image's caption is the name of its class.
        present_classes: Leave out classes that no image belongs to.
        templates: Prompts of `zero_shot` by language: a list in which `{label}` stands for the name and
            `{label:을/를}` for the name with the particle that fits; or `ko`, `en` or a YAML file of yours; default:
            the bare name.
        template_kind: Which templates of such a file: `photo` or `drawing`.
        train: What probes are fitted on; default: half of the source, drawn with `seed`, tested on the other half.
        shots: Images per class that `few_shot` is fitted on, one after the other.
        shifted: The same classes pictured differently, by name.
        corruptions: Corruptions of `shift`, each in five severities: noise, blur, contrast, brightness, jpeg, pixels.
        max_images: Images used, the first ones; 0 uses all.
        seed: Seed of what is drawn: stress, corruptions, shots and splits.
    """

    source: SourceConfig = field(default_factory=lambda: SourceConfig(scenes_part="test", scenes_size=1_000))
    tasks: list[Task] = field(default_factory=lambda: ["retrieval"])
    gallery: list[SourceConfig] = field(default_factory=list)
    classes: str | None = None
    present_classes: bool = False
    templates: dict[str, list[str] | str] = field(default_factory=dict)
    template_kind: str = "photo"
    train: SourceConfig | None = None
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    shifted: dict[str, SourceConfig] = field(default_factory=dict)
    corruptions: list[str] = field(default_factory=list)
    max_images: int = 0
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        check(self.max_images >= 0, "eval.sets[].max_images", self.max_images, "expected 0 or more")
        if self.classes is None:
            unknown = sorted(set(self.templates) - set(self.source.captions))
            languages = list(self.source.captions)
            check(not unknown, "eval.sets[].templates", unknown, f"the source's languages are {languages}")
            probes = sorted(set(self.tasks) & set(LABELLED))
            check(not probes, "eval.sets[].tasks", probes, "they need source.label and classes")
        else:
            check(self.source.label is not None, "eval.sets[].source.label", None, "name the column of the classes")
        told = self.source.captions
        for task, fits, wanted in (
            ("retrieval", bool(told), "captions"),
            ("languages", len(told) >= 2, "captions in 2 languages or more"),
            ("stress", "ko" in told, "captions in ko"),
        ):
            check(fits or task not in self.tasks, f"eval.sets[].tasks: {task}", told, f"expected {wanted}")
        if "shift" in self.tasks:
            some = bool(self.shifted or self.corruptions)
            check(some, "eval.sets[].shifted", {}, "the task shift needs shifted sets or corruptions")
        check(all(count >= 1 for count in self.shots), "eval.sets[].shots", self.shots, "expected 1 or more each")


@dataclass(frozen=True, kw_only=True)
class RatingsConfig:
    """People's ratings of captions for images, which a model's scores should agree with.

    Args:
        path: TSV file: image, caption, one or more ratings (numbers), without a header line.
        language: The captions' language.
        name: Short name used in metric names.
        image_root: Folder that relative image paths start from; default: the folder of `path`.
    """

    path: str
    language: str
    name: str = "ratings"
    image_root: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during and after training.

    Args:
        sets: What to evaluate on.
        batch_size: Images or texts encoded at once.
    """

    sets: list[EvalSetConfig] = field(default_factory=lambda: [EvalSetConfig()])
    batch_size: int = 256

    @all_faults()
    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "eval.batch_size", self.batch_size, "expected 1 or more")
