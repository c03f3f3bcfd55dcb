"""koclip.data.transforms: any picture -> RGB, and the training transform."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, CLIPImageProcessor

from koclip.config import DataConfig
from koclip.data.transforms import ImageError, Views, decode

MAX_PIXELS = 10_000


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Return a smooth random picture."""
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data, MAX_PIXELS)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def png16(values: np.ndarray, colour_type: int) -> bytes:
    """Encode (H, W, channels) 16-bit values; PIL cannot write 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        (mode, kind, options)
        for kind, options, modes in (
            ("JPEG", {}, ("RGB", "L", "CMYK")),
            ("JPEG", {"progressive": True, "subsampling": 0}, ("RGB", "L", "CMYK")),
            ("PNG", {}, ("RGB", "L", "1", "P")),
            ("TIFF", {}, ("RGB", "L", "1", "P", "CMYK")),
            ("GIF", {}, ("RGB", "L", "1", "P")),
        )
        for mode in modes  # that PIL writes
    ],
)
def test_opaque_pictures_have_pils_pixels(mode, kind, options) -> None:
    data = save(noise(mode), kind, **options)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_goes_on_white(mode, kind) -> None:
    colour = (0, 0, 0, 128) if mode == "RGBA" else (0, 128)
    half = pixels(save(Image.new(mode, (4, 4), colour), kind, lossless=True))
    np.testing.assert_allclose(half, 127, atol=1)
    clear = pixels(save(Image.new(mode, (4, 4), (*colour[:-1], 0)), kind, lossless=True, exact=True))
    np.testing.assert_array_equal(clear, 255)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_goes_on_white(mode) -> None:
    picture = Image.new(mode, (4, 4), 0)
    key = (0, 0, 0) if mode == "RGB" else 0
    np.testing.assert_array_equal(pixels(save(picture, "PNG", transparency=key)), 255)
    if mode == "P":
        np.testing.assert_array_equal(pixels(save(picture, "GIF", transparency=key)), 255)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (6, 9, 3))
    np.testing.assert_array_equal(pixels(png16(values, 2)), values >> 8)
    np.testing.assert_array_equal(pixels(png16(values[..., :1], 0)), np.repeat(values[..., :1] >> 8, 3, axis=-1))
    tiff = save(Image.fromarray(values[..., 0].astype(np.uint16)), "TIFF")
    np.testing.assert_array_equal(pixels(tiff), np.repeat(values[..., :1] >> 8, 3, axis=-1))
    opaque = np.concatenate([values, np.full_like(values[..., :1], 65_535)], axis=-1)
    np.testing.assert_array_equal(pixels(png16(opaque, 6)), values >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind, orientation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(noise(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(upright))
    assert pixels(data).shape[0] == (24 if orientation < 5 else 40)


def test_the_first_frame_of_an_animation_is_used() -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "WEBP"):
        data = save(red, kind, save_all=True, append_images=[blue])
        assert pixels(data)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_paths_and_pixels(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(save(noise(), "PNG"))
    drawn = np.array(noise())
    assert torch.equal(decode(tmp_path / "a.png", MAX_PIXELS), decode(drawn, MAX_PIXELS))


def broken() -> dict[str, bytes]:
    jpeg, png, gif = (save(noise(), kind) for kind in ("JPEG", "PNG", "GIF"))
    return {
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "JPEG without its end": jpeg[:-20],
        "JPEG header only": jpeg[:30],
        "half a PNG": png[: len(png) // 2],
        "PNG with a wrong checksum": png.replace(b"IDAT", b"IDAX"),
        "half a GIF": gif[:20],
        "bomb": save(Image.new("1", (101, 100)), "PNG"),
        "bomb that PIL refuses": save(Image.new("L", (4, 4)), "BMP").replace(
            struct.pack("<ii", 4, 4), struct.pack("<ii", 60_000, 60_000)
        ),
    }


@pytest.mark.parametrize("name", broken())
def test_broken_pictures_raise_image_error(name) -> None:
    with pytest.raises(ImageError) as caught:
        decode(broken()[name], MAX_PIXELS)
    reason = str(caught.value)
    assert reason
    assert "\n" not in reason
    assert "0x" not in reason  # no memory address: reasons are compared between runs


def test_missing_pictures_raise_image_error(tmp_path) -> None:
    with pytest.raises(ImageError, match="no image"):
        decode(None, MAX_PIXELS)
    with pytest.raises(ImageError, match=r"FileNotFoundError.*gone\.png"):
        decode(tmp_path / "gone.png", MAX_PIXELS)
    with pytest.raises(ImageError, match="IsADirectoryError"):
        decode(tmp_path, MAX_PIXELS)
    with pytest.raises(ImageError, match=r"^101 x 100 pixels; data.max_image_pixels is 10000$"):
        decode(broken()["bomb"], MAX_PIXELS)


def test_no_damage_raises_anything_else() -> None:
    rng = np.random.default_rng(0)
    whole = [save(noise(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        data = bytearray(whole[int(rng.integers(len(whole)))])
        for place in rng.integers(0, rng.choice([64, len(data)]), 4):
            data[place] = int(rng.integers(256))
        try:
            decode(bytes(data), MAX_PIXELS)
            outcomes["read"] += 1
        except ImageError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def picture(side: int = 48) -> torch.Tensor:
    return decode(np.array(noise(size=(side, side))), MAX_PIXELS)


def test_equal_seeds_give_equal_crops_and_leave_pytorch_alone() -> None:
    config = DataConfig(crop_scale=(0.3, 1.0), horizontal_flip=0.5, color_jitter=0.3, grayscale=0.2, rotation=10)
    transform = Views(config, 32).random
    before = torch.get_rng_state()
    crops = [transform(picture(), seed) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(torch.equal(transform(picture(), seed), crop) for seed, crop in enumerate(crops))
    assert len({crop.numpy().tobytes() for crop in crops}) == 8
    assert all(crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 for crop in crops)


def test_crops_keep_the_share_they_are_told_to_keep() -> None:
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100)
    wide = [Views(DataConfig(crop_scale=(0.9, 1.0)), 100).random(ramp, seed) for seed in range(40)]
    tight = [Views(DataConfig(crop_scale=(0.1, 0.2)), 100).random(ramp, seed) for seed in range(40)]
    assert min(int(crop.max()) - int(crop.min()) for crop in wide) >= 80  # 0.9 of the area at most 1.11 : 1
    assert max(int(crop.max()) - int(crop.min()) for crop in tight) <= 55


def test_flips_are_off_unless_asked_for() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32)
    plain = [Views(DataConfig(), 32).random(ramp, seed) for seed in range(50)]
    flipped = [Views(DataConfig(horizontal_flip=0.5), 32).random(ramp, seed) for seed in range(50)]
    assert all(crop[0, 0, 0] < crop[0, 0, -1] for crop in plain)
    assert 10 < sum(bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in flipped) < 40


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("side", [32, 48, 90])
def test_an_uncropped_square_equals_the_saved_processor(side, backend, tmp_path) -> None:
    sizes = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    CLIPImageProcessor(**sizes).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    expected = processor(noise(size=(side, side)), return_tensors="pt")["pixel_values"][0]
    cropped = Views(DataConfig(crop_scale=(1.0, 1.0)), 48).random(picture(side), 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    assert ((cropped / 255 - mean) / std - expected).abs().max() <= 1.01 / 255 / min(processor.image_std)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2)])
def test_odd_sizes_survive(size) -> None:
    image = decode(save(Image.new("RGB", size, "red"), "PNG"), MAX_PIXELS)
    assert Views(DataConfig(), 16).random(image, 0).shape == (3, 16, 16)
