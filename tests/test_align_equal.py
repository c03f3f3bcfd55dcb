"""Training with kept features equals training without them, and then no image is decoded or embedded any more."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from align_runs import align, arguments, write_encoder, write_pairs, write_source
from helpers.tokenizer_families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionModel
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPVisionModel

from koclip import training
from koclip.data import transforms
from koclip.models.dual_encoder import DualEncoder

PHOTOS, EVALUATED = 24, 8
TRIED = 1  # `koclip.load` tries the saved model
EPOCH, EPOCHS = 3, 4  # steps of an epoch; epochs
VIEWS = ["--data.num_crops", "3", "--data.crop_scale", "[0.3, 0.8]"]
METHODS = {
    "frozen_image": [],
    "lora": ["--align.method", "lora", "--lora.dropout", "0.2"],
    "two_stage": ["--align.method", "two_stage", "--align.first_steps", "4"],
    "anchored": ["--distill.anchor", "0.2", "--distill.cosine", "1", "--data.word_dropout", "0.2"],
    "projection": ["--align.method", "projection"],
    "projections": ["--align.method", "projection", "--align.image_projection_decay", "0.1"],
    "in pieces": ["--train.micro_batch_size", "3"],
}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source CLIP, photos, and a BERT with dropout."""
    folder = tmp_path_factory.mktemp("align")
    weights = load_file(write_source(folder / "source") / "model.safetensors")
    # Warm: float32 could not resolve 1e-6 of the losses that a cold softmax makes of the rounding of embeddings.
    weights["logit_scale"].fill_(1.0)
    save_file(weights, folder / "source" / "model.safetensors", {"format": "pt"})
    write_pairs(folder / "pairs.parquet", PHOTOS)
    (folder / "bert").mkdir()
    FAMILIES["bert"].write(folder / "bert")
    write_encoder(folder / "bert", "bert", len(AutoTokenizer.from_pretrained(folder / "bert")), hidden_dropout_prob=0.1)
    return folder


class Counts:
    """How often images were decoded, and embedded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.decoded = self.embedded = 0
        decode = transforms._decode

        def counted(*args: Any) -> torch.Tensor:
            self.decoded += 1
            return decode(*args)

        def embedding(module: torch.nn.Module, *_: object) -> None:
            self.embedded += isinstance(module, CLIPVisionModel | ChineseCLIPVisionModel)

        patch.setattr(transforms, "_decode", counted)
        self.hook = torch.nn.modules.module.register_module_forward_pre_hook(embedding)


def run(place: Path, name: str, *args: str) -> tuple[list[float], Counts]:
    """Align for four epochs; return the losses, and what it took."""
    with pytest.MonkeyPatch.context() as patch:
        counts = Counts(patch)
        rest = [*VIEWS, "--model.text_encoder", str(place / "bert"), "--train.num_steps", str(EPOCH * EPOCHS)]
        folder = ["--output_dir", str(place / "runs" / name)]
        align(*arguments(place / "source", place / "pairs.parquet", *rest, *folder, *args))
        counts.hook.remove()
    logged = [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == EPOCH * EPOCHS
    return [line["loss"] for line in logged], counts


@pytest.mark.parametrize(
    ("name", "kept", "bar"),
    [*((name, "fp32", 1e-6) for name in METHODS), ("frozen_image", "fp16", 1e-3), ("anchored", "fp16", 1e-3)],
)
def test_kept_features_change_nothing(name: str, kept: str, bar: float, place: Path) -> None:
    """The loss of every step, for four epochs, with dropout and three views of each image."""
    common = [*METHODS[name], "--align.cache_dtype", kept]  # the teacher's features are kept in any case
    losses, counts = run(place, f"{name}-{kept}", *common)
    wanted, plain = run(place, f"{name}-{kept}-without", *common, "--align.cache", "false")
    difference = max(abs(loss - other) for loss, other in zip(losses, wanted, strict=True))
    assert difference <= bar
    assert (difference > 1e-5) == (kept == "fp16")
    steps = EPOCH * EPOCHS - (4 if name == "two_stage" else 0)
    assert plain.decoded == EVALUATED + 8 * steps
    assert plain.embedded == steps * (3 if name == "in pieces" else 1) + TRIED
    # Each image once, before the first step, in all its views.
    assert (counts.decoded, counts.embedded) == (EVALUATED + PHOTOS, 1 + TRIED)


def test_a_second_run_decodes_and_embeds_nothing(place: Path) -> None:
    """On another's features, with another text encoder and another method: whole epochs without one image."""
    shared = ["--align.cache_dir", str(place / "shared")]
    _, first = run(place, "first", *shared, "--eval.sets", "[]")
    _, second = run(place, "second", *shared, "--eval.sets", "[]", "--align.method", "lora")
    _, third = run(place, "third", *shared, "--eval.sets", "[]", "--model.text_encoder", "same")
    assert [(run.decoded, run.embedded) for run in (first, second, third)] == [
        (PHOTOS, 1 + TRIED),
        (0, TRIED),
        (0, TRIED),
    ]


def test_the_first_stage_of_full_sees_no_image_either(place: Path) -> None:
    """Then the image tower is trained, which needs them."""
    args = ["--align.method", "full", "--align.first_steps", str(EPOCH * 3)]
    _, counts = run(place, "staged", *args)
    assert (counts.decoded, counts.embedded) == (EVALUATED + PHOTOS + 8 * EPOCH, 1 + EPOCH + TRIED)


def test_broken_images_are_listed_once_with_features_and_without(place: Path) -> None:
    rows = pq.read_table(place / "pairs.parquet").to_pylist()
    for number in (3, 17):
        rows[number]["image"] = rows[number]["image"][:80]
    pq.write_table(pa.Table.from_pylist(rows), place / "broken.parquet")
    pairs = f"[{{path: {place / 'broken.parquet'}, captions: {{ko: captions_ko, en: captions_en}}}}]"
    losses, listed = {}, {}
    for kept in ("true", "false"):
        args = ["--data.sources", pairs, "--align.cache", kept, "--align.cache_dtype", "fp32"]
        losses[kept], _ = run(place, f"broken-{kept}", *args)
        listed[kept] = (place / "runs" / f"broken-{kept}" / "skipped.jsonl").read_text()
    assert listed["true"] == listed["false"]
    numbers = [json.loads(line)["key"].split("/")[1] for line in sorted(listed["true"].splitlines())]
    assert numbers == ["17", "3"]
    assert losses["true"] == pytest.approx(losses["false"], abs=1e-6)


def test_a_second_stage_begins_without_the_memory_of_the_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer moments are twice the weights."""
    optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
    alive: list[bool] = []
    prepare = training.prepare

    def watched(*args: Any) -> training.TrainState:
        alive.extend(reference() is not None for reference in optimizers)
        trainer = prepare(*args)
        optimizers.append(weakref.ref(trainer.optimizer.optimizer))  # type: ignore[attr-defined]
        return trainer

    monkeypatch.setattr(training, "prepare", watched)
    run(place, "memory", *METHODS["two_stage"])
    assert alive == [False]


@pytest.mark.parametrize("method", ["two_stage", "full", "unfreeze"])
def test_every_stage_trains_in_the_precision_of_the_run(
    method: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prepare` of accelerate wraps a module once; a later stage must not train without autocast."""
    precisions: list[str] = []
    forward = DualEncoder.forward

    def noted(self: DualEncoder, *args: Any, **batch: Any) -> Any:
        precisions.append(str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else "fp32")
        return forward(self, *args, **batch)

    monkeypatch.setattr(DualEncoder, "forward", noted)
    args = ["--align.method", method, "--align.first_steps", "2", "--train.precision", "bf16"]
    if method == "unfreeze":
        args += ["--align.second_steps", "4", "--align.text_layers", "1"]
    run(place, f"precision-{method}", *args)
    assert precisions == ["torch.bfloat16"] * EPOCH * EPOCHS
