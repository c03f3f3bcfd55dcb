"""Search: exact is brute force, whatever the shards; building goes on after a kill; mistakes are named."""

import io
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_encoder import COLOURS, ColourEncoder
from helpers import warm_python
from PIL import Image

from koclip import storage
from koclip.config import ConfigError, IndexConfig, SourceConfig
from koclip.embeddings.store import Entry, Shards, StoredItem, write_shard
from koclip.search import ImageIndex, build, open_index
from koclip.search.index import _MARGIN, ApproximateIndex, build_approximate, open_approximate

TESTS = Path(__file__).parent


def vectors(count: int, width: int = 32, seed: int = 0, clusters: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, width, generator=random)
    if clusters:
        centres = torch.randn(clusters, width, generator=random)
        noise = centres[torch.randint(clusters, (count,), generator=random)] + 0.5 * noise
    return F.normalize(noise, dim=-1)


def stored(folder: Path, rows: torch.Tensor, size: int) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, part in enumerate(rows.split(size)):
        paths.append(folder / f"shard-{number:06}.safetensors")
        entries = [Entry({"key": f"{number}/{row}"}, b"x" * row) for row in range(len(part))]
        items = [StoredItem(entry.record["key"], bytes(16)) for entry in entries]
        write_shard(paths[-1], part.to(torch.bfloat16).unsqueeze(1), items, entries)
    return Shards(paths, "index")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 30 pictures in two folders, one of them broken."""
    root = tmp_path / "사진"
    for number in range(30):
        colour = list(COLOURS.values())[number % 4]
        path = root / ("가" if number % 2 else "나") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), tuple(max(0, value - number // 4) for value in colour)).save(path)
    (root / "나" / "broken.jpg").write_bytes(b"no picture")
    (root / "notes.txt").write_text("no picture either")
    return root


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", 8)


def config(images: Path | str, **changes: object) -> IndexConfig:
    return IndexConfig(model="colours", images=str(images), batch_size=3, **changes)  # type: ignore[arg-type]


def test_exact_search_is_worked_out_by_hand(tmp_path):
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]])
    result = ImageIndex(stored(tmp_path, rows, 2), {}).search(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), 3)
    assert result.places.tolist() == [[1, 2, 3], [4, 1, 2]]  # of equal ones the first
    assert torch.allclose(result.scores, torch.tensor([[1.0, 0.8, 0.8], [1.0, 0.0, -0.6]]), atol=2e-3)


def test_scores_above_1_are_ordered_before_they_are_cut(tmp_path):
    query = torch.tensor([[0.6, 0.8]])
    rows = torch.tensor([[0.6016, 0.8008], [0.6055, 0.8047], [0.8, 0.6]])  # scores 1.0016, 1.0071, 0.96
    result = ImageIndex(stored(tmp_path, rows, 2), {}).exact(query, 3)
    assert result.places.tolist() == [[1, 0, 2]]
    assert result.scores[0, :2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("size", [1, 7, 100, 5_000])
def test_exact_search_is_brute_force_over_the_stored_rows(tmp_path, size):
    rows, queries = vectors(500, clusters=20), vectors(40, seed=1)
    index = ImageIndex(stored(tmp_path, rows, size), {})
    for k in (1, 10, 500, 600):
        result = index.exact(queries, k)
        scores = queries @ rows.bfloat16().float().T
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        assert torch.allclose(result.scores, scores.gather(1, best), atol=1e-6)
        assert torch.allclose(scores.gather(1, result.places), scores.gather(1, best), atol=1e-6)
        assert result.places.shape == (40, min(k, 500))


def test_no_score_is_further_off_than_the_margin():
    for width in (8, 512, 2_048):
        rows, queries = vectors(2_000, width, clusters=3), vectors(64, width, seed=2, clusters=3)
        rows = torch.cat([rows, queries]).bfloat16()  # scores up to 1
        rough = (rows @ queries.bfloat16().T).float()
        assert float((rough - rows.float() @ queries.T).abs().max()) < _MARGIN


def test_the_margin_is_needed(tmp_path):
    """Without it, rounding loses the nearest image of one of these queries."""
    rows, queries = vectors(3_000, 8, seed=5), vectors(600, 8, seed=1_005)
    result = ImageIndex(stored(tmp_path, rows, 1_000), {}).exact(queries, 1)
    scores = queries @ rows.bfloat16().float().T
    best, places = scores.max(dim=1)
    assert bool((result.scores[:, 0] > best.clamp(max=1) - 1e-6).all())
    rough = (queries.bfloat16().double() @ rows.bfloat16().double().T).bfloat16()
    lost = rough.gather(1, places[:, None])[:, 0] < rough.amax(dim=1)
    assert int(lost.sum()) > 0


def test_threads_are_set_back_after_a_scan(tmp_path):
    before, index = torch.get_num_threads(), ImageIndex(stored(tmp_path, vectors(20), 6), {})
    try:
        torch.set_num_threads(3)
        index.exact(vectors(2), 5)
        assert torch.get_num_threads() == 3
        index._shards.rows[1] = torch.zeros(6, 7)  # of another width: the product fails
        with pytest.raises(RuntimeError):
            index.exact(vectors(2), 5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_all_are_looked_at_where_too_few_are_likely(tmp_path):
    class Few(ApproximateIndex):
        def __init__(self) -> None:
            pass

        def __len__(self) -> int:
            return 20

        def candidates(self, query: torch.Tensor, k: int) -> torch.Tensor:
            return torch.tensor([3, 11])

    index = ImageIndex(stored(tmp_path, vectors(20), 6), {}, Few())
    query = vectors(1, seed=1)
    assert set(index.search(query, 2).places[0].tolist()) == {3, 11}
    assert index.search(query, 3).places.tolist() == index.exact(query, 3).places.tolist()
    assert index.search(query, 30).places.shape == (1, 20)


def test_what_is_kept_of_an_image_is_found_again(tmp_path):
    index = ImageIndex(stored(tmp_path, vectors(20), 6), {})
    for place in (0, 5, 6, 13, 19):
        entry = index.entry(place)
        assert entry.record == {"key": f"{place // 6}/{place % 6}"}
        assert entry.thumbnail == b"x" * (place % 6)


def test_a_folder_becomes_an_index(folder, tmp_path, small):
    count, skipped = build.build(config(folder), ColourEncoder(), tmp_path / "index")
    assert count == 30
    assert [(skip.source, skip.key) for skip in skipped] == [
        (str(folder), "나/broken.jpg"),
        (str(folder), "notes.txt"),
    ]
    index = open_index(tmp_path / "index")
    query = ColourEncoder().encode_texts(["파랑"])
    keys = [index.entry(int(place)).record["key"] for place in index.search(query, 7).places[0]]
    assert {int(key.split("/")[1][:2]) % 4 for key in keys} == {2}
    assert index.entry(0).thumbnail.startswith(b"\xff\xd8")


def table(path: Path, folder: Path, count: int) -> Path:
    """Write a data set of the folder's pictures."""
    pictures = [path for path in sorted(folder.rglob("*.png")) for _ in range(2)][:count]
    rows = [json.dumps({"image": str(picture), "captions_ko": "사진", "captions_en": "photo"}) for picture in pictures]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_grew_is_refused(folder, tmp_path, small, streaming):
    source = SourceConfig(path=str(table(tmp_path / "rows.jsonl", folder, 12)), streaming=streaming)
    cfg, target = config("", source=source), tmp_path / "index"
    assert build.build(cfg, ColourEncoder(), target)[0] == 12
    assert build.build(cfg, ColourEncoder(), target)[0] == 12
    table(tmp_path / "rows.jsonl", folder, 40)
    with pytest.raises(ConfigError, match=r"output_dir: .*files: "):
        build.build(cfg, ColourEncoder(), target)


@pytest.mark.parametrize(("then", "now", "streaming"), [(12, 40, True), (20, 12, True), (16, 8, True), (12, 40, False)])
def test_a_shard_of_other_images_leaves_no_hole(folder, tmp_path, small, monkeypatch, then, now, streaming):
    """Where neither files nor their number tell: what the Hub holds has changed."""
    monkeypatch.setattr(build, "stored_files", lambda _: [])
    file = tmp_path / "rows.jsonl"
    cfg = config("", source=SourceConfig(path=str(table(file, folder, then)), streaming=streaming))
    build.build(cfg, ColourEncoder(), tmp_path / "index")
    table(file, folder, now)
    with pytest.raises(ConfigError, match="output_dir: .*shard" if streaming else "rows: 12, here 40"):
        build.build(cfg, ColourEncoder(), tmp_path / "index")


def test_shards_have_the_rows_that_are_asked_for(folder, tmp_path, small, monkeypatch):
    target = tmp_path / "index"
    build.build(config(folder), ColourEncoder(), target)
    sizes = [len(rows) for rows in Shards(sorted(target.glob("shard-*")), "index").rows]
    assert sizes == [8, 8, 8, 6]  # of 31 pictures the last is broken
    monkeypatch.setattr(build, "ROWS", 9)
    with pytest.raises(ConfigError, match="rows_per_shard: 8, here 9"):
        build.build(config(folder), ColourEncoder(), target)


def test_thumbnails_are_small(folder, tmp_path, small):
    for side, size in ((16, (16, 12)), (256, (40, 30)), (0, None)):
        build.build(config(folder, thumbnail_size=side), ColourEncoder(), tmp_path / str(side))
        thumbnail = open_index(tmp_path / str(side)).entry(0).thumbnail
        assert (Image.open(io.BytesIO(thumbnail)).size if thumbnail else None) == size


def test_pictures_of_too_many_pixels_are_left_out(folder, tmp_path, small):
    Image.new("RGB", (50, 30)).save(folder / "large.png")
    count, skipped = build.build(config(folder, max_image_pixels=1_200), ColourEncoder(), tmp_path / "index")
    assert count == 30
    assert [skip.reason for skip in skipped if skip.key == "large.png"] == ["50 x 30 pixels; max_image_pixels is 1200"]
    with pytest.raises(ConfigError, match="max_image_pixels: 1200, here 9999"):  # what was left out would stay so
        build.build(config(folder, max_image_pixels=9_999), ColourEncoder(), tmp_path / "index")


def test_file_names_need_not_be_utf_8(folder, tmp_path, small):
    named = os.fsencode(folder) + "/사진.png".encode("euc-kr")
    broken = os.fsencode(folder) + "/고장.png".encode("euc-kr")
    try:
        Path(os.fsdecode(named)).write_bytes((folder / "나" / "00.png").read_bytes())
        Path(os.fsdecode(broken)).write_bytes(b"no picture")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    count, skipped = build.build(config(folder), ColourEncoder(), tmp_path / "index")
    assert count == 31
    storage.append_lines(tmp_path / "skipped.jsonl", [skip._asdict() for skip in skipped])
    index = open_index(tmp_path / "index")
    assert sum("\ufffd" in index.entry(place).record["key"] for place in range(31)) == 1
    assert sum("\ufffd" in skip.key for skip in skipped) == 1


def test_an_embedding_that_is_not_finite_is_named(folder, tmp_path, small):
    class Spoilt(ColourEncoder):
        def _embed_images(self, images):
            embeddings = super()._embed_images(images)
            if self.calls == 2:
                embeddings[1, 0] = torch.nan
            return embeddings

    with pytest.raises(ConfigError, match=r"images.*\['가/09\.png'\]"):
        build.build(config(folder), Spoilt(), tmp_path / "index")
    assert not list((tmp_path / "index").glob("shard-*"))


def test_scenes_bring_their_captions(tmp_path):
    build.build(config("scenes", max_images=10), ColourEncoder(), tmp_path / "index")
    record = open_index(tmp_path / "index").entry(9).record
    assert record["key"] == "scenes/test/9"
    assert set(record["captions"]) == {"ko", "en"}


class Dying(ColourEncoder):
    """Dies after some batches."""

    def _embed_images(self, images):
        if self.calls == 7:
            raise KeyboardInterrupt
        return super()._embed_images(images)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_stopped_build_goes_on_and_gives_the_same_bytes(folder, tmp_path, small):
    (folder / "가" / "00.jpg").write_bytes(b"in the first shard")
    _, skipped = build.build(config(folder), ColourEncoder(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build.build(config(folder), Dying(), tmp_path / "stopped")
    with pytest.raises(ConfigError, match=r"index: .*stopped"):
        open_index(tmp_path / "stopped")
    (tmp_path / "stopped" / "writing-shard-000002.safetensors").write_bytes(b"half")
    encoder = ColourEncoder()
    _, left_out = build.build(config(folder), encoder, tmp_path / "stopped")
    assert encoder.calls < 11
    assert [skip.key for skip in left_out] == ["가/00.jpg", "나/broken.jpg", "notes.txt"]
    assert left_out == skipped
    (tmp_path / "stopped" / "writing-shard-000002.safetensors").unlink(missing_ok=True)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


KILLED = """
import sys, time
from fake_encoder import ColourEncoder
from koclip.config import IndexConfig
from koclip.search import build
from pathlib import Path

class Slow(ColourEncoder):
    def _embed_images(self, images):
        time.sleep(float(sys.argv[3]))
        return super()._embed_images(images)

build.ROWS = 8
build.build(IndexConfig(model="colours", images=sys.argv[1], batch_size=3), Slow(), Path(sys.argv[2]))
"""


def test_a_killed_build_goes_on_and_gives_the_same_bytes(folder, tmp_path, small):
    build.build(config(folder), ColourEncoder(), tmp_path / "whole")
    target = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = warm_python.start(["-c", KILLED, str(folder), str(target), "0.3"], environment)
    end = time.monotonic() + 120
    while not (target / "shard-000001.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(list(target.glob("shard-*"))) < 4
    build.build(config(folder), ColourEncoder(), target)
    for leftover in target.glob("writing-*"):
        leftover.unlink()
    assert files(target) == files(tmp_path / "whole")


def test_approximate_search_finds_nearly_all(tmp_path):
    rows, queries = vectors(20_000, 64, clusters=300), vectors(100, 64, seed=3)
    shards = stored(tmp_path, rows, 3_000)
    build_approximate(shards.rows, shards.width, tmp_path / "quick.faiss")
    quick = ImageIndex(shards, {}, open_approximate(tmp_path / "quick.faiss"))
    assert quick.is_approximate
    assert quick.width == 64
    queries = F.normalize(queries + 2 * rows[::200], dim=-1)
    likely, exact = quick.search(queries, 10), quick.exact(queries, 10)
    hits = [
        len(set(ours) & set(best)) for ours, best in zip(likely.places.tolist(), exact.places.tolist(), strict=True)
    ]
    assert np.mean(hits) >= 9.5
    same = likely.places == exact.places
    assert torch.allclose(likely.scores[same], exact.scores[same], atol=1e-6)
    assert quick.search(queries[:1], 2_000).places.shape == (1, 2_000)
    (tmp_path / "quick.faiss").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"index: .*quick\.faiss"):
        open_approximate(tmp_path / "quick.faiss")


def test_a_build_makes_the_approximate_index_when_asked(folder, tmp_path, small):
    build.build(config(folder, approximate_from=31), ColourEncoder(), tmp_path / "index")
    assert not open_index(tmp_path / "index").is_approximate
    build.build(config(folder, approximate_from=30), ColourEncoder(), tmp_path / "index")
    index = open_index(tmp_path / "index")
    assert index.is_approximate
    assert index.search(ColourEncoder().encode_texts(["파랑"]), 5).places.shape == (1, 5)


def test_an_approximate_index_of_other_rows_is_not_used(folder, tmp_path, small):
    target, other = tmp_path / "index", vectors(29, 8)
    cfg = config(folder, approximate="yes")
    build.build(cfg, ColourEncoder(), target)
    (quick,) = target.glob("approximate-*")
    whole = quick.read_bytes()
    build_approximate([other], 8, quick)
    with pytest.raises(ConfigError, match="images: got 29, expected 30"):
        open_index(target)
    (target / "shard-000001.safetensors").unlink()
    build.build(cfg, ColourEncoder(), target)  # a shard is made again, and so is what was made of all
    assert quick.read_bytes() == whole
    assert open_index(target).is_approximate


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (torch.ones(1, 31), 3, r"queries: got \(1, 31\), expected \(Q, 32\)"),
        (torch.ones(32), 3, "queries"),
        (torch.zeros(0, 32), 3, "queries"),
        (torch.ones(1, 32), 3, "expected embeddings of norm 1"),
        (torch.full((1, 32), torch.nan), 3, "not finite"),
        (vectors(1), 0, "k: got 0"),
    ],
)
def test_bad_queries_are_refused(tmp_path, queries, k, message):
    with pytest.raises(ConfigError, match=message):
        ImageIndex(stored(tmp_path, vectors(9), 4), {}).search(queries, k)


def test_another_index_is_not_overwritten(folder, tmp_path, small):
    target = tmp_path / "index"
    build.build(config(folder), ColourEncoder(), target)
    for changed, message in (
        (config(folder, thumbnail_size=0), "thumbnail_size: 256, here 0"),
        (config(folder, max_images=5), "max_images"),
    ):
        with pytest.raises(ConfigError, match=message):
            build.build(changed, ColourEncoder(), target)
    with pytest.raises(ConfigError, match="fingerprint"):
        build.build(config(folder), ColourEncoder(english=False), target)
    (folder / "new.png").write_bytes((folder / "나" / "00.png").read_bytes())
    with pytest.raises(ConfigError, match="images"):
        build.build(config(folder), ColourEncoder(), target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"output_dir: .*full"):
        build.build(config(folder), ColourEncoder(), tmp_path / "full")


def test_a_folder_without_a_usable_picture_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"images: .*empty"):
        build.build(config(tmp_path / "empty"), ColourEncoder(), tmp_path / "index")
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"images: .*empty"):
        build.build(config(tmp_path / "empty"), ColourEncoder(), tmp_path / "other")


def test_a_damaged_index_is_named(folder, tmp_path, small):
    target = tmp_path / "index"
    with pytest.raises(ConfigError, match=r"koclip index"):
        open_index(target)
    build.build(config(folder), ColourEncoder(), target)
    shard = target / "shard-000001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    with pytest.raises(ConfigError, match=r"shard-000001\.safetensors"):
        open_index(target)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"shard-000001\.safetensors"):
        open_index(target)
    build.build(config(folder), ColourEncoder(), target)
    assert shard.read_bytes() == content
    facts = json.loads((target / "embeddings.json").read_text(encoding="utf-8"))
    (target / "embeddings.json").write_text(json.dumps({**facts, "num_images": 99}))
    with pytest.raises(ConfigError, match="expected 99"):
        open_index(target)
    (target / "embeddings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"index: .*embeddings\.json"):
        open_index(target)


def test_an_index_of_an_older_format_is_refused(folder, tmp_path, small):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").write_text('{"format": 3, "num_images": 2}')
    for use in (open_index, lambda target: build.build(config(folder), ColourEncoder(), target)):
        with pytest.raises(ConfigError, match=r"(index|output_dir): .*index, format"):
            use(tmp_path / "index")


RECIPE = TESTS.parent / "recipes" / "index.py"


def run(*args: str) -> "subprocess.CompletedProcess[str]":
    return warm_python.run([str(RECIPE), *args], env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


def test_the_recipe_makes_an_index_and_names_what_it_left_out(folder, tmp_path):
    from align_runs import write_source

    model, queries = write_source(tmp_path / "model"), tmp_path / "queries.csv"
    queries.write_text("query\n" + "\n".join(f"검색어 {number}" for number in range(9)), encoding="utf-8")
    set_of_queries = ["--calibration.path", str(queries), "--calibration.image", "null"]
    for calibration in ([], [*set_of_queries, "--calibration.captions", "{ko: query}"]):
        # The second run embeds no image, and lists the same.
        options = ["--model", str(model), "--images", str(folder), "--output_dir", str(tmp_path / "index")]
        process = run(*options, *calibration)
        assert process.returncode == 0, process.stderr
        assert "30 images" in process.stdout
        assert "2 skipped" in process.stdout
        left, notes = storage.read_lines(tmp_path / "index" / "skipped.jsonl")
        assert (notes["source"], notes["key"]) == (str(folder), "notes.txt")
        assert (left["source"], left["key"]) == (str(folder), "나/broken.jpg")
        assert "not an image" in left["reason"]
    index = open_index(tmp_path / "index")
    assert len(index) == 30
    assert index.promises == {"ko": [0.1, 0.2]}
    assert f"{index.threshold(0.1, 'ko'):.4f}" in process.stdout
    assert "got 0.05" in process.stdout  # nine queries are too few for it


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--images", "photos"], "model"),
        (["--model", "m"], "images"),
        (["--model", "m", "--images", "x", "--thumbnail_size", "3"], "thumbnail_size"),
        (["--model", "m", "--images", "x", "--approximate", "maybe"], "approximate"),
        (["--model", "m", "--image", "x"], "--images"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, message):
    process = run(*args)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_the_benchmark_runs_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(RECIPE.parent / "benchmarks")
    import importlib

    benchmark = importlib.import_module("search")
    args = benchmark.parser().parse_args(["--rows", "3000", "--width", "32", "--queries", "20", "--threads", "1"])
    benchmark.make(tmp_path, args.rows, args.width)
    exact = benchmark.measure(tmp_path, args)
    shards = Shards(sorted(tmp_path.glob("shard-*")), "index")
    build_approximate(shards.rows, shards.width, tmp_path / benchmark.QUICK)
    args.way = "approximate"
    assert benchmark.recall(benchmark.measure(tmp_path, args)["places"], exact["places"]) > 0.9
