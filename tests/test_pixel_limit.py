"""The most pixels of a picture are what the recipe's own key says, in training, evaluation and the index."""

import importlib.util
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.state import AcceleratorState
from fake_encoder import ColourEncoder
from PIL import Image
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer

from koclip import config
from koclip.config import ConfigError
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model
from koclip.search import build

ROOT = Path(__file__).parents[1]
SIZES = [(8, 6)] * 10 + [(20, 10)] * 2  # 48 and 200 pixels


def run(recipe: str, schema: type, *args: str) -> None:
    """Run a recipe's main() in this process."""
    spec = importlib.util.spec_from_file_location(f"{recipe}_recipe", ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    AcceleratorState._reset_state(reset_partial_state=True)
    module.main(config.parse(schema, list(args)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    rows = []
    for number, size in enumerate(SIZES):
        buffer = io.BytesIO()
        Image.new("RGB", size, (20 * number, 99, 200 - number)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue()}, "ko": f"사진 {number}"})
    path = tmp_path_factory.mktemp("limit") / "photos.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def listed(directory: Path) -> list[str]:
    """Return the different reasons in skipped.jsonl."""
    text = (directory / "skipped.jsonl").read_text(encoding="utf-8")
    return sorted({json.loads(line)["reason"] for line in text.splitlines()})


def source(photos: Path) -> dict:
    return {"path": str(photos), "name": "photos", "captions": {"ko": "ko"}}


def test_training_and_its_evaluation_keep_the_limit_of_data(photos, tmp_path):
    run_directory = tmp_path / "run"
    settings = {
        "output_dir": str(run_directory),
        "data": {"sources": [source(photos)], "max_image_pixels": 100, "max_skipped_fraction": 0.5, "num_workers": 0},
        "eval": {"sets": [{"source": source(photos), "max_skipped_fraction": 0.5}]},
        "tokenizer": {"vocab_size": 600},
        "model": {"image_width": 32, "text_width": 32, "image_layers": 1, "text_layers": 1},
        "optim": {"warmup_steps": 0},
        "train": {"num_steps": 1, "batch_size": 4, "num_threads": 1, "tracker": "none"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    run("pretrain", config.PretrainConfig, "--config", str(tmp_path / "run.yaml"))
    results = json.loads((run_directory / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["photos/ko/text_to_image/recall@1"]["n"] == 10
    assert listed(run_directory) == ["20 x 10 pixels; data.max_image_pixels is 100"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    dual_encoder = tiny_dual_encoder()
    _, processor = from_scratch(tiny_config(), tiny_tokenizer())
    path = tmp_path_factory.mktemp("limited") / "model"
    save_stock_model(path, dual_encoder.model, processor, dual_encoder.state_dict())
    return path


def evaluate(photos: Path, model: Path, directory: Path, *args: str, ratings: Path | None = None) -> dict:
    sets = [{"source": source(photos), "max_skipped_fraction": 0.5}]
    settings = {"sets": sets, "device": "cpu", "cache_dir": None, "model": str(model)}
    if ratings:
        settings["ratings"] = [{"path": str(ratings), "language": "ko"}]
    file = directory / "suite.yaml"
    file.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    run("evaluate", config.EvaluateConfig, "--config", str(file), "--output_dir", str(directory / "out"), *args)
    return json.loads((directory / "out" / "results.json").read_text(encoding="utf-8"))["metrics"]


def test_an_evaluation_keeps_its_own_limit(photos, model, tmp_path):
    metrics = evaluate(photos, model, tmp_path, "--max_image_pixels", "100")
    assert metrics["photos/ko/text_to_image/recall@1"]["n"] == 10
    assert listed(tmp_path / "out") == ["20 x 10 pixels; max_image_pixels is 100"]
    Image.new("RGB", (20, 10)).save(tmp_path / "rated.png")
    (tmp_path / "ratings.tsv").write_text("rated.png\t빨강\t4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rated\.png.* 20 x 10 .*max_image_pixels is 100"):
        evaluate(photos, model, tmp_path, "--max_image_pixels", "100", ratings=tmp_path / "ratings.tsv")


def test_a_larger_limit_is_kept_too(tmp_path):
    """PIL warns of more than 89,478,485 pixels, which is the default, and refuses twice as many."""
    (tmp_path / "photos").mkdir()
    Image.new("1", (12_000, 8_000)).save(tmp_path / "photos" / "large.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "photos" / "small.png")
    for limit, count in ((config.DataConfig.max_image_pixels, 1), (100_000_000, 2)):
        settings = config.IndexConfig(model="colours", images=str(tmp_path / "photos"), max_image_pixels=limit)
        taken, skipped = build.build(settings, ColourEncoder(), tmp_path / str(limit))
        assert taken == count
        assert [skip.reason for skip in skipped] == ["12000 x 8000 pixels; max_image_pixels is 89478485"][: 2 - count]


SCHEMAS = {
    "data.max_image_pixels": (config.PretrainConfig, []),
    "max_image_pixels": (config.IndexConfig, ["--model", "m", "--images", "photos"]),
}


@pytest.mark.parametrize("key", SCHEMAS)
@pytest.mark.parametrize("pixels", [0, -1, 178_956_971])
def test_a_limit_that_cannot_be_kept_is_refused(key, pixels, capsys):
    schema, args = SCHEMAS[key]
    with pytest.raises((SystemExit, ConfigError)) as stopped:
        config.parse(schema, [*args, f"--{key}", str(pixels)])
    assert f"{key}: got {pixels}" in capsys.readouterr().err + str(stopped.value)
