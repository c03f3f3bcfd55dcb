"""Losses: against tables worked by hand, a stock model, and a naive double loop."""

import math
from pathlib import Path

import pytest
import torch
from helpers import warm_python
from tiny import random_embeddings, tiny_batch, tiny_dual_encoder
from torch import Tensor

from koclip.config import LossConfig
from koclip.losses import Loss, build_loss, infonce, initial_bias, sigmoid
from koclip.losses.contrastive import Embeddings

# With these texts the similarities of images (rows) and texts (columns) are the table itself.
TABLE = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
OWN = torch.tensor([0, 1, 2])
TWINS = torch.tensor([7, 8, 7])  # the first and the third caption are the same


def embeddings(table: Tensor = TABLE, scale: float = 1.0, bias: float | None = None) -> Embeddings:
    return Embeddings(table, torch.eye(len(table)), torch.tensor(scale), None if bias is None else torch.tensor(bias))


def cross_entropy(logits: list[float], shares: list[float]) -> float:
    total = math.log(sum(math.exp(logit) for logit in logits))
    return sum(share * (total - logit) for logit, share in zip(logits, shares, strict=True))


def symmetric(shares: list[list[float]], left_out: set[tuple[int, int]] = frozenset()) -> float:
    """InfoNCE of `TABLE` in plain Python; `shares` is symmetric."""
    total = 0.0
    for table in (TABLE.tolist(), TABLE.T.tolist()):
        for row in range(3):
            kept = [column for column in range(3) if (row, column) not in left_out]
            total += cross_entropy([table[row][c] for c in kept], [shares[row][c] for c in kept])
    return total / 6


def test_infonce_of_three_pairs_worked_by_hand() -> None:
    # Images: ln(e^2+e+1)-2 = .40761, ln(1+2e)-1 = .86199, ln(e+2)-0 = 1.55144.
    # Texts (columns): ln(e^2+1+e)-2 = .40761, ln(2e+1)-1 = .86199, ln(1+e+1)-0 = 1.55144.
    expected = (0.407606 + 0.861995 + 1.551445) / 3
    loss = infonce(embeddings(), OWN)
    assert loss.value.item() == pytest.approx(expected, abs=1e-5)
    assert symmetric([[1, 0, 0], [0, 1, 0], [0, 0, 1]]) == pytest.approx(expected, abs=1e-5)


def test_accuracy_counts_images_whose_best_text_has_their_caption() -> None:
    assert infonce(embeddings(), OWN).accuracy.item() == pytest.approx(2 / 3)  # a tie goes to the first, the third errs
    assert infonce(embeddings(), TWINS).accuracy.item() == pytest.approx(1)  # its best text is its own, in other words


def test_duplicates_worked_by_hand() -> None:
    def value(mode: str) -> float:
        return infonce(embeddings(), TWINS, mode).value.item()

    own = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert value("negatives") == pytest.approx(symmetric(own), abs=1e-6)
    assert value("masked") == pytest.approx(symmetric(own, left_out={(0, 2), (2, 0)}), abs=1e-6)
    assert value("positives") == pytest.approx(symmetric([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]), abs=1e-6)
    assert len({round(value(mode), 4) for mode in ("negatives", "masked", "positives")}) == 3


@pytest.mark.parametrize("loss", [infonce, sigmoid])
@pytest.mark.parametrize("mode", ["negatives", "masked", "positives"])
def test_a_batch_of_one_caption_is_finite(loss: object, mode: str) -> None:
    pairs = random_embeddings(4)
    value = loss(pairs, torch.zeros(4, dtype=torch.long), mode).value  # type: ignore[operator]
    value.backward()
    assert value.isfinite()
    assert pairs.image.grad is not None
    assert pairs.image.grad.isfinite().all()
    if loss is infonce and mode == "masked":
        assert value.item() == 0  # every pair is alone


def test_infonce_has_the_stock_models_loss_and_gradients() -> None:
    dual_encoder = tiny_dual_encoder(temperature=0.5)
    parameters = dict(dual_encoder.named_parameters())
    batch = tiny_batch(5)
    pixels = (batch["pixel_values"].float() - dual_encoder.pixel_mean) / dual_encoder.pixel_std
    stock = dual_encoder.model(**{**batch, "pixel_values": pixels}, return_loss=True).loss
    ours = infonce(dual_encoder(**batch), torch.arange(5)).value
    assert ours.item() == pytest.approx(stock.item(), abs=1e-6)
    for name, wanted, got in zip(
        parameters,
        torch.autograd.grad(stock, list(parameters.values())),
        torch.autograd.grad(ours, list(parameters.values())),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["negatives", "masked", "positives"])
def test_sigmoid_equals_a_double_loop(mode: str) -> None:
    pairs, captions = random_embeddings(6), torch.tensor([0, 1, 0, 2, 3, 1])
    image, text, scale, bias = (leaf.detach().double() for leaf in pairs[:4])
    expected = 0.0
    for row in range(6):
        for column in range(6):
            same = bool(captions[row] == captions[column])
            if mode == "masked" and same and row != column:
                continue
            sign = 1 if row == column or (mode == "positives" and same) else -1
            logit = scale.item() * torch.dot(image[row], text[column]).item() + bias.item()
            expected += math.log1p(math.exp(-sign * logit)) / 6
    assert sigmoid(pairs, captions, mode).value.item() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_needs_a_bias() -> None:
    with pytest.raises(ValueError, match=r"losses\.initial_bias"):
        sigmoid(embeddings(), OWN)


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
@pytest.mark.parametrize("mode", ["negatives", "masked", "positives"])
def test_order_of_the_pairs_does_not_matter(name: str, mode: str) -> None:
    loss = build_loss(LossConfig(name=name, duplicates=mode))
    pairs, captions = random_embeddings(7), torch.tensor([0, 1, 0, 2, 3, 1, 4])
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = pairs._replace(image=pairs.image[order], text=pairs.text[order])
    torch.testing.assert_close(loss(pairs, captions), loss(shuffled, captions[order]))


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_gradients_reach_both_towers_the_scale_and_the_bias(name: str) -> None:
    config = LossConfig(name=name)
    dual_encoder = tiny_dual_encoder(logit_bias=initial_bias(config))
    loss: Loss = build_loss(config)(dual_encoder(**tiny_batch(4)), torch.arange(4))
    loss.value.backward()
    still = [
        name for name, weight in dual_encoder.named_parameters() if weight.grad is None or weight.grad.abs().max() == 0
    ]
    # A key's bias shifts all scores of a query alike.
    assert not [name for name in still if not name.endswith("k_proj.bias")]
    assert (dual_encoder.logit_bias is not None) == (name == "sigmoid")


def test_an_unknown_loss_is_refused_before_any_data_is_read() -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "pretrain.py"
    words = [str(recipe), "--loss.name", "infonse", "--data.sources", "[{path: missing.parquet}]"]
    done = warm_python.run(words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("koclip pretrain: error: loss.name: got 'infonse'")
