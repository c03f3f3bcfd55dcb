"""A published directory loads in sentence-transformers and gives koclip's embeddings of Korean texts and pictures."""

import json
from pathlib import Path

import pytest
import sentence_transformers
import torch
from peer_models import saved
from PIL import Image

import koclip
from koclip.data.formats import scenes
from koclip.publishing.formats.sentence_transformers import describe

TEXTS = ["고양이가 창가에 앉아 있다", "빨간 원", "a red circle", "개 " * 60, "사진 📷 3장"]


def test_modules_are_named_as_every_version_that_is_allowed_knows_them(tmp_path: Path) -> None:
    """sentence-transformers 5.4 to 6.2; `sentence_transformers.base` exists from 6 on."""
    describe(saved("CLIP", tmp_path / "model"))
    modules = json.loads((tmp_path / "model" / "modules.json").read_text(encoding="utf-8"))
    assert [module["type"] for module in modules] == [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Normalize",
    ]


@pytest.mark.parametrize("kind", ["CLIP", "ChineseCLIP", "joint ViT", "joint timm"])
def test_the_same_vectors(kind: str, tmp_path: Path) -> None:
    directory = saved(kind, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert {file.name for file in describe(directory)} == {
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "config.json")
    }
    assert {name: (directory / name).read_bytes() for name in before} == before
    encoder = koclip.load(directory, "cpu")
    other = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    embeddings = other.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, encoder.encode_texts(TEXTS), atol=1e-6, rtol=0)
    pictures = [Image.fromarray(scenes.draw(scenes.scene("test", 0, number), number)) for number in range(3)]
    embeddings = other.encode(pictures, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, encoder.encode_images(pictures), atol=1e-6, rtol=0)
    assert other.similarity_fn_name == "cosine"
