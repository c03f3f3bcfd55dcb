"""Whole runs of recipes/pretrain.py, small: what they leave behind, that they resume bit for bit, that they survive."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from fake_encoder import CLASSES, write_colours
from helpers import warm_python
from PIL import Image
from safetensors.torch import load_file

from koclip import config, training
from koclip.runs.session import measures_other_data

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "pretrain.py"
SCENES = ROOT / "recipes" / "configs" / "pretrain" / "scenes.yaml"  # what the recipe runs without --config
QUICK = [
    *("--train.num_threads", "1", "--train.tracker", "none", "--train.batch_size", "8", "--train.log_every", "5"),
    *("--optim.warmup_steps", "3", "--tokenizer.train_captions", "500", "--tokenizer.vocab_size", "600"),
    *("--data.num_workers", "0", "--data.length_pool", "2", "--data.sources", "[{path: scenes, scenes_size: 4000}]"),
    *("--eval.sets", "[{source: {scenes_part: test, scenes_size: 20}}]"),
]
SMALL = [*QUICK, *("--model.image_width", "32", "--model.text_width", "32", "--model.image_layers", "1")]


def pretrain(*args: str, base: Sequence[str] = SMALL) -> None:
    """Run the recipe's main() in this process."""
    spec = importlib.util.spec_from_file_location("pretrain", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe.main(config.parse(config.PretrainConfig, [*base, *args], default=SCENES))


def weights(run: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(run / "model" / "model.safetensors").items()}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 20 steps with everything random turned on."""
    run = tmp_path_factory.mktemp("run") / "whole"
    pretrain(*RANDOM, "--output_dir", str(run))
    return run


RANDOM = [
    *("--train.num_steps", "20", "--train.save_every", "10", "--train.ema_decay", "0.9"),
    *("--model.patch_dropout", "0.3", "--data.word_dropout", "0.2", "--data.color_jitter", "0.2"),
]


def test_a_run_leaves_what_the_design_says(finished):
    left = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "results.json", "model/model.safetensors"):
        assert name in left
    assert "checkpoints/step-00000020/state.safetensors" in left
    assert {"pictures/queries-scenes.png", "pictures/example.png", "pictures/training.png"} <= left
    assert not [name for name in left if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    config.parse(config.PretrainConfig, ["--config", str(finished / "config.yaml")])


def test_without_the_fast_layers_a_run_is_the_same_up_to_rounding(finished, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("train.fast is false")

    monkeypatch.setattr("koclip.training.setup.speed_up", refuse)
    pretrain(*RANDOM, "--train.fast", "false", "--output_dir", str(tmp_path / "run"))
    slow, fast = (lines(run / "metrics.jsonl") for run in (tmp_path / "run", finished))
    assert [line["loss"] for line in slow] == pytest.approx([line["loss"] for line in fast], rel=1e-3)
    environments = [json.loads((run / "environment.json").read_text()) for run in (tmp_path / "run", finished)]
    assert [environment["fast"] for environment in environments] == [False, True]


def test_the_tracker_writes_into_the_run(tmp_path):
    pretrain("--train.num_steps", "4", "--train.tracker", "tensorboard", "--output_dir", str(tmp_path / "run"))
    assert list((tmp_path / "run" / "tracker").glob("events.out.tfevents.*"))


def test_metrics_hold_every_promised_number(finished):
    logged = lines(finished / "metrics.jsonl")
    assert [line["step"] for line in logged] == [5, 10, 15, 20]
    promised = {"loss", "accuracy", "logit_scale", "lr", "grad_norm", "images_per_second", "data_wait_share"}
    assert promised | {"padding_share", "skipped"} <= set(logged[0])
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert 0 < logged[0]["seconds"] < logged[-1]["seconds"] < 600


def test_results_name_sets_languages_tasks_and_intervals(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"model", "fingerprint", "data", "metrics", "environment"}
    for language in ("ko", "en"):
        for name in ("text_to_image/recall@10", "image_to_text/recall@1", "unseen_pairs/accuracy", "relation/accuracy"):
            metric = results["metrics"][f"scenes/{language}/{name}"]
            low, high = metric["ci95"]
            assert low <= metric["value"] <= high
            assert metric["n"] > 0
    assert results["environment"]["packages"]["torch"]


def test_stopped_and_resumed_equals_uninterrupted(finished, tmp_path):
    """A run that SIGTERM stops somewhere and --resume auto continues ends with the same bits."""
    run = tmp_path / "stopped"
    command = [sys.executable, str(RECIPE), *SMALL, *RANDOM, "--output_dir", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    give_up = time.time() + 240
    while not (run / "metrics.jsonl").exists() and time.time() < give_up and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "Stopped at step" in output
    assert "--resume auto" in output
    assert not (run / "model").exists()
    pretrain(*RANDOM, "--output_dir", str(run), "--resume", "auto")
    assert weights(run) == weights(finished)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [5, 10, 15, 20]
    seconds = [line["seconds"] for line in lines(run / "metrics.jsonl")]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)


def test_a_second_signal_exits_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with training.stop_requests(torch.device("cpu")) as asked_to_stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked_to_stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_pieces_train_what_the_whole_batch_trains(tmp_path):
    """The literal recipe in pieces of 3 and at once, without dropout: the same losses, but for rounding."""
    steps = ("--train.num_steps", "10", "--optim.warmup_steps", "1", "--train.log_every", "1")
    pretrain(*steps, "--output_dir", str(tmp_path / "whole"))
    pretrain(*steps, "--train.micro_batch_size", "3", "--output_dir", str(tmp_path / "pieces"))
    whole, pieces = (
        [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "pieces")
    )
    assert pieces == pytest.approx(whole, abs=1e-4)


def test_a_change_that_changes_the_result_is_refused_by_name(finished):
    with pytest.raises(config.ConfigError, match=r"data\.seed: 0 -> 1.*--resume_with '\[data\.seed\]'"):
        pretrain(*RANDOM, "--output_dir", str(finished), "--resume", "auto", "--data.seed", "1")


def test_evaluating_during_training_changes_nothing(finished, tmp_path, encoded):
    """Whatever is evaluated: every task, what draws numbers among them."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    colours = {"path": str(write_colours(tmp_path / "colours.parquet", encoded, 48)), "captions": {}, "label": "key"}
    sets = [
        {"source": {"scenes_part": "test", "scenes_size": 20}, "tasks": ["retrieval", "languages", "stress"]},
        {
            "source": colours,
            "classes": str(tmp_path / "classes.yaml"),
            "tasks": ["zero_shot", "shift", "linear_probe", "few_shot"],
            "corruptions": ["noise"],
            "shots": [1, 2],
        },
    ]
    watched = ["--train.eval_every", "7", "--eval.sets", json.dumps(sets)]
    pretrain(*RANDOM, *watched, "--output_dir", str(tmp_path / "watched"))
    assert weights(tmp_path / "watched") == weights(finished)
    evaluated = [line["step"] for line in lines(tmp_path / "watched" / "metrics.jsonl") if "loss" not in line]
    assert evaluated == [7, 14]


def test_another_seed_gives_another_model(finished, tmp_path):
    pretrain(*RANDOM, "--data.seed", "1", "--output_dir", str(tmp_path / "other"))
    assert weights(tmp_path / "other") != weights(finished)


def test_a_finished_run_keeps_what_it_was_trained_with(finished):
    before = [(finished / name).read_bytes() for name in ("config.yaml", "environment.json")]
    options = ("--resume", "auto", "--resume_with", "[optim.lr]", "--optim.lr", "0.5")
    pretrain(*RANDOM, "--output_dir", str(finished), *options)
    assert [(finished / name).read_bytes() for name in ("config.yaml", "environment.json")] == before


def test_without_evaluation_sets_a_model_is_made(tmp_path, capsys):
    pretrain("--train.num_steps", "5", "--eval.sets", "[]", "--output_dir", str(tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "eval.sets" in printed
    for command in ("evaluate", "index", "space", "publish"):
        assert f"koclip {command} --model {tmp_path / 'run' / 'model'}" in printed


@pytest.mark.parametrize(
    ("trained", "measured", "other"),
    [
        ("scenes", ["scenes"], False),
        ("pairs.csv", ["scenes"], True),
        ("pairs.csv", ["scenes", "held_out.csv"], False),
        ("pairs.csv", [], False),
    ],
)
def test_a_run_notices_that_only_other_data_are_measured(trained, measured, other):
    sources = [config.SourceConfig(path=trained)]
    sets = [config.EvalSetConfig(source=config.SourceConfig(path=path)) for path in measured]
    cfg = config.PretrainConfig(data=config.DataConfig(sources=sources), eval=config.EvalConfig(sets=sets))
    assert measures_other_data(cfg) == other


@pytest.mark.parametrize("place", ["/proc/none/run", "/dev/null/run"])
def test_a_directory_that_cannot_be_made_is_named(place):
    with pytest.raises(config.ConfigError, match=f"output_dir: {place} "):
        pretrain("--output_dir", place)


def test_a_used_directory_is_not_overwritten(finished):
    with pytest.raises(config.ConfigError, match="--resume auto"):
        pretrain(*RANDOM, "--output_dir", str(finished))


def test_the_wrong_number_of_processes_is_refused(tmp_path):
    with pytest.raises(config.ConfigError, match="torchrun"):
        pretrain("--train.num_steps", "4", "--train.num_processes", "2", "--output_dir", str(tmp_path / "run"))


@pytest.fixture
def dirty(tmp_path) -> Path:
    """300 pairs, 5 % broken images, some captions empty or no strings."""
    rows = []
    for index in range(300):
        name = f"{index}.png"
        Image.new("RGB", (40, 30), (index % 256, 90, 40)).save(tmp_path / name)
        rows.append({"file": name, "ko": f"{index}번 그림", "en": [f"picture {index}"]})
    for index in range(0, 300, 20):
        whole = (tmp_path / rows[index]["file"]).read_bytes()
        (tmp_path / rows[index]["file"]).write_bytes(whole[: len(whole) // 2] if index % 40 else b"no picture")
    rows[7] |= {"ko": "", "en": ["", None]}
    rows[8] |= {"ko": None, "en": []}
    rows[11]["en"] = ["<|endoftext|>", "picture 11"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return tmp_path


def test_dirty_data_trains_to_the_end_and_every_bad_sample_is_listed(dirty, capsys):
    source = f"[{{path: {dirty / 'pairs.jsonl'}, image: file, captions: {{ko: ko, en: en}}}}]"
    pretrain("--data.sources", source, "--train.num_steps", "80", "--output_dir", str(dirty / "run"))
    listed = lines(dirty / "run" / "skipped.jsonl")
    assert f"{len(listed)} samples could not be used" in capsys.readouterr().out
    bad = {index for index in range(300) if index % 20 == 0 or index in (7, 8)}
    assert {int(line["key"].split("/")[1]) for line in listed} == bad
    assert len(listed) == len(bad)
    assert all(line["reason"] for line in listed)
    assert lines(dirty / "run" / "metrics.jsonl")[-1]["step"] == 80


def test_unusable_evaluation_images_are_listed_once_across_resumes(dirty):
    source = {"path": str(dirty / "pairs.jsonl"), "image": "file", "captions": {"ko": "ko", "en": "en"}}
    args = [
        "--train.num_steps",
        "4",
        "--eval.sets",
        json.dumps([{"source": source}]),
        "--output_dir",
        str(dirty / "run"),
    ]
    pretrain(*args)
    pretrain(*args, "--resume", "auto")
    listed = [line["key"] for line in lines(dirty / "run" / "skipped.jsonl")]
    assert len(listed) == len(set(listed)) == 17  # 15 broken images and 2 rows without a caption


def test_too_much_dirt_stops_the_run_with_the_list(dirty):
    source = f"[{{path: {dirty / 'pairs.jsonl'}, image: file, captions: {{ko: ko, en: en}}}}]"
    args = ["--data.sources", source, "--train.num_steps", "200", "--data.max_skipped_fraction", "0.02"]
    with pytest.raises(config.ConfigError, match=r"max_skipped_fraction.*skipped\.jsonl"):
        pretrain(*args, "--output_dir", str(dirty / "run"))


def test_a_missing_column_is_one_line_and_exit_code_2(dirty):
    source = f"[{{path: {dirty / 'pairs.jsonl'}, image: photo, captions: {{ko: ko}}}}]"
    command = [str(RECIPE), *SMALL, "--data.sources", source, "--output_dir", str(dirty / "run")]
    done = warm_python.run(command, cwd=dirty)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "photo" in last
    assert "'file'" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["flickr8k_ko_small", "emoji_small"])
def test_the_real_configs_run(name, shared_data, tmp_path, monkeypatch):
    """Two steps of each small config on the real data."""
    monkeypatch.chdir(shared_data.parent)
    file = ROOT / "recipes" / "configs" / "pretrain" / f"{name}.yaml"
    sets = config.parse(config.PretrainConfig, ["--config", str(file)]).eval.sets
    spec = json.dumps([{**config.to_dict(eval_set), "max_images": 30, "gallery": []} for eval_set in sets])
    args = ["--config", str(file), "--train.num_steps", "2", "--optim.warmup_steps", "1", "--eval.sets", spec]
    pretrain(*args, "--tokenizer.train_captions", "2000", "--output_dir", str(tmp_path / "run"), base=QUICK)
    assert (tmp_path / "run" / "results.json").exists()
