"""One way to open a picture: training, evaluation, features, index, Space and `encode_images` see the same pixels."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import ColourEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer
from torchvision.transforms.v2.functional import to_pil_image

from koclip.config import DataConfig, IndexConfig
from koclip.data.batches import Assembler, Sample
from koclip.data.sources import Row, Skip
from koclip.data.transforms import CORRUPTIONS, ImageError, Views, corrupt, decode
from koclip.embeddings.readers import ImageReader
from koclip.encoders.transformers import TransformersEncoder
from koclip.evaluation import embed
from koclip.models.dual_encoder import from_scratch
from koclip.search import build

sys.path.insert(0, str(Path(__file__).parents[1] / "space"))

import guard

MAX_PIXELS = 10_000
SIDE = 16
ORIENTATION = ExifTags.Base.Orientation


def drawn(size: tuple[int, int] = (24, SIDE)) -> Image.Image:
    """Return a smooth picture that no turn leaves as it is."""
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pil(data: bytes) -> np.ndarray:
    """Return a picture's pixels as PIL turns them; where PIL cannot read the metadata, as they are stored."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        try:
            picture.getexif()
        except (SyntaxError, ValueError, LookupError, TypeError, struct.error):
            return np.asarray(picture.convert("RGB"))
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def pixels(data: bytes | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    return decode(data, max_pixels).permute(1, 2, 0).numpy()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif(order: str, kind: int, value: int, others: int = 2) -> bytes:
    """Return an EXIF segment whose orientation has this byte order and TIFF type, behind other tags."""
    small = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
    entries = [
        struct.pack(f"{order}HHI4s", 0x0100 + place, 3, 1, struct.pack(f"{order}H", 9)) for place in range(others)
    ]
    entries.append(
        struct.pack(f"{order}HHI", ORIENTATION, kind, 1) + struct.pack(f"{order}{small[kind]}", value).ljust(4, b"\0")
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return segment(0xE1, b"Exif\0\0" + head + b"".join(entries) + bytes(4))


def xmp(value: int, element: bool = False) -> bytes:
    orientation = f"<tiff:Orientation>{value}</tiff:Orientation>" if element else f'<a tiff:Orientation="{value}"/>'
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>" + orientation.encode() + b"</x:xmpmeta>")


def jpeg(segments: list[bytes], jfif: bool = True) -> bytes:
    """Return a JPEG with these segments in its head, its own JFIF segment before them or left out."""
    plain = encoded(drawn(), "JPEG", quality=95)
    length = struct.unpack(">H", plain[4:6])[0]
    head, rest = plain[2 : 4 + length], plain[4 + length :]
    return b"\xff\xd8" + (head if jfif else b"") + b"".join(segments) + rest


ORIENTATIONS = st.integers(0, 9)
SEGMENTS = st.one_of(
    st.builds(exif, st.sampled_from("<>"), st.sampled_from([1, 3, 4, 6, 8, 9]), ORIENTATIONS, st.integers(0, 3)),
    st.builds(xmp, ORIENTATIONS, st.booleans()),
    st.sampled_from(
        [
            segment(0xE1, b"Exif\0\0"),
            segment(0xE1, b"Exif\0\0no TIFF at all"),
            segment(0xE1, b"Exif\0\0II*\0\xff\xff\0\0"),
            segment(0xE2, b"ICC_PROFILE\0\1\1profile"),
            segment(0xED, b"Photoshop 3.0\0"),
            segment(0xE0, b"JFXX\0\x13"),
            segment(0xFE, b"a comment"),
        ]
    ),
)


@settings(max_examples=300, deadline=None)
@given(segments=st.lists(SEGMENTS, max_size=4), jfif=st.booleans())
def test_a_jpeg_is_turned_as_pil_turns_it_whatever_stands_in_its_head(segments, jfif) -> None:
    data = jpeg(segments, jfif)
    np.testing.assert_array_equal(pixels(data), by_pil(data))


HEADS = {
    "XMP before EXIF": [xmp(1), exif("<", 3, 6)],
    "XMP alone": [xmp(6)],
    "big-endian EXIF with LONG": [exif(">", 4, 6)],
    "little-endian EXIF with BYTE": [exif("<", 1, 6)],
    "EXIF that cannot be read": [segment(0xE1, b"Exif\0\0no TIFF at all"), xmp(6)],
    "plain": [exif("<", 3, 8)],
}


@pytest.fixture(scope="module")
def model():
    _, processor = from_scratch(tiny_config(), tiny_tokenizer())
    return TransformersEncoder(tiny_dual_encoder().model.eval(), processor)


class Watching(ColourEncoder):
    """Keeps the pictures that it is shown."""

    def _embed_images(self, images):
        self.seen = list(images)
        return super()._embed_images(images)


@pytest.mark.parametrize("head", HEADS)
def test_every_path_sees_the_same_pixels(head, model, tmp_path) -> None:
    data = jpeg(HEADS[head])
    file = tmp_path / "photos" / "a.jpg"
    file.parent.mkdir()
    file.write_bytes(data)
    right = by_pil(data)
    row = Row(file, {"ko": ["사진"]}, "a")
    upright = torch.from_numpy(right.copy()).permute(2, 0, 1)
    views = Views(DataConfig(num_crops=1), SIDE)
    expected = views.numbered(upright, b"", 0)

    trained = Assembler(DataConfig(num_crops=1), tiny_tokenizer(), views).sample(row, 0, (0,))
    assert isinstance(trained, Sample)
    assert trained.seen.pixels is not None
    assert torch.equal(trained.seen.pixels, expected)
    features = ImageReader(views, MAX_PIXELS).read([row], wanted=lambda _: True).inputs
    assert torch.equal(features[0, 0], expected)
    np.testing.assert_array_equal(np.asarray(embed.Images([row])[0]), right)
    np.testing.assert_array_equal(np.asarray(guard.read_picture(file)[0]), right)
    encoder = Watching()
    build.build(IndexConfig(model="colours", images=str(file.parent)), encoder, tmp_path / "index")
    np.testing.assert_array_equal(np.asarray(encoder.seen[0]), right)
    given = [str(file), file, Image.open(file), Image.fromarray(right)]
    embeddings = model.encode_images(given)
    torch.testing.assert_close(embeddings, embeddings[-1:].expand(4, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_kind_is_turned_as_pil_turns_it(kind, orientation, model) -> None:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    more = {"save_all": True, "append_images": [drawn().rotate(180)]} if kind == "MPO" else {}
    data = encoded(drawn(), kind, exif=tags, **more)
    right = by_pil(data)
    np.testing.assert_array_equal(pixels(data), right)
    embeddings = model.encode_images([Image.open(io.BytesIO(data)), Image.fromarray(right)])
    torch.testing.assert_close(embeddings[:1], embeddings[1:], atol=1e-6, rtol=0)


XMP = b'<x:xmpmeta><a tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_xmp_turns_every_kind_that_has_no_exif(kind) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    options = {"PNG": {"pnginfo": info}, "TIFF": {"tiffinfo": {700: XMP}}}.get(kind, {"xmp": XMP})
    data = encoded(drawn(), kind, **options)
    assert pixels(data).shape == (24, SIDE, 3)
    np.testing.assert_array_equal(pixels(data), by_pil(data))


@pytest.mark.parametrize(
    "data",
    [
        encoded(drawn(), "JPEG", keep_rgb=True),
        encoded(drawn().convert("CMYK"), "JPEG"),
        encoded(drawn(), "JPEG", icc_profile=b"a profile"),
        encoded(drawn().convert("P"), "PNG"),
        encoded(drawn(), "PNG", save_all=True, append_images=[drawn().rotate(180)]),
        encoded(drawn(), "GIF", save_all=True, append_images=[drawn().rotate(180)]),
        encoded(drawn(), "WEBP", save_all=True, append_images=[drawn().rotate(180)], lossless=True),
        encoded(drawn(), "MPO", save_all=True, append_images=[drawn().rotate(180)]),
    ],
    ids=["RGB JPEG", "CMYK", "ICC", "palette", "APNG", "GIF", "WebP", "MPO"],
)
def test_other_kinds_have_pils_pixels_of_the_first_picture(data) -> None:
    np.testing.assert_array_equal(pixels(data), by_pil(data))


def test_a_phones_jpeg_of_several_pictures_does_not_move(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(drawn(), "MPO", save_all=True, append_images=[drawn()]))
    assert guard.read_picture(tmp_path / "a.jpg")[1] is False
    (tmp_path / "b.gif").write_bytes(encoded(drawn(), "GIF", save_all=True, append_images=[drawn().rotate(180)]))
    assert guard.read_picture(tmp_path / "b.gif")[1] is True


def test_a_picture_is_turned_once(model) -> None:
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    opened = Image.open(io.BytesIO(encoded(drawn(), "PNG", exif=tags)))
    upright = ImageOps.exif_transpose(opened)  # what a careful caller gives
    embeddings = model.encode_images([opened, upright, opened.convert("RGB")])
    torch.testing.assert_close(embeddings, embeddings[1:2].expand(3, -1), atol=1e-6, rtol=0)
    assert opened.size == (24, SIDE)  # the caller's own is left as it was


def tiff(bits: int, sample_format: int, data: bytes, white_is_zero: bool = False) -> bytes:
    """Return an uncompressed gray TIFF one pixel high. Sample formats: 1 unsigned, 2 signed, 3 floating point."""
    width = 8 * len(data) // bits
    short, long = ("HH", 3), ("I", 4)
    head = 8 + 2 + 12 * 10 + 4
    tags = {
        **{256: (short, width), 257: (short, 1), 258: (short, bits), 259: (short, 1), 262: (short, not white_is_zero)},
        **{273: (long, head), 277: (short, 1), 278: (short, 1), 279: (long, len(data)), 339: (short, sample_format)},
    }
    entries = b""
    for tag, ((form, kind), value) in tags.items():
        entries += struct.pack("<HHI", tag, kind, 1) + struct.pack(f"<{form}", *([value] if kind == 4 else [value, 0]))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def values(kind: str, *numbers: float) -> bytes:
    return np.array(numbers, dtype=kind).tobytes()


def png16(*numbers: int, colour: bool = False, transparent: int | None = None) -> bytes:
    """Return a PNG of 16 bits, one pixel high."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = np.repeat(np.array(numbers, dtype=">u2"), 3 if colour else 1).tobytes()
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", len(numbers), 1, 16, 2 if colour else 0, 0, 0, 0))
    chunks += chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


SCALED = {
    "floats of 0 to 1": (tiff(32, 3, values("<f4", 0, 0.5, 1)), [0, 128, 255]),
    "floats of 0 to 1, white is 0": (tiff(32, 3, values("<f4", 0, 0.5, 1), white_is_zero=True), [255, 127, 0]),
    "floats that are all 0": (tiff(32, 3, values("<f4", 0, 0)), [0, 0]),
    "PFM": (b"Pf\n3 1\n-1.0\n" + values("<f4", 0, 0.5, 1), [0, 128, 255]),
    "16 bits": (tiff(16, 1, values("<u2", 0, 256, 65_535)), [0, 1, 255]),
    "16 bits, white is 0": (tiff(16, 1, values("<u2", 0, 65_535), white_is_zero=True), [255, 0]),
    "12 bits": (tiff(12, 1, bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])), [255, 0, 128, 0]),
    "PGM of 10 bits": (b"P5\n2 1\n1023\n" + values(">u2", 0, 1023), [0, 255]),
    "PNG of 16 bits": (png16(0, 32_768, 65_535), [0, 128, 255]),
    "PNG of 16 bits with a transparent gray": (png16(0, 32_768, 65_535, transparent=0), [255, 128, 255]),
    "PNG of 16 bits that is black": (png16(0, 0), [0, 0]),
}
REFUSED = {
    "floats of 0 to 255": tiff(32, 3, values("<f4", 0, 128, 255)),
    "floats of -1 to 1": tiff(32, 3, values("<f4", -1, 0, 1)),
    "floats that are no numbers": tiff(32, 3, values("<f4", 0, np.nan, 1)),
    "floats without end": tiff(32, 3, values("<f4", 0, np.inf)),
    "floats of next to nothing": tiff(32, 3, values("<f4", 0, 1e-4)),
    "32 bits": tiff(32, 1, values("<u4", 0, 4_294_967_295)),
    "32 bits of 0 to 1000": tiff(32, 1, values("<u4", 0, 1_000)),
    "32 bits of 0 to 255": tiff(32, 1, values("<u4", 0, 255)),
    "32 bits, signed": tiff(32, 2, values("<i4", -5, 70_000)),
    "16 bits, signed": tiff(16, 2, values("<i2", -5, 300)),
    "16 bits of 0 to 255": tiff(16, 1, values("<u2", 0, 100, 255)),
    "PNG of 16 bits of 0 to 255": png16(0, 100, 255),
    "colour PNG of 16 bits of 0 to 255": png16(0, 100, 255, colour=True),
    "floats of 64 bits": tiff(64, 3, values("<f8", 0, 1)),
}


@pytest.mark.parametrize("name", SCALED)
def test_deep_gray_values_are_scaled(name, model) -> None:
    data, right = SCALED[name]
    assert pixels(data)[0].tolist() == [[value] * 3 for value in right]
    opened = Image.open(io.BytesIO(data))
    embeddings = model.encode_images([opened, to_pil_image(decode(data, MAX_PIXELS))])
    torch.testing.assert_close(embeddings[:1], embeddings[1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_values_without_an_agreed_brightness_are_refused(name, model, tmp_path) -> None:
    with pytest.raises(ImageError):
        decode(REFUSED[name], MAX_PIXELS)
    (tmp_path / "a.tif").write_bytes(REFUSED[name])
    with pytest.raises(ImageError, match=r"a\.tif"):
        model.encode_images([drawn(), tmp_path / "a.tif"])


def test_a_pil_image_that_cannot_be_used_is_named_by_its_place(model) -> None:
    floats = Image.fromarray(np.array([[0, 300]], dtype=np.float32))
    for image in (floats, Image.new("RGB", (400, 1)), Image.open(io.BytesIO(encoded(drawn(), "PNG")[:200]))):
        with pytest.raises(ImageError, match=r"^images\[1\]: "):
            model.encode_images([drawn(), image])


NARROW = """
import resource, sys
from pathlib import Path
from PIL import Image
sys.path[:0] = sys.argv[2:]
import koclip
from koclip.config import DataConfig, IndexConfig
from koclip.data.batches import Assembler
from koclip.embeddings.readers import ImageReader
from koclip.data.sources import Row, Skip
from koclip.data.transforms import Views
from koclip.encoders.transformers import TransformersEncoder
from koclip.models.dual_encoder import from_scratch
from koclip.search import build
from fake_encoder import ColourEncoder
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer

folder = Path(sys.argv[1])
model, (_, processor) = tiny_dual_encoder().model.eval(), from_scratch(tiny_config(), tiny_tokenizer())
processor.image_processor.size = {"shortest_edge": 224}
processor.image_processor.crop_size = {"height": 32, "width": 32}
encoder = TransformersEncoder(model, processor)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, hard))  # bytes
views = Views(DataConfig(num_crops=1), 224)
for path in sorted((folder / "photos").glob("narrow*")):
    row = Row(path, {"ko": ["사진"]}, "narrow")
    print(type(Assembler(DataConfig(num_crops=1), tiny_tokenizer(), views).sample(row, 0, (0,))).__name__)
    print("listed" if ImageReader(views, 10**8).read([row], lambda _: True).items[0].reason else "used")
    for image in (path, Image.open(path)):
        try:
            print(encoder.encode_images([image]).shape)
        except ValueError as error:
            print(type(error).__name__)
config = IndexConfig(model="c", images=str(folder / "photos"))
print([skip.key for skip in build.build(config, ColourEncoder(), folder / "index")[1]])
"""


def test_a_narrow_picture_is_refused_before_it_is_resized(tmp_path) -> None:
    """Resized to a shorter side of 224, one of 20,000 x 1 would have a thousand million pixels: 3 GB."""
    (tmp_path / "photos").mkdir()
    names = []
    for size in ((20_000, 1), (1, 20_000), (200_000, 1), (301, 1)):
        names.append(f"narrow-{len(names)}.png")
        Image.new("RGB", size).save(tmp_path / "photos" / names[-1])
        with pytest.raises(guard.RefusedError):
            guard.read_picture(tmp_path / "photos" / names[-1])
    drawn().save(tmp_path / "photos" / "other.png")
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    child = subprocess.run(
        [sys.executable, "-c", NARROW, str(tmp_path), *paths], capture_output=True, text=True, check=False, timeout=300
    )
    assert child.stdout.split("\n")[:-1] == [
        *(["Skip", "listed", "ImageError", "ImageError"] * len(names)),
        str(names),
    ], child.stderr


@pytest.mark.parametrize("size", [(300, 1), (2, 600), (96, 64), (1, 1)])
def test_pictures_of_other_forms_are_used(size) -> None:
    image = decode(encoded(Image.new("RGB", size, "red"), "PNG"), MAX_PIXELS)
    assert Views(DataConfig(num_crops=1), 32).numbered(image, b"", 0).shape == (3, 32, 32)
    for name in CORRUPTIONS:
        assert corrupt(image, name, 5, seed=0).shape == image.shape


def test_the_kinds_are_named_where_none_of_them_fits(tmp_path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(ImageError, match=r"JPEG, PNG, .*AVIF"):
        decode(heic, MAX_PIXELS)
    sample = Assembler(DataConfig(), tiny_tokenizer(), Views(DataConfig(), SIDE)).sample(
        Row(tmp_path / "a\0b.jpg", {"ko": ["사진"]}, "a"), 0, (0,)
    )
    assert isinstance(sample, Skip)
