"""What test_distributed runs in every process of a launch, and, for reference, alone.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/two_processes.py FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny import tiny_batch, tiny_config, tiny_dual_encoder, tiny_tokenizer
from torch.distributed.tensor import DTensor

from koclip import distributed, training
from koclip.checkpoint import Run
from koclip.config import LossConfig, OptimConfig, TrainConfig
from koclip.models.dual_encoder import from_scratch
from koclip.models.inference import embed_texts

LOSSES = [(name, mode) for name in ("infonce", "sigmoid") for mode in ("negatives", "masked", "positives")]
CAPTION_IDS = torch.tensor([0, 1, 2, 3, 0, 5, 1, 1])  # equal captions within a process and across two
TRAIN = TrainConfig(batch_size=2, num_steps=10, tracker="none")
OPTIM = OptimConfig(warmup_steps=1)


def prepare(accelerator: Accelerator, loss: LossConfig) -> training.Trainer:
    # These keep losses and gradients near 1: float32 could not resolve 1e-6 of the 10 that a bias of -10 begins with.
    bias = -2.0 if loss.name == "sigmoid" else None
    dual_encoder = tiny_dual_encoder(logit_bias=bias, temperature=0.5).train()
    return training.prepare(accelerator, dual_encoder, loss, OPTIM, TRAIN)


def backward(trainer: training.Trainer) -> float:
    """Do a backward pass over this process's share of the global batch; return the global loss."""
    share = len(CAPTION_IDS) // distributed.world_size()
    rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    batch = {name: tensor[rows] for name, tensor in tiny_batch(len(CAPTION_IDS)).items()}
    loss = trainer.loss(trainer.model(**batch), CAPTION_IDS[rows])
    trainer.accelerator.backward(loss.value)
    return distributed.mean({"loss": loss.value.item()}, trainer.accelerator.device)["loss"]


def step(trainer: training.Trainer) -> None:
    backward(trainer)
    trainer.optimizer.step()
    trainer.scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.dual_encoder.clamp_logit_scale()


def gradients(trainer: training.Trainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in trainer.dual_encoder.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def losses_and_gradients(accelerator: Accelerator) -> dict[str, object]:
    results = {}
    for name, mode in LOSSES:
        trainer = prepare(accelerator, LossConfig(name=name, equal_captions=mode))  # type: ignore[arg-type]
        results[f"{name}/{mode}"] = {"loss": backward(trainer), "gradients": gradients(trainer)}
    return results


def collectives(device: torch.device) -> dict[str, object]:
    rank = distributed.rank()
    own = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = distributed.gather(own)
    (gathered * torch.arange(1.0, 13.0).view(4, 3)).sum().backward()
    return {
        "gathered": gathered.detach(),
        "gradient": distributed.gather_objects(own.grad),
        "mean": distributed.mean({"a": float(rank), "b": 2.0}, device),
        "any": [distributed.any_process(rank == 1, device), distributed.any_process(False, device)],
        "objects": distributed.gather_objects(f"process {rank}"),
    }


def resumed(accelerator: Accelerator, folder: Path) -> dict[str, object]:
    """Train two steps with a checkpoint after the first; then the second again, from the checkpoint."""
    trainer = prepare(accelerator, LossConfig())
    run = Run("test", str(folder), resume=False)
    step(trainer)
    run.save(trainer, 1, keep=1)
    step(trainer)
    again = prepare(accelerator, LossConfig())
    progress = Run("test", str(folder), resume=True).load(again)
    step(again)
    return {
        "step": progress.step,
        "straight": trainer.dual_encoder.state_dict(),
        "resumed": again.dual_encoder.state_dict(),
    }


def sharded(folder: Path) -> dict[str, object]:
    """Do it all with FSDP2. Accelerate would shard on accelerators only; PyTorch can on CPUs too."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["CLIPEncoderLayer"],
        reshard_after_forward=True,
    )
    accelerator = training.start(TRAIN)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    trainer = prepare(accelerator, LossConfig(name="sigmoid"))
    loss, found = backward(trainer), gradients(trainer)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    with torch.no_grad():
        trainer.dual_encoder.model.logit_scale.add_(10.0)
    trainer.dual_encoder.clamp_logit_scale()
    scale = trainer.dual_encoder.logit_scale()

    Run("test", str(folder), resume=False).save(trainer, 1, keep=1)
    again = prepare(accelerator, LossConfig(name="sigmoid"))
    Run("test", str(folder), resume=True).load(again)
    _, processor = from_scratch(tiny_config(), tiny_tokenizer())
    texts = []
    for one in (trainer, again):
        with one.evaluating() as model:
            texts.append(embed_texts(model, processor, ["빨간 원", "파란 별"]))
        step(one)  # training goes on after an evaluation
    published = Run("test", str(folder / "published"), resume=False)
    Run("test", str(folder), resume=True).load(trainer)
    published.save_model(trainer, processor)
    return {"loss": loss, "gradients": found, "scale": scale, "texts": texts}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = training.start(TRAIN)
    results = {
        "world_size": distributed.world_size(),
        "ddp": losses_and_gradients(accelerator),
        "collectives": collectives(accelerator.device),
        "resumed": resumed(accelerator, folder / "ddp"),
        "fsdp2": sharded(folder / "fsdp2"),
    }
    if distributed.rank() == 0:
        torch.save(results, folder / "results.pt")
    distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
