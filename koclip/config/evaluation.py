"""What a model is evaluated on."""

from dataclasses import dataclass, field
from typing import Literal

from koclip.config.checks import all_faults, check, check_languages
from koclip.config.data import SourceConfig

LABELLED = ("linear_probe", "few_shot")  # tasks that need classes, which captions are not
CLASS_TASKS = ("zero_shot", "shift")  # tasks that read the names of classes
CAPTIONED = ("retrieval", "languages", "stress")  # tasks that read captions


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One data set to evaluate on.

    Args:
        source: Its images and captions, or their classes (`label`).
        tasks: `retrieval` ranks captions and images against each other; `languages` compares the same captions in two
            languages; `stress` ranks images by Korean captions rewritten in 14 ways; `zero_shot` classifies images by
            the names of the classes; `shift`: zero-shot accuracy on the `shifted` sets and under `corruptions`,
            compared with the original set; `linear_probe` and `few_shot` fit a logistic regression on image features.
            `multiple_choice` (which text fits the image?) comes with data that has questions, such as `scenes`.
        gallery: Further sources whose captions join the candidates (and whose images do not).
        classes: Names of the classes: `cifar10`, `cifar100`, `stl10`, `tiny_imagenet` or a YAML file of yours
            (koclip/text/classes.py); default: each image's caption is the name of its class. With classes each row is
            an image; without, rows of equal images (by content) are one image with all their captions.
        labels: How `source.label` names a class: by its `key`, or by its `number`, which is its place in the list, from
            0. `auto`: by key if all labels of source, train and shifted are keys; by number if all are numbers, no key
            is one and every class has an image in each of them; anything else is refused.
        present_classes: Leave out classes that no image belongs to.
        templates: Prompts of `zero_shot` by language: a list in which `{label}` stands for the name and
            `{label:을/를}` for the name with the particle that fits; or `ko`, `en` or a YAML file of yours; default:
            the bare name.
        template_kind: Which templates of such a file: `photo` or `drawing`.
        train: Images that probes are fitted on; images that the source holds too are left out, by content. Default:
            half of the source, drawn with `seed`; then the other half is tested.
        shots: Images per class that `few_shot` is fitted on, one after the other.
        shifted: Other data sets with the same classes, to measure accuracy under distribution shift: a source for each
            name.
        corruptions: Corruptions of `shift`, each in five severities: noise, blur, contrast, brightness, jpeg, pixels.
        max_images: Images used of the source and of each shifted set, the first ones; 0 uses all. All their captions
            are, in whichever rows they stand; but of a stream nothing behind the first row of another image is read.
            `train` and `gallery` are read whole (`split: train[:1000]` reads a part).
        max_skipped_fraction: Stop when more than this share of the rows of the source, of train, of a shifted set or of
            a gallery is unusable.
        seed: Seed of what is drawn: stress, corruptions, shots and splits.
    """

    source: SourceConfig = field(default_factory=lambda: SourceConfig(scenes_part="test", scenes_size=1_000))
    tasks: list[str] = field(default_factory=lambda: ["retrieval"])
    gallery: list[SourceConfig] = field(default_factory=list)
    classes: str | None = None
    labels: Literal["auto", "key", "number"] = "auto"
    present_classes: bool = False
    templates: dict[str, list[str] | str] = field(default_factory=dict)
    template_kind: str = "photo"
    train: SourceConfig | None = None
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    shifted: dict[str, SourceConfig] = field(default_factory=dict)
    corruptions: list[str] = field(default_factory=list)
    max_images: int = 0
    max_skipped_fraction: float = 0.1
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        check_languages("eval.sets[].templates", self.templates)
        share = self.max_skipped_fraction
        check(0 <= share < 1, "eval.sets[].max_skipped_fraction", share, "expected 0 or more and less than 1")
        check(self.max_images >= 0, "eval.sets[].max_images", self.max_images, "expected 0 or more")
        if self.classes is None:
            unknown = sorted(set(self.templates) - set(self.source.captions))
            languages = list(self.source.captions)
            check(not unknown, "eval.sets[].templates", unknown, f"the source's languages are {languages}")
            probes = sorted(set(self.tasks) & set(LABELLED))
            check(not probes, "eval.sets[].tasks", probes, "they need source.label and classes")
        else:
            for name, source in self.parts.items():
                check(source.label is not None, f"eval.sets[].{name}.label", None, "name the column of the classes")
        captions = self.source.captions
        for task, fits, wanted in (
            ("retrieval", bool(captions), "captions"),
            ("languages", len(captions) >= 2, "captions in 2 languages or more"),
            ("stress", "ko" in captions, "captions in ko"),
        ):
            check(fits or task not in self.tasks, f"eval.sets[].tasks: {task}", captions, f"expected {wanted}")
        if "shift" in self.tasks:
            some = bool(self.shifted or self.corruptions)
            check(some, "eval.sets[].shifted", {}, "the task shift needs shifted sets or corruptions")
        check(all(count >= 1 for count in self.shots), "eval.sets[].shots", self.shots, "expected 1 or more each")
        self._check_shifted()
        self._check_used()

    @property
    def parts(self) -> dict[str, SourceConfig]:
        """The sources whose images are used, by name: `source`, `shifted.<name>` and `train`."""
        parts = {"source": self.source, **{f"shifted.{name}": source for name, source in self.shifted.items()}}
        return parts | ({"train": self.train} if self.train else {})

    def _check_shifted(self) -> None:
        """Every shifted set and corruption has metrics of its own name, shift_<name>/accuracy, in every language."""
        names = [*self.shifted, *self.corruptions]
        distinct = len(set(names)) == len(names) and "none" not in names
        check(
            distinct, "eval.sets[].shifted", names, "expected names that differ from each other, corruptions and none"
        )
        plain = not any("/" in name for name in self.shifted)
        check(plain, "eval.sets[].shifted", list(self.shifted), "expected names without a slash")
        for name, source in self.shifted.items() if self.classes is None else ():
            lacking = sorted(set(self.source.captions) - set(source.captions))
            key = f"eval.sets[].shifted.{name}.captions"
            check(not lacking, key, source.captions, f"expected captions in {lacking} as the source has them")

    def _check_used(self) -> None:
        """No setting is given that the tasks asked for do not use."""
        named = set(self.tasks) & set(CLASS_TASKS)
        from_files = any(isinstance(templates, str) for templates in self.templates.values())
        for name, used, wanted in (
            ("templates", named, "the task zero_shot or shift"),
            ("template_kind", from_files or self.template_kind == "photo", "templates of a file, such as {ko: ko}"),
            ("shifted", named, "the task shift"),
            ("corruptions", "shift" in self.tasks, "the task shift"),
            ("train", set(self.tasks) & set(LABELLED), "the task linear_probe or few_shot"),
            ("gallery", "retrieval" in self.tasks or (named and not self.classes), "the task retrieval"),
            ("present_classes", self.classes, "classes"),
            ("labels", self.classes or self.labels == "auto", "classes"),
        ):
            value = getattr(self, name)
            check(bool(used) or not value, f"eval.sets[].{name}", value, f"only with {wanted}: add it or take this out")


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

    def __post_init__(self) -> None:
        check_languages("ratings[].language", [self.language])


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during and after training.

    Args:
        sets: What to evaluate on.
        ratings: People's ratings that the model's scores should agree with.
        batch_size: Images or texts encoded at once.
    """

    sets: list[EvalSetConfig] = field(default_factory=lambda: [EvalSetConfig()])
    ratings: list[RatingsConfig] = field(default_factory=list)
    batch_size: int = 256

    @all_faults()
    def __post_init__(self) -> None:
        names = [part.source.short_name for part in self.sets] + [part.name for part in self.ratings]
        check(len(set(names)) == len(names), "eval.sets[].source.name", names, "give each data set a name of its own")
        check(self.batch_size >= 1, "eval.batch_size", self.batch_size, "expected 1 or more")
