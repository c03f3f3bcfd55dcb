"""Configurations of the recipes: the sections that each of them uses."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from koclip.config.alignment import METHODS, AlignMethodConfig, DistillConfig, Stage
from koclip.config.checks import all_faults, check, check_encoding, check_least, check_pixels, check_share
from koclip.config.data import DataConfig, SourceConfig, TokenizerConfig
from koclip.config.evaluation import EvalConfig, EvalSetConfig, RatingsConfig
from koclip.config.training import AdapterConfig, LossConfig, ModelConfig, OptimConfig, SwapConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Args:
        output_dir: Run directory. Default: `runs/<recipe>-<date and time>`.
        resume: `auto`: continue from the newest intact checkpoint in output_dir. `no`: stop if output_dir has a
            checkpoint.
        resume_with: Keys that may differ from the checkpoint although the trained model will differ, such as
            `[optim.lr]`. `data.sources` also allows changed rows.
    """

    output_dir: str | None = None
    resume: Literal["auto", "no"] = "no"
    resume_with: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Train a CLIP from random weights on (image, caption) pairs."""

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
class AlignConfig(RunConfig):
    """Give a CLIP another text encoder, or adapt its text encoder, and keep its image embeddings."""

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
        first, second, steps = self.align.first_steps, self.align.second_steps, self.train.num_steps
        check(first < steps, "align.first_steps", first, f"expected fewer than train.num_steps ({steps})")
        fix = f"expected at most train.num_steps minus align.first_steps ({steps - first})"
        check(second == 0 or second <= steps - first, "align.second_steps", second, fix)
        _check_run(self)
        cached = self.align.cache and any(stage.images and not stage.trains_image for stage in self.stages)
        fixed = self.data.num_crops >= 1 or not cached
        fix = "expected 1 or more, because align.cache stores the embeddings of fixed crops"
        check(fixed, "data.num_crops", self.data.num_crops, fix)
        self._check_projection()
        self._check_preserve()
        language = self.distill.language if self.taught else None
        captions = {source.short_name: list(source.captions) for source in self.data.sources}
        missing = {name: languages for name, languages in captions.items() if language and language not in languages}
        fix = (
            f"expected {language}, too, because the teacher reads it: add captions in {language}, or train without a "
            "teacher (align.method frozen_image, distill.anchor 0, distill.preserve 0)"
        )
        check(not missing, "data.sources[].captions", missing, fix)
        random_text = self.model.text_encoder is None or self.model.text_encoder.startswith("auto:")
        adapted = METHODS[self.align.method].adapters and random_text
        fix = "a pretrained encoder or `same`: adapters cannot repair frozen random weights"
        check(not adapted, "model.text_encoder", self.model.text_encoder, f"{self.align.method} expects {fix}")
        same = self.model.text_encoder == "same"
        distilled = same and not any(stage.images for stage in self.stages)
        check(not distilled, "model.text_encoder", "same", "expected another text encoder, for the teacher to teach")

    def _check_projection(self) -> None:
        """Check that a stage that trains projections only can cache what it needs."""
        projects = any(stage.text_layers == 0 for stage in self.stages)
        whole = not (projects and self.align.cache and self.data.word_dropout)
        fix = f"expected 0, because {self.align.method} caches the features of whole captions; or set align.cache false"
        check(whole, "data.word_dropout", self.data.word_dropout, fix)
        encoder = self.model.text_encoder
        pretrained = encoder is not None and not encoder.startswith("auto:")
        fix = f"name a pretrained text encoder, because {self.align.method} keeps its random weights"
        check(pretrained or not projects, "model.text_encoder", encoder, fix)
        whole = pretrained or self.align.text_layers is None
        fix = "remove it: the layers below have random weights, because model.text_encoder is new"
        check(whole, "align.text_layers", self.align.text_layers, fix)
        kept = self.align.image_projection_decay is None or not self.distill.preserve
        fix = "expected 0 with align.image_projection_decay, which changes the image embeddings that it compares with"
        check(kept, "distill.preserve", self.distill.preserve, fix)

    def _check_preserve(self) -> None:
        """Check that the run has what the preservation term compares: images, and captions that the source reads."""
        preserve, language = self.distill.preserve, self.distill.language
        key, images = "distill.preserve", any(stage.images for stage in self.stages)
        check(not preserve or images, key, preserve, f"expected 0: {self.align.method} sees no images; use anchor")
        sources = self.data.sources
        mixed = any((source.languages or dict.fromkeys(source.captions, 1.0)).get(language) for source in sources)
        languages = [source.languages or list(source.captions) for source in sources]
        fix = f"expected {language} with a weight above 0, because distill.preserve needs such captions in the batches"
        check(not preserve or mixed, "data.sources[].languages", languages, fix)
        changes = any(stage.images and stage.trains_image for stage in self.stages)
        fixed = self.data.num_crops >= 1 or not (preserve and changes)
        fix = "expected 1 or more, because distill.preserve compares with the source's embeddings of fixed crops"
        check(fixed, "data.num_crops", self.data.num_crops, fix)

    @property
    def text_tokenizer(self) -> TokenizerConfig:
        """The tokenizer; by default the tokenizer of the text encoder."""
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
        first, second = self.align.first_steps, self.align.second_steps
        bounds = [0, *[first, first + second][: len(plans) - 1], self.train.num_steps]
        second_lr = self.align.second_lr or self.optim.lr
        rates = self.optim.lr, second_lr, self.align.third_lr or second_lr
        layers = {"projection": 0, "layers": self.align.text_layers, "all": None}
        image_adapters = method.adapters and self.lora.target != "text"
        stages = []
        for number, plan in enumerate(plans):
            if bounds[number] == bounds[number + 1]:
                continue  # no steps are left for the last stage
            stages.append(
                Stage(
                    plan.name,
                    start=bounds[number],
                    end=bounds[number + 1],
                    lr=rates[number],
                    images=plan.images,
                    distill=self.distill if plan.distills or self.distill.in_stages_with_images else None,
                    trains_image=plan.trains_image or image_adapters,
                    text_layers=layers[plan.text],
                    image_decay=self.align.image_projection_decay,
                    layer_decay=self.align.layer_decay,
                )
            )
        return tuple(stages)


def _check_run(config: PretrainConfig | AlignConfig) -> None:
    """Check what every training recipe's sections must agree on."""
    warmup, num_steps = config.optim.warmup_steps, min(stage.end - stage.start for stage in config.stages)
    fix = f"expected fewer than train.num_steps ({num_steps}, of the shortest stage)"
    check(warmup < num_steps, "optim.warmup_steps", warmup, fix)
    resumable = config.resume == "no" or config.output_dir is not None
    check(resumable, "resume", config.resume, "set output_dir to the run directory to continue from")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure dual encoders: retrieval, zero-shot classification, probes, languages, stress, shifts, human ratings.

    Args:
        model: The model: a directory or Hub id of a dual encoder of transformers; or
            `open_clip:<name>@<tag or file>`, `sentence_transformers:<model>`,
            `sentence_transformers:<text model>+<image model>`, `mclip:<text model>+<image model>`.
        models: Several models to compare: `--models a b c`.
        source: Model that the others started from. It is evaluated, too, and the report says what each model has kept,
            forgotten and gained, query by query. Default: no comparison.
        output_dir: Directory of results, table and charts. Default: `runs/evaluate-<date and time>`.
        cache_dir: Directory of cached embeddings, which later evaluations on the same data reuse. null: no cache.
        sets: Data sets to evaluate on.
        ratings: Human ratings to compare the model's scores with.
        max_image_pixels: Skip images with more pixels (width x height). Protects from decompression bombs.
        batch_size: Images or texts encoded at a time.
        device: Device name of PyTorch. Default: a GPU if available.
    """

    model: str | None = None
    models: list[str] = field(default_factory=list)
    source: str | None = None
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
        check(len(set(named)) == len(named), "models", named, "expected each model once")
        check(bool(self.sets or self.ratings), "sets", [], "expected at least one data set")
        names = [eval_set.source.short_name for eval_set in self.sets] + [ratings.name for ratings in self.ratings]
        check(len(set(names)) == len(names), "sets[].source.name", names, "expected a different name for each data set")
        check_pixels("max_image_pixels", self.max_image_pixels)
        check_least(self, "", 1, "batch_size")

    @property
    def all_models(self) -> list[str]:
        """`model` and `models`."""
        return [*([self.model] if self.model else []), *self.models]


@dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """Build a public data set from its source. Without a name: list the data sets.

    Args:
        name: Data set, such as `emoji`. May be given as the first word: `koclip data emoji`.
        output_dir: Directory of the data set. Default: `data/<name>`, where the configurations read it. Its folder
            `downloads` keeps the downloads: if the command is interrupted, run it again, and it continues.
        accept_terms: The same name again: you have read and accept the terms of the data set, which the command prints.
            Needed for data that may be used for research only.
    """

    name: str = ""
    output_dir: str | None = None
    accept_terms: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrimConfig:
    """Cut the vocabulary of a text encoder or a dual encoder to the pieces that your texts use.

    Args:
        model: Directory or Hub id of a text encoder, a dual encoder, or a sentence-transformers model. WordPiece,
            Unigram and BPE tokenizers, with weights in safetensors.
        texts: Text files (`.txt`, one text per line), or data sets with the columns `captions_ko` and `captions_en`:
            `--texts captions.parquet corpus.txt`. Patterns such as `corpus/*.txt` are allowed. Each different text
            counts once.
        sources: Data sets with other columns. Their images are read for `image_range` only.
        encoding: Encoding of the text files. A byte-order mark in the file overrides it.
        output_dir: Directory of the result, and of the report `trim.json`, which contains some of the texts. An earlier
            result is replaced; another directory that is not empty is refused.
        min_count: Keep pieces that occur at least this often. Texts count in NFC and in NFD.
        num_pieces: Keep at most this many pieces, the most frequent ones. Default: no limit. Special tokens, and bytes
            or single characters as fallback, are always kept and count too.
        held_out: Share of the texts, selected by a hash of their content, whose pieces are not counted. The report says
            how many of them change. 0: count all texts.
    """

    model: str = ""
    texts: list[str] = field(default_factory=list)
    sources: list[SourceConfig] = field(default_factory=list)
    encoding: str = "utf-8"
    output_dir: str = "trimmed"
    min_count: int = 1
    num_pieces: int | None = None
    held_out: float = 0.1

    @all_faults()
    def __post_init__(self) -> None:
        check(bool(self.model), "model", self.model, "name a directory or Hub id of a text encoder or dual encoder")
        some = bool(self.texts or self.sources)
        check(some, "texts", self.texts, "name text files or data sets: --texts captions.parquet corpus.txt")
        check_encoding("encoding", self.encoding)
        check_least(self, "", 1, "min_count", "num_pieces")
        check_share("held_out", self.held_out)
