"""What alignment starts from: image spaces kept bit for bit, nothing random in an encoder, everything else refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

import koclip
from koclip.config import ConfigError
from koclip.models.dual_encoder import encode_images, from_scratch
from koclip.models.first_token import fold
from koclip.models.pretrained import load_image_side, load_text_encoder
from koclip.models.stock import save_stock_model
from koclip.models.swap import swap_text_tower

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {"image_size": 32, "patch_size": 8}
VISION = WIDTH | IMAGES
TEXT = WIDTH | {"vocab_size": 90, "max_position_embeddings": 40}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **IMAGES}
TOWERS = {
    "google/vit": ("ViTForImageClassification", "vit", VISION),
    "vit": ("ViTModel", "vit", VISION),
    "deit": ("DeiTForImageClassification", "deit", VISION),
    "dinov2": ("Dinov2Model", "dinov2", DINO),
    "dinov2 classifier": ("Dinov2ForImageClassification", "dinov2", DINO),
    "clip vision": ("CLIPVisionModel", "clip_vision_model", VISION),
    "siglip": ("SiglipVisionModel", "siglip_vision_model", VISION),
    "timm vit": ("TimmWrapperForImageClassification", "timm_wrapper", {"architecture": "test_vit", "num_labels": 5}),
    "timm resnet": ("TimmWrapperForImageClassification", "timm_wrapper", {"architecture": "test_resnet"}),
}
PIXELS = {"input_size": [3, 32, 32], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
TIMM = PIXELS | {"crop_pct": 0.8, "crop_mode": "center"}


def stored(directory: Path, name: str, kind: str, options: dict[str, object]) -> PreTrainedModel:
    """Save a model of random weights, biases and norms too: a lost one would show."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options)
    if kind == "timm_wrapper":
        config.pretrained_cfg = TIMM
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return model


def stored_tower(directory: Path, name: str) -> PreTrainedModel:
    model = stored(directory, *TOWERS[name])
    if not name.startswith("timm"):
        size = {"height": 32, "width": 32}
        processor = transformers.ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
        processor.save_pretrained(directory)
    return model


def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def ids() -> Tensor:
    return torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(2))


def change(directory: Path, **settings: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def drop(directory: Path, *names: str, **more: Tensor) -> None:
    """Take weights out of a checkpoint, put others in."""
    weights = load_file(directory / "model.safetensors")
    left = {name: value for name, value in weights.items() if name not in names}
    assert len(left) == len(weights) - len(names)
    save_file(left | more, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOWERS)
def test_the_pooled_output_of_a_tower_is_the_image_space(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, in the dual encoder that is saved and loaded too."""
    original = stored_tower(tmp_path / "tower", name)
    tower, processor = load_image_side(str(tmp_path / "tower"))
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    assert not tower.training
    base = getattr(original, "vision_model", getattr(original, original.base_model_prefix, original))
    text = load_text_encoder(stored_text(tmp_path / "text"))
    swapped = swap_text_tower(tower.to(dtype), text).eval()
    swapped.save_pretrained(tmp_path / "dual", state_dict=fold(swapped, swapped.state_dict()))
    loaded, info = AutoModel.from_pretrained(tmp_path / "dual", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    with torch.no_grad():
        pooled = tower(pixel_values=pixels().to(dtype)).pooler_output
        got = encode_images(loaded.eval(), pixels().to(dtype))
        if not name.startswith("timm"):  # the wrapper that classifies has no pooled output
            output = base.to(dtype)(pixel_values=pixels().to(dtype))
            first = name in ("google/vit", "deit")  # without a pooler of their own: the class token
            assert torch.equal(pooled, output.last_hidden_state[:, 0] if first else output.pooler_output)
    wanted = torch.nn.functional.normalize(pooled.float(), dim=-1)
    # On one thread some CPUs' convolutions round by where weights lie in memory: here mapped from a file, there not.
    assert (got - wanted).abs().max() <= (1e-7 if "resnet" in name else 0)
    assert loaded.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=4e-3)  # bf16 has three digits
    assert len(processor.image_mean) == len(processor.image_std) == 3


def stored_text(directory: Path, name: str = "BertModel", kind: str = "bert", **options: object) -> str:
    stored(directory, name, kind, TEXT | options)
    return str(directory)


@pytest.mark.parametrize("name", ["clip", "chinese", "joint"])
def test_a_clip_is_loaded_whole(name: str, tmp_path: Path) -> None:
    preset = {"preset": "timm:test_vit"} if name == "joint" else {}
    model, processor = from_scratch(tiny_config(**preset), tiny_tokenizer())
    torch.nn.init.constant_(model.logit_scale, 3.21)
    if name == "chinese":
        model = swap_text_tower(model, load_text_encoder(stored_text(tmp_path / "text", max_position_embeddings=24)))
    save_stock_model(
        tmp_path / "clip", model, processor, {f"model.{key}": value for key, value in model.state_dict().items()}
    )
    loaded, images = load_image_side(str(tmp_path / "clip"))
    assert type(loaded) is type(model)
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())
    assert images.image_mean == processor.image_processor.image_mean
    assert loaded.logit_scale.item() == pytest.approx(3.21)


def test_what_is_stored_in_bf16_is_loaded_in_fp32(tmp_path: Path) -> None:
    stored_tower(tmp_path, "dinov2").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_image_side(str(tmp_path))[0].dtype == torch.float32
    transformers.BertModel(AutoConfig.for_model("bert", **TEXT)).to(torch.bfloat16).save_pretrained(tmp_path / "text")
    assert load_text_encoder(str(tmp_path / "text")).dtype == torch.float32


def test_image_processors_are_kept(tmp_path: Path) -> None:
    stored_tower(tmp_path, "google/vit")
    _, processor = load_image_side(str(tmp_path))
    wanted = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.to_dict() == wanted.to_dict()
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_timms_image_processor_is_translated(mode: str, tmp_path: Path) -> None:
    stored_tower(tmp_path, "timm vit")
    change(tmp_path, pretrained_cfg=TIMM | {"crop_mode": mode})
    _, processor = load_image_side(str(tmp_path))
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    wanted = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(noise))["pixel_values"]
    processor.save_pretrained(tmp_path / "copy")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "copy", backend="pil")
    got = loaded(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < 1.5 / 255 / 0.2  # a step of the pixels' 8 bits
    assert (got - wanted).abs().mean() < 0.02


def test_a_timm_crop_that_has_no_translation_is_refused(tmp_path: Path) -> None:
    stored_tower(tmp_path, "timm vit")
    change(tmp_path, pretrained_cfg=TIMM | {"crop_mode": "border"})
    with pytest.raises(ConfigError, match=r"model\.clip: .*\('border', 32, 32\)"):
        load_image_side(str(tmp_path))


def refusal(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_image_side(str(path))
    assert str(caught.value).startswith("model.clip: ")
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "cannot be loaded" in refusal("nobody/nothing")
    assert "Expected config.json and model.safetensors" in refusal(tmp_path)
    for path in (str(tmp_path), f"auto:{tmp_path}"):
        with pytest.raises(ConfigError, match=r"model\.text_encoder: .*config\.json"):
            load_text_encoder(path)


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    model = stored_tower(tmp_path, "dinov2")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "cannot be loaded" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "no file named model.safetensors" in refusal(tmp_path)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    stored_tower(tmp_path, "dinov2")
    change(tmp_path, model_type="theirs", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    assert "no remote code" in refusal(tmp_path)


def test_models_without_an_image_space_are_refused(tmp_path: Path) -> None:
    assert "is a BertModel" in refusal(stored_text(tmp_path / "bert"))
    stored_tower(tmp_path / "tower", "timm vit")
    change(tmp_path / "tower", do_pooling=False)
    assert "got None, expected (images, config.hidden_size)" in refusal(tmp_path / "tower")
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    stored(tmp_path / "maps", "ResNetModel", "resnet", stages)  # whose pooled output is (B, W, 1, 1)
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "maps")
    assert "got (1, 16, 1, 1)" in refusal(tmp_path / "maps")
    stored_tower(tmp_path / "naked", "dinov2")
    (tmp_path / "naked" / "preprocessor_config.json").unlink()
    assert "Expected preprocessor_config.json" in refusal(tmp_path / "naked")
    (tmp_path / "projected").mkdir()
    stored(tmp_path / "projected", "CLIPVisionModelWithProjection", "clip_vision_model", VISION)
    assert "visual_projection.weight" in refusal(tmp_path / "projected")  # dropped, the space would be another


@pytest.mark.parametrize("name", ["google/vit", "dinov2", "timm vit", "siglip"])
def test_image_towers_with_other_weights_are_refused(name: str, tmp_path: Path) -> None:
    stored_tower(tmp_path, name)
    stored = load_file(tmp_path / "model.safetensors")
    names = [key for key in stored if ".1." in key and key.endswith("weight") and "text_model" not in key]
    drop(tmp_path, names[0])
    assert "missing_keys" in refusal(tmp_path)
    stored_tower(tmp_path, name)
    drop(tmp_path, **{names[0].replace(".1.", ".7."): torch.zeros(3)})  # of a layer that is not there
    assert "unexpected_keys" in refusal(tmp_path)
    stored_tower(tmp_path, name)
    drop(tmp_path, names[0], **{names[0]: torch.zeros(3)})
    assert "mismatched_keys" in refusal(tmp_path)


def test_half_a_pooler_is_refused(tmp_path: Path) -> None:
    stored_tower(tmp_path, "vit")
    drop(tmp_path, "pooler.dense.bias")
    assert "pooler.dense.bias" in refusal(tmp_path)


def test_a_clip_with_missing_weights_is_refused(tmp_path: Path) -> None:
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    save_stock_model(tmp_path, model, processor, {f"model.{key}": value for key, value in model.state_dict().items()})
    load_image_side(str(tmp_path))
    drop(tmp_path, "visual_projection.weight")
    assert "visual_projection.weight" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("RobertaForMaskedLM", "roberta"),  # as klue/roberta-base
        ("BertForMaskedLM", "bert"),
        ("AlbertForMaskedLM", "albert"),
        ("MPNetForMaskedLM", "mpnet"),
    ],
)
def test_a_missing_pooler_returns_the_first_token(name: str, kind: str, tmp_path: Path) -> None:
    options = {"embedding_size": 16} if kind == "albert" else {"pad_token_id": 1}
    path = stored_text(tmp_path / "text", name, kind, **options)
    encoder = load_text_encoder(path)
    with torch.no_grad():
        output = encoder(input_ids=ids())
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    image = tiny_dual_encoder(preset="timm:test_vit").model
    swapped = swap_text_tower(image, encoder).eval()
    with torch.no_grad():
        features = swapped.get_text_features(input_ids=ids()).pooler_output
    torch.testing.assert_close(features, swapped.text_projection(output.pooler_output), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "RobertaModel"])
def test_nothing_random_is_left_in_a_text_tower(name: str, tmp_path: Path) -> None:
    """Whatever the random numbers, a model comes out the same."""
    path = stored_text(tmp_path / "text", name, "roberta", pad_token_id=1)
    for image in (tiny_dual_encoder().model, tiny_dual_encoder(preset="timm:test_vit").model):
        state_dicts = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            state_dicts.append(swap_text_tower(image, load_text_encoder(path)).state_dict())
        assert all(torch.equal(value, state_dicts[1][key]) for key, value in state_dicts[0].items())


def test_a_pooler_that_is_there_is_kept(tmp_path: Path) -> None:
    path = stored_text(tmp_path, "BertForPreTraining")
    wanted = load_file(tmp_path / "model.safetensors")["bert.pooler.dense.weight"]
    assert torch.equal(load_text_encoder(path).pooler.dense.weight, wanted)


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "DistilBertForMaskedLM", "ElectraForPreTraining"])
def test_text_encoders_with_other_weights_are_refused(name: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 90, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    if name == "DistilBertForMaskedLM":
        model = stored(tmp_path, name, "distilbert", sizes)
    else:
        model = stored(tmp_path, name, name.split("For")[0].lower(), TEXT | {"embedding_size": 32})
    load_text_encoder(str(tmp_path))
    stored_names = load_file(tmp_path / "model.safetensors")
    names = [key for key in stored_names if ".layer.1." in key and key.endswith("weight")]
    drop(tmp_path, names[0])
    with pytest.raises(ConfigError, match=r"model\.text_encoder: .*missing_keys"):
        load_text_encoder(str(tmp_path))
    drop(tmp_path, **{names[0]: torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"model\.text_encoder: .*mismatched_keys"):
        load_text_encoder(str(tmp_path))
    model.save_pretrained(tmp_path)
    change(tmp_path, num_hidden_layers=1, n_layers=1)  # fewer layers than there are weights for
    with pytest.raises(ConfigError, match=r"model\.text_encoder: .*unexpected_keys"):
        load_text_encoder(str(tmp_path))


def test_a_model_that_reads_no_text_is_refused(tmp_path: Path) -> None:
    stored_tower(tmp_path, "dinov2")
    with pytest.raises(ConfigError, match=r"model\.text_encoder: .*Dinov2Model"):
        load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("target", ["clip", "timm"])
@pytest.mark.parametrize("source", ["clip", "chinese"])
def test_a_clips_text_tower_is_taken(source: str, target: str, tmp_path: Path) -> None:
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    if source == "chinese":
        model = swap_text_tower(model, load_text_encoder(stored_text(tmp_path / "text")))
    save_stock_model(
        tmp_path / "clip", model, processor, {f"model.{key}": value for key, value in model.state_dict().items()}
    )
    encoder = load_text_encoder(str(tmp_path / "clip"))
    image = tiny_dual_encoder(**({"preset": "timm:test_vit"} if target == "timm" else {})).model
    swapped = swap_text_tower(image, encoder).eval()
    with torch.no_grad():
        wanted = model.eval().text_model(input_ids=ids()).last_hidden_state
        got = swapped.text_model(input_ids=ids()).last_hidden_state
    assert torch.equal(got, wanted)


def test_random_weights_from_a_configuration(tmp_path: Path) -> None:
    path = stored_text(tmp_path, "RobertaModel", "roberta", pad_token_id=1)
    (tmp_path / "model.safetensors").unlink()
    change(tmp_path, dtype="bfloat16")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, same, other = (load_text_encoder(f"auto:{path}", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are touched
    weights = [encoder.encoder.layer[1].output.dense.weight for encoder in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.dtype == torch.float32


def test_koclip_load_names_what_is_not_a_dual_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a BertModel"):
        koclip.load(stored_text(tmp_path))
    with pytest.raises(ConfigError, match=r"nowhere: no such directory, .*owner/name$"):
        koclip.load(tmp_path / "nowhere")


def test_koclip_load_of_a_run_names_its_model(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"expected its model: {model}$"):
        koclip.load(tmp_path / "run")
