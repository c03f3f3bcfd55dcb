"""The launch configurations, read by accelerate's own loader, and the lab configurations they start."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny import paper_tokenizer

from koclip.config import PretrainConfig, parse
from koclip.models.dual_encoder import from_scratch

RECIPES = Path(__file__).parents[1] / "recipes"
LAUNCHES = {
    "cpu": ("NO", 1, 1),
    "one_gpu": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "deepspeed_zero2": ("DEEPSPEED", 8, 1),
    "two_nodes": ("MULTI_GPU", 16, 2),
}
LABS = {"vit_b32": (32_768, 5e-4), "vit_b16": (32_768, 5e-4), "vit_l14": (16_384, 4e-4), "rn50": (32_768, 5e-4)}


def launch(name: str) -> Any:
    return load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))


def lab(name: str) -> PretrainConfig:
    return parse(PretrainConfig, ["--config", str(RECIPES / "configs" / "pretrain" / f"{name}_webdataset.yaml")])


def test_every_launch_configuration_is_tested() -> None:
    assert {path.stem for path in (RECIPES / "accelerate").glob("*.yaml")} == set(LAUNCHES)


@pytest.mark.parametrize(("name", "expected"), LAUNCHES.items())
def test_accelerate_reads_it(name: str, expected: tuple[str, int, int]) -> None:
    config = launch(name)
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == expected
    assert config.use_cpu == (name == "cpu")
    header = (RECIPES / "accelerate" / f"{name}.yaml").read_text(encoding="utf-8").split("compute_environment")[0]
    assert f"{name}.yaml" in header
    assert all(line.startswith("#") for line in header.splitlines())


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_commands_in_its_header_parse(name: str) -> None:
    header = (RECIPES / "accelerate" / f"{name}.yaml").read_text(encoding="utf-8").replace("\\\n#", " ")
    commands = re.findall(r"recipes/pretrain\.py(.*)", header)
    assert commands
    for command in commands:
        parse(PretrainConfig, command.replace("recipes/configs", str(RECIPES / "configs")).split())


@pytest.mark.parametrize(("name", "section"), [("fsdp2", "fsdp_config"), ("deepspeed_zero2", "deepspeed_config")])
def test_launcher_knows_every_setting(name: str, section: str) -> None:
    known = {action.dest for action in launch_command_parser()._actions}
    assert getattr(launch(name), section).keys() <= known


@pytest.mark.parametrize("preset", ["tiny", "vit_l14", "rn50"])
def test_layers_that_fsdp2_wraps_exist(preset: str) -> None:
    wrapped = launch("fsdp2").fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    config = parse(PretrainConfig, ["--model.preset", preset])
    with torch.device("meta"):
        model, _ = from_scratch(config.model, paper_tokenizer())
    assert set(wrapped) <= {type(module).__name__ for module in model.modules()}


def script_of(name: str) -> str:
    """Return what a file makes each machine run."""
    text = (RECIPES / "accelerate" / name).read_text(encoding="utf-8")
    return str(yaml.safe_load(text)["run"]) if name.endswith(".yml") else text


@pytest.mark.parametrize("name", ["two_nodes.slurm", "two_nodes.sky.yml"])
def test_scripts_for_two_nodes_start_what_is_there(name: str) -> None:
    text = script_of(name)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for path in ("accelerate/two_nodes.yaml", "pretrain.py", "configs/pretrain/vit_l14_webdataset.yaml"):
        assert f"recipes/{path}" in text
        assert (RECIPES / path).exists()
    words = text.split("recipes/pretrain.py")[1].replace("\\\n", " ").replace("'", " ").split()
    config = parse(PretrainConfig, words)
    assert config.train.num_processes == launch("two_nodes").num_processes
    assert config.train.num_processes * config.train.batch_size == 32_768
    assert config.resume == "auto"


def test_the_file_for_skypilot_asks_for_the_machines_of_the_launch_configuration() -> None:
    task = yaml.safe_load((RECIPES / "accelerate" / "two_nodes.sky.yml").read_text(encoding="utf-8"))
    gpus = int(task["resources"]["accelerators"].split(":")[1])
    config = launch("two_nodes")
    assert (task["num_nodes"], task["num_nodes"] * gpus) == (config.num_machines, config.num_processes)
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    assert "'.[train]'" in task["setup"]


@pytest.mark.parametrize(("name", "expected"), LABS.items())
def test_lab_configurations_are_the_papers(name: str, expected: tuple[int, float]) -> None:
    config = lab(name)
    assert config.model.preset == name
    assert (config.train.batch_size * (config.train.num_processes or 0), config.optim.lr) == expected
    assert (config.tokenizer.vocab_size, config.tokenizer.max_tokens) == (49_408, 77)
    assert (config.optim.beta2, config.optim.eps) == ((0.999, 1e-8) if name == "rn50" else (0.98, 1e-6))
    assert (config.optim.beta1, config.optim.weight_decay, config.optim.warmup_steps) == (0.9, 0.2, 2_000)
    assert config.train.num_steps * expected[0] == 32 * 400_000_000
    assert (config.loss.name, config.loss.duplicates, config.model.temperature) == ("infonce", "negatives", 0.07)
    assert config.train.precision == "bf16"
    assert config.data.sources[0].format == "webdataset"


@pytest.mark.parametrize("name", LABS)
def test_lab_configurations_leave_no_section_to_defaults(name: str) -> None:
    text = (RECIPES / "configs" / "pretrain" / f"{name}_webdataset.yaml").read_text(encoding="utf-8")
    assert list(yaml.safe_load(text)) == ["data", "tokenizer", "model", "loss", "optim", "train", "eval"]
