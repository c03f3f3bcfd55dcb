"""`koclip plan`: parameters, FLOPs and memory equal those of real models; hours, energy and price are arithmetic."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, ModernBertConfig, ViTConfig, XLMRobertaConfig

from koclip.config import (
    AdapterConfig,
    AlignConfig,
    AlignMethodConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    PretrainConfig,
    SwapConfig,
    TokenizerConfig,
    TrainConfig,
    parse,
)
from koclip.models.presets import PRESETS
from koclip.planning import counting, devices, memory
from koclip.planning.models import build
from koclip.planning.plan import plan

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
PAPER = TokenizerConfig(vocab_size=49_408, max_tokens=77)
META = torch.device("meta")


def pretraining(preset: str = "tiny", tokenizer: TokenizerConfig = PAPER, **train: Any) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(preset=preset), tokenizer=tokenizer, train=TrainConfig(**{"batch_size": 2, **train})
    )


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of models that have a config.json, and no weights."""
    folder = tmp_path_factory.mktemp("configurations")
    text = {"vocab_size": 600, "max_position_embeddings": 32, "eos_token_id": 599, "pad_token_id": 598, **SMALL}
    configs: dict[str, Any] = {
        "clip": CLIPConfig(
            text_config=text, vision_config={"image_size": 32, "patch_size": 8, **SMALL}, projection_dim=32
        ),
        "vit": ViTConfig(image_size=32, patch_size=8, **SMALL),
        "xlm_roberta": XLMRobertaConfig(vocab_size=1_000, max_position_embeddings=66, pad_token_id=1, **SMALL),
        "modernbert": ModernBertConfig(
            vocab_size=1_000, pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, **SMALL
        ),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


def alignment(model: SwapConfig, align: AlignMethodConfig, **train: Any) -> AlignConfig:
    return AlignConfig(
        model=model,
        align=align,
        lora=AdapterConfig(target="both"),
        data=DataConfig(num_crops=1),
        tokenizer=TokenizerConfig(max_tokens=24),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(**{"batch_size": 4, "num_steps": 300, **train}),
    )


def stages_of(run: PretrainConfig | AlignConfig, **options: Any) -> list[dict[str, Any]]:
    return list(plan(PlanConfig(run="planned", **options), run)["stages"])


def total_of(stage: dict[str, Any], key: str = "total") -> int:
    return sum(part[key] for part in stage["parameters"].values())


@pytest.mark.parametrize(("preset", "count"), [("vit_b32", 151_277_313), ("vit_l14", 427_616_513)])
def test_parameters_are_those_of_the_papers_models(preset, count):
    encoder = build(pretraining(preset), META).dual_encoder
    assert sum(part["total"] for part in counting.parameters(encoder).values()) == count


def test_parameters_of_the_parts_add_up():
    encoder = build(pretraining(), META).dual_encoder
    counts = counting.parameters(encoder)
    assert sum(part["total"] for part in counts.values()) == sum(weight.numel() for weight in encoder.parameters())
    assert counts["token_embeddings"]["total"] == 49_408 * 128
    assert counts["projections"]["total"] == 2 * 128 * 128


def counted_by_torch(model: Any, pairs: int, tokens: int, image_size: int) -> int:
    """FLOPs of forward, loss and backward of a stock model, as its own class computes them, without fused kernels."""
    model.train()
    model.set_attn_implementation("eager")
    ids = torch.zeros(pairs, tokens, dtype=torch.long, device=META)
    pixels = torch.zeros(pairs, 3, image_size, image_size, device=META)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, return_loss=True).loss.backward()
    return int(counter.get_total_flops())


FAST_ENOUGH = ("tiny", "vit_b32", "rn50")
LARGER = [pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if name not in FAST_ENOUGH]


@pytest.mark.parametrize("preset", [*FAST_ENOUGH, *LARGER])
def test_flops_equal_those_that_torch_counts(preset):
    run = pretraining(preset, fast=False)
    planned = build(run, META)
    model = planned.dual_encoder.model
    model.to_empty(device=META)
    expected = counted_by_torch(model, 2, 77, planned.image_size)
    assert stages_of(run)[0]["flops_per_pair"]["total"] == pytest.approx(expected / 2, rel=0.01)


def test_flops_of_a_vit_equal_the_formula():
    """24 layers of 257 tokens and width 1,024: the products of the layers, and those of the attention scores."""
    width, length, layers = 1_024, 257, 24
    products = 2 * length * 12 * width**2 + 4 * length**2 * width
    patches = 2 * 256 * 3 * 14**2 * width
    expected = layers * products + patches + 2 * width * 768
    image = stages_of(pretraining("vit_l14", fast=False))[0]["flops_per_pair"]["image"]
    assert image == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("text", "pooling"), [("xlm_roberta", "first"), ("modernbert", "mean")])
def test_flops_of_other_text_towers_equal_those_of_a_real_step(configurations, text, pooling):
    model = SwapConfig(clip=configurations["clip"], text_encoder=configurations[text], pooling=pooling)
    run = alignment(model, AlignMethodConfig(method="full"), fast=False)
    planned = build(run, torch.device("cpu"))
    planned.begin(run, run.stages[0])
    encoder = planned.dual_encoder
    encoder.model.set_attn_implementation("eager")
    shapes = counting.Shapes(4, 24, planned.image_size)
    real = counting.flops(encoder, shapes)
    flops = stages_of(run)[0]["flops_per_pair"]
    assert flops["image"] + flops["text"] == pytest.approx((real.image + real.text) / 4, rel=0.01)
    assert flops["backward"] == pytest.approx(real.backward / 4, rel=0.01)


def test_what_is_frozen_or_cached_costs_less(configurations):
    model = SwapConfig(clip=configurations["clip"], text_encoder=configurations["xlm_roberta"], pooling="first")
    full, frozen, projection = (
        stages_of(alignment(model, AlignMethodConfig(method=method)))[0]
        for method in ("full", "frozen_image", "projection")
    )
    assert (full["image"], frozen["image"], projection["image"]) == ("pixels", "embedding", "embedding")
    assert projection["text"] == "pooled"
    assert full["flops_per_pair"]["image"] > 0 == frozen["flops_per_pair"]["image"]
    assert projection["flops_per_pair"]["text"] == 2 * 64 * 32  # the projection alone
    assert full["memory"]["moments"] > frozen["memory"]["moments"] > projection["memory"]["moments"]
    assert total_of(projection, "trained") == 64 * 32
    assert total_of(full) == total_of(projection)


def test_every_method_has_a_plan(configurations):
    model = SwapConfig(clip=configurations["clip"], text_encoder=configurations["xlm_roberta"], pooling="first")
    unfreeze = AlignMethodConfig(method="unfreeze", first_steps=100, second_steps=100, text_layers=1)
    stages = stages_of(alignment(model, unfreeze))
    trained = [total_of(stage, "trained") for stage in stages]
    assert [stage["steps"] for stage in stages] == [100, 100, 100]
    assert trained[0] < trained[1] < trained[2]
    two = stages_of(alignment(model, AlignMethodConfig(method="two_stage", first_steps=100)))
    assert [stage["image"] for stage in two] == ["nothing", "embedding"]
    lora = stages_of(alignment(model, AlignMethodConfig(method="lora")))[0]
    assert 0 < total_of(lora, "trained") < total_of(lora) / 4
    alone = replace(model, clip=configurations["vit"])
    assert stages_of(alignment(alone, AlignMethodConfig(method="projection")))[0]["image"] == "embedding"


def test_micro_batches_cost_flops_and_save_memory():
    whole, cut = (stages_of(pretraining(batch_size=64, micro_batch_size=size))[0] for size in (None, 8))
    flops = cut["flops_per_pair"]
    assert flops["recomputed"] == flops["image"] + flops["text"]
    assert whole["flops_per_pair"]["recomputed"] == 0
    assert cut["memory"]["step"] < whole["memory"]["step"] / 2


def test_gradient_checkpointing_costs_flops_and_saves_memory():
    run = pretraining("small", batch_size=64)
    recomputing = replace(
        run, model=replace(run.model, image_gradient_checkpointing=True, text_gradient_checkpointing=True)
    )
    plain, recomputed = stages_of(run)[0], stages_of(recomputing)[0]
    assert recomputed["flops_per_pair"]["backward"] > 1.2 * plain["flops_per_pair"]["backward"]
    assert recomputed["memory"]["step"] < 0.7 * plain["memory"]["step"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_without_data_equals_that_of_real_tensors(precision):
    run = pretraining(fast=False)
    shapes = counting.Shapes(16, 32, 40)
    real = counting.step(build(run, torch.device("cpu")).dual_encoder, shapes, precision)
    with counting.without_data(build(run, META).dual_encoder) as encoder:
        planned = counting.step(encoder, shapes, precision)
    assert planned.peak == pytest.approx(real.peak, rel=0.02)
    assert planned.written == pytest.approx(real.written, rel=0.02)
    assert planned.calls == pytest.approx(real.calls, rel=0.1)  # masks: real ones are looked at, and simplified


def test_memory_adds_up():
    parts = {"weights": 100, "gradients": 100, "moments": 200, "average": 0, "loss": 7, "batch": 3}
    assert memory.Memory(**parts, step=500, cached=False).peak == 100 + 200 + 3 + 500 + 7
    assert memory.Memory(**parts, step=500, cached=True).peak == 100 + 200 + 3 + 500 + 100
    assert memory.Memory(**parts, step=20, cached=False).peak == 100 + 200 + 3 + 100
    shared = memory.Memory(**parts, step=500, cached=False).sharded(4)
    assert (shared.weights, shared.gradients, shared.moments, shared.step) == (25, 25, 50, 500)
    assert memory.state_bytes(10, 4, averaged=True) == {"weights": 40, "gradients": 16, "moments": 32, "average": 40}
    assert memory.checkpoint_bytes(memory.state_bytes(10, 4, averaged=False), keep=2)["checkpoints"] == 3 * (40 + 32)


@pytest.mark.parametrize(("limit", "expected"), [(99, 0), (10**9, 4_096), (100 + 7 * 777, 777)])
def test_the_largest_micro_batch(limit, expected):
    largest = memory.largest_batch(lambda pairs: 100 + 7 * pairs, limit, 4_096)
    assert largest <= expected
    assert largest == pytest.approx(expected, rel=0.02)


def test_the_largest_micro_batch_of_a_run_fits():
    run = pretraining("small", TokenizerConfig(), batch_size=256)
    stage = stages_of(run, memory_gib=0.1, device="a100")[0]
    largest = stage["largest_micro_batch"]
    assert 1 < largest < 256
    assert stage["memory"]["peak"] > stage["memory_limit"]
    cut = replace(run, train=replace(run.train, micro_batch_size=largest))
    assert stages_of(cut, device="a100")[0]["memory"]["peak"] <= stage["memory_limit"]


def test_hours_energy_and_price_of_a_device():
    run = pretraining(batch_size=8, num_steps=1_000, precision="bf16")
    options: dict[str, Any] = {"device": "h100", "utilization": 0.5, "num_devices": 4, "price_per_hour": 3.0}
    result = plan(PlanConfig(run="planned", **options), run)
    stage, total = result["stages"][0], result["total"]
    assert total["pairs"] == 1_000 * 8 * 4
    assert total["flops"] == total["pairs"] * stage["flops_per_pair"]["total"]
    assert total["hours"] == pytest.approx(total["flops"] / (989e12 * 0.5 * 4) / 3600)
    assert total["kwh"] == pytest.approx(total["hours"] * 4 * 700 / 1000)
    assert total["price"] == pytest.approx(total["hours"] * 4 * 3)


def test_measured_steps_give_hours():
    run = pretraining(tokenizer=TokenizerConfig(max_tokens=16), batch_size=4, num_steps=1_000, micro_batch_size=2)
    result = plan(PlanConfig(run="planned", steps=2, watts=50), run)
    speed = result["stages"][0]["measured"]["pairs_per_second"]
    assert speed > 0
    assert result["total"]["hours"] == pytest.approx(4_000 / speed / 3600)
    assert result["total"]["kwh"] == pytest.approx(result["total"]["hours"] * 50 / 1000)


def test_measured_steps_of_an_alignment(configurations):
    model = SwapConfig(clip=configurations["clip"], text_encoder=configurations["xlm_roberta"], pooling="first")
    run = alignment(model, AlignMethodConfig(method="two_stage", first_steps=100))
    assert all(stage["measured"]["pairs_per_second"] > 0 for stage in stages_of(run, steps=1))


def test_the_papers_runs_imply_a_utilization():
    """The arithmetic of the guide's table; the FLOPs per pair there are from the plan."""
    peak = devices.peak_flops(devices.DEVICES["v100"], "fp16")
    for run, flops, expected in zip(devices.PAPER_RUNS, (529.0e9, 1_653.3e9), (0.204, 0.184), strict=True):
        seconds = run.num_devices * run.days * 86_400
        used = devices.implied_utilization(flops, devices.PAPER_PAIRS, seconds, peak)
        assert used == pytest.approx(expected, abs=0.0005)


def test_features_on_disk(configurations):
    model = SwapConfig(clip=configurations["clip"], text_encoder=configurations["xlm_roberta"], pooling="first")
    run = alignment(model, AlignMethodConfig(method="projection"))
    disk = plan(PlanConfig(run="planned", num_images=1_000, num_captions=5_000), run)["disk"]
    assert disk["image_features"] == 1_000 * 32 * 2
    assert disk["text_features"] == 5_000 * 64 * 2


def test_keys_of_the_run_override_it():
    config = parse(PlanConfig, ["pretrain/scenes", "--train.batch_size", "128", "--watts", "9"], first="run")
    run = config.read_run()
    assert isinstance(run, PretrainConfig)
    assert (run.train.batch_size, config.watts) == (128, 9)
    assert isinstance(PlanConfig(run="align/scenes").read_run(), AlignConfig)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"run": "pretrain/absent"}, "run"),
        ({"run": "evaluate/scenes"}, "run"),
        ({"run": "pretrain/scenes", "device": "abacus"}, "device"),
    ],
)
def test_mistakes_are_one_line(options, key):
    config = PlanConfig(**options)
    with pytest.raises(ConfigError, match=f"^{key}: got ") as error:
        plan(config, config.read_run())
    assert "\n" not in str(error.value)


def test_a_mistake_in_an_override_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        PlanConfig(run="pretrain/scenes", overrides=["--train.batch_size", "1"]).read_run()
    assert stopped.value.code == 2
    assert "train.batch_size" in capsys.readouterr().err


def test_the_recipe_prints_and_writes_the_plan(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "plan.json"
    words = ["plan", "pretrain/scenes", "--device", "a100", "--output_file", str(file)]
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "plan.py"), run_name="__main__")
    result = json.loads(file.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert f"{result['parameters']['image_tower']['total']:,}" in printed
    assert math.isfinite(result["total"]["hours"])
