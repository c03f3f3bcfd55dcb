"""M-CLIP, opened by name, embeds as its package does, which no longer loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peer_models import WIDTH, draw, saved, xlmr_tokenizer
from safetensors.torch import load_file, save_file
from test_encoders import TEXTS, close, pictures, publish, refusal
from test_peers import check_contract
from torch.nn import functional as F

from koclip.encoders import load


def mclip(directory: Path) -> Path:
    """As multilingual_clip's class saves it, with the buffer that transformers 4 wrote."""
    tokenizer = xlmr_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 42, "pad_token_id": 1, "type_vocab_size": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        base = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**WIDTH, **sizes))
        linear = torch.nn.Linear(32, 24)
        draw(base)
        draw(linear)
    publish(directory / "base", base, tokenizer)
    (directory / "base" / "model.safetensors").unlink()  # its weights are not read
    tokenizer.save_pretrained(directory)
    weights = {f"transformer.{name}": value for name, value in base.state_dict().items()}
    weights |= {f"LinearTransformation.{name}": value for name, value in linear.state_dict().items()}
    weights["transformer.embeddings.position_ids"] = torch.arange(42)[None]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    settings = {"model_type": "M-CLIP", "modelBase": str(directory / "base")}
    (directory / "config.json").write_text(json.dumps(settings | {"numDims": 24, "transformerDimensions": 32}))
    return directory


def test_mclip_embeds_as_its_package(tmp_path: Path) -> None:
    """The sums of multilingual_clip/pt_multilingual_clip.py, normalised."""
    directory, images = mclip(tmp_path / "mclip"), saved("CLIP", tmp_path / "clip")
    state = torch.get_rng_state()
    encoder = load(f"mclip:{directory}+{images}", "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    base = transformers.XLMRobertaModel(transformers.AutoConfig.from_pretrained(directory / "base")).eval()
    weights = load_file(directory / "model.safetensors")
    named = {name.removeprefix("transformer."): value for name, value in weights.items() if "Linear" not in name}
    base.load_state_dict({name: value for name, value in named.items() if "position_ids" not in name})
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        embs = base(**tokens)[0]
        att = tokens["attention_mask"]
        embs = (embs * att.unsqueeze(2)).sum(dim=1) / att.sum(dim=1)[:, None]
        wanted = F.linear(embs, weights["LinearTransformation.weight"], weights["LinearTransformation.bias"])
    close(encoder.encode_texts(TEXTS), F.normalize(wanted, dim=-1))
    alone = load(str(images), "cpu")
    close(encoder.encode_images(pictures()), alone.encode_images(pictures()))
    assert encoder.scale == alone.scale
    check_contract(encoder, 32)
    assert encoder.unknown_share(["꿹", "고"]) == 1 / 4


def test_mclip_fingerprints(tmp_path: Path) -> None:
    directory, images = mclip(tmp_path / "mclip"), saved("CLIP", tmp_path / "clip")
    encoder = load(f"mclip:{directory}+{images}", "cpu")
    first = encoder.fingerprint()
    encoder.encode_texts(["별 " * 100])
    assert encoder.fingerprint() == first
    shutil.copytree(directory, tmp_path / "copy")
    assert load(f"mclip:{tmp_path}/copy+{images}", "cpu").fingerprint() == first
    weights = load_file(directory / "model.safetensors")
    weights["LinearTransformation.bias"][3] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    assert load(f"mclip:{tmp_path}/copy+{images}", "cpu").fingerprint() != first
    other = saved("ChineseCLIP", tmp_path / "other")
    assert load(f"mclip:{directory}+{other}", "cpu").fingerprint() != first


def test_mclip_refusals(tmp_path: Path) -> None:
    directory, images = mclip(tmp_path / "mclip"), saved("CLIP", tmp_path / "clip")
    assert "expected mclip:<text model>+<any of these, for images>" in refusal(f"mclip:{directory}")
    wider = saved("SigLIP", tmp_path / "wider")
    assert "(1, 32), (1, 24)" in refusal(f"mclip:{directory}+{wider}")
    with pytest.raises(ValueError, match="modelBase"):
        load(f"mclip:{images}+{images}", "cpu")
    weights = load_file(directory / "model.safetensors")
    for change, fault in (
        ({"LinearTransformation.bias": None}, "missing"),
        ({"more": torch.zeros(2)}, "more"),
        ({"LinearTransformation.bias": torch.zeros(7)}, "of other sizes"),
    ):
        changed: dict[str, Any] = {name: value for name, value in (weights | change).items() if value is not None}
        save_file(changed, directory / "model.safetensors")
        with pytest.raises(ValueError, match=fault):
            load(f"mclip:{directory}+{images}", "cpu")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^model: .*model\.safetensors"):
        load(f"mclip:{directory}+{images}", "cpu")
