import dataclasses
import sys

import pytest

from koclip.config import (
    AlignConfig,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    IndexConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    PublishConfig,
    SourceConfig,
    TrainConfig,
    check,
    dump,
    parse,
    run,
)


def test_defaults_and_overrides():
    config = parse(
        PretrainConfig, ["--train.batch_size", "32", "--optim.lr", "3e-4", "--data.crop_scale", "[0.5, 1.0]"]
    )
    assert config.train.batch_size == 32
    assert config.optim.lr == 3e-4
    assert config.data.crop_scale == (0.5, 1.0)
    assert config.model == ModelConfig()


def test_file_and_override_order(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("optim: {lr: 3e-4, weight_decay: 0.1}\n")
    config = parse(PretrainConfig, ["--config", str(file), "--optim.lr", "1e-4"])
    assert (config.optim.lr, config.optim.weight_decay) == (1e-4, 0.1)


def test_a_list_of_sections_replaces_that_of_the_file(tmp_path):
    """Otherwise another source would keep the name, and so the data card, of the first."""
    file = tmp_path / "config.yaml"
    file.write_text("data: {sources: [{path: a.csv, name: photos, weight: 2}, {path: b.csv}]}\n", encoding="utf-8")
    for override in (["--data.sources", "[{path: c.csv}]"], ["--data.sources=[{path: c.csv}]"]):
        config = parse(PretrainConfig, ["--config", str(file), *override])
        assert config.data.sources == [SourceConfig(path="c.csv")]


@pytest.mark.parametrize(
    ("args", "dry_run", "private"),
    [
        ([], False, False),
        (["--dry_run"], True, False),
        (["--dry_run", "--private", "--tag", "v1"], True, True),
        (["--private", "false", "--dry_run=true"], True, False),
    ],
)
def test_a_switch_stands_for_itself(args, dry_run, private):
    config = parse(PublishConfig, ["--model", "a", "--repo_id", "org/a", *args])
    assert (config.dry_run, config.private) == (dry_run, private)


@pytest.mark.parametrize("name", ["alone", "a/b/c", "a b/c", "조직/이름", ""])
def test_a_repository_is_named_in_full(name, capsys):
    with pytest.raises(SystemExit):
        parse(PublishConfig, ["--model", "a", "--repo_id", name])
    assert "repo_id" in capsys.readouterr().err


def test_dump_reads_back_equal(tmp_path):
    config = PretrainConfig(
        data=DataConfig(sources=[SourceConfig(path="쌍.csv", captions={"ko": "설명"}, where={"split": ["a"]})]),
        train=TrainConfig(num_steps=7000),
    )
    dump(config, tmp_path / "config.yaml")
    assert parse(PretrainConfig, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optim.learning_rate", "1e-3"], ["optim.learning_rate"]),
        (["--train.batch", "32"], ["train.batch"]),  # no abbreviations
        (["--train.batch_size", "1.5"], ["train.batch_size", "int", "1.5"]),
        (["--train.precision", "no"], ["train.precision", "bf16", "no"]),
        (["--train.compile", "maybe"], ["train.compile", "maybe"]),
        (["--train.batch_size", "1"], ["train.batch_size", "got 1", "2"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--data.sources", "[{path: x, weigth: 3}]"], ["weigth"]),
        (["--data.sources", "[{path: x, weight: -3}]"], ["data.sources[].weight", "-3"]),
        (["--optim.warmup_steps", "5000"], ["optim.warmup_steps", "train.num_steps"]),
        (["--resume", "auto"], ["resume", "output_dir"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(PretrainConfig, args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_unknown_key_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--optim.learning_rat", "1e-3", "--train.batchsize", "3"])
    assert "--train.batch_size" in capsys.readouterr().err


def test_help_documents_every_key(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(PretrainConfig, ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in (DataConfig, ModelConfig, LossConfig, OptimConfig, TrainConfig):
        for field in dataclasses.fields(section):
            assert f"{field.name}:" in section.__doc__, f"{section.__name__}.{field.name} has no help"
            assert f".{field.name} " in text, field.name


def test_run_turns_a_config_error_into_one_line(capsys, monkeypatch):
    def main(config):
        raise ConfigError("model.image_size: got 50, expected a multiple of 8")

    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as stopped:
        run(main, PretrainConfig)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "koclip pretrain: error: model.image_size: got 50, expected a multiple of 8\n"


FAULTS = {  # command line -> the keys that are wrong, each in another place
    "sections": (PretrainConfig, "--optim.lr -1 --data.num_crops -2 --train.batch_size 1 --loss.tile_rows 0"),
    "one section": (PretrainConfig, "--optim.lr 0 --optim.warmup_steps -1 --optim.max_grad_norm -1"),
    "a section and the whole": (PretrainConfig, "--optim.lr 0 --resume auto"),
    "the whole": (AlignConfig, "--model.clip a --align.method lora --train.num_steps 9 --optim.warmup_steps 9"),
    "nothing named": (
        AlignConfig,
        "--model.clip= --align.wise_ft 0 --lora.rank 0 --distill.anchor -1 --data.num_crops 1",
    ),
    "lists": (PretrainConfig, "--data.sources [{weight:-1,scenes_size:3},{captions:{}}] --eval.sets [{max_images:-1}]"),
    "evaluate": (EvaluateConfig, "--batch_size 0 --sets [{shots:[0]}]"),
    "publish": (PublishConfig, "--model a --repo_id b --message= --space c"),
    "index": (IndexConfig, "--max_images -1 --thumbnail_size 5 --batch_size 0"),
}
KEYS = {
    "sections": ["optim.lr", "data.num_crops", "train.batch_size", "loss.tile_rows"],
    "one section": ["optim.lr", "optim.warmup_steps", "optim.max_grad_norm"],
    "a section and the whole": ["optim.lr", "resume"],
    "the whole": ["optim.warmup_steps", "data.num_crops", "model.text_encoder"],
    "nothing named": ["model.clip", "align.wise_ft", "lora.rank", "distill.anchor"],
    "lists": [
        *("data.sources[].weight", "data.sources[].scenes_size", "data.sources[].captions"),
        "eval.sets[].max_images",
    ],
    "evaluate": ["model", "batch_size", "eval.sets[].shots"],
    "publish": ["repo_id", "space", "message"],
    "index": ["model", "images", "max_images", "thumbnail_size", "batch_size"],
}


@pytest.mark.parametrize("case", FAULTS)
def test_all_faults_are_told_at_once(case, capsys):
    schema, line = FAULTS[case]
    with pytest.raises(SystemExit) as stopped:
        parse(schema, words(line))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{len(KEYS[case])} faults: " in error
    assert [key for key in KEYS[case] if f") {key}: got " not in error] == []


def words(line: str) -> list[str]:
    """Split a command line; lists are written without blanks, which YAML needs behind a colon."""
    return [word.replace(":", ": ") for word in line.split()]


def test_sections_tell_all_their_faults_in_python_too():
    with pytest.raises(ConfigError, match=r"optim\.lr: got 0, .*optim\.warmup_steps: got -1, "):
        OptimConfig(lr=0, warmup_steps=-1)


def test_one_fault_is_told_as_it_is():
    with pytest.raises(ConfigError, match=r"^optim\.lr: got 0, [^;]*$"):
        OptimConfig(lr=0)


def test_what_a_fault_leads_to_is_left_out():
    """The code runs on with a value that nothing behind it expects."""
    from koclip.config.checks import all_faults

    def look(values):
        with all_faults():
            check(bool(values), "values", values, "expected some")
            check(values[0] > 0, "values[0]", values, "expected more than 0")

    with pytest.raises(ConfigError, match=r"^values: got \[\], [^;]*$"):
        look([])
    with pytest.raises(TypeError):
        look(["a"])
    with pytest.raises(ConfigError, match=r"^values: got \[\], [^;]*$"), all_faults():
        look([])
    with pytest.raises(ConfigError, match=r"^after: "):  # nothing is collected any more
        check(False, "after", 0, "")
