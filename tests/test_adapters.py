"""LoRA and DoRA: only the chosen tower changes, what is saved is what was trained, merged weights do the same."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gradients import LOSSES, assert_equal_gradients, prepare
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_config, tiny_dual_encoder, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from koclip.align import lora
from koclip.align.lora import BASE, AdapterBase, attach, base_weights, merge, report, save
from koclip.config import AdapterConfig, ConfigError
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.models.fast import speed_up
from koclip.models.first_token import fold, stock_pooler
from koclip.models.stock import save_stock_model
from koclip.models.swap import swap_text_tower

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT = SIZES | {"image_size": 32, "patch_size": 8}
IMAGE = {
    "clip": {},
    "timm": {"preset": "timm:test_vit"},
    "vit": ("vit", VIT),
    "dinov2": ("dinov2", {name: VIT[name] for name in VIT if name != "intermediate_size"}),
}
TEXT = {"clip": {}, "bert": {}, "roberta": {}, "albert": {"embedding_size": 16}, "mpnet": {}}
PAIRS = [("clip", "clip"), ("clip", "bert"), ("clip", "roberta"), ("clip", "albert"), ("clip", "mpnet")]
PAIRS += [("timm", "clip"), ("vit", "roberta"), ("dinov2", "bert")]
# query, key, value, output and two of the MLP; timm joins the first three; ALBERT has one layer's weights for all
LINEAR = {"clip": 12, "bert": 12, "roberta": 12, "albert": 6, "mpnet": 12, "timm": 4 * 6, "vit": 12, "dinov2": 12}
MODES = [AdapterConfig(rank=4), AdapterConfig(target="both", rank=4), AdapterConfig(target="both", rank=4, dora=True)]


def mode(config: AdapterConfig) -> str:
    return f"{config.target}-{'dora' if config.dora else 'lora'}"


def base(image: str = "clip", text: str = "bert") -> PreTrainedModel:
    """A dual encoder after a swap; the same each time."""
    return copy.deepcopy(built(image, text))


batch_of = functools.cache(tiny_batch)


@functools.cache
def built(image: str, text: str) -> PreTrainedModel:
    torch.manual_seed(0)
    options = IMAGE[image]
    if isinstance(options, dict):
        source = tiny_dual_encoder(**options).model
    else:
        source = AutoModel.from_config(AutoConfig.for_model(options[0], **options[1]))
    if text == "clip":
        return source.eval()
    pad = tiny_tokenizer().pad_token_id
    sizes = SIZES | {"vocab_size": 600, "max_position_embeddings": 600, "pad_token_id": pad} | TEXT[text]
    if text in ("roberta", "mpnet"):
        sizes |= {"pad_token_id": 1}
    encoder = AutoModel.from_config(AutoConfig.for_model(text, **sizes))
    return swap_text_tower(source, encoder).eval()


def trained(model: PreTrainedModel, config: AdapterConfig = MODES[1], new_text: bool = True) -> PreTrainedModel:
    """Attach adapters and move every trained parameter away from where it starts."""
    attach(model, config, new_text)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def features_of(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return image and text features. Pixels of 0 to 255 would saturate attention: its gradient would be 0."""
    batch = batch_of(4)
    images = model.get_image_features(pixel_values=batch["pixel_values"].float() / 128 - 1).pooler_output
    texts = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    return images, texts


@torch.no_grad()
def embed(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    return features_of(model)


def pooled(model: Any) -> bool:
    """Return whether the saved model has a pooler that only approximates the first token's state."""
    return bool(stock_pooler(model.text_model))


def difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the largest one of the image and of the text features."""
    return tuple((a - b).abs().max().item() for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def trained_names(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model: PreTrainedModel, tower: str) -> set[str]:
    names = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    return {name for name in names if name.startswith(tower)}


@pytest.mark.parametrize("config", MODES, ids=mode)
@pytest.mark.parametrize(("image", "text"), PAIRS)
def test_every_layer_of_the_chosen_towers_is_adapted(image: str, text: str, config: AdapterConfig) -> None:
    model = base(image, text)
    before = embed(model)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    attach(model, config)
    assert max(difference(embed(model), before)) <= (2e-6 if config.dora else 0)  # they start at nothing
    assert len(adapted(model, "text_model")) == LINEAR[text]
    assert len(adapted(model, "vision_model")) == (LINEAR[image] if config.target == "both" else 0)
    full = {name for name in trained_names(model) if "lora_" not in name}
    assert {name.split(".modules_to_save")[0] for name in full} == {"text_projection"}
    images, texts = features_of(model)
    (images.sum() + texts.sum()).backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # all of them are in the way of the embeddings
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        assert parameter.requires_grad or parameter.grad is None
    kept = merge(model, model.state_dict())
    assert all(torch.equal(kept[name], value) for name, value in frozen.items()) or config.dora


def test_text_adapters_leave_the_image_side_bit_for_bit() -> None:
    model = base()
    before = embed(model)
    scale = model.logit_scale.clone()
    trained(model, MODES[0])
    images, texts = difference(embed(model), before)
    assert images == 0.0
    assert texts > 0.1
    assert torch.equal(model.logit_scale, scale)
    wrapped = DualEncoder(model, from_scratch(tiny_config(), tiny_tokenizer())[1])
    assert wrapped.trains("text")
    assert not wrapped.trains("image")
    assert not wrapped.train().model.vision_model.training


def test_image_adapters_leave_the_text_tower() -> None:
    model = base()
    attach(model, AdapterConfig(target="image"))
    assert not adapted(model, "text_model")
    assert {name.split(".")[0] for name in trained_names(model)} == {"vision_model", "text_projection"}


def test_a_text_projection_that_is_not_new_is_frozen(tmp_path: Path) -> None:
    model = base("clip", "clip")
    before = embed(model)
    trained(model, AdapterConfig(target="image"), new_text=False)
    assert difference(embed(model), before)[1] == 0.0
    assert all("lora_" in name for name in trained_names(model))
    save(model, model.state_dict(), tmp_path, "someone/clip")
    loaded = PeftModel.from_pretrained(base("clip", "clip"), tmp_path / "adapter").eval()
    assert difference(embed(loaded), embed(model)) == (0.0, 0.0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/clip"
    assert lora.read_base(tmp_path / "adapter") == AdapterBase("someone/clip", "same", "LoRA")
    assert 'AutoModel.from_pretrained("someone/clip")' in (tmp_path / "adapter" / "README.md").read_text()


def test_towers_without_linear_layers_are_refused() -> None:
    model = tiny_dual_encoder(preset="timm:test_resnet").model
    attach(model, AdapterConfig(target="text"))
    with pytest.raises(ConfigError, match=r"lora\.target: got 'image', .*TimmWrapperModel"):
        attach(tiny_dual_encoder(preset="timm:test_resnet").model, AdapterConfig(target="both"))


def test_the_seed_decides_and_nobody_elses_random_numbers_are_touched() -> None:
    before = torch.get_rng_state()
    adapters = []
    for seed in (0, 0, 1):
        model = base()
        torch.set_rng_state(before)
        attach(model, MODES[0], seed=seed)
        merge(model, model.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
        adapters.append({name: value for name, value in model.state_dict().items() if "lora_A" in name})
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert not any(torch.equal(value, adapters[2][name]) for name, value in adapters[0].items())


@pytest.mark.parametrize("config", MODES, ids=mode)
@pytest.mark.parametrize(("image", "text"), PAIRS)
def test_saved_adapters_are_loaded_by_peft(image: str, text: str, config: AdapterConfig, tmp_path: Path) -> None:
    """To 0.0; of this machine, only adapter_config.json names where the base is."""
    directory = tmp_path / "run" / "model"
    model = trained(base(image, text), config)
    (tmp_path / "mine").mkdir()
    save(model, model.state_dict(), directory, str(tmp_path / "mine"), "klue/roberta-base")
    folder = directory / "adapter"
    weights_and_settings = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in folder.iterdir()} == weights_and_settings | {"adapter_base.json", "README.md"}
    method = "DoRA" if config.dora else "LoRA"
    assert lora.read_base(folder) == AdapterBase(None, "klue/roberta-base", method)  # the CLIP is a directory here
    named = [file.name for file in folder.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    assert named == ["adapter_config.json"]
    assert 'load_text_encoder("klue/roberta-base")' in (folder / "README.md").read_text()
    loaded = PeftModel.from_pretrained(base(image, text), folder).eval()
    assert difference(normalized(loaded.base_model.model), normalized(model)) == (0.0, 0.0)
    stock = base(image, text)
    weights = base_weights(model.state_dict())
    assert all(torch.equal(weights.pop(name), value) for name, value in stock.state_dict().items())
    assert not weights
    stock.save_pretrained(directory.with_name(BASE), state_dict=fold(stock, stock.state_dict()))
    by_peft = AutoPeftModel.from_pretrained(folder).eval().base_model.model
    for automatic in (by_peft, AutoModel.from_pretrained(folder).eval()):
        assert type(automatic).__name__ == type(model).__name__
        assert max(difference(normalized(automatic), normalized(model))) <= (1e-6 if pooled(model) else 0)
    size = f"{(folder / 'adapter_model.safetensors').stat().st_size / 1000:,.0f} kB"
    trainable = sum(value.numel() for value in load_file(folder / "adapter_model.safetensors").values())
    line = report(model)
    assert line.split(" modules")[0].endswith(f" {len(adapted(model, ''))}")
    assert line.endswith(f"adapter file {size}")
    assert f"trainable {trainable:,} of" in line
    assert line.startswith("DoRA: " if config.dora else "LoRA: ")


@pytest.mark.parametrize("config", MODES, ids=mode)
@pytest.mark.parametrize(("image", "text"), PAIRS)
def test_merged_weights_do_the_same(image: str, text: str, config: AdapterConfig) -> None:
    model = trained(base(image, text), config)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merge(model, model.state_dict())
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    stock = base(image, text)
    start = embed(stock)
    stock.load_state_dict(merged)  # strict: the stock class's names
    images, texts = difference(normalized(stock), normalized(model))
    assert max(images, texts) <= 1e-6
    assert max(difference(embed(stock), start)) > 0.05
    if config.target == "text":
        assert images == 0.0


def normalized(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    images, texts = (torch.nn.functional.normalize(rows, dim=-1) for rows in embed(model))
    return images, texts


def test_a_directory_that_looks_like_a_hub_id_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(base())
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    save(model, model.state_dict(), Path("out"), "runs/mine")
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "runs" / "mine")
    assert "runs/mine" not in Path("out/adapter/README.md").read_text()


def test_weights_come_from_the_state_dict_given(tmp_path: Path) -> None:
    """An average's, say, and with the names of a `DualEncoder`."""
    model = trained(base())
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)
    weights = {f"model.{name}": value for name, value in average.state_dict().items()}
    weights["logit_bias"] = torch.tensor(-3.0)
    save(model, weights, tmp_path, "a/b", "c/d")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layer = "text_model.encoder.layer.0.attention.self.query.lora_A"
    assert torch.equal(saved[f"base_model.model.{layer}.weight"], average.get_parameter(f"{layer}.default.weight"))
    merged = merge(model, weights)
    assert merged["logit_bias"].item() == -3.0
    stock = base()
    stock.load_state_dict({name.removeprefix("model."): merged[name] for name in merged if name != "logit_bias"})
    assert max(difference(normalized(stock), normalized(average))) <= 1e-6


def test_bf16_weights_are_merged_in_fp32() -> None:
    half = trained(base().to(torch.bfloat16))
    merged = merge(half, half.state_dict())
    assert {value.dtype for value in merged.values()} == {torch.float32}
    whole = copy.deepcopy(half).float()
    stock = base()
    stock.load_state_dict(merged)
    assert max(difference(normalized(stock), normalized(whole))) <= 1e-6


@pytest.mark.parametrize(("image", "text"), PAIRS)
def test_a_model_with_adapters_is_published_as_a_stock_one(image: str, text: str, tmp_path: Path) -> None:
    model = trained(base(image, text))
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_stock_model(tmp_path, model, from_scratch(tiny_config(), tiny_tokenizer())[1], merge(model, weights))
    save(model, weights, tmp_path, "a/b", "c/d")
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert max(difference(normalized(loaded.eval()), normalized(model))) <= 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_the_fast_paths_work_through_adapters(dora: bool) -> None:
    model = trained(base("clip", "clip"), AdapterConfig(target="both", rank=4, dora=dora))
    fast = copy.deepcopy(model)
    speed_up(fast, torch.device("cpu"))
    for candidate in (model, fast):
        wrapped = DualEncoder(candidate, from_scratch(tiny_config(), tiny_tokenizer())[1])
        embeddings = wrapped.eval()(**batch_of(4))
        (embeddings.image.sum() * embeddings.text.sum()).backward()
    assert max(difference(normalized(fast), normalized(model))) <= 1e-6
    wanted = dict(model.named_parameters())
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-3, msg=name)
    merged = merge(fast, fast.state_dict())
    stock = base("clip", "clip")
    stock.load_state_dict(merged)
    assert max(difference(normalized(stock), normalized(model))) <= 1e-6


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def adapted_encoder(request: pytest.FixtureRequest) -> DualEncoder:
    model = trained(base("clip", "clip"), AdapterConfig(target="both", rank=4, dropout=0.1, dora=request.param))
    return DualEncoder(model, from_scratch(tiny_config(), tiny_tokenizer())[1])


def test_grad_cache_is_exact_with_adapters(adapted_encoder: DualEncoder) -> None:
    names = assert_equal_gradients(prepare(adapted_encoder, LOSSES[0]))
    assert sum("lora_A" in name for name in names) == 24
    assert sum("lora_B" in name for name in names) == 24
    assert "model.logit_scale" not in names
