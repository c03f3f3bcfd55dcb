"""The entry of every stock class says where its parts are."""

import typing
from pathlib import Path

import pytest
import torch
from peer_models import KINDS, saved
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.models.stock import LAYOUTS, StockModel, is_stock, layout_of, parts, positions, save_stock_model

TRAINED = [kind for kind in KINDS if kind not in ("SigLIP 2 NaFlex", "SigLIP")]


@pytest.fixture(params=TRAINED, scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("stock") / "model")


def test_every_class_has_one_entry_and_is_tried_below(tmp_path: Path) -> None:
    classes = [layout.model_class for layout in LAYOUTS]
    assert set(classes) == set(typing.get_args(StockModel))
    assert len(set(classes)) == len(classes)
    models = [KINDS[kind](tmp_path)[0] for kind in TRAINED]
    assert {layout_of(model).model_class for model in models} == set(classes)
    with pytest.raises(TypeError, match="Siglip2Model"):
        layout_of(KINDS["SigLIP 2 NaFlex"](tmp_path)[0])


def test_the_parts_are_there_and_compute_the_embeddings(directory: Path) -> None:
    model: typing.Any = AutoModel.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    assert is_stock(model)
    kind: typing.Any = layout_of(model).processor_class
    processor = kind(image_processor=processor.image_processor, tokenizer=processor.tokenizer)
    own = parts(model)
    pixels = processor.image_processor([torch.zeros(3, 40, 40, dtype=torch.uint8)], return_tensors="pt")
    names = ["input_ids", "attention_mask"] if layout_of(model).reads_mask else ["input_ids"]
    ids = {name: processor.tokenizer(["별"], return_tensors="pt")[name] for name in names}
    with torch.no_grad():
        for tower, projection, inputs, features in (
            (own.image_tower, own.image_projection, pixels, model.get_image_features),
            (own.text_tower, own.text_projection, ids, model.get_text_features),
        ):
            assert isinstance(tower, PreTrainedModel)
            assert getattr(projection, "bias", None) is None
            pooled = tower(**inputs).get("pooler_output")
            if tower is own.text_tower and type(model).__name__ in ("ChineseCLIPModel", "AltCLIPModel"):
                pooled = tower(**inputs).last_hidden_state[:, 0]  # these classes read the first token
            if tower is own.text_tower and type(model).__name__ == "RouterModel":
                pooled = tower(**inputs).last_hidden_state.mean(dim=1)
            torch.testing.assert_close(projection(pooled), features(**inputs).pooler_output)
    assert getattr(own.image_projection, "out_features", 0) == getattr(own.text_projection, "out_features", 0)
    assert own.logit_scale.shape == layout_of(model).scalar_shape
    assert own.logit_scale is dict(model.named_parameters())[layout_of(model).logit_scale]
    assert len(positions(own.text_tower)) == (0 if layout_of(model).num_positions is None else 1)
    shares = {"image": layout_of(model).image_side, "text": layout_of(model).text_side}
    modules = {side: [model.get_submodule(name) for name in names] for side, names in shares.items()}
    trained = {id(weight) for side in modules.values() for module in side for weight in module.parameters()}
    scalars = {id(own.logit_scale), *([id(model.logit_bias)] if layout_of(model).has_bias_parameter else [])}
    assert {id(weight) for weight in model.parameters()} - trained == scalars  # nothing else is trained


def test_the_bias_and_the_number_of_positions_are_saved_where_the_entry_says(tmp_path: Path) -> None:
    model, processor = from_scratch(tiny_config(), tiny_tokenizer(12))
    dual_encoder = DualEncoder(model, processor, logit_bias=-3.5)
    processor.tokenizer.model_max_length = 7
    save_stock_model(tmp_path, model, processor, dual_encoder.state_dict())
    again: typing.Any = AutoModel.from_pretrained(tmp_path)
    assert again.config.logit_bias == -3.5
    assert again.config.text_config.max_position_embeddings == 7
    assert list(map(len, positions(parts(again).text_tower).values())) == [7]
