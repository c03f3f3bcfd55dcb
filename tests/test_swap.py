"""Text towers swapped: the image side bit for bit, the text side exactly the encoder's, the result a stock class."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_dual_encoder
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPModel, PreTrainedModel, VisionTextDualEncoderModel

from koclip.models.first_token import fold, stock_pooler, unfold
from koclip.models.swap import linear_pooler, swap_text_tower

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES = {**WIDTH, "vocab_size": 90}
KLUE = {"pad_token_id": 1, "max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"pad_token_id": 0, "max_position_embeddings": 40},
    "roberta": KLUE | {"bos_token_id": 0, "eos_token_id": 2},
    "xlm-roberta": KLUE,
    "camembert": KLUE,
    "electra": {"embedding_size": 32, "pad_token_id": 0, "max_position_embeddings": 40},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40},
}
# Families with a pooler that are not converted.
POOLED: dict[str, dict[str, object]] = {
    "albert": {"embedding_size": 16, "pad_token_id": 0},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": 42},
    "big_bird": {"pad_token_id": 0, "attention_type": "original_full", "max_position_embeddings": 40},
    "ernie": {"pad_token_id": 0},
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text"), KLUE),
}


def encoder(kind: str, **options: object) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"vocab_size": 90} if kind == "distilbert" else SIZES
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**sizes, **FAMILIES.get(kind, {}), **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases and norms too: a lost one would show
    return model.eval()


@pytest.fixture
def clip() -> CLIPModel:
    model = tiny_dual_encoder().model.eval()
    torch.nn.init.constant_(model.logit_scale, 3.21)
    return model  # type: ignore[return-value]


def tokens(pad: int, length: int = 12) -> tuple[Tensor, Tensor]:
    """Five texts of different lengths, padded on the right; the last fills all positions."""
    ids = torch.randint(5, 90, (5, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.tensor([[3], [7], [1], [9], [length]])).long()
    return ids.masked_fill(mask == 0, pad), mask


def images(model: object) -> Tensor:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*FAMILIES, "clip_text_model", "albert", "mpnet"])
def test_the_image_side_stays_bit_for_bit(kind, dtype, clip, tmp_path) -> None:
    clip = clip.to(dtype)
    options = {"embedding_size": 32} if kind == "albert" else {}
    swapped = swap_text_tower(clip, encoder(kind, **options).to(dtype)).eval()
    before = images(clip)
    assert torch.equal(images(swapped), before)
    swapped.save_pretrained(tmp_path, state_dict=fold(swapped, swapped.state_dict()))
    loaded, info = AutoModel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(images(loaded.eval()), before)
    assert torch.equal(loaded.logit_scale, clip.logit_scale)
    assert loaded.config.projection_dim == clip.config.projection_dim
    classes = {"clip_text_model": "CLIPModel", "albert": "VisionTextDualEncoderModel"}
    expected = classes.get(kind, "VisionTextDualEncoderModel" if kind == "mpnet" else "ChineseCLIPModel")
    assert type(loaded).__name__ == expected


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("kind", FAMILIES)
def test_hidden_states_are_the_encoders(kind, length, clip, tmp_path) -> None:
    """To 0.0, at every place that is not padding, for texts as long as the encoder takes too."""
    original = encoder(kind)
    ids, mask = tokens(original.config.pad_token_id, length)
    swap_text_tower(clip, original).eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = original(input_ids=ids, attention_mask=mask).last_hidden_state
        got = loaded.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        features = loaded.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    assert torch.equal(got[mask == 1], wanted[mask == 1])
    assert torch.equal(features, loaded.text_projection(wanted[:, 0]))  # a bias-free projection of the first token


def test_the_projection_has_clips_spread_and_the_seed_decides(clip) -> None:
    first, same, other = (swap_text_tower(clip, encoder("bert"), seed).text_projection.weight for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("kind", [*FAMILIES, *POOLED, "chinese_clip_text_model"])
def test_beside_any_other_image_tower_the_first_token_is_projected(kind, tmp_path) -> None:
    """Exactly in training, and to 1e-6 in the published model; the same again as a source."""
    if kind == "chinese_clip_text_model":
        original: Any = swap_text_tower(tiny_dual_encoder().model, encoder("bert")).text_model.eval()
    else:
        original = encoder(kind, **POOLED.get(kind, {}))
    ids, mask = tokens(original.config.pad_token_id)
    with torch.no_grad():
        wanted = original(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    swapped = swap_text_tower(tiny_dual_encoder(preset="timm:test_vit").model, original).eval()
    assert isinstance(swapped, VisionTextDualEncoderModel)
    swapped.save_pretrained(tmp_path, state_dict=fold(swapped, swapped.state_dict()))
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = swapped.text_projection(wanted)
        features = [m.get_text_features(input_ids=ids, attention_mask=mask).pooler_output for m in (swapped, loaded)]
        assert torch.equal(features[0], expected)
        published, expected = F.normalize(features[1]), F.normalize(expected)
        torch.testing.assert_close(published, expected, atol=1e-6, rtol=0)
        assert stock_pooler(swapped.text_model).keys() <= loaded.text_model.state_dict().keys()
        unfold(loaded)
        assert torch.equal(loaded.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, features[0])
    again = fold(loaded, loaded.state_dict())
    assert all(torch.equal(again[name], value) for name, value in fold(swapped, swapped.state_dict()).items())


def test_a_pooler_of_its_own_is_kept_in_a_source() -> None:
    config = AutoConfig.for_model("bert", **SIZES)
    vision = tiny_dual_encoder(preset="timm:test_vit").model.vision_model
    source = VisionTextDualEncoderModel(vision_model=vision, text_model=AutoModel.from_config(config))
    before = {name: value.clone() for name, value in source.state_dict().items()}
    unfold(source)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert fold(source, before) is before


@pytest.mark.parametrize("kind", ["bert", "clip_text_model", "albert"])
def test_the_source_is_not_changed_by_training(kind, clip) -> None:
    """It may be the teacher."""
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    swapped = swap_text_tower(clip, encoder(kind, **({"embedding_size": 32} if kind == "albert" else {})))
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "albert", "clip_text_model"])
@pytest.mark.parametrize("tower", ["vit", "clip_vision_model"])
def test_an_image_tower_alone_is_its_own_image_space(tower, kind) -> None:
    torch.manual_seed(0)
    alone = AutoModel.from_config(AutoConfig.for_model(tower, **WIDTH, image_size=32, patch_size=8)).eval()
    swapped = swap_text_tower(alone, encoder(kind, **({"embedding_size": 16} if kind == "albert" else {}))).eval()
    with torch.no_grad():
        wanted = alone(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))).pooler_output
    assert torch.equal(images(swapped), wanted)
    assert swapped.config.projection_dim == 32
    assert swapped.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    as_clip = {"clip_text_model": "CLIPModel", "bert": "ChineseCLIPModel"} if tower == "clip_vision_model" else {}
    assert type(swapped).__name__ == as_clip.get(kind, "VisionTextDualEncoderModel")
    text = swapped.get_text_features(input_ids=tokens(swapped.config.text_config.pad_token_id)[0]).pooler_output
    assert text.shape == (5, 32)


def test_a_vit_without_a_pooler_returns_its_class_token(tmp_path) -> None:
    torch.manual_seed(0)
    vit = AutoModel.from_config(AutoConfig.for_model("vit", **WIDTH, image_size=32, patch_size=8)).eval()
    linear_pooler(vit)
    vit.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        output = loaded(torch.randn(2, 3, 32, 32))
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
