"""What a model is evaluated on."""

from dataclasses import dataclass, field
from typing import Literal

from koclip.config.checks import all_faults, check, check_languages, check_least, check_share
from koclip.config.data import SourceConfig

LABELLED = ("linear_probe", "few_shot")  # tasks that need classes
CLASS_TASKS = ("zero_shot", "shift")  # tasks that read the names of classes
CAPTIONED = ("retrieval", "languages", "no_match", "stress")  # tasks that read captions


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One data set to evaluate on.

    Args:
        source: The data set: its images and captions, or their classes (`label`).
        tasks: `retrieval`: rank images for captions, and captions for images. `languages`: compare the same captions in
            two languages. `no_match`: how many captions show something above a threshold although their image was
            removed, and how many show their image when it is there; half of the images calibrates the threshold.
            `stress`: retrieval with Korean captions that are rewritten in 14 ways. `zero_shot`: classify images by the
            names of the classes. `shift`: zero-shot accuracy on the `shifted` sets and under `corruptions`, compared
            with the original set. `linear_probe` and `few_shot`: fit a logistic regression on image features.
            `multiple_choice`: choose the text that fits the image; runs on data with questions, such as `scenes`.
        gallery: Further sources. Their captions join the candidates of `retrieval`; their images do not.
        classes: Names of the classes: `cifar10`, `cifar100`, `emoji_kinds`, `stl10`, `tiny_imagenet` or your YAML
            file (koclip/text/classes.py). Each row is then an image. Default: the caption of an image is the name of
            its class, and rows with equal images (by content) are one image with all their captions.
        labels: How `source.label` names a class: `key`, or `number`: its position in the list, from 0. `auto`: `key` if
            all labels of source, train and shifted are keys; `number` if all are numbers, no key is a number and every
            class has an image in each of these sources; otherwise an error.
        present_classes: Leave out classes without images.
        templates: Prompts of `zero_shot` by language: a list with `{label}` for the name, or `{label:을/를}` for the
            name with the particle that fits; or `ko`, `en` or your YAML file. Default: the bare name.
        template_kind: Kind of the templates to use from such a file: `photo` or `drawing`.
        train: Images to fit probes on; images that are also in the source (by content) are left out. Default: a random
            half of the source; the other half is tested.
        shots: Numbers of images per class that `few_shot` is fitted on.
        shifted: Other data sets with the same classes, to measure accuracy under distribution shift. Maps a name to a
            source.
        corruptions: Corruptions for `shift`, each in five severities: noise, blur, contrast, brightness, jpeg, pixels.
        max_images: Use only the first images of the source and of each shifted set, at most this many, with all their
            captions. 0: all. A stream is read only up to the first row of the next image. `train` and `gallery` are
            read whole; `split: train[:1000]` limits them.
        max_skipped_fraction: Stop if more than this share of the rows of a source is unusable.
        seed: Seed of stress, corruptions, shots and splits.
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
        check_share("eval.sets[].max_skipped_fraction", self.max_skipped_fraction)
        check_least(self, "eval.sets[].", 0, "max_images")
        if self.classes is None:
            unknown = sorted(set(self.templates) - set(self.source.captions))
            languages = list(self.source.captions)
            check(not unknown, "eval.sets[].templates", unknown, f"expected languages of the captions: {languages}")
            probes = sorted(set(self.tasks) & set(LABELLED))
            check(not probes, "eval.sets[].tasks", probes, "these tasks need source.label and classes")
        else:
            for name, source in self.parts.items():
                check(source.label is not None, f"eval.sets[].{name}.label", None, "name the column of the classes")
        captions = self.source.captions
        for task, fits, wanted in (
            ("retrieval", bool(captions), "captions"),
            ("languages", len(captions) >= 2, "captions in 2 languages or more"),
            ("no_match", bool(captions), "captions"),
            ("stress", "ko" in captions, "captions in ko"),
        ):
            check(fits or task not in self.tasks, f"eval.sets[].tasks: {task}", captions, f"expected {wanted}")
        some = "shift" not in self.tasks or bool(self.shifted or self.corruptions)
        check(some, "eval.sets[].shifted", self.shifted, "the task shift needs shifted sets or corruptions")
        check(all(count >= 1 for count in self.shots), "eval.sets[].shots", self.shots, "expected 1 or more each")
        self._check_shifted()
        self._check_used()

    @property
    def parts(self) -> dict[str, SourceConfig]:
        """The sources whose images are used, by name: `source`, `shifted.<name>` and `train`."""
        parts = {"source": self.source, **{f"shifted.{name}": source for name, source in self.shifted.items()}}
        return parts | ({"train": self.train} if self.train else {})

    def _check_shifted(self) -> None:
        """Check the names of shifted sets, which become names of metrics, and their captions."""
        names = [*self.shifted, *self.corruptions]
        distinct = len(set(names)) == len(names) and "none" not in names
        check(distinct, "eval.sets[].shifted", names, "expected different names, neither corruptions nor none")
        plain = not any("/" in name for name in self.shifted)
        check(plain, "eval.sets[].shifted", list(self.shifted), "expected names without a slash")
        for name, source in self.shifted.items() if self.classes is None else ():
            lacking = sorted(set(self.source.captions) - set(source.captions))
            key = f"eval.sets[].shifted.{name}.captions"
            check(not lacking, key, source.captions, f"expected captions in {lacking} too, as in the source")

    def _check_used(self) -> None:
        """Check that the tasks use every setting that is given."""
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
            check(bool(used) or not value, f"eval.sets[].{name}", value, f"needs {wanted}: add that or remove this")


@dataclass(frozen=True, kw_only=True)
class RatingsConfig:
    """Human ratings of how well captions fit images, to compare the model's scores with.

    Args:
        path: TSV file without a header line: image, caption, one or more ratings (numbers).
        language: Language of the captions.
        name: Short name in metric names.
        image_root: Folder that relative image paths start from. Default: the folder of `path`.
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
        sets: Data sets to evaluate on.
        ratings: Human ratings to compare the model's scores with.
        batch_size: Images or texts encoded at a time.
    """

    sets: list[EvalSetConfig] = field(default_factory=lambda: [EvalSetConfig()])
    ratings: list[RatingsConfig] = field(default_factory=list)
    batch_size: int = 256

    @all_faults()
    def __post_init__(self) -> None:
        names = [part.source.short_name for part in self.sets] + [part.name for part in self.ratings]
        check(len(set(names)) == len(names), "eval.sets[].source.name", names, "give each data set a different name")
        check_least(self, "eval.", 1, "batch_size")
