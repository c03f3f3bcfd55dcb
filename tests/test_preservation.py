"""The preservation term: by hand, against plain loops with gradients, in tiles and pieces, and in whole runs."""

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from align_runs import align, arguments, write_pairs, write_source
from helpers.gradients import SIZES, assert_equal_gradients
from PIL import Image
from tiny import random_embeddings, tiny_dual_encoder, tiny_pieces
from torch import Tensor

import koclip
from koclip import losses, training
from koclip.config import DistillConfig, LossConfig, OptimConfig, PretrainConfig, Stage, TrainConfig
from koclip.data.batches import Batch
from koclip.losses.contrastive import Embeddings
from koclip.losses.preservation import SourcePairs, preservation

EYE = torch.eye(2)
ALL = torch.tensor([True, True])


def test_two_pairs_worked_by_hand() -> None:
    """Similarities of the model: (1, 0), (0, 1); of the source: (ln 3, 0), (0, 0). The scale is 1."""
    source = SourcePairs(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), EYE, ALL)
    e = math.e

    def divergence(shares: Sequence[float], others: Sequence[float]) -> float:
        return sum(share * math.log(share / other) for share, other in zip(shares, others, strict=True))

    model = ((e / (1 + e), 1 / (1 + e)), (1 / (1 + e), e / (1 + e)))
    rows = divergence((0.75, 0.25), model[0]) + divergence((0.5, 0.5), model[1])
    columns = divergence((0.75, 0.25), model[0]) + divergence((0.5, 0.5), model[1])
    value = preservation(Embeddings(EYE, EYE, torch.tensor(1.0)), source, tile_rows=99)
    assert value.item() == pytest.approx((rows + columns) / 4, rel=1e-6)


def source_of(count: int, readable: Sequence[bool], seed: int = 3) -> SourcePairs:
    pairs = torch.randn(2, count, 8, generator=torch.Generator().manual_seed(seed))
    image, text = torch.nn.functional.normalize(pairs, dim=-1)
    return SourcePairs(image, text, torch.tensor(readable))


def plain(embeddings: Embeddings, source: SourcePairs) -> Tensor:
    """The term in loops over pairs, without softmax functions."""
    image, text, scale = embeddings[:3]
    places = [place for place, known in enumerate(source.readable.tolist()) if known]
    total = torch.zeros(())
    sides = ((image, text, source.image, source.text), (text, image, source.text, source.image))
    for own, other, source_own, source_other in sides:
        for row in places:
            exact = [(scale.detach() * source_own[row] @ source_other[column]).exp() for column in places]
            model = [(scale.detach() * own[row] @ other[column]).exp() for column in places]
            for share, guess in zip(exact, model, strict=True):
                total = total + share / sum(exact) * ((share / sum(exact)).log() - (guess / sum(model)).log())
    return total / (2 * len(places))


READABLE = [True, False, True, True, False, True, True]


@pytest.mark.parametrize("tile_rows", [1, 2, 99])
def test_the_value_and_the_gradients_are_those_of_plain_loops(tile_rows: int) -> None:
    """In tiles, too. Pairs that the source cannot read get no gradient; the logit scale gets none."""
    embeddings, source = random_embeddings(7), source_of(7, READABLE)
    value = preservation(embeddings, source, tile_rows)
    wanted = plain(embeddings, source)
    torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(value, embeddings[:2])
    for own, expected in zip(gradients, torch.autograd.grad(wanted, embeddings[:2]), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)
        assert not own[1].any()
        assert own[0].any()
    value = preservation(embeddings, source, 99)
    assert torch.autograd.grad(value, embeddings.logit_scale, allow_unused=True)[0] is None


def test_it_is_zero_if_nothing_has_changed_or_nothing_is_readable() -> None:
    embeddings = random_embeddings(7)
    same = SourcePairs(embeddings.image.detach(), embeddings.text.detach(), torch.ones(7, dtype=torch.bool))
    value = preservation(embeddings, same, 99)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(value, embeddings.text)[0].abs().max() < 1e-6
    assert preservation(embeddings, source_of(7, [False] * 7), 99).item() == 0


def test_it_falls_when_the_similarities_come_near_those_of_the_source() -> None:
    embeddings, source = random_embeddings(7), source_of(7, READABLE)
    values = []
    for share in (0.0, 0.5, 0.9):
        parts = [torch.lerp(own.detach(), other, share) for own, other in zip(embeddings[:2], source[:2], strict=True)]
        image, text = (torch.nn.functional.normalize(part, dim=-1) for part in parts)
        values.append(preservation(Embeddings(image, text, embeddings.logit_scale.detach()), source, 99).item())
    assert values == sorted(values, reverse=True)


def test_the_weight_adds_it_to_the_contrastive_loss() -> None:
    """With the model's images as the source's if the image tower is frozen."""
    pairs, teacher, ids = random_embeddings(6), torch.randn(6, 8), torch.arange(6)[:, None].expand(6, 3)
    readable = torch.tensor([True, True, False, True, False, True])
    build = losses.build_loss(LossConfig(), DistillConfig(preserve=0.7))
    unit = torch.nn.functional.normalize(teacher, dim=-1)
    image = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    for known, expected in ((None, pairs.image.detach()), (image, image)):
        term = preservation(pairs, SourcePairs(expected, unit, readable), 99)
        contrast = losses.build_loss(LossConfig())(pairs, ids)
        both = build(pairs, ids, teacher, readable, known)
        torch.testing.assert_close(both.value, contrast.value + 0.7 * term)
        assert both.accuracy == contrast.accuracy


def preserved_pieces(sizes: list[int], images: bool) -> list[Batch]:
    """Pieces with the source's embeddings; with `images`, of trained images, too."""
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for piece in tiny_pieces(sizes, 0):
        count = len(piece.keys)
        teacher, source = torch.nn.functional.normalize(torch.randn(2, count, 32, generator=generator), dim=-1)
        changes = {"teacher": teacher, "readable": torch.arange(count) % 3 > 0}
        ids = piece.pair_ids[:, :1].expand(-1, 3)
        known = {"source_image": source} if images else {"pixel_values": None, "image": source}
        pieces.append(dataclasses.replace(piece, pair_ids=ids, **changes, **known))
    return pieces


@pytest.mark.parametrize("images", [False, True], ids=["frozen images", "trained images"])
@pytest.mark.parametrize("tile_rows", [None, 2])
def test_pieces_have_the_gradient_of_the_batch(
    images: bool, tile_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.gradients.tiny_pieces", lambda sizes: preserved_pieces(sizes, images))
    encoder = tiny_dual_encoder(temperature=0.5)
    for module in () if images else (encoder.model.vision_model, encoder.model.visual_projection):
        module.requires_grad_(False)
    train = TrainConfig(batch_size=sum(SIZES), micro_batch_size=SIZES[0], tracker="none")
    stage = Stage("full", 0, train.num_steps, 1e-3, distill=DistillConfig(preserve=3.0), trains_image=images)
    config = PretrainConfig(loss=LossConfig(tile_rows=tile_rows), optim=OptimConfig(warmup_steps=1), train=train)
    names = assert_equal_gradients(training.prepare(training.start(train), encoder, config, stage))
    assert "model.text_projection.weight" in names
    assert any("vision_model" in name for name in names) == images


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source CLIP and photos."""
    folder = tmp_path_factory.mktemp("preservation")
    write_source(folder / "source")
    write_pairs(folder / "pairs.parquet")
    return folder


def mixed(place: Path, name: str, *args: str) -> Path:
    """Align the source's own text tower to captions in both languages; return the run directory."""
    rows = f"path: {place / 'pairs.parquet'}, captions: {{ko: captions_ko, en: captions_en}}"
    sources = ("--data.sources", f"[{{{rows}, languages: {{ko: 0.5, en: 0.5}}}}]", "--output_dir", str(place / name))
    steps = ("--train.num_steps", "40", "--optim.lr", "0.0005", "--model.text_encoder", "same")
    align(*arguments(place / "source", place / "pairs.parquet", *sources, *steps, *args))
    return place / name


def divergence(place: Path, model: Path) -> float:
    """Return the term between a model and the source on the photos with their English captions."""
    rows = pq.read_table(place / "pairs.parquet").to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"])) for row in rows]
    texts = [row["captions_en"][0] for row in rows]
    sides = []
    for folder in (model, place / "source"):
        encoder = koclip.load(folder, "cpu")
        sides.append((encoder.encode_images(pictures), encoder.encode_texts(texts)))
    source = SourcePairs(*sides[1], torch.ones(len(rows)).bool())
    return preservation(Embeddings(*sides[0], torch.tensor(3.21).exp()), source, 99).item()


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("frozen_image", ()),
        ("lora", ("--optim.lr", "0.005")),
        ("full", ()),
        ("frozen_image", ("--train.micro_batch_size", "3", "--align.cache", "false")),
    ],
)
def test_a_run_keeps_the_similarities_of_the_source(method: str, args: tuple[str, ...], place: Path) -> None:
    """With the source's own text tower, by every way to train it, and with trained images."""
    name = f"{method}-{len(args)}"
    plain_run, preserved = (
        mixed(place, f"{name}-{weight}", "--align.method", method, "--distill.preserve", weight, *args)
        for weight in ("0", "10")
    )
    assert divergence(place, preserved / "model") < 0.5 * divergence(place, plain_run / "model")


def test_runs_with_image_adapters_share_the_embeddings_of_the_source(place: Path) -> None:
    """The source has no adapters, so a run with a frozen image tower has stored the same embeddings."""
    steps = ("--train.num_steps", "2", "--eval.sets", "[]", "--distill.preserve", "1")
    shared = (*steps, "--align.cache_dir", str(place / "shared"))
    mixed(place, "shared-frozen", *shared)
    before = {file: file.stat().st_mtime_ns for file in (place / "shared").rglob("*.safetensors")}
    for rank in ("2", "4"):
        adapters = ("--align.method", "lora", "--lora.target", "both", "--lora.rank", rank)
        run = mixed(place, f"shared-{rank}", *shared, *adapters)
        assert all(math.isfinite(json.loads(line)["loss"]) for line in (run / "metrics.jsonl").open(encoding="utf-8"))
    assert {file: file.stat().st_mtime_ns for file in (place / "shared").rglob("*.safetensors")} == before
    assert {file.parts[-3] for file in before} == {"images", "teacher"}


def test_no_teacher_runs_in_a_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features come from the cache: in each step the text tower embeds the batch of 8 once."""
    calls = []
    forward = koclip.models.dual_encoder.text_features

    def counted(*args: Any) -> Tensor:
        calls.append(len(args[1]))
        return forward(*args)

    monkeypatch.setattr("koclip.models.dual_encoder.text_features", counted)
    run = mixed(place, "counted", "--distill.preserve", "1", "--train.num_steps", "5")
    steps = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert calls[-5:] == [8] * len(steps)
    assert sum(calls[:-5]) <= 48  # the source embeds each English caption once, before the first step
    assert all(math.isfinite(json.loads(line)["loss"]) for line in steps)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--distill.preserve", "-1"], ["distill.preserve", "-1"]),
        (["--distill.preserve", "1"], ["data.sources[].languages", "en", "distill.preserve"]),
        (["--distill.preserve", "1", "--align.method", "distill"], ["distill.preserve", "distill sees no images"]),
        (
            ["--distill.preserve", "1", "--align.method", "full", "--data.num_crops", "0", "--distill.language", "ko"],
            ["data.num_crops", "distill.preserve"],
        ),
    ],
)
def test_settings_that_cannot_preserve_are_refused(args: list[str], words: list[str], place: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        align(*arguments(place / "source", place / "pairs.parquet", *args))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
