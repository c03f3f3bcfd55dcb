"""Parameters by part, FLOPs by part and peak memory of a training step, counted on tensors that hold no data.

The step is the real one: the model's own layers run forward and backward under PyTorch's `FakeTensorMode`, which
computes shapes only. `FlopCounterMode` counts multiplications and additions of matrix products, convolutions and
attention; it counts nothing else, as is usual. A counted step takes seconds, whatever its size.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from koclip.models.dual_encoder import DualEncoder
from koclip.models.fast import speed_up
from koclip.models.stock import parts

# PyTorch's counter knows the fused attention of GPUs, but not that of CPUs. It passes shapes. The backward pass counts
# twice the forward pass, as for other products: what a kernel computes again is no work of the model.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: 2 * sdpa_flop_count(q, k, v)
    ),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shapes(NamedTuple):
    """The shapes of a batch."""

    pairs: int  # in the model at a time
    tokens: int
    image_size: int  # pixels
    image: str = "pixels"  # what a batch has of an image: `pixels`, `pooled` features, an `embedding` or `nothing`
    text: str = "tokens"  # `tokens` or `pooled` features


class Work(NamedTuple):
    """FLOPs of the parts for one batch. The backward pass of a part that is not trained is cheaper or does not run."""

    image: int  # image tower and projection, forward
    text: int  # text tower and projection, forward
    backward: int  # both


def parameters(encoder: DualEncoder) -> dict[str, dict[str, int]]:
    """Return the number of parameters by part: `total`, and `trained`. Exact.

    The parts are `image_tower`, `text_tower` without its token embeddings, `token_embeddings`, `projections` and
    `scalars`.
    """
    model = parts(encoder.model)
    tokens = {id(weight) for weight in model.text_tower.get_input_embeddings().parameters()}
    text = [weight for weight in model.text_tower.parameters() if id(weight) not in tokens]
    projections = [*model.image_projection.parameters(), *model.text_projection.parameters()]
    groups: dict[str, list[Any]] = {
        "image_tower": list(model.image_tower.parameters()),
        "text_tower": text,
        "token_embeddings": list(model.text_tower.get_input_embeddings().parameters()),
        "projections": projections,
    }
    named = {id(weight) for group in groups.values() for weight in group}
    groups["scalars"] = [weight for weight in encoder.parameters() if id(weight) not in named]
    return {
        name: {
            "total": sum(weight.numel() for weight in group),
            "trained": sum(weight.numel() for weight in group if weight.requires_grad),
        }
        for name, group in groups.items()
    }


@contextmanager
def without_data(encoder: DualEncoder) -> Iterator[DualEncoder]:
    """Replace the parameters of a model on the meta device by tensors that have a device but no data, for the block."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device="cpu")
        yield encoder


def use_fast_layers(encoder: DualEncoder, device: str) -> None:
    """Use the layers of a run with `train.fast` on a `cpu` or on `cuda`."""
    speed_up(encoder.model, torch.device(device))


def flops(encoder: DualEncoder, shapes: Shapes) -> Work:
    """Return the FLOPs of a batch without the loss, of a model inside `without_data`."""
    encoder.train()
    counts = []
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        embeddings = []
        for inputs in (_image_inputs(encoder, shapes), _text_inputs(encoder, shapes)):
            embeddings.append(_embed(encoder, inputs))
            counts.append(counter.get_total_flops())
        _backward(embeddings)
        total = counter.get_total_flops()
    image, text = counts[0], counts[1] - counts[0]
    return Work(image, text, total - counts[1])


def loss_flops(pairs: int, global_pairs: int, width: int) -> int:
    """Return the FLOPs of a contrastive loss: similarities (pairs, global_pairs), and two products backward."""
    return 3 * 2 * pairs * global_pairs * width


class Step(NamedTuple):
    """What a forward and a backward pass do besides FLOPs."""

    peak: int  # the most bytes that are allocated at a time: activations, and the gradients that exist by then
    written: tuple[int, int]  # bytes of all tensors that the operations allocate: forward, backward
    calls: tuple[int, int]  # operations: forward, backward


class _Meter(TorchDispatchMode):
    """Counts operations and the bytes of all storages that they allocate, and remembers the most bytes at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most = self.written = self.calls = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function.namespace != "prim"  # tensors without data ask for their device before each operation
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.most = max(self.most, self.bytes)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known.add(storage)
            self.bytes += size
            self.written += size
            weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.bytes -= size


def step(encoder: DualEncoder, shapes: Shapes, precision: str) -> Step:
    """Return what a forward and a backward pass do, of a model inside `without_data`. Weights are not counted."""
    encoder.train()
    encoder.zero_grad(set_to_none=True)
    with _Meter() as meter:
        inputs = _image_inputs(encoder, shapes), _text_inputs(encoder, shapes)
        with torch.autocast("cpu", dtype=_DTYPES[precision], enabled=precision != "fp32"):
            embeddings = [_embed(encoder, each) for each in inputs]
        written, calls = meter.written, meter.calls
        _backward(embeddings)
    encoder.zero_grad(set_to_none=True)
    return Step(meter.most, (written, meter.written - written), (calls, meter.calls - calls))


def _image_inputs(encoder: DualEncoder, shapes: Shapes) -> dict[str, Any] | None:
    if shapes.image == "pixels":
        pixels = torch.zeros(shapes.pairs, 3, shapes.image_size, shapes.image_size, dtype=torch.uint8)
        return {"pixel_values": pixels}
    if shapes.image == "pooled":
        return {"image_pooled": torch.zeros(shapes.pairs, parts(encoder.model).image_projection.in_features)}
    return None


def _text_inputs(encoder: DualEncoder, shapes: Shapes) -> dict[str, Any]:
    if shapes.text == "pooled":
        return {"text_pooled": torch.zeros(shapes.pairs, parts(encoder.model).text_projection.in_features)}
    ids = torch.zeros(shapes.pairs, shapes.tokens, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _embed(encoder: DualEncoder, inputs: dict[str, Any] | None) -> torch.Tensor | None:
    """Return what one side of a `DualEncoder` embeds."""
    if inputs is None:
        return None
    nothing: dict[str, Any] = dict.fromkeys(("pixel_values", "input_ids", "attention_mask"))
    if "input_ids" in inputs or "text_pooled" in inputs:
        text: torch.Tensor = encoder(**nothing | inputs).text
        return text
    count = len(next(iter(inputs.values())))
    width = 1  # the text is given, so that its tower does not run
    given = {"text": torch.zeros(count, width), "text_norm": torch.ones(count)}
    image: torch.Tensor = encoder(**nothing | inputs | given).image
    return image


def _backward(embeddings: list[torch.Tensor | None]) -> None:
    """Run the backward pass of the sum of all embeddings that need a gradient."""
    sums = [embedding.sum() for embedding in embeddings if embedding is not None and embedding.requires_grad]
    if sums:
        torch.stack(sums).sum().backward()
