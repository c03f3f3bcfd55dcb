"""Features of frozen towers: they are what the towers make, they are mapped, and they are refused to anybody else."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from align_runs import write_pairs
from PIL import Image
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer
from torch import Tensor

from koclip.config import ConfigError, DataConfig, SourceConfig
from koclip.data.transforms import Views, centre_view, decode, digest_of
from koclip.embeddings.fill import Cache, embed_shard, image_features, teacher_features
from koclip.embeddings.readers import ItemBatch
from koclip.embeddings.store import Shards, StoredItem
from koclip.encoders.transformers import TransformersEncoder
from koclip.models.dual_encoder import DualEncoder, encode_images, from_scratch, text_features

ROWS = 20  # in shards of 8, 8 and 4
pytestmark = pytest.mark.usefixtures("small_shards")


def build(
    folder: Path, source: SourceConfig, encoder: DualEncoder | None = None, dtype: str = "fp32", **changes: object
) -> Shards:
    """Make the features of a source's images, by the same tower each time if none is given."""
    config = DataConfig(**{"sources": [source], "num_crops": 1, **changes})  # type: ignore[arg-type]
    tower = encoder or tiny_dual_encoder()
    return image_features(Accelerator(cpu=True), tower, config, Views(config, 32), Cache(folder, dtype))


def images_of(source: SourceConfig) -> list[bytes]:
    return [row["image"] for row in pq.read_table(source.path).to_pylist()]


def rewrite(source: SourceConfig, change: Callable[[list[dict]], list[dict]]) -> None:
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(source.path).to_pylist())), source.path)


@torch.no_grad()
def directly(config: DataConfig, image: bytes, view: int) -> Tensor:
    """Return what the tower makes of a view of one image alone."""
    pixels = Views(config, 32).numbered(decode(image, 10_000), digest_of(image), view)
    encoder = tiny_dual_encoder().eval()
    return encode_images(encoder.model, encoder.normalized(pixels[None]))[0]


@pytest.mark.parametrize(("dtype", "bar"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_kept_embeddings_are_those_made_directly(dtype: str, bar: float, pairs: SourceConfig, tmp_path: Path) -> None:
    config = DataConfig(sources=[pairs], num_crops=3, crop_scale=(0.2, 0.6))
    shards = build(tmp_path / "kept", pairs, dtype=dtype, num_crops=3, crop_scale=(0.2, 0.6))
    assert len(shards) == ROWS
    assert len(list((tmp_path / "kept").rglob("shard-*"))) == 3
    for image in images_of(pairs):
        views = [shards.embedding(digest_of(image), number) for number in range(3)]
        for number, embedding in enumerate(views):
            assert embedding.dtype == torch.float32
            assert (embedding - directly(config, image, number)).abs().max() <= bar, number
        assert min((views[0] - views[1]).norm(), (views[0] - views[2]).norm(), (views[1] - views[2]).norm()) > 10 * bar


def test_the_first_view_is_what_evaluation_sees(pairs: SourceConfig, tmp_path: Path) -> None:
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    config = DataConfig(sources=[pairs], num_crops=2)
    views = Views(config, 32, centre_view(processor.image_processor))
    shards = image_features(Accelerator(cpu=True), DualEncoder(model, processor), config, views, Cache(tmp_path / "f"))
    images = images_of(pairs)
    embedded = TransformersEncoder(model, processor).encode_images([Image.open(io.BytesIO(image)) for image in images])
    kept = torch.stack([shards.embedding(digest_of(image)) for image in images])
    assert torch.nn.functional.cosine_similarity(kept, embedded).min() > 0.999  # PIL and torchvision round apart
    crops = torch.stack([shards.embedding(digest_of(image), 1) for image in images])
    assert ((kept - embedded).norm(dim=1) < (crops - embedded).norm(dim=1)).all()


def test_shards_are_mapped_not_read(tmp_path: Path) -> None:
    count, width = 4_096, 4_096  # 64 MiB
    items = [StoredItem(str(number), digest_of(str(number).encode())) for number in range(count)]
    path = tmp_path / "shard-000000.safetensors"
    embed_shard(path, [ItemBatch(count, items, [""] * count)], lambda _: torch.ones(count, 1, width), torch.float32)
    process = psutil.Process()
    before = process.memory_info().rss
    shards = Shards([path], "align.cache_dir")
    for item in items[::500]:
        shards.embedding(item.digest)
    opened = process.memory_info().rss - before
    assert all(shards.embedding(item.digest).sum() == width for item in items)
    read = process.memory_info().rss - before
    assert opened < 8 * 2**20
    assert read > 48 * 2**20  # what was measured does see pages that are read


def with_other_weight() -> DualEncoder:
    encoder = tiny_dual_encoder()
    weight = encoder.model.vision_model.encoder.layers[1].mlp.fc2.bias
    with torch.no_grad():
        weight[3] += 1e-3
    return encoder


def with_other_pixels() -> DualEncoder:
    encoder = tiny_dual_encoder()
    encoder.pixel_mean += 1.0
    return encoder


REFUSED = {
    "image tower": {"encoder": with_other_weight},
    "pixels": {"encoder": with_other_pixels},
    "views": {"num_crops": 2},
    "largest image": {"max_image_pixels": 10_000},
    "precision": {"dtype": "fp16"},
}


@pytest.mark.parametrize("differing", REFUSED)
def test_features_of_another_making_are_refused(differing: str, pairs: SourceConfig, tmp_path: Path) -> None:
    build(tmp_path / "kept", pairs)
    changes = {name: value() if callable(value) else value for name, value in REFUSED[differing].items()}
    with pytest.raises(ConfigError, match=rf"align\.cache_dir: .*kept .*\({differing}: [^;]*\)"):
        build(tmp_path / "kept", pairs, **changes)
    build(tmp_path / "kept", pairs)


@pytest.mark.parametrize("change", [{"crop_scale": (0.5, 1.0)}, {"grayscale": 0.5}, {"num_crops": 3}])
def test_other_crops_are_refused(change: dict[str, object], pairs: SourceConfig, tmp_path: Path) -> None:
    build(tmp_path / "kept", pairs, num_crops=2)
    with pytest.raises(ConfigError, match="views: "):
        build(tmp_path / "kept", pairs, **{"num_crops": 2, **change})


def test_another_image_size_is_refused(pairs: SourceConfig, tmp_path: Path) -> None:
    config = DataConfig(sources=[pairs], num_crops=1)
    build(tmp_path / "kept", pairs)
    with pytest.raises(ConfigError, match=r"views: .*32.*, here .*40"):
        image_features(
            Accelerator(cpu=True), tiny_dual_encoder(), config, Views(config, 40), Cache(tmp_path / "kept", "fp32")
        )


def test_the_same_tower_elsewhere_is_known(pairs: SourceConfig, tmp_path: Path) -> None:
    """In another folder, saved by another version: what it computes is the same."""
    build(tmp_path / "kept", pairs)
    encoder = tiny_dual_encoder()
    settings = encoder.model.vision_model.config
    settings.transformers_version, settings._name_or_path, settings.architectures = "5.0.0", "elsewhere", ["CLIPModel"]
    build(tmp_path / "kept", pairs, encoder=encoder)


def swapped(rows: list[dict]) -> list[dict]:
    rows[9], rows[12] = rows[12], rows[9]
    return rows


def other_bytes(rows: list[dict]) -> list[dict]:
    return [*rows[:9], rows[9] | {"image": rows[9]["image"] + b"\0"}, *rows[10:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_bytes, r"the first that differs is rows~\w+/9;"),
        (swapped, r"the first that differs is rows~\w+/9;"),
        (lambda rows: rows[:18], r"\b2\b.*\b4\b"),
        (lambda rows: rows[:16], "shard-000002.safetensors "),
        (lambda rows: rows + rows[:1], r"\b5\b.*\b4\b"),
    ],
)
def test_other_data_is_refused(
    change: Callable[[list[dict]], list[dict]], message: str, pairs: SourceConfig, tmp_path: Path
) -> None:
    build(tmp_path / "kept", pairs)
    rewrite(pairs, change)
    with pytest.raises(ConfigError, match=rf"align.cache_dir: .*{message}.*kept"):
        build(tmp_path / "kept", pairs)


def test_whole_shards_of_new_rows_are_added(pairs: SourceConfig, tmp_path: Path) -> None:
    rewrite(pairs, lambda rows: rows[:16])
    build(tmp_path / "kept", pairs)
    write_pairs(Path(pairs.path), 24)
    assert len(build(tmp_path / "kept", pairs)) == 24


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.write_bytes(b""), lambda file: file.write_text("{}")])
def test_broken_shards_are_refused(damage: Callable[[Path], object], pairs: SourceConfig, tmp_path: Path) -> None:
    build(tmp_path / "kept", pairs)
    shard = tmp_path / "kept" / "0-rows" / "shard-000001.safetensors"
    whole = shard.read_bytes()
    damage(shard)
    with pytest.raises(ConfigError, match=r"align\.cache_dir: .*shard-000001\.safetensors"):
        build(tmp_path / "kept", pairs)
    shard.unlink()
    build(tmp_path / "kept", pairs)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("text", ["", '{"features": "unit', "null"])
def test_a_broken_record_is_refused(text: str, pairs: SourceConfig, tmp_path: Path) -> None:
    build(tmp_path / "kept", pairs)
    (tmp_path / "kept" / "embeddings.json").write_text(text)
    with pytest.raises(ConfigError, match=r"align\.cache_dir: .*embeddings\.json.*kept"):
        build(tmp_path / "kept", pairs)


def test_features_of_an_older_format_are_refused(pairs: SourceConfig, tmp_path: Path) -> None:
    build(tmp_path / "kept", pairs)
    facts = json.loads((tmp_path / "kept" / "embeddings.json").read_text())
    (tmp_path / "kept" / "embeddings.json").write_text(json.dumps(facts | {"format": 3}))
    with pytest.raises(ConfigError, match=r"align\.cache_dir: .*kept, format: got 3"):
        build(tmp_path / "kept", pairs)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "features.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"align\.cache_dir: .*old, format"):
        build(tmp_path / "old", pairs)


def test_data_that_changes_under_a_run_is_noticed(pairs: SourceConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"align\.cache_dir"):
        build(tmp_path / "kept", pairs).embedding(digest_of(b"another image"))


@pytest.fixture
def teacher() -> tuple:
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    return model.eval(), processor.tokenizer


def test_the_teachers_features_are_those_made_directly(teacher: tuple, pairs: SourceConfig, tmp_path: Path) -> None:
    def without_english(rows: list[dict]) -> list[dict]:
        return [row | {"captions_en": []} if number in (0, *range(8, 16)) else row for number, row in enumerate(rows)]

    rewrite(pairs, without_english)  # the second shard has none at all
    config, (model, tokenizer) = DataConfig(sources=[pairs]), teacher
    shards = teacher_features(Accelerator(cpu=True), teacher, config, "en", Cache(tmp_path / "kept", "fp32"))
    sentences = [text for row in pq.read_table(pairs.path).to_pylist() for text in row["captions_en"]]
    assert len(shards) == len(sentences) == 22
    for sentence in sentences:
        encoded = tokenizer([sentence], return_tensors="pt")
        with torch.no_grad():
            alone = text_features(model, encoded["input_ids"], encoded["attention_mask"])[0]
        torch.testing.assert_close(shards.embedding(digest_of(sentence.encode())), alone, atol=1e-5, rtol=0)
    teacher_features(
        Accelerator(cpu=True), teacher, config, "en", Cache(tmp_path / "kept", "fp32")
    )  # after use, the same


def test_another_teacher_is_refused(teacher: tuple, pairs: SourceConfig, tmp_path: Path) -> None:
    config, model = DataConfig(sources=[pairs]), teacher[0]
    teacher_features(Accelerator(cpu=True), teacher, config, "en", Cache(tmp_path / "kept", "fp32"))
    rewrite(pairs, lambda rows: [row | {"captions_en": row["captions_en"][:1]} for row in rows])
    with pytest.raises(ConfigError, match=r"align\.cache_dir: .*\b8\b.*\b16\b"):
        teacher_features(Accelerator(cpu=True), teacher, config, "en", Cache(tmp_path / "kept", "fp32"))
    with pytest.raises(ConfigError, match=r"features: .* en, here .* ko"):
        teacher_features(Accelerator(cpu=True), teacher, config, "ko", Cache(tmp_path / "kept", "fp32"))
    model.text_projection.weight.data[0, 0] += 1e-3
    with pytest.raises(ConfigError, match="text tower: "):
        teacher_features(Accelerator(cpu=True), teacher, config, "en", Cache(tmp_path / "kept", "fp32"))
    assert json.loads((tmp_path / "kept" / "embeddings.json").read_text())["longest sentence"] == "24 tokens"
