"""Models of open_clip and sentence-transformers, opened by name, embed as their own libraries do.

Most tests need the extra `peers`: pip install 'koclip[peers]'.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peer_models import WIDTH, bert, bert_tokenizer, draw, saved, xlmr_tokenizer
from safetensors.torch import load_file, save_file
from test_encoders import TEXTS, close, pictures, publish, refusal
from test_inference import picture
from torch.nn import functional as F

from koclip.encoders import load
from koclip.encoders.base import Encoder


def check_contract(encoder: Encoder, width: int) -> None:
    """What holds for any encoder: unit norm, members of a batch alone, any kind of picture."""
    texts, images, features = (
        encoder.encode_texts(TEXTS),
        encoder.encode_images(pictures()),
        encoder.image_features(pictures()),
    )
    for embeddings in (texts, images):
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)))
        assert (embeddings @ embeddings.T).fill_diagonal_(0).max() < 0.9999
    close(texts, torch.cat([encoder.encode_texts([text]) for text in TEXTS]))
    close(images, torch.cat([encoder.encode_images([image]) for image in pictures()]))
    assert features.shape == (3, width)
    gray = picture(0).convert("L")
    close(*encoder.encode_images([gray, gray.convert("RGB")]).split(1))
    close(*encoder.encode_images([gray.convert("RGBA"), gray.convert("RGB")]).split(1))
    assert encoder.encode_texts(["별 원 " * 300]).isfinite().all()


@pytest.mark.parametrize(("package", "spec"), [("open_clip", "ViT-B-32@openai"), ("sentence_transformers", "a+b")])
def test_a_missing_package_is_named(package: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^model: {package} .*koclip\[peers\]"):
        load(f"{package}:{spec}", "cpu")


@pytest.mark.parametrize("rest", ["ViT-B-32", "ViT-B-32@weights.pt", "hf-hub:a/b@openai", "ViT-B-32@a/pytorch.bin"])
def test_open_clip_needs_named_safe_weights(rest: str) -> None:
    assert "expected" in refusal(f"open_clip:{rest}")


VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "ViT": (VIT, 64),
    "ResNet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, 24),
    "timm": ({"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}, 64),
    "timm classifier": ({"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "", "image_size": 64}, 0),
}


def open_clip_directory(directory: Path, vision: dict[str, Any], hf: Path | None = None, **more: Any) -> Path:
    import open_clip

    text: dict[str, Any] = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    if hf:
        text = {"hf_model_name": str(hf), "hf_tokenizer_name": str(hf), "hf_proj_type": "mlp"}
        text |= {"hf_pooler_type": "mean_pooler", "context_length": 40}
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text} | more
    directory.mkdir()
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": pixels}))
    (directory / "tiny-peer.json").write_text(json.dumps(settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        open_clip.add_model_config(directory / "tiny-peer.json")
        model = open_clip.create_model("tiny-peer", pretrained_text=False)
        draw(model)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "open_clip_model.safetensors")
    return directory


@pytest.mark.parametrize("tower", TOWERS)
def test_open_clip_embeds_as_its_library(tower: str, tmp_path: Path) -> None:
    import open_clip

    directory = open_clip_directory(tmp_path / "model", TOWERS[tower][0])
    name = f"local-dir:{directory}"
    encoder = load(f"open_clip:{name}", "cpu")
    model, preprocess = open_clip.create_model_from_pretrained(name)
    model.eval()
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
        images = model.encode_image(torch.stack([preprocess(image) for image in pictures()]), normalize=True)
    close(encoder.encode_texts(TEXTS), texts)
    close(encoder.encode_images(pictures()), images)
    features = encoder.image_features(pictures()).clone()
    check_contract(encoder, TOWERS[tower][1] or model.visual.trunk.num_features)
    assert encoder.scale == pytest.approx(model.logit_scale.exp().item())
    assert encoder.unknown_share(["꿹 🙂"]) == 0
    visual = model.visual
    if tower == "ViT":
        features = features @ visual.proj
    elif tower.startswith("timm"):
        features = visual.head(features) if len(visual.head) else visual.trunk.get_classifier()(features)
    close(F.normalize(features.detach(), dim=-1), images)
    assert encoder.encode_texts(["별"]).shape == (1, 24)
    assert visual.state_dict().keys() == encoder.model.visual.state_dict().keys()  # the projection is still there


def test_open_clip_takes_a_file(tmp_path: Path) -> None:
    directory = open_clip_directory(tmp_path / "model", VIT)
    whole = load(f"open_clip:local-dir:{directory}", "cpu")
    file = load(f"open_clip:tiny-peer@{directory / 'open_clip_model.safetensors'}", "cpu")
    close(file.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    assert not torch.allclose(file.encode_images(pictures()), whole.encode_images(pictures()))  # its own mean and std
    assert "is not a known tag" in refusal("open_clip:tiny-peer@nowhere")
    assert "cannot be loaded by open_clip" in refusal(f"open_clip:local-dir:{tmp_path}")
    (directory / "open_clip_model.safetensors").unlink()
    assert "cannot be loaded by open_clip" in refusal(f"open_clip:local-dir:{directory}")  # nothing random


def with_xlmr(folder: Path, tokenizer: Any, vocab_size: int) -> str:
    """Save a model of open_clip whose text tower is an XLM-R; return open_clip's name of it."""
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": 42, "pad_token_id": 1, "type_vocab_size": 1}
    base = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**WIDTH, **sizes))
    directory = open_clip_directory(folder / "model", VIT, publish(folder / "text", base, tokenizer))
    tokenizer.save_pretrained(directory)
    return f"local-dir:{directory}"


def test_open_clip_with_a_text_encoder_of_transformers(tmp_path: Path) -> None:
    import open_clip

    tokenizer = xlmr_tokenizer()
    name = with_xlmr(tmp_path, tokenizer, len(tokenizer))
    encoder = load(f"open_clip:{name}", "cpu")
    model = open_clip.create_model_from_pretrained(name, return_transform=False).eval()
    with torch.no_grad():
        close(encoder.encode_texts(TEXTS), model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True))
    assert encoder.unknown_share(["꿹", "고"]) == 1 / 4


def test_open_clip_tells_nllb_the_language(tmp_path: Path) -> None:
    """The library leaves it to its caller; with transformers 5 its `set_language` does nothing."""
    import open_clip

    entries = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"별원빨간abcdefred ".replace(" ", ""), "kor_Hang", "eng_Latn"]
    vocab = {entry: place for place, entry in enumerate(dict.fromkeys(entries))}
    languages = ["kor_Hang", "eng_Latn"]
    tokenizer = transformers.NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=languages, src_lang="eng_Latn")
    name = with_xlmr(tmp_path, tokenizer, 2 * len(vocab))
    encoder = load(f"open_clip:{name}", "cpu")
    first = encoder.fingerprint()
    model, tokens = open_clip.create_model_from_pretrained(name, return_transform=False).eval(), []
    stock = open_clip.get_tokenizer(name)
    for language, text in (("eng_Latn", "red"), ("kor_Hang", "빨간 별"), ("eng_Latn", "abc")):
        stock.tokenizer.src_lang = language
        tokens.append(stock([text]))
        assert tokens[-1][0, 0] == stock.tokenizer.convert_tokens_to_ids(language)
    with torch.no_grad():
        wanted = model.encode_text(torch.cat(tokens), normalize=True)
    close(encoder.encode_texts(["red", "빨간 별", "abc"]), wanted)
    close(encoder.encode_texts(["빨간 별"]), wanted[1:2])
    assert encoder.fingerprint() == first


def test_open_clip_takes_the_activation_of_the_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ViT-B-32@openai` was trained with QuickGELU, `ViT-B-32` says GELU; the library only warns."""
    import open_clip

    directory = open_clip_directory(tmp_path / "model", VIT)
    tag = {"file": str(directory / "open_clip_model.safetensors"), "quick_gelu": True}
    monkeypatch.setitem(sys.modules["open_clip.pretrained"]._PRETRAINED, "tiny-peer", {"tiny": tag})
    encoder = load("open_clip:tiny-peer@tiny", "cpu")
    model = open_clip.create_model("tiny-peer", tag["file"], force_quick_gelu=True).eval()
    tokens = open_clip.get_tokenizer("tiny-peer")(TEXTS)
    with torch.no_grad():
        close(encoder.encode_texts(TEXTS), model.encode_text(tokens, normalize=True))
        plain = open_clip.create_model("tiny-peer", tag["file"]).eval().encode_text(tokens, normalize=True)
    assert not torch.allclose(encoder.encode_texts(TEXTS), plain, atol=1e-3)


def test_open_clip_fingerprints(tmp_path: Path) -> None:
    directory = open_clip_directory(tmp_path / "model", VIT)
    encoder = load(f"open_clip:local-dir:{directory}", "cpu")
    first = encoder.fingerprint()
    encoder.encode_texts(TEXTS)
    assert encoder.fingerprint() == first
    shutil.copytree(directory, tmp_path / "copy")
    assert load(f"open_clip:local-dir:{tmp_path}/copy", "cpu").fingerprint() == first
    file = tmp_path / "copy" / "open_clip_config.json"
    settings = json.loads(file.read_text())
    for section, change in (
        ("preprocess_cfg", {"mean": [0.3, 0.2, 0.1]}),
        ("preprocess_cfg", {"interpolation": "bilinear"}),
        ("model_cfg", {"quick_gelu": True}),
        ("model_cfg", {"vision_cfg": VIT | {"head_width": 16}}),  # the same weights
        ("model_cfg", {"text_cfg": settings["model_cfg"]["text_cfg"] | {"tokenizer_kwargs": {"clean": "whitespace"}}}),
    ):
        file.write_text(json.dumps(settings | {section: settings[section] | change}))
        assert load(f"open_clip:local-dir:{tmp_path}/copy", "cpu").fingerprint() != first, change


def sentence_models(directory: Path) -> tuple[Path, Path]:
    """In the layout that clip-ViT-B-32-multilingual-v1 and clip-ViT-B-32 are published in."""
    import sentence_transformers
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import CLIPModel, Pooling

    tokenizer = bert_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        publish(directory / "bert", bert(tokenizer), tokenizer)
        dense = Dense(32, 24, bias=False, activation_function=torch.nn.Identity())
    parts = [Transformer(str(directory / "bert")), Pooling(32), dense]
    sentence_transformers.SentenceTransformer(modules=parts, device="cpu").save(str(directory / "texts"))
    clip = CLIPModel(str(saved("CLIP", directory / "clip")))
    images = directory / "images"
    sentence_transformers.SentenceTransformer(modules=[clip], device="cpu").save(str(images))
    (images / "0_CLIPModel").mkdir()
    for file in list(images.iterdir()):
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            file.rename(images / "0_CLIPModel" / file.name)
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (images / "modules.json").write_text(json.dumps([module]))
    return directory / "texts", images


def test_sentence_transformers_embed_as_their_library(tmp_path: Path) -> None:
    import sentence_transformers as library

    texts, images = sentence_models(tmp_path)
    encoder = load(f"sentence_transformers:{texts}+{images}", "cpu")
    model = library.SentenceTransformer(str(texts), device="cpu")
    wanted = model.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True)
    close(encoder.encode_texts(TEXTS), wanted)
    model = library.SentenceTransformer(str(images), device="cpu")
    close(
        encoder.encode_images(pictures()), model.encode(pictures(), normalize_embeddings=True, convert_to_tensor=True)
    )
    clip = load(str(tmp_path / "clip"), "cpu")
    close(encoder.encode_images(pictures()), clip.encode_images(pictures()))
    close(encoder.image_features(pictures()), clip.image_features(pictures()))
    assert encoder.scale == clip.scale
    check_contract(encoder, 32)
    assert encoder.unknown_share(["꿹", "고"]) == 1 / 2


def test_sentence_transformers_fingerprints_and_refusals(tmp_path: Path) -> None:
    texts, images = sentence_models(tmp_path)
    encoder = load(f"sentence_transformers:{texts}+{images}", "cpu")
    first = encoder.fingerprint()
    encoder.encode_texts(TEXTS)
    assert encoder.fingerprint() == first
    shutil.copytree(tmp_path / "texts", tmp_path / "copy")
    spec = f"sentence_transformers:{tmp_path}/copy+{images}"
    assert load(spec, "cpu").fingerprint() == first
    pooling = tmp_path / "copy" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"pooling_mode": "max"}))
    assert load(spec, "cpu").fingerprint() != first
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    dropped = {name: value for name, value in weights.items() if "layer.1.output.dense.weight" not in name}
    save_file(dropped, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys"):
        load(spec, "cpu")
    with pytest.raises(ValueError, match=r"^model: .*modules\.json"):
        load(f"sentence_transformers:{tmp_path}/bert+{images}", "cpu")
    with pytest.raises(ValueError, match=r"^model: .*BertModel"):
        load(f"sentence_transformers:{texts}+{texts}", "cpu")
    assert "sentence_transformers:<text model>+<image model>" in refusal(f"sentence_transformers:{texts}")
