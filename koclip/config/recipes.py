"""Configurations of the recipes: the sections that each of them uses."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from koclip.config.checks import all_faults, check, check_pixels
from koclip.config.data import DataConfig, SourceConfig, TokenizerConfig
from koclip.config.evaluation import EvalConfig, EvalSetConfig, RatingsConfig
from koclip.config.model import AdapterConfig, ModelConfig, SwapConfig
from koclip.config.training import AlignMethodConfig, DistillConfig, LossConfig, OptimConfig, TrainConfig


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

    @all_faults()
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
