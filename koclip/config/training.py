"""The dual encoder, its loss, the optimizer and the training run."""

from dataclasses import dataclass
from typing import Literal

from koclip.config.checks import all_faults, check, check_least, check_share


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dual encoder. A preset gives every size; the other keys override it.

    Args:
        preset: `tiny`, `small`, a size of the CLIP paper (`vit_b32`, `vit_b16`, `vit_l14`, `vit_l14_336`, `rn50`,
            `rn101`, `rn50x4`, `rn50x16`, `rn50x64`), or another image tower with random weights:
            `timm:<architecture>`, or `auto:<directory or Hub id>` of a configuration for transformers' AutoModel.
        image_size: Side of the square input, pixels.
        patch_size: Side of a patch, pixels; image_size must be a multiple.
        image_width: Width of the image tower.
        image_layers: Depth of the image tower.
        text_width: Width of the text tower.
        text_layers: Depth of the text tower.
        embed_dim: Width of the shared space.
        temperature: Initial temperature of the contrastive loss (the paper's 0.07).
        patch_dropout: Share of the image patches dropped in training (FLIP, Li et al. 2023).
        image_gradient_checkpointing: Recompute the image tower's activations in the backward pass.
        text_gradient_checkpointing: Likewise for the text tower.
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

    @all_faults()
    def __post_init__(self) -> None:
        # exp(logit_scale) is clamped to 100, so a temperature below 0.01 could not be kept.
        check(0.01 <= self.temperature <= 1, "model.temperature", self.temperature, "expected 0.01 to 1")
        check_share("model.patch_dropout", self.patch_dropout)
        sizes = ("image_size", "patch_size", "image_width", "image_layers", "text_width", "text_layers", "embed_dim")
        check_least(self, "model.", 1, *sizes)


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """The source dual encoder, and its new text encoder.

    Args:
        clip: Directory or Hub id of a dual encoder (CLIP, ChineseCLIP, AltCLIP, MetaCLIP 2, SigLIP, SigLIP 2 of one
            resolution, VisionTextDualEncoder), or of an image tower such as `google/vit-large-patch16-224`. A
            checkpoint of open_clip: `open_clip:hf-hub:<Hub id>`, `open_clip:local-dir:<directory>` or
            `open_clip:<model name>@<pretrained tag or file.safetensors>`; it is converted to a CLIP, MetaCLIP 2 or
            SigLIP of transformers in the folder source/ of the run. The image embeddings stay the same.
        text_encoder: Directory or Hub id of a text encoder with its tokenizer. `auto:<directory or Hub id>`: random
            weights of that configuration, with the tokenizer there. `same`: keep the text encoder of `clip`.
            Default: a CLIP text transformer of the sizes below with random weights.
        pooling: The text embedding is a projection of the `first` token's state, or of the `mean` of all states.
            `mean`, and encoders that only sentence-transformers holds, are published as its `Router`. Default: as
            1_Pooling/config.json of the text encoder says (sentence-transformers), else `first`.
        text_width: Width of a new text transformer. Default: the source's.
        text_layers: Depth of a new text transformer. Default: the source's.
        image_gradient_checkpointing: Recompute the image tower's activations in the backward pass.
        text_gradient_checkpointing: Likewise for the text tower.
        seed: Seed of the new weights.
    """

    clip: str = ""
    text_encoder: str | None = None
    pooling: Literal["first", "mean"] | None = None
    text_width: int | None = None
    text_layers: int | None = None
    image_gradient_checkpointing: bool = False
    text_gradient_checkpointing: bool = False
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        check(bool(self.clip), "model.clip", self.clip, "name the directory or Hub id of a CLIP or an image tower")
        check_least(self, "model.", 1, "text_width", "text_layers")
        for name in ("text_width", "text_layers"):
            value, fix = getattr(self, name), "remove it: model.text_encoder has its own size"
            check(value is None or self.text_encoder is None, f"model.{name}", value, fix)
        named = self.text_encoder not in (None, "same")
        fix = "remove it: only a new text encoder (model.text_encoder) takes it"
        check(self.pooling is None or named, "model.pooling", self.pooling, fix)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA (Hu et al. 2022) on the attention and MLP layers, for `align.method: lora`.

    Args:
        target: Tower with adapters: `text`, `image` or `both`. A new text projection is always trained.
        rank: Rank of the adapters.
        alpha: Adapters are scaled by alpha / rank.
        dropout: Dropout probability at the input of the adapters.
        dora: Learn magnitude and direction separately (DoRA, Liu et al. 2024).
    """

    target: Literal["text", "image", "both"] = "text"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    dora: bool = False

    @all_faults()
    def __post_init__(self) -> None:
        check_least(self, "lora.", 1, "rank", "alpha")
        check_share("lora.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss.

    Args:
        name: `infonce` (CLIP), `sigmoid` (SigLIP), or another loss of `koclip.losses.CONTRASTIVE`.
        duplicates: What two pairs of a batch with the same caption or the same image count as: `positives`, `negatives`
            (as in the CLIP paper), or `masked` (neither).
        tile_rows: Rows of the similarity matrix (batch_size x global batch) in memory at a time. It changes the memory,
            not the result. Default: as many as fit into 4 MiB on a CPU, 256 MiB on a GPU, but at least 64.
    """

    name: str = "infonce"
    duplicates: Literal["positives", "masked", "negatives"] = "positives"
    tile_rows: int | None = None

    @all_faults()
    def __post_init__(self) -> None:
        check_least(self, "loss.", 1, "tile_rows")


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
        max_grad_norm: Clip gradients to this norm. 0: no clipping; the norm is logged in any case.
    """

    lr: float = 1e-3
    min_lr_ratio: float = 0.0
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    max_grad_norm: float = 1.0

    @all_faults()
    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", self.lr, "expected more than 0")
        check(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "expected 0 to 1")
        check_least(self, "optim.", 0, "warmup_steps", "max_grad_norm")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run.

    Args:
        num_steps: Optimizer steps.
        batch_size: Pairs per process and step; the loss sees batch_size x num_processes pairs.
        micro_batch_size: Pairs in the model at a time. The gradient is still of the whole batch (GradCache), for
            about a third more work. Default: the whole batch.
        num_processes: Stop if the run was launched with another number of processes. Default: any number.
        precision: `fp32`, `bf16` or `fp16` (autocast; weights stay fp32).
        compile: Compile the model with torch.compile.
        fast: In the last layer compute only the tokens that CLIP reads, and use faster layers on CPUs. Embeddings and
            gradients stay the same, up to rounding.
        ema_decay: Decay of an exponential moving average of the weights; the average is evaluated and published. 0: no
            average.
        log_every: Steps between two lines of metrics.jsonl. Their `seconds` are the wall-clock time of the run so far.
        eval_every: Steps between two evaluations. 0: only at the end.
        save_every: Steps between two checkpoints. 0: only at the end.
        keep_checkpoints: Number of checkpoints to keep, the newest.
        max_bad_steps: Stop after this many steps in a row whose loss or gradient is not finite. Such steps do not
            change the model; events.jsonl lists them.
        spike_sigmas: events.jsonl also lists losses more than this many standard deviations above the running mean. 0:
            lists none.
        num_threads: CPU threads per process. 0: PyTorch's default.
        tracker: Program that metrics are also sent to, in addition to metrics.jsonl.
        seed: Seed of dropout.
    """

    num_steps: int = 3_000
    batch_size: int = 64
    micro_batch_size: int | None = None
    num_processes: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    fast: bool = True
    ema_decay: float = 0.0
    log_every: int = 50
    eval_every: int = 0
    save_every: int = 1_000
    keep_checkpoints: int = 2
    max_bad_steps: int = 10
    spike_sigmas: float = 6.0
    num_threads: int = 0
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        check_least(self, "train.", 1, "num_steps", "log_every", "keep_checkpoints", "max_bad_steps")
        check_least(self, "train.", 0, "spike_sigmas")
        check(self.batch_size >= 2, "train.batch_size", self.batch_size, "expected 2 or more, to contrast pairs")
        micro = self.micro_batch_size
        fits = micro is None or 1 <= micro <= self.batch_size
        check(fits, "train.micro_batch_size", micro, f"expected 1 to train.batch_size ({self.batch_size})")
        check_share("train.ema_decay", self.ema_decay)
