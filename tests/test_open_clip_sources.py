"""Checkpoints of open_clip, converted to stock classes, embed as open_clip does; what no class holds is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from align_runs import align, arguments, write_pairs
from hub_repos import Repo
from hub_server import HubServer
from open_clip_checkpoints import CHECKPOINTS, write
from safetensors.torch import load_file, save_file
from test_encoders import pictures
from torch.nn import functional as F
from transformers import AutoImageProcessor, pipeline

import koclip
from koclip.config import ConfigError
from koclip.models.open_clip import convert, hub_id, stock_source
from koclip.models.pretrained import load_image_side
from koclip.models.stock import bias_of, parts
from koclip.text import open_clip as tokenizers

TEXTS = [
    "a photo of a CAT",
    "Two  dogs, one_red\tball!",
    "초록 나무 아래 개",
    "",
    "The cat's mat; (3) 'x' -- 7.5% " * 20,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    for name in CHECKPOINTS:
        write(name, folder / name)
        convert(f"open_clip:local-dir:{folder / name}", folder / "stock" / name)
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_stock_model_embeds_as_open_clip(name: str, place: Path) -> None:
    """The same pixels and ids to 1e-6; then pictures and texts, which the processor reads."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{place / name}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{place / name}")
    encoder = koclip.load(place / "stock" / name)
    assert type(encoder.model).__name__ == CHECKPOINTS[name][3]
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = tokenize(TEXTS)
    with torch.no_grad():
        own = encoder.model.get_image_features(pixel_values=pixels).pooler_output
        difference = F.normalize(own, dim=-1) - model.eval().encode_image(pixels, normalize=True)
        assert difference.abs().max() <= 1e-6
        own = encoder.model.get_text_features(input_ids=ids).pooler_output
        texts = model.encode_text(ids, normalize=True)
        assert (F.normalize(own, dim=-1) - texts).abs().max() <= 1e-6
        images = model.encode_image(torch.stack([preprocess(picture) for picture in pictures()]), normalize=True)
    assert (encoder.encode_texts(TEXTS) - texts).abs().max() <= 1e-6
    encoder.processor.image_processor = AutoImageProcessor.from_pretrained(place / "stock" / name, backend="pil")
    assert (encoder.encode_images(pictures()) - images).abs().max() <= 1e-6
    assert parts(encoder.model).logit_scale.item() == model.logit_scale.item()
    bias = getattr(model, "logit_bias", None)
    assert bias_of(encoder.model) == (None if bias is None else bias.item())


@pytest.mark.parametrize("name", ["LAION", "SigLIP 2"])
def test_the_pipeline_scores_as_open_clip(name: str, place: Path) -> None:
    """Through the tokenizer with its padding, and without a mask where open_clip has none."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{place / name}")
    texts = TEXTS[:3]
    ids = open_clip.get_tokenizer(f"local-dir:{place / name}")(texts)
    with torch.no_grad():
        logits = model.eval().get_logits(preprocess(pictures()[0])[None], ids)[0][0]
    images = AutoImageProcessor.from_pretrained(place / "stock" / name, backend="pil")
    classify: Any = pipeline(
        "zero-shot-image-classification", model=str(place / "stock" / name), image_processor=images
    )
    answers = classify(pictures()[0], candidate_labels=texts, hypothesis_template="{}")
    scores = torch.tensor([next(each["score"] for each in answers if each["label"] == text) for text in texts])
    expected = logits.sigmoid() if name == "SigLIP 2" else logits.softmax(0)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_a_file_by_name_is_the_directory(place: Path, tmp_path: Path) -> None:
    """open_clip's package has the configuration and the BPE. Text lengths and pixels have open_clip's defaults."""
    settings = CHECKPOINTS["LAION"][0]
    (tmp_path / "tiny-laion.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / "tiny-laion.json")
    weights = place / "LAION" / "open_clip_model.safetensors"
    convert(f"open_clip:tiny-laion@{weights}", tmp_path / "stock")
    named, whole = (koclip.load(path) for path in (tmp_path / "stock", place / "stock" / "LAION"))
    assert torch.equal(named.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    assert not torch.equal(named.encode_images(pictures()), whole.encode_images(pictures()))  # other mean, deviation
    assert named.processor.image_processor.image_mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def test_the_tokenizer_in_the_directory_is_used_without_the_package(place: Path, tmp_path: Path, monkeypatch) -> None:
    """`push_to_hf_hub` writes OpenAI's tokenizer of transformers beside a model with open_clip's own."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"koclip\[peers\]"):
        convert(f"open_clip:local-dir:{place / 'LAION'}", tmp_path / "stock")
    convert(f"open_clip:local-dir:{place / 'SigLIP'}", tmp_path / "siglip")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).symlink_to(place / "LAION" / name)
    koclip.load(place / "stock" / "LAION").processor.tokenizer.save_pretrained(tmp_path)
    convert(f"open_clip:local-dir:{tmp_path}", tmp_path / "laion")
    own, stored = (koclip.load(path) for path in (place / "stock" / "LAION", tmp_path / "laion"))
    assert torch.equal(own.encode_texts(TEXTS), stored.encode_texts(TEXTS))


# Checkpoint, section, setting, value, and what the message names.
REFUSED: list[tuple[str, str, str, Any, str]] = [
    ("LAION", "vision_cfg", "no_ln_pre", True, "no_ln_pre"),
    ("LAION", "vision_cfg", "pool_type", "avg", "vision_cfg.pool_type"),
    ("LAION", "vision_cfg", "attentional_pool", True, "attentional_pool"),
    ("LAION", "vision_cfg", "ls_init_value", 1e-4, "ls_init_value"),
    ("LAION", "vision_cfg", "layers", [1, 1, 1, 1], "ResNet"),
    ("LAION", "vision_cfg", "act_kwargs", {"approximate": "sine"}, "act_kwargs"),
    ("LAION", "vision_cfg", "image_size", [32, 40], "image_size"),
    ("LAION", "vision_cfg", "image_size", 40, "position_embedding"),
    ("LAION", "vision_cfg", "of_the_future", 1, "of_the_future"),
    ("LAION", "text_cfg", "no_causal_mask", True, "no_causal_mask"),
    ("LAION", "text_cfg", "embed_cls", True, "embed_cls"),
    ("LAION", "text_cfg", "proj_bias", True, "proj_bias"),
    ("LAION", "text_cfg", "proj_type", "none", "proj_type"),
    ("LAION", "text_cfg", "pool_type", "first", "text_cfg.pool_type"),
    ("LAION", "text_cfg", "qk_norm", True, "qk_norm"),
    ("LAION", "text_cfg", "context_length", 41, "position_embedding"),
    ("LAION", "text_cfg", "vocab_size", 49_407, "vocab_size"),
    ("LAION", "text_cfg", "tokenizer_kwargs", {"strip_sep_token": True}, "strip_sep_token"),
    ("LAION", "text_cfg", "tokenizer_mode", "clips", "tokenizer_mode"),
    ("LAION", "text_cfg", "hf_model_name", "xlm-roberta-base", "hf_model_name"),
    ("LAION", "", "multimodal_cfg", {}, "multimodal_cfg"),
    ("MetaCLIP 2", "text_cfg", "eos_id", 3, "end token"),
    ("SigLIP", "vision_cfg", "timm_proj", "linear", "timm_proj"),
    ("SigLIP", "vision_cfg", "timm_pool", "avg", "timm_pool"),
    ("SigLIP", "vision_cfg", "timm_model_name", "test_resnet", "attention pooling"),
    ("SigLIP", "vision_cfg", "timm_model_name", "vit_of_the_future", "vit_of_the_future"),
    ("SigLIP", "vision_cfg", "timm_model_name", "vit_tiny_scaled_32", "ls1"),
    ("SigLIP", "vision_cfg", "image_size", 64, "image_size"),
    ("SigLIP", "text_cfg", "pool_type", "argmax", "text_cfg.pool_type"),
    ("SigLIP", "text_cfg", "no_causal_mask", False, "no_causal_mask"),
    ("SigLIP", "", "embed_dim", 32, "embed_dim"),
    ("SigLIP", "preprocess_cfg", "resize_mode", "longest", "resize_mode"),
]


@pytest.mark.parametrize(("name", "section", "key", "value", "named"), REFUSED)
def test_what_no_stock_class_holds_is_refused_by_name(
    name: str, section: str, key: str, value: Any, named: str, place: Path, tmp_path: Path
) -> None:
    for file in (place / name).iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = json.loads((place / name / "open_clip_config.json").read_text())
    owner = settings if section == "preprocess_cfg" else settings["model_cfg"]
    (owner[section] if section else owner)[key] = value
    (tmp_path / "open_clip_config.json").unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=named):
        convert(f"open_clip:local-dir:{tmp_path}", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_other_weights_are_refused(place: Path, tmp_path: Path) -> None:
    config = (place / "LAION" / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    file, spec = tmp_path / "open_clip_model.safetensors", f"open_clip:local-dir:{tmp_path}"
    weights = load_file(place / "LAION" / "open_clip_model.safetensors")
    extra = weights | {"visual.ln_of_the_future": torch.zeros(1)}
    fewer = {name: value for name, value in weights.items() if name != "visual.proj"}
    for changed, named in ((extra, "ln_of_the_future"), (fewer, "visual_projection")):
        save_file(changed, file)
        with pytest.raises(ConfigError, match=named):
            convert(spec, tmp_path / "stock")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="safetensors"):
        convert(spec, tmp_path / "stock")
    file.rename(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="no pickles"):
        convert(spec, tmp_path / "stock")


def test_a_directory_of_another_source_is_refused(tmp_path: Path) -> None:
    """A run that stopped before its first checkpoint may start again with another `model.clip`."""
    (tmp_path / "converted_from.txt").write_text("open_clip:local-dir:first", encoding="utf-8")
    assert stock_source("open_clip:local-dir:first", tmp_path) == str(tmp_path)
    with pytest.raises(ConfigError, match=r"local-dir:first.*local-dir:second"):
        stock_source("open_clip:local-dir:second", tmp_path)


def test_specs(tmp_path: Path) -> None:
    assert stock_source("org/clip", tmp_path) == "org/clip"
    assert hub_id("open_clip:hf-hub:org/clip") == "org/clip"
    assert hub_id("open_clip:local-dir:org/clip") is None
    assert hub_id("open_clip:ViT-B-32@laion2b_s34b_b79k") == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert hub_id("open_clip:ViT-B-32@weights.safetensors") is None
    assert hub_id("org/clip") is None
    for rest in ("ViT-B-32", "ViT-B-32@weights.pt", "hf-hub:a/b@openai", "No-Such-Model@laion2b", "ViT-B-32@no_tag"):
        with pytest.raises(ConfigError, match="expected"):
            convert(f"open_clip:{rest}", tmp_path / "stock")


def test_a_report_names_the_checkpoint(place: Path, tmp_path: Path, monkeypatch) -> None:
    """And embeds with the folder of the converted model."""
    sources: list[Any] = []
    monkeypatch.setattr("koclip.runs.session.report", lambda *args: sources.append(args[-1]))
    spec, run = f"open_clip:local-dir:{place / 'LAION'}", tmp_path / "run"
    options = ("--model.text_encoder", "same", "--output_dir", str(run))
    align(*arguments(spec, write_pairs(tmp_path / "pairs.parquet"), *options), reported=True)
    assert [(source.name, source.model) for source in sources] == [(spec, str(run / "source"))]


FROM_THE_HUB = """
import sys
from pathlib import Path
import open_clip_checkpoints  # timm's tiny model
from koclip.config import ConfigError
from koclip.models.open_clip import convert

convert("open_clip:hf-hub:org/siglip", Path(sys.argv[1]))
try:
    convert("open_clip:hf-hub:org/nothing", Path(sys.argv[2]))
except ConfigError as error:
    print(error)
"""


def test_a_hub_id(place: Path, tmp_path: Path) -> None:
    """The tokenizer is in the repository that the configuration names."""
    server = HubServer({})
    files = {file.name: file.read_bytes() for file in (place / "SigLIP").iterdir()}
    own = {name: files.pop(name) for name in ("open_clip_config.json", "open_clip_model.safetensors")}
    for name, content in (("org/siglip", own), ("timm/tiny", files)):
        server.repos[name] = Repo()
        server.repos[name].commit({path: (body, len(body) > 10_000) for path, body in content.items()})
        server.large |= {hashlib.sha256(body).hexdigest(): body for body in content.values()}
    names = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    names |= {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", FROM_THE_HUB, str(tmp_path / "stock"), str(tmp_path / "nothing")]
    done = subprocess.run(command, env=os.environ | names, capture_output=True, text=True, check=False)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "org/nothing has no open_clip_config.json" in done.stdout
    assert not (tmp_path / "nothing").exists()
    remote, local = (koclip.load(path) for path in (tmp_path / "stock", place / "stock" / "SigLIP"))
    assert torch.equal(remote.encode_texts(TEXTS), local.encode_texts(TEXTS))


def test_a_plain_path_names_the_right_form(place: Path) -> None:
    with pytest.raises(ConfigError, match=f"open_clip:local-dir:{place / 'LAION'}"):
        load_image_side(str(place / "LAION"))


@pytest.mark.parametrize("name", ["SigLIP", "SigLIP 2", "MetaCLIP 2"])
def test_tokenizers_clean_as_open_clip(name: str, place: Path) -> None:
    """Every character of the first planes in words; those that ftfy repairs are not compared."""
    tokenize = open_clip.get_tokenizer(f"local-dir:{place / name}")
    settings = json.loads((place / name / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    tokenizer = tokenizers.load("", str(place / name), settings)
    texts = [f" A{chr(code)}b {chr(code)}" for code in range(0x20, 0x3000) if chr(code).isprintable()]
    texts = [text for text in texts if open_clip.tokenizer.basic_clean(text) == text.strip()]
    assert len(texts) > 9_000
    options = {"padding": "max_length", "max_length": settings["context_length"], "truncation": True}
    own = tokenizer(texts, return_tensors="pt", **options).input_ids
    wrong = [text for text, row, other in zip(texts, own, tokenize(texts), strict=True) if not torch.equal(row, other)]
    assert wrong == []
