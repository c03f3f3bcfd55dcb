"""Configurations of the recipes that use a trained model."""

import re
from dataclasses import dataclass, field
from typing import Literal

from koclip.config.data import DataConfig, SourceConfig
from koclip.config.errors import all_faults, check, check_pixels
from koclip.config.evaluation import EvalSetConfig, RatingsConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure dual encoders: retrieval, zero-shot classification, probes, languages, stress, shifts, people.

    Args:
        model: What is evaluated: a directory or Hub id of a dual encoder of transformers; or
            `open_clip:<name>@<tag or file>`, `sentence_transformers:<text model>+<image model>`,
            `mclip:<text model>+<image model>`.
        models: Several, side by side: `--models a b c`.
        output_dir: Where results, table and pictures go; default: runs/evaluate-<date and time>.
        cache_dir: Where embeddings are kept, so that the next evaluation on the same data embeds nothing; null keeps
            none.
        sets: What to evaluate on.
        ratings: People's ratings that the models' scores should agree with.
        max_image_pixels: Leave larger images (width x height) out as decompression bombs.
        batch_size: Images or texts encoded at once.
        device: As PyTorch names it; default: a GPU if there is one.
    """

    model: str | None = None
    models: list[str] = field(default_factory=list)
    output_dir: str | None = None
    cache_dir: str | None = "runs/embeddings"
    sets: list[EvalSetConfig] = field(default_factory=list)
    ratings: list[RatingsConfig] = field(default_factory=list)
    max_image_pixels: int = DataConfig.max_image_pixels
    batch_size: int = 256
    device: str | None = None

    @all_faults()
    def __post_init__(self) -> None:
        named = self.all_models
        check(bool(named), "model", self.model, "name a directory or Hub id: --model runs/<run>/model")
        check(len(set(named)) == len(named), "models", named, "name each model once")
        check(bool(self.sets or self.ratings), "sets", [], "expected at least one data set")
        names = [one.source.short_name for one in self.sets] + [one.name for one in self.ratings]
        check(len(set(names)) == len(names), "sets[].source.name", names, "give each data set a name of its own")
        check_pixels("max_image_pixels", self.max_image_pixels)
        check(self.batch_size >= 1, "batch_size", self.batch_size, "expected 1 or more")

    @property
    def all_models(self) -> list[str]:
        """`model` and `models`."""
        return [*([self.model] if self.model else []), *self.models]


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Check a trained model, write its card from its numbers, and push both to the Hub.

    The token is the one of `hf auth login` or of the environment variable HF_TOKEN.

    Args:
        model: The model's directory; config.yaml and environment.json of its training run lie beside it.
        repo_id: Where it goes: `organisation/name` or `user/name`.
        results: Its results.json, of training or of recipes/evaluate.py; default: the one beside `model`. Its numbers
            must be of these very weights, which its fingerprint shows.
        dry_run: Write the card and check everything, and push nothing. Needs no token.
        tag: Name of the release, as `v1.0`; default: none. A tag that exists is never moved.
        private: Make the repository private if it is new.
        adapter: Push the folder adapter/ too, if there is one.
        message: The commit's first line.
        clip: Hub id of what the run's config.yaml names as model.clip, where that is a directory.
        text_encoder: The same of model.text_encoder.
        licenses: Licences of the Hub models that the run began with, by Hub id: an id of SPDX or the Hub, or
            `unstated` if none is stated; other words are shown, and make this model's licence `other`. Default: what
            the Hub says. A data set's licence is that of its data card alone.
        license: Licence of this model if its sources leave the choice, as the Hub spells it.
        data_cards: Directory of the data cards.
        training_time: How long training took, as people read it; default: the last `seconds` of the run's
            metrics.jsonl, where there are some.
        onnx: Write ONNX graphs of both towers, too: in `fp32`, or in `int8` besides; needs
            `pip install 'koclip[onnx]'`. ONNX Runtime reads them, and of transformers.js CLIPTextModelWithProjection
            and CLIPVisionModelWithProjection.
        int8_sets: What the loss of `int8` in retrieval is measured on; default: the sets of `results` with the task
            `retrieval`, their first 1,000 images, or the built-in scenes where it has none.
        max_image_pixels: Leave larger images (width x height) of these sets out as decompression bombs.
        sentence_transformers: Let `SentenceTransformer(repo_id)` load it, too.
        space: Space of the Hub that shows it, `organisation/name`; made or brought up to date. Default: none.
    """

    model: str
    repo_id: str
    results: str | None = None
    dry_run: bool = False
    tag: str | None = None
    private: bool = False
    adapter: bool = True
    message: str = "Publish the model"
    clip: str | None = None
    text_encoder: str | None = None
    licenses: dict[str, str] = field(default_factory=dict)
    license: str = "apache-2.0"
    data_cards: str = "data_cards"
    training_time: str | None = None
    onnx: Literal["fp32", "int8"] | None = None
    int8_sets: list[EvalSetConfig] = field(default_factory=list)
    max_image_pixels: int = DataConfig.max_image_pixels
    sentence_transformers: bool = False
    space: str | None = None

    @all_faults()
    def __post_init__(self) -> None:
        for key, name in (("repo_id", self.repo_id), ("space", self.space)):
            named = name is None or re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
            check(named, key, name, "expected organisation/name: letters, digits, - _ .")
        check(bool(self.message.strip()), "message", self.message, "expected some words")
        check_pixels("max_image_pixels", self.max_image_pixels)
        names = [one.source.short_name for one in self.int8_sets]
        check(not names or self.onnx == "int8", "int8_sets", names, "expected --onnx int8, whose loss they measure")
        check(len(set(names)) == len(names), "int8_sets[].source.name", names, "give each data set a name of its own")
        tasks = [one.tasks for one in self.int8_sets]
        check(all("retrieval" in one for one in tasks), "int8_sets[].tasks", tasks, "expected retrieval among them")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Make a collection of images searchable.

    Args:
        model: A directory or Hub id of a dual encoder, or another that `recipes/evaluate.py` takes.
        images: A folder of pictures, with the folders in it; or a data set: `scenes`, a file or a Hub id.
        source: A data set whose columns must be named, in the place of `images`.
        output_dir: Where the index goes; the same command goes on where a killed one stopped.
        max_images: Images taken, the first ones; 0 takes all.
        max_image_pixels: Leave larger images (width x height) out as decompression bombs.
        thumbnail_size: Longer side of the small pictures that are kept to be shown, pixels; 0 keeps none.
        approximate: Whether to make an approximate index too (needs `pip install 'koclip[search]'`); `auto` makes one
            from `approximate_from` images on.
        approximate_from: Images; fewer are all looked at in a tenth of a second.
        batch_size: Images encoded at once.
        device: As PyTorch names it; default: a GPU if there is one.
    """

    model: str = ""
    images: str = ""
    source: SourceConfig | None = None
    output_dir: str = "index"
    max_images: int = 0
    max_image_pixels: int = DataConfig.max_image_pixels
    thumbnail_size: int = 256
    approximate: Literal["auto", "yes", "no"] = "auto"
    approximate_from: int = 1_000_000
    batch_size: int = 64
    device: str | None = None

    @all_faults()
    def __post_init__(self) -> None:
        check(bool(self.model), "model", self.model, "name a directory or Hub id: --model runs/<run>/model")
        some = bool(self.images) or self.source is not None
        check(some, "images", self.images, "name a folder of pictures or a data set: --images photos/")
        check(self.max_images >= 0, "max_images", self.max_images, "expected 0 or more")
        check_pixels("max_image_pixels", self.max_image_pixels)
        size = self.thumbnail_size
        check(size == 0 or 16 <= size <= 1_024, "thumbnail_size", size, "expected 16 to 1024, or 0 for none")
        check(self.approximate_from >= 1, "approximate_from", self.approximate_from, "expected 1 or more")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "expected 1 or more")
