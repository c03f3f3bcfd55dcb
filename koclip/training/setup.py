"""Prepare training: the accelerator, and the training state."""

import dataclasses

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType

from koclip.config import AlignConfig, ConfigError, OptimConfig, PretrainConfig, Stage, TrainConfig
from koclip.data.order import BatchPart
from koclip.losses import build_loss
from koclip.models.dual_encoder import DualEncoder
from koclip.models.fast import speed_up
from koclip.optim import adamw, layer_rates, projection_decay, warmup_cosine
from koclip.training.loop import Health, TrainState, ema_of


def start(config: TrainConfig) -> Accelerator:
    """Return the accelerator, and check the number of processes.

    Raises:
        ConfigError: the number of processes is not `num_processes`. On CPUs, several processes need
            ACCELERATE_USE_CPU=true and torchrun. Any other launch silently starts independent runs.
    """
    transformers.utils.logging.disable_progress_bar()  # files load in a moment
    precision = "no" if config.precision == "fp32" else config.precision
    tracker = None if config.tracker == "none" else config.tracker
    # accelerate needs a directory at once; the run's directory replaces it later.
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir="runs")
    if config.num_processes not in (None, accelerator.num_processes):
        raise ConfigError(
            f"train.num_processes: got {accelerator.num_processes} processes, expected {config.num_processes}; launch "
            f"with `accelerate launch --num_processes {config.num_processes}`, on CPUs with "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {config.num_processes}`"
        )
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed + accelerator.process_index)
    return accelerator


def prepare(
    accelerator: Accelerator,
    dual_encoder: DualEncoder,
    config: PretrainConfig | AlignConfig,
    stage: Stage | None = None,
) -> TrainState:
    """Put the model on its device, wrap it for distributed training and build its optimizer, for a stage of the run.

    Raises:
        ConfigError: sharded training does not support `train.ema_decay`, several stages or, with DeepSpeed,
            `train.micro_batch_size`.
    """
    stage, train = stage or config.stages[0], config.train
    if _sharded(accelerator, train, stage):
        dual_encoder.lift_scalars()
    if train.fast:
        speed_up(dual_encoder.model, accelerator.device)
    dual_encoder.to(accelerator.device)
    ema = ema_of(dual_encoder, train.ema_decay) if train.ema_decay else None
    optim = dataclasses.replace(config.optim, lr=stage.lr)
    decays = projection_decay(dual_encoder, stage.image_decay)
    optimizer = adamw(dual_encoder, optim, layer_rates(dual_encoder, stage.layer_decay), decays)
    compiled = torch.compile(dual_encoder) if train.compile else dual_encoder
    _configure_deepspeed(accelerator, train, optim)
    wrapped, wrapped_optimizer = accelerator.prepare(compiled, optimizer)
    return TrainState(
        accelerator=accelerator,
        model=wrapped,
        dual_encoder=accelerator.unwrap_model(wrapped, keep_torch_compile=False),
        optimizer=wrapped_optimizer,
        scheduler=warmup_cosine(optimizer, optim, stage.end, stage.start),
        loss=build_loss(config.loss, stage.distill, stage.images),
        max_grad_norm=optim.max_grad_norm,
        num_micro_batches=len(BatchPart(train.batch_size, micro_batch_size=train.micro_batch_size).pieces),
        health=Health(train.max_bad_steps, train.spike_sigmas),
        ema=ema,
    )


def _configure_deepspeed(accelerator: Accelerator, train: TrainConfig, optim: OptimConfig) -> None:
    """Give DeepSpeed the settings that accelerate reads from a data loader and from its YAML."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings |= {"train_micro_batch_size_per_gpu": train.batch_size, "gradient_clipping": optim.max_grad_norm}


def _sharded(accelerator: Accelerator, train: TrainConfig, stage: Stage) -> bool:
    """Return whether the weights will be sharded; check that the run's settings allow it."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if train.micro_batch_size and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            f"train.micro_batch_size: got {train.micro_batch_size}; DeepSpeed updates the weights in each backward "
            "pass, so micro-batches are not supported: leave it out, or use DDP or FSDP2 (recipes/accelerate/)"
        )
    if train.ema_decay and sharded:
        raise ConfigError(
            f"train.ema_decay: got {train.ema_decay}; sharded weights cannot be averaged: set it to 0, or use DDP"
        )
    if sharded and stage.end < train.num_steps:
        raise ConfigError(
            "align.method: got a method of several stages; sharded weights can be trained in one stage only: use DDP "
            "(recipes/accelerate/), or train two runs, the second with model.clip: <first run>/model and "
            "model.text_encoder: same"
        )
    return sharded


def release(state: TrainState) -> DualEncoder:
    """Return the model of a finished stage without its wrappers, ready for the next stage."""
    state.accelerator.free_memory()
    plain: DualEncoder = state.accelerator.unwrap_model(state.model, False, keep_torch_compile=False)
    # `prepare` leaves a module with this mark as it is: the next stage would train without autocast.
    vars(plain).pop("_is_accelerate_prepared", None)
    plain.zero_grad(set_to_none=True)
    return plain
