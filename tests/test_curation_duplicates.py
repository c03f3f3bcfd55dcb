"""Near-duplicates: JPEG, other sizes, mirrored and cropped copies are found, and other pictures stay."""

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn
from test_curation import encoded, picture, reasons_by_row, settings, write_rows

from koclip.config import DuplicateRules
from koclip.curation import duplicates
from koclip.curation.duplicates import cosines, mirrored, picture_hashes, similar
from koclip.curation.pictures import SIDE
from koclip.curation.pipeline import curate

NUM_ROWS, COPIES = 100, 10


def cut(image: Image.Image, left: float, top: float, share: float) -> Image.Image:
    width, height = image.size
    right, bottom = (left + share) * width, (top + share) * height
    return image.crop((round(left * width), round(top * height), round(right), round(bottom)))


CHANGES = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=40),
    "resized": lambda image: encoded(image.resize((60, 50)), "JPEG", quality=90),
    "mirrored": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", quality=80),
    "cropped": lambda image: encoded(cut(image, 0.03, 0.02, 0.93), "JPEG", quality=90),
    "corner": lambda image: encoded(cut(image, 0.0, 0.1, 0.9), "JPEG", quality=90),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):
    """Curate pictures and copies of some; return the reasons by row. Row 100 + n is a copy of row n."""
    folder = tmp_path_factory.mktemp("duplicates")
    images = [picture(number, 120, 100) for number in range(NUM_ROWS)]
    pictures = [encoded(image) for image in images]
    originals = iter(range(NUM_ROWS))
    pictures += [change(images[next(originals)]) for change in CHANGES.values() for _ in range(COPIES)]
    captions = [f"여러 색이 섞인 그림 {number}" for number in range(len(pictures))]
    source = write_rows(folder / "raw.parquet", captions, pictures)
    curate(settings(source, folder / "clean"))
    return reasons_by_row(folder / "clean")


def test_of_a_picture_and_its_copy_the_larger_stays(result):
    assert set(result.values()) == {"near-duplicate"}
    smaller = {NUM_ROWS + place for place in range(COPIES, 2 * COPIES)}  # resized
    smaller |= {NUM_ROWS + place for place in range(3 * COPIES, 5 * COPIES)}  # cropped
    dropped = {row % NUM_ROWS for row in result}
    assert len(dropped) == len(result)
    assert len(dropped & set(range(len(CHANGES) * COPIES))) / len(CHANGES) / COPIES >= 0.95
    assert len(dropped & set(range(len(CHANGES) * COPIES))) / len(result) >= 0.95
    assert len(smaller & set(result)) / len(smaller) >= 0.95


def test_the_hash_has_the_signs_of_the_cosine_transform():
    thumbnails = np.random.default_rng(0).uniform(0, 255, (3, SIDE, SIDE)).astype(np.float32)
    expected = dctn(thumbnails.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(3, -1) > 0
    expected[:, 0] = False
    hashes = picture_hashes(thumbnails, crops=False)
    np.testing.assert_array_equal(np.unpackbits(hashes[:, :1].copy().view(np.uint8), axis=1), expected)
    np.testing.assert_array_equal(mirrored(hashes), picture_hashes(thumbnails[:, :, ::-1], crops=False))
    np.testing.assert_allclose(cosines()[0], 1)


def test_a_part_of_a_picture_has_the_hash_of_that_part():
    smooth = np.asarray(picture(3, 640, 640).convert("L"), np.float32)
    part = np.asarray(Image.fromarray(smooth).crop((0, 0, 608, 608)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    whole = np.asarray(Image.fromarray(smooth).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    own = picture_hashes(whole[None], crops=True)[0]
    assert own.shape == (19,)
    distances = np.bitwise_count(own ^ picture_hashes(part[None], crops=False)[0, 0])
    assert distances[1] <= 1
    assert distances[1] < distances[0]


@pytest.mark.parametrize("max_distance", [0, 1, 5, 7, 16])
@pytest.mark.parametrize(("num_queries", "num_hashes"), [(1, 1), (40, 300), (400, 50)])
def test_bands_find_exactly_the_pairs_of_all_comparisons(max_distance, num_queries, num_hashes, monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, num_hashes, np.uint64) << np.uint64(1)
    queries = rng.integers(0, 2**63, (num_queries, 3), np.uint64) << np.uint64(1)
    for number in range(num_queries):  # copies with up to `max_distance` + 1 different bits
        queries[number, number % 3] = hashes[number % num_hashes]
        for bit in rng.choice(64, number % (max_distance + 2), replace=False):
            queries[number, number % 3] ^= np.uint64(1) << np.uint64(bit)
    hashes, queries = (values & ~np.uint64(1 << 7) for values in (hashes, queries))
    expected = np.argwhere(np.bitwise_count(queries[:, :, None] ^ hashes) <= max_distance)
    assert len(expected) >= num_queries // 2
    np.testing.assert_array_equal(similar(queries, hashes, max_distance), expected)
    monkeypatch.setattr(duplicates, "_LOOKED_UP", 64)  # many blocks
    np.testing.assert_array_equal(similar(queries, hashes, max_distance, num_threads=3), expected)


@pytest.mark.parametrize("copies", [254, 255, 256, 700])
def test_many_equal_hashes_are_all_found(copies):
    hashes = np.full(copies, 0x123456789ABCDE00, np.uint64)
    queries = np.array([[0x123456789ABCDE00], [0x123456789ABCDE01], [0x0EDCBA9876543200]], np.uint64)
    expected = [[query, 0, place] for query in (0, 1) for place in range(copies)]
    assert similar(queries, hashes, 3).tolist() == expected


def test_no_hashes_are_similar_to_none():
    assert similar(np.empty((0, 1), np.uint64), np.empty(0, np.uint64), 7).shape == (0, 3)


def test_rows_with_the_same_picture_and_other_captions_stay(tmp_path):
    copies = [encoded(picture(1)), encoded(picture(1)), encoded(picture(1)), encoded(picture(2))]
    source = write_rows(tmp_path / "raw.parquet", ["노는 강아지", "뛰는 강아지", "노는 강아지", "노는 강아지"], copies)
    curate(settings(source, tmp_path / "clean"))
    assert reasons_by_row(tmp_path / "clean") == {2: "repeated pair"}


def test_the_order_of_the_rows_does_not_decide_which_picture_stays(tmp_path):
    images = [encoded(picture(1, 60, 50)), encoded(picture(1, 120, 100)), encoded(picture(1, 90, 75))]
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        source = write_rows(tmp_path / f"{name}.parquet", ["노는 강아지"] * 3, [images[place] for place in order])
        curate(settings(source, tmp_path / name, shard_size=1))
        assert set(reasons_by_row(tmp_path / name)) == {place for place in range(3) if order[place] != 1}


def test_duplicates_stay_if_the_rule_is_off(tmp_path):
    source = write_rows(tmp_path / "raw.parquet", ["노는 강아지"] * 2, [encoded(picture(1))] * 2)
    content = curate(settings(source, tmp_path / "clean", duplicates=DuplicateRules(enabled=False)))
    assert content["rows"]["kept"] == 2
