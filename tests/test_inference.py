"""`koclip.load` and what an `Encoder` offers."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer
from transformers import AutoConfig, CLIPModel

import koclip
from koclip.config import ConfigError
from koclip.encoders import Encoder, usable
from koclip.evaluation.embed import Embedder
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dual_encoder = tiny_dual_encoder()
    _, processor = from_scratch(tiny_config(), tiny_tokenizer())
    path = tmp_path_factory.mktemp("published") / "model"
    save_stock_model(path, dual_encoder.model, processor, dual_encoder.state_dict())
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Encoder:
    return koclip.load(directory, device="cpu")


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size).convert(mode)


def test_load_gives_a_float32_model_in_evaluation_mode(loaded: Encoder) -> None:
    model, processor = loaded.model, loaded.processor
    assert isinstance(model, CLIPModel)
    assert model.dtype == torch.float32
    assert not any(module.training for module in model.modules())
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings


@pytest.mark.parametrize("count", [0, 1, 7])
def test_any_number_of_images_and_texts(count: int, loaded: Encoder) -> None:
    images = loaded.encode_images([picture(seed) for seed in range(count)], batch_size=3)
    texts = loaded.encode_texts([f"그림 {'아주 ' * seed}" for seed in range(count)], batch_size=3)
    for embeddings in (images, texts):
        assert embeddings.shape == (count, 32)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(count))


def test_order_is_kept_whatever_the_lengths_and_the_batches(loaded: Encoder) -> None:
    texts = ["별", "아주 길고 긴 문장 하나가 여기 있다", "원", "조금 긴 문장", "a", "빨간 원 위의 파란 별", ""]
    alone = torch.cat([loaded.encode_texts([text]) for text in texts])
    torch.testing.assert_close(loaded.encode_texts(texts, batch_size=2), alone, atol=1e-6, rtol=0)
    assert (alone @ alone.T).fill_diagonal_(0).max() < 0.9999  # or order could not be seen
    pictures = [picture(seed) for seed in range(5)]
    alone = torch.cat([loaded.encode_images([image]) for image in pictures])
    torch.testing.assert_close(loaded.encode_images(pictures, batch_size=2), alone, atol=1e-6, rtol=0)
    assert (alone @ alone.T).fill_diagonal_(0).max() < 0.9999


def test_embeddings_are_those_of_the_stock_model(loaded: Encoder) -> None:
    model, processor = loaded.model, loaded.processor
    pictures, texts = [picture(1), picture(2)], ["빨간 원", "파란 별 하나"]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = model(**inputs)
    torch.testing.assert_close(loaded.encode_images(pictures), stock.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded.encode_texts(texts), stock.text_embeds, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "YCbCr"])
def test_pictures_of_any_mode(mode: str, loaded: Encoder) -> None:
    if mode == "I;16":
        gray = np.asarray(picture(0, "L"), dtype=np.uint16) * 257
        image, same = Image.fromarray(gray), picture(0, "L").convert("RGB")
    else:
        image = picture(0).convert("L").convert(mode) if mode != "CMYK" else picture(0, "CMYK")
        same = image.convert("RGB")
    got, wanted = loaded.encode_images([image, same])
    torch.testing.assert_close(got, wanted)


def test_transparency_is_white(loaded: Encoder) -> None:
    clear, white = Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("RGB", (40, 40), "white")
    got, wanted = loaded.encode_images([clear, white])
    torch.testing.assert_close(got, wanted)


def test_paths_are_read_upright(tmp_path: Path, loaded: Encoder) -> None:
    upright = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    got = loaded.encode_images([str(tmp_path / "turned.png"), tmp_path / "turned.png", upright])
    torch.testing.assert_close(got[:2], got[2:].expand(2, -1))


def test_texts_are_normalised_and_cut(loaded: Encoder) -> None:
    composed = "빨간 원 위에 있는 별"
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    texts = [composed, decomposed, f" <|endoftext|> {composed}", "긴 " * 500, "긴 " * 600]
    got = loaded.encode_texts(texts)
    assert torch.equal(got[0], got[1])
    torch.testing.assert_close(got[0], got[2])
    torch.testing.assert_close(got[3], got[4])


def test_raw_texts_reach_the_tokenizer_as_they_are(loaded: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation measures what a model does with decomposed text; users get composed text."""
    texts = [unicodedata.normalize("NFD", "빨간 별"), "별"]
    batches: list[list[str]] = []
    embed = loaded._embed_texts
    monkeypatch.setattr(loaded, "_embed_texts", lambda batch: batches.append(batch) or embed(batch))
    loaded.encode_texts(texts, raw=True)
    loaded.encode_texts(texts)
    Embedder(loaded, 8).texts(texts)
    assert batches == [texts[::-1], ["별", "빨간 별"], texts[::-1]]  # from short to long


def test_similarity_is_scaled_cosine_plus_bias(loaded: Encoder, directory: Path, tmp_path: Path) -> None:
    pictures, texts = [picture(1), picture(2)], ["빨간 원", "파란 별 하나", "별"]
    image, text = loaded.encode_images(pictures), loaded.encode_texts(texts)
    with torch.no_grad():
        inputs = loaded.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        stock = loaded.model(**inputs).logits_per_image
    torch.testing.assert_close(loaded.similarity(pictures, texts), stock, atol=1e-4, rtol=0)
    assert torch.equal(loaded.similarity(image, text), loaded.similarity(pictures, texts))
    assert loaded.bias == 0.0
    shutil.copytree(directory, tmp_path / "biased")
    config = AutoConfig.from_pretrained(directory)
    config.logit_bias = -7.5
    config.save_pretrained(tmp_path / "biased")
    biased = koclip.load(tmp_path / "biased", device="cpu")
    assert biased.bias == -7.5
    torch.testing.assert_close(biased.similarity(image, text), stock - 7.5, atol=1e-4, rtol=0)


def test_modes_are_left_as_they_were(loaded: Encoder) -> None:
    model = loaded.model
    model.train()
    model.vision_model.eval()  # as a frozen tower is
    before = {name: module.training for name, module in model.named_modules()}
    loaded.encode_texts(["별"])
    with pytest.raises(FileNotFoundError):
        loaded.encode_images(["nowhere.png"])
    assert {name: module.training for name, module in model.named_modules()} == before
    model.eval()


def test_load_refuses_weights_of_another_class(tmp_path: Path, directory: Path) -> None:
    _, processor = from_scratch(tiny_config(preset="timm:test_vit"), tiny_tokenizer())
    joint = tiny_dual_encoder(preset="timm:test_vit")
    save_stock_model(tmp_path / "joint", joint.model, processor, joint.state_dict())
    koclip.load(tmp_path / "joint", device="cpu")
    shutil.copy(directory / "config.json", tmp_path / "joint")  # a CLIPModel's, on other weights
    with pytest.raises(ConfigError, match=r"CLIPModel.*missing_keys"):
        koclip.load(tmp_path / "joint", device="cpu")


def test_load_refuses_missing_weights(tmp_path: Path, directory: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    model = CLIPModel(AutoConfig.from_pretrained(directory))
    weights = {name: value for name, value in model.state_dict().items() if name != "text_projection.weight"}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    with pytest.raises(ConfigError, match=r"text_projection\.weight"):
        koclip.load(tmp_path / "model", device="cpu")


def test_load_refuses_weights_of_other_sizes(tmp_path: Path, directory: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    config = AutoConfig.from_pretrained(directory)
    config.text_config.vocab_size += 1
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"mismatched_keys.*token_embedding"):
        koclip.load(tmp_path / "model", device="cpu")


def test_a_device_that_is_not_here_is_named():
    for name in ("cuda:99", "nowhere"):
        with pytest.raises(ConfigError, match=f"^device: .*{name}"):
            usable(name)
    assert usable("cpu").type == "cpu"
