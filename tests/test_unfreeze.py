"""What trains of the text tower: its top layers, its token embeddings, and more from stage to stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import align, arguments, write_encoder, write_pairs, write_source
from helpers.tokenizer_families import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file
from test_swap import FAMILIES as SIZES
from test_swap import WIDTH, encoder
from tiny import tiny_dual_encoder
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from koclip.align import methods
from koclip.align.methods import freezes_embeddings, set_trainable
from koclip.config import AlignConfig, ConfigError, parse
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import parts
from koclip.models.swap import swap_text_tower
from koclip.optim import adamw, depth

WORDS = "embeddings.word_embeddings.weight"
TOP = "text_model.encoder.layer.1."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source CLIP, photos, and a BERT of two layers with dropout."""
    folder = tmp_path_factory.mktemp("unfreeze")
    write_source(folder / "source")
    write_pairs(folder / "pairs.parquet")
    (folder / "bert").mkdir()
    FAMILIES["bert"].write(folder / "bert")
    size = len(AutoTokenizer.from_pretrained(folder / "bert"))
    write_encoder(folder / "bert", "bert", size, hidden_dropout_prob=0.5, max_position_embeddings=40)
    return folder


def run(place: Path, name: str, *args: str) -> Path:
    directory = place / "runs" / name
    if not directory.exists():
        rest = ("--model.text_encoder", str(place / "bert"), "--output_dir", str(directory), "--eval.sets", "[]", *args)
        align(*arguments(place / "source", place / "pairs.parquet", *rest))
    return directory


def trained(directory: Path, before: dict[str, torch.Tensor], step: int) -> set[str]:
    """Return the weights of the text side in a checkpoint that differ from `before`, another state of the model."""
    after = state(directory, step)
    return {name for name in before if name.startswith("text_") and not torch.equal(after[name], before[name])}


def state(directory: Path, step: int) -> dict[str, torch.Tensor]:
    saved = load_file(directory / "checkpoints" / f"step-{step:08d}" / "state.safetensors")
    return {
        name.removeprefix("model.model."): value for name, value in saved.items() if name.startswith("model.model.")
    }


def start(place: Path) -> dict[str, torch.Tensor]:
    """Return the text encoder's weights under their names in the model; the projection is new."""
    bert = load_file(place / "bert" / "model.safetensors")
    return {f"text_model.{name}": value for name, value in bert.items() if not name.startswith("pooler.")}


@pytest.mark.parametrize("method", ["frozen_image", "full", "distill", "two_stage"])
def test_only_the_top_layers_train(method: str, place: Path) -> None:
    stages = ["--align.first_steps", "3"] if method in ("full", "two_stage") else []
    directory = run(place, method, "--align.method", method, "--align.text_layers", "1", *stages)
    changed = trained(directory, start(place), 6) - {f"text_model.{WORDS}"}  # the row of the padding token is zeroed
    assert changed
    assert all(name.startswith(TOP) for name in changed)
    with safe_open(directory / "checkpoints" / "step-00000006" / "state.safetensors", "pt") as file:
        moments = {name.split("/")[0] for name in file.keys() if name.startswith("optimizer.")}  # noqa: SIM118
    text = {name.removeprefix("optimizer.model.") for name in moments if ".text_" in name}
    assert text == {*changed, "text_projection.weight"}  # AdamW has no state for frozen weights


def test_token_embeddings_are_frozen(place: Path) -> None:
    every_step = ("--train.save_every", "1", "--train.keep_checkpoints", "9")
    directory = run(place, "embeddings", "--align.freeze_embeddings", "true", *every_step)
    changed = trained(directory, state(directory, 1), 6)
    assert f"text_model.{WORDS}" not in changed
    assert {"text_model.embeddings.position_embeddings.weight", "text_projection.weight"} <= changed


@pytest.mark.parametrize(
    ("text_encoder", "pieces", "chosen", "expected"),
    [
        ("bert", 10, None, True),
        ("bert", 1_000_000, None, False),
        ("same", 10, None, True),
        ("auto:bert", 10, None, False),
        (None, 10, None, False),
        ("bert", 10, False, False),
        ("auto:bert", 1_000_000, True, True),
    ],
)
def test_the_default_depends_on_the_vocabulary(
    text_encoder: str | None, pieces: int, chosen: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "MANY_PIECES", pieces)
    model = dual_encoder().model
    args = [
        *(["--model.text_encoder", text_encoder] if text_encoder else []),
        "--model.clip",
        "x",
        "--data.num_crops",
        "1",
    ]
    args += [] if chosen is None else ["--align.freeze_embeddings", str(chosen).lower()]
    config = parse(AlignConfig, args)
    assert freezes_embeddings(model, config) == expected
    report = methods.METHODS["frozen_image"].attach(model, config)
    assert (report is not None) == expected
    assert report is None or "90 pieces" in report


def dual_encoder() -> DualEncoder:
    """Return a CLIP's image tower with a BERT of two layers that drops half of everything."""
    wrapped = tiny_dual_encoder()
    text = encoder("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    wrapped.model = swap_text_tower(wrapped.model, text)
    return wrapped


def test_frozen_layers_keep_no_activations_and_drop_nothing() -> None:
    args = ["--model.clip", "x", "--model.text_encoder", "y", "--align.text_layers", "1", "--data.num_crops", "1"]
    config = parse(AlignConfig, args)
    wrapped = dual_encoder()
    set_trainable(wrapped, config, config.stages[0], wrapped.model)
    wrapped.train()
    tower: Any = parts(wrapped.model).text_tower
    outputs: list[torch.Tensor] = []
    for layer in tower.encoder.layer:
        layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    ids = torch.randint(5, 90, (4, 9))
    for _ in range(2):
        tower(input_ids=ids, attention_mask=torch.ones_like(ids))
    first, top, again, top_again = (output if torch.is_tensor(output) else output[0] for output in outputs)
    assert (first.requires_grad, top.requires_grad) == (False, True)
    assert torch.equal(first, again)
    assert not torch.equal(top, top_again)
    layers = {name: module.training for name, module in tower.named_modules() if isinstance(module, nn.Dropout)}
    assert not any(training for name, training in layers.items() if ".layer.1." not in name)
    assert any(layers.values())
    sizes = sum(weight.numel() for group in adamw(wrapped, config.optim).param_groups for weight in group["params"])
    top_layer = sum(weight.numel() for weight in tower.encoder.layer[1].parameters())
    assert sizes == top_layer + parts(wrapped.model).text_projection.weight.numel()  # the logit scale is the source's


def test_stages_unfreeze_more_and_more(place: Path) -> None:
    steps = ("--align.first_steps", "2", "--align.second_steps", "2", "--align.text_layers", "1")
    directory = run(
        place,
        "stages",
        "--align.method",
        "unfreeze",
        *steps,
        "--train.save_every",
        "1",
        "--train.keep_checkpoints",
        "9",
    )
    first, second, third = (trained(directory, state(directory, step - 1), step) for step in (2, 4, 6))
    projection, words = "text_projection.weight", f"text_model.{WORDS}"
    assert first == {projection}
    assert projection in second
    assert all(name.startswith(TOP) for name in second - {projection})
    assert {projection, words, "text_model.encoder.layer.0.output.dense.weight"} <= third


def test_no_steps_left_means_no_third_stage() -> None:
    words = ["--model.clip", "a", "--model.text_encoder", "b", "--data.num_crops", "1", "--optim.warmup_steps", "1"]
    words += ["--align.method", "unfreeze", "--align.text_layers", "1", "--train.num_steps", "6"]
    stages = parse(AlignConfig, [*words, "--align.first_steps", "2", "--align.second_steps", "4"]).stages
    assert [(stage.name, stage.start, stage.end) for stage in stages] == [("projection", 0, 2), ("top_layers", 2, 6)]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--align.method", "unfreeze", "--align.first_steps", "2"], ["align.second_steps", "align.text_layers"]),
        (["--align.second_steps", "2"], ["align.second_steps", "frozen_image"]),
        (["--align.third_lr", "0.1"], ["align.third_lr", "frozen_image"]),
        (["--align.method", "projection", "--align.text_layers", "1"], ["align.text_layers", "projection"]),
        (["--align.method", "projection", "--align.freeze_embeddings", "false"], ["align.freeze_embeddings"]),
        (["--align.text_layers", "0"], ["align.text_layers", "0"]),
        (
            [
                *("--align.method", "unfreeze", "--align.text_layers", "1", "--align.first_steps", "3"),
                *("--align.second_steps", "4"),
            ],
            ["align.second_steps", "(3)"],
        ),
    ],
)
def test_mistakes(args: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(place, "never", *args)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_more_layers_than_the_tower_has_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"align\.text_layers: got 3, expected at most 2"):
        run(place, "deep", "--align.text_layers", "3")


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "mpnet", "modernbert", "xlm-roberta-xl"])
def test_what_all_layers_share_is_deeper_than_they_are(kind: str) -> None:
    settings: dict[str, Any] = {**WIDTH, "vocab_size": 90, "pad_token_id": 0, **SIZES.get(kind, {})}
    if kind == "deberta-v2":
        settings |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    tower = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    depths = depth(tower)
    for name, below in depths.items():
        above = name.startswith(("pooler", "final_norm") + (("encoder.LayerNorm",) if kind == "xlm-roberta-xl" else ()))
        inside = ".layer." in name or name.startswith("layers.")
        assert below in ((0,) if above else (1, 2) if inside else (3,)), name
