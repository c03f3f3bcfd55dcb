"""Encoders whose files disagree with their tokenizer, and dual encoders of which only a part can be taken."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from peer_models import WIDTH, bert_tokenizer, draw, saved, xlmr_tokenizer
from safetensors.torch import load_file
from tiny import tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel

from koclip.align.methods import adapt, load_teacher, text_encoder
from koclip.config import ConfigError, SwapConfig
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.models.first_token import fold
from koclip.models.pretrained import load_image_side, load_text_encoder
from koclip.models.stock import save_stock_model
from koclip.models.swap import swap_text_tower
from koclip.text import tokenizers

TEXTS = ["고양이가 창가에 앉아 있다", "개", "a red circle"]
PADS = "config.json of this {} says pad_token_id {}, its tokenizer pads with 1; koclip uses the tokenizer's"
SIZES = WIDTH | {"embedding_size": 32, "dim": 32, "n_heads": 2, "n_layers": 2, "hidden_dim": 48}
COUNT = (
    *("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text"),
    *("longformer", "ibert", "xmod"),
)
FREE = {"bert", "electra", "distilbert", "albert", "ernie"}  # positions from 0 on, whatever pads
NO_POOLER = {"electra", "distilbert"}  # no class of transformers holds them beside an image tower of timm


def encoder_beside_xlmr(folder: Path, kind: str, **settings: object) -> Path:
    """Save an encoder beside a tokenizer of XLM-R's, as multilingual-e5 and its like are: <s> is 0, <pad> is 1."""
    tokenizer = xlmr_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 42, "pad_token_id": 0}
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    return folder


def hidden(tower: torch.nn.Module, encoded: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return tower.eval()(**{name: encoded[name] for name in ("input_ids", "attention_mask")}).last_hidden_state


@pytest.mark.parametrize(
    ("kind", "image"),
    [(kind, "clip") for kind in sorted(FREE)] + [(kind, "timm") for kind in sorted(FREE - NO_POOLER)],
)
def test_the_tokenizer_says_what_pads(kind: str, image: str, tmp_path: Path) -> None:
    """The first token is 0, which config.json calls padding: as such it would be zeros in the published model."""
    folder = str(encoder_beside_xlmr(tmp_path / "encoder", kind))
    original = AutoModel.from_pretrained(folder)
    clip, processor = from_scratch(
        tiny_config(**({"preset": "timm:test_vit"} if image == "timm" else {})), tiny_tokenizer()
    )
    with pytest.warns(UserWarning, match=re.escape(PADS.format(kind, 0))):
        encoder = load_text_encoder(folder)
    tokenizer = tokenizers.load(folder, 40, encoder.config, TEXTS[:2])
    model, joint = adapt(SwapConfig(clip="a", text_encoder=folder), clip, encoder, processor.image_processor, tokenizer)
    DualEncoder(model, joint)  # which compares their ids
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    kept = encoded["attention_mask"] == 1
    expected = hidden(original, encoded)[kept]
    for part in (model, loaded):
        assert part.config.text_config.pad_token_id == 1
        assert part.text_model.get_input_embeddings().padding_idx == 1
        assert torch.equal(hidden(part.text_model, encoded)[kept], expected)


def test_a_tokenizer_from_elsewhere_says_it_too(tmp_path: Path) -> None:
    """`tokenizer.path` names it."""
    folder = encoder_beside_xlmr(tmp_path / "encoder", "bert")
    (folder / "tokenizer.json").unlink()
    encoder = load_text_encoder(str(folder))
    assert encoder.config.pad_token_id == 0
    xlmr_tokenizer().save_pretrained(tmp_path / "tokenizer")
    clip, processor = from_scratch(tiny_config(), tiny_tokenizer())
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer"), 40, encoder.config, TEXTS[:2])
    config = SwapConfig(clip="a", text_encoder=str(folder))
    with pytest.warns(UserWarning, match=re.escape(PADS.format("bert", 0))):
        model, joint = adapt(config, clip, encoder, processor.image_processor, tokenizer)
    DualEncoder(model, joint)
    assert model.config.text_config.pad_token_id == 1


@pytest.mark.parametrize("kind", COUNT)
def test_where_positions_count_from_padding_it_is_refused(kind: str, tmp_path: Path) -> None:
    folder = str(encoder_beside_xlmr(tmp_path, kind))
    encoder = load_text_encoder(folder)
    assert encoder.config.pad_token_id == 0
    with pytest.raises(ConfigError, match=f"id 1, the {kind} .*pad_token_id 0"):
        tokenizers.load(folder, 40, encoder.config, TEXTS[:2])


@pytest.mark.parametrize("kind", [*sorted(FREE), "big_bird", *COUNT])
def test_it_is_known_which_encoders_count_from_padding(kind: str) -> None:
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, vocab_size=90, pad_token_id=1))
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    assert [table.padding_idx is not None for table in tables] == [kind in tokenizers.COUNT_FROM_PADDING]


def test_a_tokenizer_of_another_vocabulary_says_nothing_of_padding(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    T.BertModel(T.BertConfig(**WIDTH, vocab_size=20, pad_token_id=3)).save_pretrained(folder)
    assert load_text_encoder(str(folder)).config.pad_token_id == 3  # without a tokenizer
    bert_tokenizer().save_pretrained(folder)
    encoder = load_text_encoder(str(folder))
    assert encoder.config.pad_token_id == 3
    with pytest.raises(ConfigError, match=r"\b20\b"):
        tokenizers.load(str(folder), 40, encoder.config, TEXTS[:2])


@pytest.mark.parametrize("towers", ["CLIP's image tower", "CLIP's text tower", "SigLIP's image tower", "neither"])
def test_joint_weights_have_the_names_that_all_versions_read(towers: str, tmp_path: Path) -> None:
    """transformers 4 and 5.0 to 5.5 draw these towers at random, in silence, where they are named as 5.10 has them."""
    clip, processor = from_scratch(tiny_config(), tiny_tokenizer())
    images, encoder, tokenizer = processor.image_processor, None, processor.tokenizer
    image = clip if towers == "CLIP's image tower" else T.ViTModel(T.ViTConfig(**WIDTH, image_size=32, patch_size=8))
    if towers == "SigLIP's image tower":
        image = T.SiglipVisionModel(T.SiglipVisionConfig(**WIDTH, image_size=32, patch_size=8))
    if towers != "CLIP's text tower":
        tokenizer = tokenizers.load(str(encoder_beside_xlmr(tmp_path / "encoder", "albert")), 24)
        encoder = load_text_encoder(str(tmp_path / "encoder"))
    config = SwapConfig(clip="a", **({} if encoder else {"text_width": 64, "text_layers": 1}))
    model, joint = adapt(config, image, encoder, images, tokenizer)
    draw(model)
    save_stock_model(tmp_path / "model", model, joint, model.state_dict())
    names = load_file(tmp_path / "model" / "model.safetensors")
    for side in ("vision_model", "text_model"):
        deeper = {name.startswith(f"{side}.{side}.") for name in names if name.startswith(f"{side}.")}
        assert deeper == {towers.endswith("image tower") if side == "vision_model" else towers == "CLIP's text tower"}
    loaded, info = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    stock = fold(model, model.state_dict())
    cut = {name for name, value in loaded.state_dict().items() if value.shape != stock[name].shape}
    assert all("position_embedding" in name for name in cut)
    weights = {name: value for name, value in stock.items() if name not in cut}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())


NOT_THE_TEXTS = {
    "SigLIP": "SiglipModel",
    "SigLIP 2": "SiglipModel",
    "SigLIP 2 NaFlex": "Siglip2Model",
    "MetaCLIP 2": "MetaClip2Model",
    "AltCLIP": "AltCLIPModel",
}


def test_what_an_image_tower_alone_lacks_is_said(tmp_path: Path) -> None:
    folder = str(tmp_path)
    T.SiglipVisionModel(T.SiglipVisionConfig(**WIDTH, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    T.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tower, processor = load_image_side(folder)
    swapped = swap_text_tower(tower, T.BertModel(T.BertConfig(**WIDTH, vocab_size=90)))
    assert swapped.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for key, attempt in (
        ("model.text_encoder: ", lambda: text_encoder(SwapConfig(clip=folder, text_encoder="same"), tower)),
        ("model.clip: ", lambda: load_teacher(tower, folder)),
        (
            "model.text_width, model.text_layers: ",
            lambda: adapt(SwapConfig(clip=folder), tower, None, processor, tiny_tokenizer()),
        ),
    ):
        with pytest.raises(ConfigError) as raised:
            attempt()
        assert str(raised.value).startswith(key)
        assert f"{folder} is an image tower alone, a SiglipVisionModel" in str(raised.value)


@pytest.mark.parametrize("kind", NOT_THE_TEXTS)
def test_text_towers_that_cannot_be_taken_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = str(saved(kind, tmp_path / "dual"))
    with pytest.raises(ConfigError, match=rf"^model.text_encoder: {folder} is a {NOT_THE_TEXTS[kind]}"):
        load_text_encoder(folder)
