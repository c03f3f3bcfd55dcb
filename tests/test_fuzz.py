"""koclip.data under fire: damaged pictures and hostile captions stop nothing, and every unusable row is listed."""

import dataclasses
import io
import json
import random
import re
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from loading import batches, config
from PIL import Image

from koclip.config import DataConfig, SourceConfig
from koclip.data.batches import Assembler, Sample
from koclip.data.order import BatchPart
from koclip.data.sources import Skip, row
from koclip.data.transforms import ImageError, Views, decode
from koclip.text.normalize import clean_captions, normalize

SEED = 20_240_607
COUNT = 1_000
MAX_PIXELS = 100_000
MODES = {"JPEG": "RGB L CMYK", "PNG": "RGB RGBA L LA P 1", "GIF": "P L", "BMP": "RGB L 1", "WEBP": "RGB RGBA"}
MUTATIONS = ["flipped bits", "truncation", "wrong header", "wrong size"]


def save(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def whole_images() -> list[bytes]:
    """Encode noise in every mode of every kind, some turned by EXIF, progressive, animated or compressed."""
    values = random.Random(SEED).randbytes(20 * 14 * 3)
    noise, sixteen = Image.frombytes("RGB", (20, 14), values), Image.frombytes("I;16", (21, 20), values)
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = [(kind, mode) for kind, modes in (MODES | {"TIFF": "RGB RGBA L CMYK 1"}).items() for mode in modes.split()]
    return [
        *(save(noise.convert(mode), kind) for kind, mode in modes),
        *(save(sixteen, kind) for kind in ("PNG", "TIFF")),
        *(save(noise, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")),
        *(save(noise, "TIFF", compression=name) for name in ("jpeg", "tiff_lzw", "tiff_adobe_deflate")),
        save(noise, "JPEG", progressive=True),
        save(noise, "GIF", save_all=True, append_images=[noise.rotate(90)]),
    ]


def mutate(rng: random.Random, data: bytearray, other: bytes, mutation: str) -> None:
    place, size = rng.randrange(len(data)), rng.randint(1, 40)
    if mutation == "flipped bits":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif mutation == "truncation":
        del data[place:]
    elif mutation == "wrong header":
        data[:size] = rng.choice([other[:size], rng.randbytes(size)])
    else:  # a large number in a field near the front
        number = struct.pack(rng.choice("<>") + rng.choice("HI"), rng.choice([0x7FFF, 0xEA60, 0xFFFF]))
        data[place % 200 : place % 200 + len(number)] = number


def mutated_images() -> list[bytes]:
    """Return `COUNT` damaged pictures; picture n has suffered mutation n % 4, and one in four another too."""
    rng = random.Random(SEED)
    whole = whole_images()
    images = []
    for number in range(COUNT):
        data = bytearray(rng.choice(whole))
        mutate(rng, data, rng.choice(whole), MUTATIONS[number % 4])
        if data and rng.random() < 0.25:
            mutate(rng, data, rng.choice(whole), rng.choice(MUTATIONS))
        images.append(bytes(data))
    return images


def png(width: int, height: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return an RGB PNG of compressed `rows`, with more `chunks` in front of them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def zeros(megabytes: int) -> bytes:
    """Compress zeros without ever holding them."""
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(10**6)) for _ in range(megabytes)), packer.flush()])


def crafted_images() -> dict[str, bytes]:
    """Return pictures that are small as files and huge in memory, and one that a reader of PIL's chokes on."""
    tiny, huge = zlib.compress(bytes(49 * 16)), zeros(300)
    real = png(10_000, 9_000, huge)
    spider = bytearray(save(Image.new("F", (5, 3)), "SPIDER"))
    spider[104:108] = struct.pack("=f", 1)  # says that it is picture 1 of a stack
    claims = {}
    for kind, form, *size in [("JPEG", ">HH", 3, 5), ("GIF", "<HH", 5, 3), ("BMP", "<ii", 5, 3)]:
        small = save(Image.new("RGB", (5, 3)), kind)
        claims[kind] = small.replace(struct.pack(form, *size), struct.pack(form, 60_000, 60_000))
    return claims | {
        "PNG of 90 megapixels": real,
        "PNG that says it has 3600 megapixels": png(60_000, 60_000, tiny),
        "PNG with a text of 300 MB": png(16, 16, tiny, (b"zTXt", b"Comment\0\0" + huge)),
        "PNG with a colour profile of 300 MB": png(16, 16, tiny, (b"iCCP", b"profile\0\0" + huge)),
        "icon of 90 megapixels": struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(real), 22) + real,
        "SPIDER": bytes(spider),
    }


def outcome(data: bytes, max_pixels: int) -> str:
    """Return "read", why the picture was refused, or "WRONG" and what else happened."""
    try:
        image = decode(data, max_pixels)
        assert (image.dtype, image.ndim, image.shape[0]) == (torch.uint8, 3, 3)
        assert 0 < image[0].numel() <= max_pixels
    except ImageError as error:
        return str(error)
    except Exception as error:  # any other error is a fault of `decode`: the caller fails on "WRONG"
        return f"WRONG {type(error).__name__}: {error}"
    return "read"


def decode_all() -> None:
    """Print the outcome of every mutated picture, then that, the seconds and the MB of every crafted one."""
    for data in mutated_images():
        print(json.dumps(outcome(data, MAX_PIXELS)), flush=True)  # noqa: T201
    for name, data in crafted_images().items():
        before, start = peak_memory(), time.process_time()
        said = outcome(data, DataConfig.max_image_pixels)
        print(json.dumps([name, said, time.process_time() - start, peak_memory() - before]), flush=True)  # noqa: T201


def peak_memory() -> float:
    """Return the most memory that this process ever held, in MB."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) / 1024


@pytest.fixture(scope="module")
def outcomes() -> list:
    """Decode all pictures in a process of their own, which a crash ends."""
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, timeout=300)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"seed {SEED}, picture {len(lines)}: {child.returncode}: {child.stderr[-2_000:]}"
    return lines


def test_damaged_pictures_are_read_or_refused(outcomes) -> None:
    said = outcomes[:COUNT]
    wrong = {number: text for number, text in enumerate(said) if text.startswith("WRONG") or not text}
    assert not wrong, f"seed {SEED}"
    for first, mutation in enumerate(MUTATIONS):
        kinds = Counter(text == "read" for text in said[first::4])
        assert kinds[True] >= 2, (mutation, kinds)
        assert kinds[False] >= 50, (mutation, kinds)
    assert len(set(said)) > 15
    assert "max_image_pixels" in str(said)


def test_bombs_are_refused_quickly_and_in_little_memory(outcomes) -> None:
    crafted = outcomes[COUNT:]
    assert len(crafted) == 9
    refused = [outcome for outcome in crafted if outcome[1] != "read" and not outcome[1].startswith("WRONG")]
    assert [outcome for outcome in refused if outcome[2] < 2 and outcome[3] < 150] == crafted


SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "[CLS]", "[sep]", "</s>", "<pad>"]
PIECES = ["<|endoftext|", "endoftext|>", "<||>", "[CLS", "<|start<|endoftext|>oftext|>", "\\u0000", "%s{}", '"']
JAMO = [chr(code) for first in (0x1100, 0x1161, 0x11A8, 0x3131) for code in range(first, first + 19)]
BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROL = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
SURROGATES = [chr(code) for code in range(0xD800, 0xE000, 37)]
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u3164"
BLANK = " \t\n\u3000\u00a0\u2028\u200b\ufeff\u3164"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd"
MARKS = [chr(code) for code in range(0x300, 0x370)]
ANY = [chr(code) for code in (*range(0x21, 0xD800, 11), *range(0xE000, 0x110000, 211))]
WORDS = ["고양이", "빨간 원", "a cat", "두 개", "קלט", "قط", "猫", "ㅋㅋㅋ", "café"]
NOTHING = [None, 3, 2.5, True, {"a": "b"}, [], [None, 3], [["개"]], ["", "  "], "", "nan", "None", "<NA>"]
LONG = ["가", "개<|endoftext|>", FAMILY, "\u202e가", "\x00\ud800a"]


def among_words(rng: random.Random, alphabet: Sequence[str]) -> str:
    return "".join("".join(rng.choices(alphabet, k=5)) + word for word in rng.sample(WORDS, 3))


def usable(rng: random.Random) -> object:
    """Make a hostile cell with a caption in it."""
    alphabets = [SPECIAL, PIECES, JAMO, BIDI, CONTROL, SURROGATES, INVISIBLE, [FAMILY], MARKS, ANY]
    others = [
        unicodedata.normalize("NFD", " ".join(rng.sample(WORDS, 4))),
        FAMILY * rng.randint(1, 300),
        "개" + "".join(rng.choices(MARKS, k=500)),
        "개" + rng.choice(MARKS) * 2_000,
        ["", None, " \t", rng.choice(SPECIAL), rng.choice(WORDS), 3],
    ]
    return rng.choice([among_words(rng, alphabet) for alphabet in alphabets] + others)


def unusable(rng: random.Random) -> object:
    """Make a cell without a caption."""
    alphabets = [SPECIAL, CONTROL, SURROGATES, BLANK]
    return rng.choice(
        [rng.choice(NOTHING), *("".join(rng.choices(letters, k=rng.randrange(50))) for letters in alphabets)]
    )


def hostile_captions() -> list[tuple[object, bool]]:
    """Return `COUNT` caption cells, and whether there is a caption in them."""
    rng = random.Random(SEED)
    long = [(text * (100_000 // len(text)), True) for text in LONG]
    return long + [(usable(rng), True) if rng.random() < 0.75 else (unusable(rng), False) for _ in range(COUNT - 5)]


def assert_tokens(ids: torch.Tensor, mask: torch.Tensor, tokenizer) -> None:
    """Every row is: begin, ordinary tokens, end, padding."""
    assert ids.shape == mask.shape
    assert ids.shape[1] <= tokenizer.model_max_length
    assert 0 <= int(ids.min()) <= int(ids.max()) < len(tokenizer)
    for tokens, length in zip(ids.tolist(), mask.sum(dim=1).tolist(), strict=True):
        assert length >= 3
        assert (tokens[0], tokens[length - 1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert not set(tokens[1 : length - 1]) & set(tokenizer.all_special_ids)
        assert set(tokens[length:]) <= {tokenizer.pad_token_id}
    assert torch.equal(mask, (torch.arange(ids.shape[1]) < mask.sum(dim=1, keepdim=True)).long())


def test_hostile_captions_become_tokens_or_skips(tokenizer, encoded) -> None:
    source = SourceConfig(path="rows.jsonl", captions={"ko": "text"})
    assembler = Assembler(config(source), tokenizer, Views(DataConfig(), 16))
    samples = []
    for number, (cell, good) in enumerate(hostile_captions()):
        sample = assembler.sample(row({"image": encoded(), "text": cell}, source, str(number)), 0, (0, number))
        assert isinstance(sample, Sample) == good, (SEED, number, str(cell)[:100])
        assert good or sample == Skip(f"{source.key}/{number}", "no usable caption", "rows.jsonl")
        samples += [sample] * good
    assert 0.7 < len(samples) / COUNT < 0.8
    batch = assembler.collate(samples, [], COUNT)
    assert_tokens(batch.input_ids, batch.attention_mask, tokenizer)
    for ids in tokenizer([sample.caption[:1_000] for sample in samples])["input_ids"]:  # beyond the longest length
        assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)


def test_a_caption_of_invisible_characters_is_none() -> None:
    for character in "\u200b\u202e\u2066\u200d\u1160\uffa0":
        assert clean_captions(character * 3) == [], ascii(character)


def test_a_flood_of_combining_marks_does_not_stop_the_loader() -> None:
    start = time.process_time()
    assert normalize("개" + "\u0301\u0316" * 50_000)
    assert time.process_time() - start < 1


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, outcomes) -> tuple[SourceConfig, dict[str, str]]:
    """Return a source of every damaged picture and every hostile caption, and by picture what to expect of its row."""
    folder = tmp_path_factory.mktemp("attacked")
    fine = save(Image.new("RGB", (5, 3), "red"), "PNG")
    lines, expected = [], {}
    for number, (image, (cell, good)) in enumerate(zip(mutated_images(), hostile_captions(), strict=True)):
        expected |= {f"image-{number}": outcomes[number], f"text-{number}": "read" if good else "no usable caption"}
        (folder / f"image-{number}").write_bytes(image)
        (folder / f"text-{number}").write_bytes(fine)
        lines.append(json.dumps({"image": f"image-{number}", "text": "빨간 원"}))
        lines.append(json.dumps({"image": f"text-{number}", "text": cell}, ensure_ascii=False))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="ignore")  # no lone surrogates
    return SourceConfig(path=str(folder / "rows.jsonl"), captions={"ko": "text"}), expected


@pytest.mark.parametrize("streaming", [False, True])
def test_an_attacked_source_gives_full_batches_and_lists_what_it_left_out(attacked, streaming, tokenizer) -> None:
    source, expected = attacked
    source = dataclasses.replace(source, streaming=streaming)
    # A worker decodes: its death would be a failed test, not the end of all tests. The pools hold every row once.
    options = {"num_workers": 1, "shuffle_buffer": 500, "max_image_pixels": MAX_PIXELS, "length_pool": 5}
    drawn = batches(config(source, **options, word_dropout=0.2), tokenizer, 2 * COUNT // 20, BatchPart(20))
    for batch in drawn:
        assert (batch.pixel_values.shape, len(batch.keys), len(batch.input_ids)) == ((20, 3, 16, 16), 20, 20)
        assert batch.num_drawn == 20 + len(batch.skipped)
        assert_tokens(batch.input_ids, batch.attention_mask, tokenizer)
    read = {name for name, reason in expected.items() if reason == "read"}
    assert {key.rsplit("/", 1)[1] for batch in drawn for key in batch.keys} == read
    skipped = {(skip.key.rsplit("/", 1)[1], skip.reason, skip.source) for batch in drawn for skip in batch.skipped}
    assert skipped == {(name, expected[name], source.path) for name in expected if name not in read}


if __name__ == "__main__":
    decode_all()
