"""Distillation: each term by hand, together with images and alone, from known embeddings, in pieces."""

import dataclasses

import pytest
import torch
from helpers.gradients import SIZES, assert_equal_gradients
from tiny import random_embeddings, tiny_dual_encoder, tiny_pieces

from koclip import losses, training
from koclip.config import DistillConfig, LossConfig, OptimConfig, PretrainConfig, Stage, TrainConfig
from koclip.data.batches import Batch
from koclip.losses.contrastive import Embeddings

TEXT = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
NORM = torch.tensor([5.0, 2.0])  # features (3, 4) and (2, 0)
TEACHER = torch.tensor([[3.0, 0.0], [2.0, 1.0]])
MADE = Embeddings(torch.empty(2, 0), TEXT, torch.tensor(10.0), None, NORM)
IDS = torch.tensor([[0, 0, 0], [1, 1, 1]])


def only(**weights: float) -> DistillConfig:
    return DistillConfig(**{"contrastive": 0.0, "cosine": 0.0, "mse": 0.0} | weights)


@pytest.mark.parametrize(
    ("distill", "expected"),
    [
        # Cosines: 0.6 and 2 / sqrt(5).
        (only(cosine=2.0), 2 * ((1 - 0.6) + (1 - 2 / 5**0.5)) / 2),
        # Differences (0, 4) and (0, -1), over four numbers.
        (only(mse=3.0), 3 * (16 + 1) / 4),
    ],
)
def test_each_distance_by_hand(distill: DistillConfig, expected: float) -> None:
    loss = losses.build_loss(LossConfig(), distill, images=False)(MADE, IDS, TEACHER)
    assert loss.value.item() == pytest.approx(expected, rel=1e-6)


def test_the_teacher_takes_the_place_of_images() -> None:
    taught = losses.build_loss(LossConfig(), only(contrastive=0.5), images=False)(MADE, IDS, TEACHER)
    unit = torch.nn.functional.normalize(TEACHER, dim=-1)
    wanted = losses.infonce(MADE._replace(image=unit), torch.arange(2))
    assert taught.value.item() == pytest.approx(0.5 * wanted.value.item(), rel=1e-6)
    assert taught.accuracy == wanted.accuracy


def test_the_anchor_weighs_the_teacher_against_images() -> None:
    pairs, teacher = random_embeddings(6), torch.randn(6, 8)
    pairs = pairs._replace(text_norm=torch.ones(6))
    ids = torch.arange(6)[:, None].expand(6, 3)
    distill = DistillConfig(anchor=0.3, mse=1.0)
    images = losses.build_loss(LossConfig())(pairs, ids)
    alone = losses.build_loss(LossConfig(), distill, images=False)(pairs, ids, teacher)
    both = losses.build_loss(LossConfig(), distill)(pairs, ids, teacher)
    torch.testing.assert_close(both.value, images.value + 0.3 * alone.value)
    assert both.accuracy == images.accuracy


def test_equal_sentences_are_no_negatives_of_each_other() -> None:
    """Two captions of the same image have different sentences; two of the same sentence have one target."""
    pairs, teacher = random_embeddings(4), torch.randn(4, 8)
    build = losses.build_loss(LossConfig(duplicates="masked"), only(contrastive=1.0), images=False)
    distinct = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]])
    same_image, same_sentence = distinct.clone(), distinct.clone()
    same_image[1, 1], same_sentence[1, 2] = 0, 0
    values = [build(pairs, ids, teacher).value.item() for ids in (distinct, same_image, same_sentence)]
    assert values[0] == values[1]
    assert values[2] < values[0]


def test_without_the_teachers_features_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="teacher"):
        losses.build_loss(LossConfig(), DistillConfig(), images=False)(MADE, IDS)


def taught_pieces(sizes: list[int], seed: int = 0, images: bool = False) -> list[Batch]:
    """Pieces with a teacher, and image embeddings that are known or none."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for piece in tiny_pieces(sizes, seed):
        known, teacher = torch.randn(2, len(piece.keys), 32, generator=generator)
        image = torch.nn.functional.normalize(known, dim=-1) if images else None
        ids = piece.pair_ids[:, :1].expand(-1, 3)
        pieces.append(dataclasses.replace(piece, pixel_values=None, image=image, teacher=teacher, pair_ids=ids))
    return pieces


@pytest.mark.parametrize("images", [False, True], ids=["sentences", "known images"])
def test_pieces_have_the_gradient_of_the_batch(images: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three terms, with the image tower frozen and never run."""
    monkeypatch.setattr("helpers.gradients.tiny_pieces", lambda sizes: taught_pieces(sizes, images=images))
    encoder = tiny_dual_encoder(temperature=0.5)
    for module in (encoder.model.vision_model, encoder.model.visual_projection):
        module.requires_grad_(False)
    encoder.model.vision_model.forward = lambda *_, **__: pytest.fail("the image tower ran")
    train = TrainConfig(batch_size=sum(SIZES), micro_batch_size=SIZES[0], tracker="none")
    distill = DistillConfig(mse=0.5, anchor=0.7)
    stage = Stage("distill", 0, train.num_steps, 1e-3, images=images, distill=distill)
    trainer = training.prepare(
        training.start(train), encoder, PretrainConfig(optim=OptimConfig(warmup_steps=1), train=train), stage
    )
    names = assert_equal_gradients(trainer)
    assert "model.text_projection.weight" in names
    assert not any("vision_model" in name for name in names)
