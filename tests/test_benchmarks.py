"""The benchmarks run, at tiny sizes."""

import copy
import importlib
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config, tiny_tokenizer
from torchvision import transforms

from koclip.config import DataConfig, SourceConfig, TrainConfig
from koclip.data.loader import training_captions
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import parts
from koclip.text.tokenizers import train_bpe

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for the script that it runs

import clip_shapes  # noqa: E402
import curation_scale  # noqa: E402
import curation_training  # noqa: E402
import decode_speed  # noqa: E402
import few_shot  # noqa: E402
import gpu  # noqa: E402
import grad_cache  # noqa: E402
import loss_memory  # noqa: E402
import no_match  # noqa: E402
import open_clip_weights  # noqa: E402
import pairs  # noqa: E402
import parity_open_clip  # noqa: E402
import plan_predictions  # noqa: E402
import ratios  # noqa: E402
import text_batches  # noqa: E402
import text_memory  # noqa: E402
import train_speed  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.mark.parametrize(
    "benchmark",
    [
        *(train_speed, decode_speed, parity_open_clip, gpu, grad_cache, loss_memory, text_batches, text_memory),
        *(curation_scale, curation_training, few_shot, no_match, plan_predictions),
    ],
    ids=lambda module: module.__name__,
)
def test_the_command_in_a_benchmarks_first_lines_parses(benchmark):
    script = f"python recipes/benchmarks/{benchmark.__name__}.py"
    commands = [line.split("  #")[0].split() for line in benchmark.__doc__.splitlines() if script in line]
    assert commands
    for words in commands:
        benchmark.parser().parse_args(words[2:])
    with pytest.raises(SystemExit, match="2"):
        benchmark.parser().parse_args(["--no_such_option"])


def test_a_missing_open_clip_is_a_message_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "open_clip_peer", raising=False)
    with pytest.raises(SystemExit, match=r"pip install .*open_clip_torch"):
        importlib.import_module("open_clip_peer")


def test_weights_under_open_clips_names_are_the_same_weights():
    model, _ = from_scratch(tiny_config(), tiny_tokenizer())
    state = model.state_dict()
    converted = open_clip_weights.to_open_clip(state)
    assert sum(tensor.numel() for tensor in converted.values()) == sum(tensor.numel() for tensor in state.values())
    assert not [name for name in converted if "_model." in name or "q_proj" in name]
    fused = converted["transformer.resblocks.1.attn.in_proj_weight"]
    attention = model.get_submodule("text_model.encoder.layers.1.self_attn")
    assert torch.equal(fused[64:128], attention.get_parameter("k_proj.weight"))
    assert torch.equal(converted["visual.proj"], parts(model).image_projection.weight.T)


def test_stand_in_captions_are_as_long_as_cocos(tmp_path):
    data = DataConfig(sources=[pairs.stand_ins(tmp_path, 256)])
    tokenizer = train_bpe(training_captions(data), vocab_size=2_000, max_tokens=pairs.CONTEXT)
    batches = pairs.record(data, tokenizer, 16, batch_size=32, count=8)
    lengths = torch.cat([batch.attention_mask.sum(dim=1) for batch in batches]).float()
    assert lengths.mean().item() == pytest.approx(13, abs=0.5)
    longest = statistics.mean(batch.input_ids.shape[1] for batch in batches)
    assert longest - lengths.mean().item() < 2  # grouped by length


def test_padding_and_ratios():
    ids = torch.tensor([[5, 6], [7, 8]])
    assert pairs.padded(ids, 0, 4).tolist() == [[5, 6, 0, 0], [7, 8, 0, 0]]
    assert ratios.spread([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == "2.00 (1.00-3.00)"


def test_koclip_and_trainer_take_turns():
    tokenizer = tiny_tokenizer(max_tokens=pairs.CONTEXT)
    model, processor = clip_shapes.build_clip(tiny_config(), tokenizer)
    ours = copy.deepcopy(model)
    before = model.logit_scale.clone()
    batches = pairs.record(DataConfig(sources=[SourceConfig(scenes_size=64)]), tokenizer, 32, batch_size=4, count=2)
    train = TrainConfig(num_steps=1_000, batch_size=4, tracker="none")
    loops = {"koclip": train_speed.koclip_loop(ours, processor, batches, train), "open_clip": lambda: None}
    options = train_speed.parser().parse_args(["--rounds", "2", "--cpu_time"])
    seconds = train_speed.rounds(model, processor, batches, loops, options)
    assert {name: len(times) for name, times in seconds.items()} == {"Trainer": 2, "koclip": 2, "open_clip": 2}
    assert not torch.equal(ours.logit_scale, before)
    assert not torch.equal(model.logit_scale, before)


def test_koclips_pixels_are_those_of_torchvisions_antialiased_crop(monkeypatch):
    def train_transform(size, mean, std):
        crop = transforms.RandomResizedCrop(size, (0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
        return transforms.Compose([crop, transforms.ToTensor(), transforms.Normalize(mean, std)])

    monkeypatch.setitem(sys.modules, "open_clip_peer", SimpleNamespace(train_transform=train_transform))
    row = decode_speed.row((320, 240), decode_speed.jpegs(2, (320, 240), []), rounds=1)
    assert row.startswith("| 320x240")
    decibels, largest = row.split("|")[5:7]
    assert float(decibels.removesuffix("dB ")) > 60
    assert int(largest) <= 3


def test_the_loss_curves_of_koclip_and_open_clip_agree():
    curves = parity_open_clip.compare(SourceConfig(scenes_size=500), 8, 8, tiny_config(embed_dim=64))
    assert curves.difference < parity_open_clip.TOLERANCE
    assert "equal" in parity_open_clip.table(curves)


def test_train_speed_prints_every_loop(capsys):
    train_speed.main(["--rounds", "1", "--batches", "2", "--batch_size", "4"], tiny_config(image_size=32))
    assert {"| Trainer |", "| open_clip |", "| koclip |"} <= {f"|{line.split('|')[1]}|" for line in table(capsys)}


def test_decode_speed_prints_every_size(capsys):
    decode_speed.main(["--rounds", "1", "--files", "1"])
    assert [line.split(",")[0] for line in table(capsys)[2:]] == ["| 640x480", "| 500x375"]


def table(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_the_settings_of_predictions_exist():
    """Three are fitted, and 17 others are predicted."""
    options = plan_predictions.parser().parse_args([])
    settings = (*plan_predictions.FITTED, *plan_predictions.PREDICTED)
    assert len({setting.name for setting in settings}) == len(settings) == len(plan_predictions.FITTED) + 17 == 20
    runs = [plan_predictions.plan_config(setting, options, 0).read_run() for setting in settings]
    assert {run.train.precision for run in runs} == {"fp32", "bf16"}
