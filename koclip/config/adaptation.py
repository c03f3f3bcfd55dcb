"""Configuration of `koclip adapt`."""

from dataclasses import dataclass, field
from typing import Literal

from koclip.config.checks import all_faults, check, check_languages, check_least, check_pixels, check_share
from koclip.config.data import DataConfig, SourceConfig


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Build a classifier from a few labelled images per class, starting from the names of the classes.

    Args:
        model: Directory or Hub id of a dual encoder, or any model that `koclip evaluate` takes.
        images: Folder with a folder of images for each class.
        source: Data set with a column of labels, instead of `images`: a table or a Hub data set.
        validation: Images to choose methods and settings on. Default: cross-validation of the few images, or with one
            image per class a fixed rule.
        calibration: Images for the temperature and the threshold of "none of these", which no choice has seen. Default:
            the held-out images of the choice.
        test: Images to measure on. Default: the numbers are those of the held-out images.
        classes: Names of the classes: a built-in list or your YAML file, as in `koclip evaluate`. Default:
            `classes.yaml` in output_dir, which is written from the captions (`source.captions`, by language) or the
            labels if it does not exist. You may edit it and run the command again.
        labels: How labels name a class: `key`, `number` or `auto`, as in `koclip evaluate`.
        templates: Prompts by language, as in `koclip evaluate`. Default: koclip's own for ko and en, else the name.
        template_kind: Kind of the templates to use: `photo` or `drawing`.
        languages: Languages of the names to start from. Default: all languages of the classes.
        methods: Methods to try besides zero-shot: `linear`, `tip_adapter`, `tip_adapter_f`, `coop`.
        shots: Use at most this many images per class, drawn with `seed`. 0: all.
        none: Threshold of "none of these": `all`: a share of at most `alpha` of the images that have a class is
            refused. `class`: of each class. `no`: every image gets a class.
        alpha: This share.
        output_dir: Directory of the classifier, its card and pictures.
        cache_dir: Directory of cached embeddings. null: no cache.
        max_skipped_fraction: Stop if more than this share of the rows of a source is unusable.
        max_image_pixels: Skip images with more pixels (width x height). Protects from decompression bombs.
        batch_size: Images encoded at a time.
        device: Device name of PyTorch. Default: a GPU if available.
        seed: Seed of the drawn images, of cross-validation and of `coop`.
    """

    model: str = ""
    images: str = ""
    source: SourceConfig | None = None
    validation: SourceConfig | None = None
    calibration: SourceConfig | None = None
    test: SourceConfig | None = None
    classes: str | None = None
    labels: Literal["auto", "key", "number"] = "auto"
    templates: dict[str, list[str] | str] = field(default_factory=dict)
    template_kind: str = "photo"
    languages: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=lambda: ["linear", "tip_adapter", "tip_adapter_f"])
    shots: int = 0
    none: Literal["all", "class", "no"] = "all"
    alpha: float = 0.1
    output_dir: str = "classifier"
    cache_dir: str | None = "runs/embeddings"
    max_skipped_fraction: float = 0.1
    max_image_pixels: int = DataConfig.max_image_pixels
    batch_size: int = 64
    device: str | None = None
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        check(bool(self.model), "model", self.model, "name a directory or Hub id: --model runs/<run>/model")
        some = bool(self.images) != (self.source is not None)
        check(some, "images", self.images, "name a folder with a folder per class (--images), or a source, not both")
        for name, source in self.parts.items():
            check(source.label is not None, f"{name}.label", None, "name the column of the labels")
        check_languages("languages", self.languages)
        known = ["linear", "tip_adapter", "tip_adapter_f", "coop"]
        unknown = sorted(set(self.methods) - set(known))
        check(not unknown, "methods", unknown, f"expected some of {known}; zero_shot is always tried")
        check_least(self, "", 0, "shots")
        check_least(self, "", 1, "batch_size")
        check(0 < self.alpha < 1, "alpha", self.alpha, "expected a share above 0 and below 1")
        check_share("max_skipped_fraction", self.max_skipped_fraction)
        check_pixels("max_image_pixels", self.max_image_pixels)

    @property
    def parts(self) -> dict[str, SourceConfig]:
        """The sources by name."""
        folder = SourceConfig(path=self.images, format="image_folder", split="all", label="label", captions={})
        parts = {"source": self.source or folder}
        named = {"validation": self.validation, "calibration": self.calibration, "test": self.test}
        return parts | {name: source for name, source in named.items() if source is not None}
