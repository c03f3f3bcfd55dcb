"""The command `koclip`: what it lists and copies, how it starts recipes, and that it is quick to answer."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from koclip import cli, installation
from koclip.config import AlignConfig, parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    """The command sets the arguments of its process."""
    monkeypatch.setattr(sys, "argv", ["koclip"])


def start(*words: str, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start `koclip` in a folder, from this checkout."""
    settings = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "koclip.cli", *words],
        cwd=folder,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def koclip(*words: str, folder: Path, code: int = 0) -> tuple[str, str]:
    """Run `koclip` in a folder; it exits with `code`. Return what it prints, on stdout and on stderr."""
    process = start(*words, folder=folder)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stdout + stderr
    return stdout, stderr


LIGHT = """
import sys
from koclip import cli
try:
    cli.main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["ls"], ["cp", "align/scenes", "copy.yaml"], ["align", "--help"]]
)
def test_it_answers_without_torch(words, tmp_path):
    settings = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, check=True, **settings)
    assert done.stderr == "False\n"
    assert len(done.stdout) > 10


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert len(text.splitlines()) <= 32
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"\n    {name} " in text for name in (*cli.RECIPES, "ls", "cp"))


def test_every_recipe_is_a_command():
    scripts = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert scripts <= set(cli.RECIPES)


def test_ls_says_what_each_configuration_needs():
    rows = {line.split()[0]: line for line in cli.table().splitlines() if line}
    assert set(installation.configs()) <= set(rows)
    assert "openai/clip-vit-base-patch32, klue/roberta-base" in rows["align/klue_roberta_base_two_stage"]
    assert "1 GPU of 24 GB" in rows["align/klue_roberta_base_two_stage"]
    assert "built in" in rows["pretrain/scenes"]
    assert "2 CPU cores, 3.5 minutes" in rows["pretrain/scenes"]
    assert "koclip data emoji " in rows["pretrain/emoji_small"]


def test_the_data_sets_that_ls_names_can_be_built():
    from koclip.data_sets import DATA_SETS

    named = {name for names in re.findall(r"koclip data ((?:\w+, )*\w+)  ", cli.table()) for name in names.split(", ")}
    assert "emoji" in named
    assert named - {"your files"} <= set(DATA_SETS)


def test_ls_of_one_recipe_lists_its_own_only():
    names = [line.split()[0] for line in cli.table("index").splitlines()]
    assert names == ["configuration", "index/scenes"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        cli.table("nothing")


def test_cp_copies_and_does_not_overwrite(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = ROOT / "recipes" / "configs" / "align" / "klue_roberta_base_two_stage.yaml"
    cli.main(["cp", "align/klue_roberta_base_two_stage", "my.yaml"])
    assert (tmp_path / "my.yaml").read_bytes() == source.read_bytes()
    (tmp_path / "my.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["cp", "align/klue_roberta_base_two_stage", "my.yaml"])
    assert exit_.value.code == 2
    assert "my.yaml" in capsys.readouterr().err
    assert (tmp_path / "my.yaml").read_text(encoding="utf-8") == "mine"
    cli.main(["cp", "--force", "align/klue_roberta_base_two_stage", "my.yaml"])
    assert (tmp_path / "my.yaml").read_bytes() == source.read_bytes()
    cli.main(["cp", "accelerate/ddp"])
    assert (tmp_path / "ddp.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["cp", "align/klue_roberta_two_stage"], "align/klue_roberta_base_two_stage"),
        (["pretain"], "pretrain"),
        (["ls", "nothing"], "pretrain"),
        (["pretrain", "--launch"], "--launch"),
        (["index", "--launch", "--num_processes 2"], "--launch"),
    ],
)
def test_a_mistake_is_one_line_with_a_hint(words, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert hint in error
    assert error.count("\n") == 1


def test_wrong_arguments_are_refused_without_starting_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "launch", lambda *_: pytest.fail("started"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["pretrain", "--config", "pretrain/scenes", "--train.num_steps", "many"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "koclip pretrain" in error
    assert "train.num_steps" in error
    assert error.count("\n") == 1


def test_launch_options_reach_accelerate_and_all_else_the_recipe(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "launch", lambda *arguments: calls.append(arguments))
    cli.main(["pretrain", "--train.num_steps", "9000", "--launch", "--num_processes 2 --main_process_port 1"])
    cli.main(["evaluate", "--launch=--multi_gpu", "--model", "a"])
    assert calls == [
        (
            ROOT / "recipes" / "pretrain.py",
            ["--num_processes", "2", "--main_process_port", "1"],
            ["--train.num_steps", "9000"],
        ),
        (ROOT / "recipes" / "evaluate.py", ["--multi_gpu"], ["--model", "a"]),
    ]


def test_a_recipe_keeps_its_exit_status(tmp_path):
    _, error = koclip("pretrain", "--data.sources", "[{path: nowhere.csv}]", folder=tmp_path, code=2)
    assert "nowhere.csv" in error


@pytest.mark.slow
def test_a_signal_reaches_the_recipe_which_saves_and_stops(tmp_path):
    words = ["--output_dir", "run", "--train.num_steps", "100000", "--train.log_every", "1", "--eval.sets", "[]"]
    process = start("pretrain", *words, folder=tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    for _ in range(240):
        time.sleep(1)
        if log.is_file() and log.read_text(encoding="utf-8").count("\n") > 2:
            break
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "--resume auto" in stdout + stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_configuration_is_found_by_name_unless_a_file_has_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--config", "align/kobert_frozen"], ["--config=align/kobert_frozen.yaml"]):
        assert parse(AlignConfig, words).model.text_encoder == "monologg/kobert"
    (tmp_path / "align").mkdir()
    text = "{model: {clip: a/b, text_encoder: c/d}, data: {num_crops: 1}}"
    (tmp_path / "align" / "kobert_frozen").write_text(text, encoding="utf-8")
    assert parse(AlignConfig, ["--config", "align/kobert_frozen"]).model.text_encoder == "c/d"
    with pytest.raises(SystemExit):
        parse(AlignConfig, ["--config", "align/kobert_frozn"])
    assert "align/kobert_frozen" in capsys.readouterr().err
