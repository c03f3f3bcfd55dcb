"""Every knob of koclip, once: frozen dataclasses, one per room, and the parser that fills them.

A recipe's configuration is the dataclass that lists the sections it uses. `parse()` builds it from
`--config FILE.yaml` and `--section.key value` overrides, and stops with one clear line on any mistake.
"""

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

Config = TypeVar("Config")
Format = Literal[
    "auto",
    "scenes",
    "hub",
    "parquet",
    "arrow",
    "json",
    "csv",
    "image_folder",
    "webdataset",
    "annotations",
]


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, what was got and the fix."""


def check(condition: bool, key: str, got: object, fix: str) -> None:
    """Raise a `ConfigError` naming `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: got {got!r}, {fix}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of (image, captions) rows.

    Args:
        path: `scenes` (built in), a local file, folder or glob, or a Hub data set id such as `owner/name`.
        format: How to read it; `auto` decides by the file name. `annotations` is KoCLIP's and COCO's
            `[{"file_path": ..., "captions": [...]}]`.
        name: Short name used in logs and metric names; default: the last part of the path.
        split: Split to read; of local files too a slice, such as `train[:1000]`.
        subset: Configuration of a Hub data set that has several.
        revision: Git revision of a Hub data set; default: its main branch.
        streaming: Read rows as they arrive instead of preparing the whole set on disk first.
            WebDataset shards are always streamed.
        image: Column that holds the image (bytes, a file path, or an Image feature). Dots reach into nested columns.
        image_root: Folder that relative image paths start from; default: the folder of `path`.
        captions: Caption column by language, for example `{ko: captions_ko, en: captions_en}`. A cell is a string
            or a list of strings.
        languages: Relative chance of drawing each language; default: all alike.
        where: Keep only rows whose column holds one of the listed values, for example `{vendor: [noto, twemoji]}`.
        weight: Relative number of rows drawn from this source when there are several; default: its size, 1 for
            streamed sources.
        scenes_size: Number of images that `scenes` holds; even, because they come in pairs.
        scenes_part: `train` and `test` hold different scenes. Neither shows the (colour, shape) pairs that are kept for
            zero-shot evaluation.
    """

    path: str = "scenes"
    format: Format = "auto"
    name: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    image: str = "image"
    image_root: str | None = None
    captions: dict[str, str] = field(default_factory=lambda: {"ko": "captions_ko", "en": "captions_en"})
    languages: dict[str, float] | None = None
    where: dict[str, list[str]] | None = None
    weight: float | None = None
    scenes_size: int = 100_000
    scenes_part: Literal["train", "test"] = "train"

    def __post_init__(self) -> None:
        check(bool(self.captions), "data.sources[].captions", self.captions, "name at least one caption column")
        unknown = set(self.languages or {}) - set(self.captions)
        check(not unknown, "data.sources[].languages", sorted(unknown), f"captions has {sorted(self.captions)}")
        for language, chance in (self.languages or {}).items():
            check(chance >= 0, f"data.sources[].languages.{language}", chance, "expected 0 or more")
        if self.languages is not None:
            check(sum(self.languages.values()) > 0, "data.sources[].languages", self.languages, "give one a chance > 0")
        even = self.scenes_size >= 2 and self.scenes_size % 2 == 0
        check(even, "data.sources[].scenes_size", self.scenes_size, "expected an even number")
        check(self.weight is None or self.weight > 0, "data.sources[].weight", self.weight, "expected more than 0")

    @property
    def label(self) -> str:
        """The name that logs and metrics use for this source."""
        return self.name or Path(self.path.rstrip("/")).name.split(".")[0].replace("*", "all")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and the way batches are made of it.

    Args:
        sources: Where pairs come from; several are mixed by their `weight`.
        crop_scale: Range of the share of the image's area that a random crop keeps.
        horizontal_flip: Chance of mirroring an image. 0 keeps "left" and "right" true.
        rotation: Images are turned by up to this many degrees either way, on white.
        color_jitter: Brightness, contrast and saturation change by up to this share; the hue, which captions name, stays.
        grayscale: Chance of taking an image's colours away.
        word_dropout: Chance of leaving a word out of a caption (never all of them).
        length_pool: Batches are grouped by caption length within pools of this many batches; 1 turns it off.
        num_workers: Processes that decode images, per training process; 0 decodes in the training process.
        shuffle_buffer: Rows that a streamed source shuffles within.
        max_skipped_fraction: Stop when more than this share of the rows drawn is unusable.
        max_image_pixels: Refuse larger images (width x height) as decompression bombs.
        seed: Seed of the order, the captions drawn and the augmentation.
    """

    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    crop_scale: tuple[float, float] = (0.9, 1.0)
    horizontal_flip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0
    word_dropout: float = 0.0
    length_pool: int = 8
    num_workers: int = 0
    shuffle_buffer: int = 10_000
    max_skipped_fraction: float = 0.1
    max_image_pixels: int = 89_478_485
    seed: int = 0

    def __post_init__(self) -> None:
        check(len(self.sources) > 0, "data.sources", self.sources, "list at least one source")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "expected 0 < low <= high <= 1")
        for name in ("horizontal_flip", "color_jitter", "grayscale"):
            check(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "expected 0 to 1")
        check(0 <= self.word_dropout < 1, "data.word_dropout", self.word_dropout, "expected 0 or more and less than 1")
        check(0 <= self.rotation <= 180, "data.rotation", self.rotation, "expected 0 to 180")
        check(self.length_pool >= 1, "data.length_pool", self.length_pool, "expected 1 or more")
        check(self.num_workers >= 0, "data.num_workers", self.num_workers, "expected 0 or more")
        check(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "expected 1 or more")
        share = self.max_skipped_fraction
        check(0 <= share < 1, "data.max_skipped_fraction", share, "expected 0 or more and less than 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The text tokenizer.

    Args:
        path: Directory or Hub id of an existing tokenizer; default: train a byte-level BPE on the captions.
        vocab_size: Entries of a trained vocabulary, the 512 byte symbols and 2 special tokens included.
        max_tokens: Longest caption in tokens, both special tokens included; longer ones are cut.
        train_captions: Captions that a tokenizer is trained on at most (the first ones of the sources).
    """

    path: str | None = None
    vocab_size: int = 1_000
    max_tokens: int = 32
    train_captions: int = 1_000_000

    def __post_init__(self) -> None:
        check(self.vocab_size > 514, "tokenizer.vocab_size", self.vocab_size, "expected more than 514 (512 bytes + 2)")
        check(self.max_tokens >= 3, "tokenizer.max_tokens", self.max_tokens, "expected 3 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dual encoder. A preset gives every size; the other keys override it.

    Args:
        preset: `tiny`, `small`, the paper's `vit_b32`, `vit_b16`, `vit_l14`, `vit_l14_336`, `rn50`, `rn101`,
            `rn50x4`, `rn50x16`, `rn50x64`, or `auto:<path or Hub id>` for any image tower that transformers loads.
        image_size: Side of the square input, pixels.
        patch_size: Side of a patch, pixels; image_size must be a multiple.
        image_width: Width of the image tower.
        image_layers: Depth of the image tower.
        text_width: Width of the text tower.
        text_layers: Depth of the text tower.
        embed_dim: Width of the shared space.
        temperature: Initial temperature of the contrastive loss (the paper's 0.07).
        patch_dropout: Share of the patches that the ViT does not see in training (FLIP, Li et al. 2023).
        image_gradient_checkpointing: Recompute the image tower's activations in the backward pass.
        text_gradient_checkpointing: The same for the text tower.
        seed: Seed of the initial weights.
    """

    preset: str = "tiny"
    image_size: int | None = None
    patch_size: int | None = None
    image_width: int | None = None
    image_layers: int | None = None
    text_width: int | None = None
    text_layers: int | None = None
    embed_dim: int | None = None
    temperature: float = 0.07
    patch_dropout: float = 0.0
    image_gradient_checkpointing: bool = False
    text_gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # exp(logit_scale) is clamped to 100, so a temperature below 0.01 could not be kept.
        check(0.01 <= self.temperature <= 1, "model.temperature", self.temperature, "expected 0.01 to 1")
        check(0 <= self.patch_dropout < 1, "model.patch_dropout", self.patch_dropout, "expected 0 or more, less than 1")
        for name in ("image_size", "patch_size", "image_width", "image_layers", "text_width", "text_layers"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"model.{name}", value, "expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss.

    Args:
        name: `infonce` (CLIP) or `sigmoid` (SigLIP).
        equal_captions: What another image with the very same caption counts as: `positives`, `masked` (neither)
            or `negatives` (as in the CLIP paper).
    """

    name: Literal["infonce", "sigmoid"] = "infonce"
    equal_captions: Literal["positives", "masked", "negatives"] = "positives"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    Args:
        lr: Peak learning rate.
        min_lr_ratio: Learning rate at the last step, as a share of the peak.
        warmup_steps: Steps of linear warm-up.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Term that keeps the denominator above zero.
        weight_decay: Decoupled decay; norms, biases and the logit scale have none.
        max_grad_norm: Gradients are clipped to this norm; 0 turns clipping off (the norm is logged either way).
    """

    lr: float = 1e-3
    min_lr_ratio: float = 0.0
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", self.lr, "expected more than 0")
        check(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "expected 0 to 1")
        check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "expected 0 or more")
        check(self.max_grad_norm >= 0, "optim.max_grad_norm", self.max_grad_norm, "expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run.

    Args:
        num_steps: Optimizer steps.
        batch_size: Pairs per process and step; the loss sees batch_size x num_processes pairs.
        num_processes: Processes this run must have; the run stops if it was launched with another number.
            Default: any number.
        precision: `fp32`, `bf16` or `fp16` (autocast; weights stay fp32).
        compile: Compile the model with torch.compile.
        ema_decay: Decay of an exponential moving average of the weights; 0 turns it off. Evaluation and the
            published model use the average when it is on.
        log_every: Steps between two lines of metrics.jsonl.
        eval_every: Steps between two evaluations; 0 evaluates at the end only.
        save_every: Steps between two checkpoints; 0 saves at the end only.
        keep_checkpoints: Newest checkpoints kept.
        num_threads: CPU threads per process; 0 leaves PyTorch's choice.
        tracker: Where metrics go besides metrics.jsonl.
        seed: Seed of dropout.
    """

    num_steps: int = 3_000
    batch_size: int = 64
    num_processes: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    ema_decay: float = 0.0
    log_every: int = 50
    eval_every: int = 0
    save_every: int = 1_000
    keep_checkpoints: int = 2
    num_threads: int = 0
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.num_steps >= 1, "train.num_steps", self.num_steps, "expected 1 or more")
        check(self.batch_size >= 2, "train.batch_size", self.batch_size, "a contrastive loss needs 2 pairs or more")
        check(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "expected 0 or more and less than 1")
        check(self.log_every >= 1, "train.log_every", self.log_every, "expected 1 or more")
        check(self.keep_checkpoints >= 1, "train.keep_checkpoints", self.keep_checkpoints, "expected 1 or more")


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


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a CLIP from random weights on (image, caption) pairs.

    Args:
        output_dir: Run directory; default: runs/pretrain-<date and time>.
        resume: `auto` continues from the newest checkpoint in output_dir, `no` refuses a directory that has one.
    """

    output_dir: str | None = None
    resume: Literal["auto", "no"] = "no"
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


def parse(schema: type[Config], args: Sequence[str] | None = None) -> Config:
    """Build `schema` from the command line: `--config FILE.yaml` and `--section.key value`.

    Exits with code 2 and one line on stderr on an unknown key, a wrong type, a missing file or a value out of range.
    """
    summary = (schema.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(description=summary, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(schema, as_group=False)
    try:
        sections = parser.instantiate(parser.parse_args(sys.argv[1:] if args is None else list(args)))
        values = {f.name: sections[f.name] for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
        return schema(**values)
    except (ArgumentError, ConfigError, OSError) as error:
        known = [option for action in parser._actions for option in action.option_strings]
        _explain(" ".join(str(error).split()) + _nearest(str(error), known))


def _nearest(message: str, known: list[str]) -> str:
    """Return " Did you mean ...?" for the options in a message that are no known option but look like one."""
    unknown = [word.strip("'\"") for word in message.split() if word.startswith("--")]
    near = [match for word in unknown for match in difflib.get_close_matches(word.split("=")[0], known, n=1)]
    return f" Did you mean {', '.join(near)}?" if near else ""


def _explain(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[Config], None], schema: type[Config]) -> None:
    """Parse the command line and run a recipe; a mistake in the configuration or the data it names is one line."""
    config = parse(schema)
    try:
        main(config)
    except ConfigError as error:
        _explain(str(error))


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists and scalars."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return plain


def dump(config: Any, path: Path) -> None:
    """Write a configuration as YAML that `--config` reads back to an equal one."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
