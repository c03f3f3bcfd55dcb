"""Texts behind context: with the vectors of words as context, they are the texts behind these words."""

import pytest
import torch
from peer_models import KINDS, saved

from koclip.classifiers.coop import Prompts, coop
from koclip.classifiers.heads import Shots, zero_shot
from koclip.config import ConfigError
from koclip.encoders import load
from koclip.encoders.transformers import TransformersEncoder
from koclip.text.prefix import add_prefix

WORDS, NAMES = "빨간 작은", ["고양이", "파란 별 하나", "원"]


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEncoder:
    opened = load(saved(request.param, tmp_path_factory.mktemp("context") / "model"), "cpu")
    assert isinstance(opened, TransformersEncoder)
    return opened


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> TransformersEncoder:
    opened = load(saved("CLIP", tmp_path_factory.mktemp("context") / "clip"), "cpu")
    assert isinstance(opened, TransformersEncoder)
    return opened


def test_vectors_of_words_as_context_are_the_words(encoder):
    got = encoder.texts_behind(encoder.token_vectors(WORDS), NAMES)
    torch.testing.assert_close(got, encoder.encode_texts([f"{WORDS} {name}" for name in NAMES]))


def test_context_keeps_the_tokenizers_prefix(tmp_path):
    prefixed = load(saved("ChineseCLIP", tmp_path / "model"), "cpu")
    assert isinstance(prefixed, TransformersEncoder)
    plain = prefixed.token_vectors(WORDS)
    add_prefix(prefixed.processor.tokenizer, "query: ")
    prefixed = TransformersEncoder(prefixed.model, prefixed.processor)
    torch.testing.assert_close(prefixed.token_vectors(WORDS), plain)
    got = prefixed.texts_behind(plain, NAMES)
    torch.testing.assert_close(got, prefixed.encode_texts([f"{WORDS} {name}" for name in NAMES]))


def test_gradients_of_the_context(clip):
    clip.model.double()
    try:
        context = clip.token_vectors(WORDS).double()[:3].requires_grad_()
        assert torch.autograd.gradcheck(lambda moved: clip.texts_behind(moved, NAMES[:2])[:, :4], context)
    finally:
        clip.model.float()


def test_a_context_that_is_too_long_is_refused(clip):
    with pytest.raises(ConfigError, match="context, tokens"):
        clip.texts_behind(torch.zeros(100, clip.token_vectors(WORDS).shape[1]), NAMES)


def shots_of(encoder: TransformersEncoder) -> Shots:
    images = torch.nn.functional.normalize(torch.randn(6, encoder.encode_texts(["a"]).shape[1]), dim=1)
    return Shots(images, torch.tensor([0, 0, 1, 1, 2, 2]))


def test_only_the_context_learns(clip):
    before = {name: weight.clone() for name, weight in clip.model.state_dict().items()}
    prompts, shots = Prompts(clip, NAMES, WORDS), shots_of(clip)
    first, last = coop(prompts, shots, [0, 8])
    again = coop(prompts, shots, [8])[0]
    assert torch.equal(again.weight, last.weight)
    assert all(torch.equal(before[name], weight) for name, weight in clip.model.state_dict().items())
    assert all(weight.grad is None for weight in clip.model.parameters())
    texts = clip.scale * clip.encode_texts([f"{WORDS} {name}" for name in NAMES])
    torch.testing.assert_close(first.weight, zero_shot(texts).weight, atol=1e-4, rtol=1e-4)
    losses = [
        torch.nn.functional.cross_entropy(head.logits(shots.images), shots.labels).item() for head in (first, last)
    ]
    assert losses[1] < losses[0] - 1e-3


def test_a_step_sees_the_drawn_classes_only(clip, monkeypatch):
    monkeypatch.setattr("koclip.classifiers.coop._CLASSES", 2)
    seen = []
    embed = clip.texts_behind

    def spy(context: torch.Tensor, texts: list[str]) -> torch.Tensor:
        seen.append(list(texts))
        return embed(context, texts)

    monkeypatch.setattr(clip, "texts_behind", spy)
    coop(Prompts(clip, NAMES, WORDS), shots_of(clip), [6])
    assert [len(texts) for texts in seen[:-1]] == [2] * 6
    assert len({tuple(texts) for texts in seen[:-1]}) > 1
    assert seen[-1] == NAMES


def test_coop_needs_a_model_of_transformers():
    from small_evaluations import Seeing

    with pytest.raises(ConfigError, match="expected a model of transformers"):
        Prompts.of(Seeing(), NAMES, "ko")
