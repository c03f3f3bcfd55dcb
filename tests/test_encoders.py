"""Every class of dual encoder, opened by name, embeds as its own stock call does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dirty import encoded
from peer_models import KINDS, VISION, WIDTH, bert, bert_tokenizer, joint, joint_processor, saved, xlmr_tokenizer
from PIL import Image
from sentence_transformers import SentenceTransformer
from test_inference import picture
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from koclip.config import ConfigError
from koclip.data.sources import Row
from koclip.encoders import load
from koclip.encoders.transformers import TransformersEncoder
from koclip.evaluation.embed import Embedder, Images
from koclip.models.stock import layout_of

TEXTS = ["별", "빨간 원 위에 있는 작은 파란 별 하나", "A red Circle", "고양이 2 마리"]
PROJECTS = [kind for kind in KINDS if "SigLIP" not in kind]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directories: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in directories:
            directories[kind] = saved(kind, tmp_path_factory.mktemp("peers") / kind.replace(" ", "-"))
        return directories[kind]

    return directory


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(kind: str, directories: Callable[[str], Path]) -> Path:
    return directories(kind)


def pictures() -> list[Image.Image]:
    return [picture(seed, size=(48, 40) if seed else (40, 72)) for seed in range(3)]


def stock(kind: str, directory: Path) -> tuple[Tensor, Tensor]:
    """Embed as each class's documentation does."""
    if kind == "Router":
        library: Any = SentenceTransformer(str(directory), device="cpu")
        options: dict[str, Any] = {"convert_to_tensor": True}
        return library.encode(TEXTS, **options), library.encode(pictures(), **options)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    if kind.startswith("SigLIP"):
        texts = [text.lower() for text in TEXTS]
        options = {"padding": "max_length", "truncation": True, "max_length": 64}
        tokens = processor.tokenizer(texts, return_tensors="pt", **options)
        assert set(tokens) == {"input_ids"}
        assert tokens["input_ids"].shape == (len(TEXTS), 64)
    else:
        tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **processor.image_processor(pictures(), return_tensors="pt"))
    return out.text_embeds, out.image_embeds


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_embeddings_are_those_of_the_stock_call(kind: str, directory: Path) -> None:
    encoder = load(str(directory), "cpu")
    text_embeds, image_embeds = stock(kind, directory)
    texts, images = encoder.encode_texts(TEXTS), encoder.encode_images(pictures())
    close(texts, text_embeds)
    close(images, image_embeds)
    assert encoder.name == str(directory)
    own = getattr(encoder.model, "logit_bias", None)  # of SigLIP
    assert encoder.bias == (0.0 if own is None else own.item())
    assert (own is not None) == kind.startswith("SigLIP")
    for embeddings in (texts, images):
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)))
        assert (embeddings @ embeddings.T).fill_diagonal_(0).max() < 0.9999  # or a mix-up could not be seen


def test_a_batch_embeds_as_its_members_do(kind: str, directory: Path) -> None:
    encoder = load(str(directory), "cpu")
    alone = torch.cat([encoder.encode_texts([text]) for text in TEXTS])
    close(encoder.encode_texts(TEXTS), alone)
    alone = torch.cat([encoder.encode_images([image]) for image in pictures()])
    close(encoder.encode_images(pictures()), alone)


def test_features_are_what_the_projection_reads(kind: str, directory: Path) -> None:
    encoder = load(str(directory), "cpu")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    features = encoder.image_features(pictures())
    assert not features.requires_grad
    assert features.dim() == 2
    if kind in PROJECTS:
        assert features.shape[1] == model.visual_projection.in_features != model.visual_projection.out_features
        close(F.normalize(model.visual_projection(features.clone()), dim=-1), encoder.encode_images(pictures()))
    else:
        close(F.normalize(features, dim=-1), encoder.encode_images(pictures()))
    norms = features.norm(dim=1)
    assert (norms - 1).abs().min() > 1e-3  # they are not normalised


@pytest.mark.parametrize("kind", ["CLIP", "ChineseCLIP", "AltCLIP", "MetaCLIP 2"])
def test_features_are_the_normed_class_token(kind: str, directories: Callable[[str], Path]) -> None:
    """The linear probe of the CLIP paper."""
    model = AutoModel.from_pretrained(directories(kind), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directories(kind))
    with torch.no_grad():
        tower = model.vision_model(**processor.image_processor(pictures(), return_tensors="pt"))
        wanted = model.vision_model.post_layernorm(tower.last_hidden_state[:, 0])
    close(load(str(directories(kind)), "cpu").image_features(pictures()), wanted)


def test_a_long_text_is_cut(kind: str, directory: Path) -> None:
    """To what the tower has positions for, even where the tokenizer knows no longest length."""
    encoder = load(str(directory), "cpu")
    got = encoder.encode_texts(["별 원 " * 200, "별 원 " * 300])
    assert got.isfinite().all()
    close(got[:1], got[1:])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("SigLIP")])
def test_siglip_reads_lower_case(kind: str, directories: Callable[[str], Path]) -> None:
    encoder = load(str(directories(kind)), "cpu")
    upper, lower, other = encoder.encode_texts(["별 ABC", "별 abc", "별 abd"])
    assert torch.equal(upper, lower)
    assert not torch.allclose(lower, other)


def test_naflex_patches_are_those_the_checkpoint_names(directories: Callable[[str], Path]) -> None:
    """The processor of SigLIP 2 would cut patches of 16 whatever was saved."""
    directory = directories("SigLIP 2 NaFlex")
    saved_size = json.loads((directory / "processor_config.json").read_text())["image_processor"]["patch_size"]
    assert saved_size == 8
    processor = AutoProcessor.from_pretrained(directory)
    assert processor(images=pictures(), return_tensors="pt")["pixel_values"].shape[-1] == 16 * 16 * 3
    inputs = processor.image_processor(pictures(), return_tensors="pt")
    assert inputs["pixel_values"].shape[-1] == 8 * 8 * 3
    assert len(inputs["spatial_shapes"].unique(dim=0)) > 1  # pictures keep their form


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_any_mode(mode: str, kind: str, directory: Path) -> None:
    encoder = load(str(directory), "cpu")
    image = picture(0).convert("L").convert(mode)
    close(*encoder.encode_images([image, image.convert("RGB")]).split(1))
    clear, white = Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("RGB", (40, 40), "white")
    close(*encoder.encode_images([clear, white]).split(1))


def test_modes_are_left_as_they_were(kind: str, directory: Path) -> None:
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).train()
    model.vision_model.eval()  # as a frozen tower is
    encoder = TransformersEncoder(model, AutoProcessor.from_pretrained(directory))
    before = {name: module.training for name, module in model.named_modules()}
    encoder.encode_texts(TEXTS)
    encoder.encode_images(pictures())
    encoder.image_features(pictures())
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_unknown_tokens(kind: str, directories: Callable[[str], Path]) -> None:
    encoder = load(str(directories(kind)), "cpu")
    assert encoder.unknown_share([]) == 0
    assert encoder.unknown_share(["고양이"]) == 0
    special = encoder.unknown_share(["<|endoftext|> 🙂"])
    if kind == "CLIP" or kind.startswith("SigLIP 2"):  # a token for every byte
        assert special == 0
        assert encoder.unknown_share(["꿹 🙂 䨺"]) == 0
    else:
        assert special > 0
        pieces = 2 if isinstance(encoder.processor.tokenizer, transformers.BertTokenizer) else 4  # with the leading "▁"
        assert encoder.unknown_share(["꿹", "고"]) == 1 / pieces
        assert encoder.unknown_share(["꿹"] * 3) == encoder.unknown_share(["꿹"])


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_fingerprints(kind: str, directory: Path, tmp_path: Path) -> None:
    encoder = load(str(directory), "cpu")
    first = encoder.fingerprint()
    encoder.encode_texts(["아주 긴 문장 " * 100])
    assert encoder.fingerprint() == first  # whatever it was called with
    shutil.copytree(directory, tmp_path / "elsewhere")
    assert load(str(tmp_path / "elsewhere"), "cpu").fingerprint() == first

    model, processor = AutoModel.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    parameter = list(model.parameters())[-1]
    parameter.data.view(-1)[0] += 1e-3
    assert TransformersEncoder(model, processor).fingerprint() != first
    parameter.data.view(-1)[0] = encoder.model.get_parameter(list(dict(model.named_parameters()))[-1]).view(-1)[0]
    assert TransformersEncoder(model, processor).fingerprint() == first
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert TransformersEncoder(model, processor).fingerprint() != first
    for change in (lambda own: own.add_tokens(["새말"]), lambda own: setattr(own, "padding_side", "left")):
        processor = AutoProcessor.from_pretrained(directory)
        change(processor.tokenizer)
        assert TransformersEncoder(model, processor).fingerprint() != first


def test_models_with_the_same_image_side_share_the_embeddings_of_images(
    kind: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(str(directory), "cpu")
    if kind == "SigLIP 2 NaFlex":  # of which koclip does not know the image side
        assert encoder.image_fingerprint() == encoder.fingerprint()
        return
    images = Images([Row(encoded(image, "PNG"), {}, str(number)) for number, image in enumerate(pictures())])
    embedded = Embedder(encoder, 8, tmp_path).images(images)
    whole, first, layout = encoder.fingerprint(), encoder.image_fingerprint(), layout_of(encoder.model)
    for tower in (layout.text_tower, layout.image_tower):
        weight = next(encoder.model.get_submodule(tower).parameters()).data.view(-1)
        weight[0] += 1
        assert encoder.fingerprint() != whole
        assert (encoder.image_fingerprint() == first) == (tower == layout.text_tower)
        if tower == layout.text_tower:
            with monkeypatch.context() as patch:
                patch.setattr(encoder, "encode_images", None)
                assert torch.equal(Embedder(encoder, 8, tmp_path).images(images), embedded)
        weight[0] -= 1
    encoder.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert encoder.image_fingerprint() != first


def refusal(spec: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(str(spec), "cpu")
    assert str(caught.value).startswith("model")
    assert str(spec) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def publish(directory: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def test_what_is_no_dual_encoder_is_refused_by_name(tmp_path: Path) -> None:
    publish(tmp_path / "bert", bert(bert_tokenizer()), bert_tokenizer())
    assert "a BertModel: expected one of CLIPModel, ChineseCLIPModel, AltCLIPModel" in refusal(tmp_path / "bert")
    sizes = {"text_config": WIDTH | {"vocab_size": 90}, "vision_config": VISION}
    transformers.CLIPSegModel(transformers.CLIPSegConfig(**sizes)).save_pretrained(tmp_path / "seg")
    assert "a CLIPSegModel: expected one of" in refusal(tmp_path / "seg")
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "open_clip:<model name>@<pretrained tag or file.safetensors>" in refusal("openclip:ViT-B-32@openai")


def test_incomplete_directories_are_refused(directories: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(directories("CLIP"), tmp_path / "naked")
    for file in (tmp_path / "naked").glob("*token*"):
        file.unlink()
    for file in (tmp_path / "naked").glob("*process*"):
        file.unlink()
    assert "preprocessor_config.json" in refusal(tmp_path / "naked")
    shutil.copytree(directories("SigLIP 2"), tmp_path / "fewer")
    settings = json.loads((tmp_path / "fewer" / "config.json").read_text())
    settings["vision_config"]["num_hidden_layers"] = 3
    change(tmp_path / "fewer" / "config.json", **settings)
    assert "missing_keys" in refusal(tmp_path / "fewer")


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    maps = transformers.ResNetModel(transformers.ResNetConfig(**stages))  # its pooled output is (B, W, 1, 1)
    maps.config.hidden_size = 16
    publish(tmp_path / "maps", joint(maps, bert(tokenizer)), joint_processor(tokenizer))
    assert "does not embed a picture and a text" in refusal(tmp_path / "maps")
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": len(tokenizer)}
    poolerless = transformers.DistilBertModel(transformers.DistilBertConfig(**sizes))
    tower = transformers.ViTModel(transformers.ViTConfig(**VISION))
    publish(tmp_path / "poolerless", joint(tower, poolerless), joint_processor(tokenizer))
    assert "does not embed a picture and a text" in refusal(tmp_path / "poolerless")


@pytest.mark.parametrize("kind", ["CLIP", "MetaCLIP 2"])
def test_texts_without_the_end_token_are_refused(kind: str, directories: Callable[[str], Path], tmp_path: Path) -> None:
    """Both classes read the first token where there is none: every text would have one embedding."""
    shutil.copytree(directories(kind), tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["text_config"]["eos_token_id"] = 7
    change(tmp_path / "model" / "config.json", **settings)
    assert "end token 7" in refusal(tmp_path / "model")


def test_metaclip2_reads_the_first_end_token(directories: Callable[[str], Path]) -> None:
    directory = directories("MetaCLIP 2")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = xlmr_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    ends = tokens["attention_mask"].sum(dim=1) - 1
    assert (tokens["input_ids"].gather(1, ends[:, None]) == 2).all()
    with torch.no_grad():
        hidden = model.text_model(**tokens).last_hidden_state[torch.arange(len(TEXTS)), ends]
        wanted = F.normalize(model.text_projection(hidden), dim=-1)
    close(load(str(directory), "cpu").encode_texts(TEXTS), wanted)


def test_a_fingerprint_forgets_where_towers_came_from(tmp_path: Path) -> None:
    tower, text, fingerprints = transformers.ViTModel(transformers.ViTConfig(**VISION)), bert(bert_tokenizer()), set()
    for name in ("first", "other"):
        parts = [str(tmp_path / name / part) for part in ("vision", "text")]
        tower.save_pretrained(parts[0])
        text.save_pretrained(parts[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(*parts)
        publish(tmp_path / name, model, joint_processor(bert_tokenizer()))
        assert parts[0] in (tmp_path / name / "config.json").read_text()
        fingerprints.add(load(str(tmp_path / name), "cpu").fingerprint())
    assert len(fingerprints) == 1
