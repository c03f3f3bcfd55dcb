"""The tiled losses: equal to the dense ones, and linear in memory."""

import pytest
import torch
from tiny import random_embeddings
from torch import Tensor

from koclip import losses
from koclip.config import ConfigError, LossConfig
from koclip.losses.contrastive import Embeddings

LOSSES = [(name, mode) for name in ("infonce", "sigmoid") for mode in ("negatives", "masked", "positives")]


def large_embeddings(count: int, width: int) -> Embeddings:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, count, width, generator=generator)
    noise[1] += 0.5 * noise[0]  # pairs belong together
    image, text = torch.nn.functional.normalize(noise, dim=-1)
    return Embeddings(
        *(leaf.clone().requires_grad_() for leaf in (image, text, torch.tensor(20.0), torch.tensor(-8.0)))
    )


def value_and_gradients(loss: losses.LossFn, embeddings: Embeddings, captions: Tensor) -> tuple[Tensor, ...]:
    output = loss(embeddings, captions)
    gradients = torch.autograd.grad(output.value, list(embeddings[:4]), allow_unused=True)
    return output.value, output.accuracy, *(each for each in gradients if each is not None)


@pytest.mark.parametrize(("name", "mode"), LOSSES)
@pytest.mark.parametrize("tile_rows", [1, 5, 16])
def test_tiles_equal_the_dense_loss(name: str, mode: str, tile_rows: int) -> None:
    captions = torch.tensor([0, 1, 0, 2, 3, 1, 4, 5, 0, 6, 7, 8, 9, 2, 11, 12, 1])
    dense = value_and_gradients(
        losses.build_loss(LossConfig(name=name, duplicates=mode, tile_rows=99)), random_embeddings(17), captions
    )
    tiled = value_and_gradients(
        losses.build_loss(LossConfig(name=name, duplicates=mode, tile_rows=tile_rows)), random_embeddings(17), captions
    )
    assert len(dense) == (5 if name == "infonce" else 6)
    for wanted, got in zip(dense, tiled, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "mode"), LOSSES)
def test_tiles_equal_the_dense_loss_where_images_repeat(name: str, mode: str) -> None:
    """A has B's caption and B has C's image: how many pairs are right differs between a row and a column."""
    captions = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5, 6])
    images = torch.tensor([0, 1, 1, 2, 3, 4, 4, 4, 5])
    ids = torch.stack([captions, images], dim=1)
    dense, tiled = (
        value_and_gradients(
            losses.build_loss(LossConfig(name=name, duplicates=mode, tile_rows=rows)), random_embeddings(9), ids
        )
        for rows in (99, 4)
    )
    for wanted, got in zip(dense, tiled, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    if mode != "negatives":
        alone = losses.build_loss(LossConfig(name=name, duplicates=mode))(random_embeddings(9), captions)
        assert abs(alone.value - dense[0]) > 1e-3  # that images repeat matters


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_tiles_pass_gradcheck(name: str) -> None:
    """The hand-written backward pass against finite differences, in float64."""
    image, text, scale, bias = (leaf.detach().double() for leaf in random_embeddings(5)[:4])
    captions = torch.tensor([0, 1, 0, 2, 3])

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return losses.build_loss(LossConfig(name=name, tile_rows=2))(
            Embeddings(image, text, scale, bias), captions
        ).value

    torch.set_default_dtype(torch.float64)
    try:
        leaves = [leaf.requires_grad_() for leaf in (image, text, scale, bias)]
        assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def saved_bytes(loss: losses.LossFn, embeddings: Embeddings) -> int:
    """Return the bytes that wait for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(embeddings, torch.arange(len(embeddings.image)))
    return sum(kept.values())


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_8192_pairs_keep_little_more_than_the_features(name: str) -> None:
    """Bar: at most 1.2 times the features; by default, without any setting."""
    embeddings = large_embeddings(8_192, 512)
    features = 2 * embeddings.image.nbytes
    assert saved_bytes(losses.build_loss(LossConfig(name=name)), embeddings) <= 1.2 * features


def test_the_dense_loss_keeps_many_times_the_features() -> None:
    """The check above can fail."""
    embeddings = large_embeddings(2_048, 64)
    dense = saved_bytes(losses.build_loss(LossConfig(tile_rows=2_048)), embeddings)
    assert dense > 10 * 2 * embeddings.image.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_8192_pairs_have_the_dense_loss_and_gradients(name: str) -> None:
    captions = torch.arange(8_192)
    results = [
        value_and_gradients(
            losses.build_loss(LossConfig(name=name, tile_rows=rows)), large_embeddings(8_192, 512), captions
        )
        for rows in (8_192, None)
    ]
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tile_rows", [1, 99, None])
def test_an_unknown_loss_is_refused_before_it_sees_data(tile_rows: int | None) -> None:
    config = LossConfig(name="a_new_loss", tile_rows=tile_rows)
    for function in (losses.build_loss, losses.initial_bias):
        with pytest.raises(ConfigError, match=r"loss\.name: got 'a_new_loss'"):
            function(config)


def test_a_loss_without_a_tiled_form_is_dense_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CONTRASTIVE, "only_dense", losses.Contrastive(losses.infonce))
    embeddings, captions = random_embeddings(70), torch.arange(70)
    monkeypatch.setitem(losses.TILE_SIZE, "cpu", 1)  # 64 rows in a tile
    monkeypatch.setattr(losses, "tiled", lambda *_: pytest.fail("tiled"))
    assert torch.equal(
        losses.build_loss(LossConfig(name="only_dense"))(embeddings, captions).value,
        losses.infonce(embeddings, captions, "positives").value,
    )
    for function in (losses.build_loss, losses.initial_bias):
        with pytest.raises(ConfigError, match=r"loss\.tile_rows: got 2"):
            function(LossConfig(name="only_dense", tile_rows=2))


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
@pytest.mark.parametrize("tile_rows", [1, 99])
def test_a_way_with_duplicates_that_is_not_known_is_refused(name: str, tile_rows: int) -> None:
    config = LossConfig(name=name, duplicates="positive", tile_rows=tile_rows)
    with pytest.raises(ConfigError, match=r"loss\.duplicates: got 'positive'"):
        losses.build_loss(config)(random_embeddings(4), torch.arange(4))


def test_few_rows_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"loss\.tile_rows: got 0"):
        LossConfig(tile_rows=0)
