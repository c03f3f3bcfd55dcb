"""All collective operations of koclip. Without a process group, each returns its input."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all processes, for the gradient of the global loss.

    `torch.distributed.nn.functional.all_gather` does this too but is deprecated; `accelerator.gather` cuts the graph.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd's tensor is read-only
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, (W * B, ...), in rank order. Gradients flow back to the process of each row.

    Every process must hold the same number of rows.
    """
    if world_size() == 1:
        return tensor
    gathered: torch.Tensor = _Gather.apply(tensor)
    return gathered


def logsumexp(values: torch.Tensor) -> torch.Tensor:
    """Return log(sum(exp(value))) over the processes, for each element. No gradient flows."""
    if world_size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total = (values - largest).exp()
    dist.all_reduce(total)
    return largest + total.log()


def mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return the mean of each value over the processes."""
    if world_size() == 1:
        return values
    packed = torch.tensor(list(values.values()), dtype=torch.float64 if device.type == "cpu" else torch.float32)
    packed = packed.to(device)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / world_size()).tolist(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any process; all processes get the same answer."""
    if world_size() == 1:
        return flag
    packed = torch.tensor(int(flag), device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return bool(packed.item())


def gather_objects(item: Item) -> list[Item]:
    """Return every process's item, in rank order."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def share(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return the result of every item, in order. Process r works on items r, r + W, r + 2W, ..."""
    size = world_size()
    parts = gather_objects([work(item) for item in items[rank() :: size]])
    return [parts[number % size][number // size] for number in range(len(items))]


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()
