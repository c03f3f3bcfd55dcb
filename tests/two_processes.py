"""What test_distributed runs in every process of a launch, and, for reference, alone.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/two_processes.py FOLDER
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny import tiny_batch, tiny_config, tiny_dual_encoder, tiny_pieces, tiny_tokenizer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor

from koclip import distributed, training
from koclip.config import LossConfig, OptimConfig, PretrainConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.encoders.transformers import TransformersEncoder
from koclip.losses import Loss
from koclip.losses.contrastive import Embeddings
from koclip.models.dual_encoder import from_scratch
from koclip.runs.session import Session
from koclip.training import grad_cache

LOSSES = {
    f"{name}/{mode}/{'tiled' if tile_rows else 'dense'}": LossConfig(name=name, duplicates=mode, tile_rows=tile_rows)
    for name in ("infonce", "sigmoid")
    for mode in ("negatives", "masked", "positives")
    for tile_rows in (None, 1)
}
CAPTION_IDS = torch.tensor([0, 1, 2, 3, 0, 5, 1, 1])  # equal captions within a process and across two
TRAIN = TrainConfig(batch_size=2, num_steps=10, tracker="none")
OPTIM = OptimConfig(warmup_steps=1)
CONFIG = PretrainConfig(train=TRAIN, optim=OPTIM)


def prepare(accelerator: Accelerator, loss: LossConfig, **model: object) -> training.TrainState:
    # These keep losses and gradients near 1: float32 could not resolve 1e-6 of the 10 that a bias of -10 begins with.
    bias = -2.0 if loss.name == "sigmoid" else None
    dual_encoder = tiny_dual_encoder(logit_bias=bias, temperature=0.5, **model).train()
    return training.prepare(accelerator, dual_encoder, dataclasses.replace(CONFIG, loss=loss))


def backward(trainer: training.TrainState) -> float:
    """Do a backward pass over this process's share of the global batch; return the global loss."""
    share = len(CAPTION_IDS) // distributed.world_size()
    rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    batch = {name: tensor[rows] for name, tensor in tiny_batch(len(CAPTION_IDS)).items()}
    loss = trainer.loss(trainer.model(**batch), CAPTION_IDS[rows])
    trainer.accelerator.backward(loss.value)
    return distributed.mean({"loss": loss.value.item()}, trainer.accelerator.device)["loss"]


def step(trainer: training.TrainState) -> None:
    backward(trainer)
    trainer.optimizer.step()
    trainer.scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.dual_encoder.clamp_logit_scale()


def gradients(trainer: training.TrainState) -> dict[str, torch.Tensor]:
    by_name = {}
    for name, parameter in trainer.dual_encoder.named_parameters():
        assert parameter.grad is not None, name
        by_name[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return by_name


def losses_and_gradients(accelerator: Accelerator) -> dict[str, object]:
    results = {}
    for name, loss in LOSSES.items():
        trainer = prepare(accelerator, loss)
        results[name] = {"loss": backward(trainer), "gradients": gradients(trainer)}
    return results


def pieces_of(step: int, sizes: tuple[int, ...] = (2, 2, 1)) -> list[Batch]:
    """This process's share of a step's batch, in uneven pieces."""
    return tiny_pieces(list(sizes), seed=2 * step + distributed.rank())


def at_once(trainer: training.TrainState, pieces: Sequence[Batch]) -> Loss:
    """The plain way: one forward pass of each piece, one backward pass of them all, which synchronises once."""
    outputs = [trainer.dual_encoder(**piece.inputs) for piece in pieces]
    image, text = (torch.cat([getattr(output, side) for output in outputs]) for side in ("image", "text"))
    whole = Embeddings(image, text, outputs[0].logit_scale, outputs[0].logit_bias)
    loss = trainer.loss(whole, torch.cat([piece.pair_ids for piece in pieces]))
    loss.value.backward()
    for parameter in trainer.dual_encoder.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= distributed.world_size()  # type: ignore[operator]
    return loss


def at_once_sharded(trainer: training.TrainState, pieces: Sequence[Batch]) -> None:
    """The plain way for sharded weights, which are gathered for one forward pass only: padding all pieces alike."""
    length = max(piece.input_ids.shape[1] for piece in pieces)
    pad = trainer.dual_encoder.model.config.text_config.pad_token_id
    inputs = [
        (
            piece.pixel_values,
            F.pad(piece.input_ids, (0, length - piece.input_ids.shape[1]), value=pad),
            F.pad(piece.attention_mask, (0, length - piece.input_ids.shape[1])),
        )
        for piece in pieces
    ]
    embeddings = trainer.model(*(torch.cat(parts) for parts in zip(*inputs, strict=True)))
    trainer.accelerator.backward(trainer.loss(embeddings, torch.cat([piece.pair_ids for piece in pieces])).value)


def grad_cached(accelerator: Accelerator) -> dict[str, object]:
    """Gradients in pieces and at once, with dropout, and the weights after 20 steps of either."""
    results = {}
    for name in ("infonce", "sigmoid"):
        measured: dict[str, list[object]] = {"loss": [], "gradients": [], "weights": []}
        for backward in (at_once, cached):
            trainer = prepare(accelerator, LossConfig(name=name), patch_dropout=0.3)
            torch.manual_seed(distributed.rank())
            syncs = count_syncs(trainer)
            for step in range(20):
                loss = backward(trainer, pieces_of(step))
                if step == 0:
                    value = distributed.mean({"loss": loss.value.item()}, accelerator.device)["loss"]
                    measured["loss"].append(value)
                    measured["gradients"].append(
                        {key: gradient.clone() for key, gradient in gradients(trainer).items()}
                    )
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
            measured["weights"].append(trainer.dual_encoder.state_dict())
            measured.setdefault("syncs", []).append(len(syncs))
        results[name] = measured
    return results


def count_syncs(trainer: training.TrainState) -> list[int]:
    """Return a list that grows by one whenever DDP averages a bucket of gradients; a tiny model is one bucket."""
    syncs: list[int] = []

    def hook(_: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        syncs.append(1)
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    trainer.model.register_comm_hook(None, hook)
    return syncs


def cached(trainer: training.TrainState, pieces: Sequence[Batch]) -> Loss:
    return grad_cache.backward(trainer.accelerator, trainer.model, trainer.dual_encoder, trainer.loss, pieces)


def with_one_bad_process(accelerator: Accelerator) -> dict[str, object]:
    """Three steps; in the second, only the last process has a batch that is not finite."""
    trainer = prepare(accelerator, LossConfig())

    def batches() -> Iterator[Batch]:
        for step in range(3):
            (piece,) = pieces_of(step, (2,))
            if step == 1 and distributed.rank() == 1:
                piece = dataclasses.replace(piece, pixel_values=piece.pixel_values.float() * float("nan"))
            yield piece

    list(training.steps(trainer, batches(), 0, 3, log_every=3))
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.dual_encoder.parameters()])
    return {"events": distributed.gather_objects(trainer.health.take_events()), "weights": distributed.gather(weights)}


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


def open_run(folder: Path, accelerator: Accelerator, resume: bool = False) -> Session:
    config = dataclasses.replace(CONFIG, output_dir=str(folder), resume="auto" if resume else "no")
    return Session("test", config, accelerator)


def resumed(accelerator: Accelerator, folder: Path) -> dict[str, object]:
    """Train two steps with a checkpoint after the first; then the second again, from the checkpoint."""
    trainer = prepare(accelerator, LossConfig())
    run = open_run(folder, accelerator)
    step(trainer)
    run.save(trainer, 1, keep=1, wait=True)
    step(trainer)
    again = prepare(accelerator, LossConfig())
    progress = open_run(folder, accelerator, resume=True).load(again)
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
    loss, whole = backward(trainer), gradients(trainer)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    with torch.no_grad():
        trainer.dual_encoder.model.logit_scale.add_(10.0)
    trainer.dual_encoder.clamp_logit_scale()
    scale = trainer.dual_encoder.logit_scale()

    open_run(folder, accelerator).save(trainer, 1, keep=1, wait=True)
    again = prepare(accelerator, LossConfig(name="sigmoid"))
    open_run(folder, accelerator, resume=True).load(again)
    _, processor = from_scratch(tiny_config(), tiny_tokenizer())
    texts = []
    for current in (trainer, again):
        with current.evaluating() as model:
            texts.append(TransformersEncoder(model, processor).encode_texts(["빨간 원", "파란 별"]))
        step(current)  # training goes on after an evaluation
    stats = [last for _, last in training.steps(again, iter(pieces_of(0, (2,))), 0, 1, log_every=1)]
    again.num_micro_batches = 3
    stats += [last for _, last in training.steps(again, iter(pieces_of(1)), 0, 1, log_every=1)]
    published = open_run(folder / "published", accelerator)
    open_run(folder, accelerator, resume=True).load(trainer)
    published.save_model(trainer, processor)
    in_pieces = {}
    for name, way in (("at once", at_once_sharded), ("pieces", cached)):
        fresh = prepare(accelerator, LossConfig(name="sigmoid"))
        way(fresh, pieces_of(0))
        in_pieces[name] = {key: value.clone() for key, value in gradients(fresh).items()}
    return {
        "loss": loss, "gradients": whole, "scale": scale, "texts": texts, "stats": stats, "in_pieces": in_pieces,
    }  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = training.start(TRAIN)
    results = {
        "world_size": distributed.world_size(),
        "ddp": losses_and_gradients(accelerator),
        "collectives": collectives(accelerator.device),
        "resumed": resumed(accelerator, folder / "ddp"),
        "grad_cache": grad_cached(accelerator),
        "bad": with_one_bad_process(accelerator),
        "fsdp2": sharded(folder / "fsdp2"),
    }
    if distributed.rank() == 0:
        torch.save(results, folder / "results.pt")
    distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
