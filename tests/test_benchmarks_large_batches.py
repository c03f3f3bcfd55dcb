"""The benchmarks of large batches and of text run, at tiny sizes."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch

from koclip.config import ModelConfig, TrainConfig

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for the script that it runs

import clip_shapes  # noqa: E402
import gpu  # noqa: E402
import grad_cache  # noqa: E402
import loss_memory  # noqa: E402
import text_batches  # noqa: E402
import text_memory  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_cache, "MODEL", ModelConfig(preset="tiny", image_size=16))


def test_noise_is_pairs_in_pieces_with_coco_lengths():
    model, _ = grad_cache.build()
    pieces = list(grad_cache.noise(model, 256, 24))
    assert sum(len(piece.keys) for piece in pieces) == 256
    text = clip_shapes.towers(model.config).text
    for piece in pieces:
        assert piece.attention_mask.sum(dim=1).max() == piece.input_ids.shape[1]
        ends = (piece.input_ids == text.eos_token_id) & (piece.attention_mask == 1)
        assert torch.equal(ends.sum(dim=1), torch.ones(len(ends), dtype=torch.long))
        padding = piece.input_ids[piece.attention_mask == 0]
        assert torch.equal(padding, torch.full_like(padding, clip_shapes.integer(text.pad_token_id)))
    lengths = torch.cat([piece.attention_mask.sum(dim=1) for piece in pieces]).float()
    assert lengths.mean().item() == pytest.approx(13, abs=0.5)


def test_grad_cache_gradients_are_exact():
    options = grad_cache.parser().parse_args(["--check_batch_size", "20", "--micro_batch_size", "8"])
    ratio, cosine, norms = map(float, grad_cache.gradient_error("koclip", "plain", options).split(" | "))
    assert ratio == pytest.approx(1, abs=1e-5)
    assert cosine == pytest.approx(1, abs=1e-7)
    assert norms == pytest.approx(1, abs=1e-5)


def test_open_clips_logit_scale_gradient_is_too_large():
    options = grad_cache.parser().parse_args(["--check_batch_size", "32", "--micro_batch_size", "8"])
    ratio = float(grad_cache.gradient_error("open_clip", "open_clip plain", options).split(" | ")[0])
    assert ratio == pytest.approx(4, rel=1e-3)


def test_grad_cache_measures_in_a_process_of_its_own():
    options = grad_cache.parser().parse_args(["--batch_size", "16", "--micro_batch_size", "8", "--cpu_time"])
    measured = grad_cache.run("koclip", options)
    assert measured["seconds"] > 0
    assert set(measured) == {"seconds", "megabytes"}


def test_loss_memory_prints_every_way(capsys):
    loss_memory.main(["--sizes", "2048", "--ways", "dense", "tiled", "--cpu_time"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 2,048")]
    assert [row[1] for row in rows] == ["dense", "tiled"]
    dense, tiled = rows
    assert float(tiled[3]) <= 1.2 < float(dense[3])
    assert float(tiled[6].rstrip(" |")) == pytest.approx(float(dense[6].rstrip(" |")), abs=2e-6)


def test_text_memory_trains_fewer_weights_each_way(monkeypatch, capsys):
    """In this process, so the memory is not that of a way; the script starts a process for each."""
    sizes = ["--rounds", "1", "--batch_size", "4", "--depth", "3", "--width", "32", "--pieces", "20000", "--steps", "1"]
    monkeypatch.setattr(text_memory, "run", lambda way, args: measured_here(way, args, capsys))
    text_memory.main(sizes)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "GiB" in line]
    assert [row[0].strip("| ") for row in rows] == list(text_memory.WAYS)
    everything, embeddings, layers = (float(row[1]) for row in rows)
    assert everything > embeddings + 0.5  # 20,000 pieces of width 32 are 0.64 million weights
    assert embeddings >= layers


def measured_here(way, args, capsys):
    text_memory.worker(text_memory.parser().parse_args([*args, "--ways", way]))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_text_batches_checks_embeddings_and_prints_every_way(tmp_path, capsys):
    rows = [{"image": None, "captions_ko": [" ".join(["그림"] * (1 + number % 5))]} for number in range(64)]
    picture = {"bytes": None, "path": None}
    features = datasets.Features({"image": datasets.Image(), "captions_ko": datasets.List(datasets.Value("string"))})
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    picture["bytes"] = (tmp_path / "one.png").read_bytes()
    table = datasets.Dataset.from_list([row | {"image": picture} for row in rows], features=features)
    table.to_parquet(tmp_path / "pairs.parquet")
    text_batches.main(
        ["--captions", str(tmp_path / "pairs.parquet"), "--rounds", "1", "--batch_size", "8", "--width", "64"]
    )
    printed = capsys.readouterr().out
    assert [line.split(" | ")[0].strip("| ") for line in printed.splitlines()[5:]] == list(text_batches.WAYS)


def test_text_batches_without_captions_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        text_batches.main(["--captions", str(tmp_path / "none.parquet")])
    assert "name a file of pairs with --captions" in capsys.readouterr().err


def test_a_gpu_benchmark_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        gpu.main([])


def test_the_gpu_benchmarks_step_trains():
    model, processor = grad_cache.build()
    before = model.logit_scale.clone()
    batch = list(grad_cache.noise(model, 8, 4))
    train = TrainConfig(num_steps=1_000, batch_size=8, micro_batch_size=4, tracker="none")
    step = gpu.koclip_step(model, processor, batch, train)
    step()
    step()
    assert not torch.equal(model.logit_scale, before)


def test_floating_point_operations_are_the_papers():
    """ViT-B/32 forward: 8.8 GFLOP an image and 6.0 a text of 77 tokens, a multiply-add counted as two."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(projection_dim=512))
    piece = next(grad_cache.noise(model, 1, 1))
    whole = piece.input_ids.new_zeros(1, 77)
    object.__setattr__(piece, "input_ids", whole)
    assert gpu.flops(model, [piece]) / 3e9 == pytest.approx(8.8 + 6.0, rel=0.03)
