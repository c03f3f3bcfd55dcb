"""Pre-flight: whether a directory may be published. Nothing is taken on trust, the model is loaded and asked."""

import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from koclip.config import ConfigError
from koclip.encoders import load
from koclip.publishing.files import Check, check_files
from koclip.publishing.formats.onnx import EXACT, FOLDER, INT8, MOST, RESULTS, SIDES, run, session
from koclip.text import tokenizers

_STRANGER = Path(__file__).with_name("clean_load.py")
# From short to long, which is the order that `encode_texts` fills its batch in: the same sums, to the last bit.
TEXTS = ("고양이", "빨간 자전거", "a photo of a dog", "창가에 앉아 밖을 보는 고양이 사진")
_MARKED = ("고양이가 창가에 앉아 있다", "꽃밭 위의 벌", "각", "값싼 닭고기", "café déjà vu")
_AGAIN = "save the model again with koclip; if it was changed by hand, undo that"


def preflight(directory: Path, repo_id: str | None = None, adapter: bool = True) -> list[Check]:
    """Check a model directory against the release list.

    Args:
        directory: What is to be published, with its card.
        repo_id: Where to; an account's name is no secret in it.
        adapter: Whether adapter/ is to be published too.

    Raises:
        ConfigError: it is no directory with a config.json.
    """
    checks = check_files(directory, repo_id, adapter)
    if checks[0].problems:  # without a tokenizer or weights there is nothing to load
        return checks
    with tempfile.TemporaryDirectory() as folder:
        return [*checks, *_ask(directory, Path(folder)), _ids(directory)]


def print_checks(checks: Sequence[Check]) -> None:
    """Print a table of all checks, and for each one that fails what is wrong and how to mend it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "", "what is wrong, and how to mend it"):
        table.add_column(heading, overflow="fold")
    for one in checks:
        verdict = Text("fails", style="bold red") if one.problems else Text("ok", style="green")
        table.add_row(one.name, verdict, Text("\n".join([*one.problems, f"→ {one.mend}"] if one.problems else [])))
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)


def refuse(checks: Sequence[Check]) -> None:
    """Raise a `ConfigError` that names the checks that failed, if any did."""
    failed = [one for one in checks if one.problems]
    if failed:
        wrong = "; ".join(f"{one.name}: {one.problems[0]} ({one.mend})" for one in failed)
        raise ConfigError(f"model: {len(failed)} of {len(checks)} checks fail; nothing was pushed. {wrong}")


def _ask(directory: Path, folder: Path) -> list[Check]:
    """Let a clean process load the directory, and compare its embeddings with koclip's."""
    pictures = _pictures(folder)
    pairs = [[unicodedata.normalize(form, text) for form in ("NFC", "NFD")] for text in _MARKED]
    inputs = {"texts": TEXTS, "pictures": pictures, "pairs": pairs, "threads": torch.get_num_threads()}
    (folder / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    home = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ran = subprocess.run(
        [sys.executable, "-I", str(_STRANGER), str(directory.resolve()), str(folder)],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )
    loads = "loads by stock transformers alone"
    if ran.returncode != 0:
        return [Check(loads, [(ran.stderr.strip().splitlines() or ["it died"])[-1]], _AGAIN)]
    answer = json.loads(ran.stdout.splitlines()[-1])
    wrong = [f"{kind}: {', '.join(names[:5])}" for kind, names in answer["problems"].items()]
    try:
        encoder = load(directory, device="cpu")
    except ConfigError as error:
        return [Check(loads, [*wrong, str(error)], _AGAIN)]
    ours = {"image": encoder.encode_images(pictures), "text": encoder.encode_texts(TEXTS)}
    theirs = load_file(folder / "stranger.safetensors")
    far = {name: _difference(ours[name], theirs[name]) for name in ours}
    unequal = [f"{name} embeddings differ by {value:.2g}" for name, value in far.items() if value != 0]
    return [
        Check(loads, wrong, _AGAIN),
        Check("embeddings are koclip's, to 0.0", unequal, _AGAIN),
        Check(
            "composed and decomposed text: same ids",
            [f"{text!r} has other ids decomposed" for text in answer["unequal"]],
            "load the tokenizer with koclip.text.tokenizers.load, which composes, and save it again",
        ),
        *_graphs(directory, encoder.processor, pictures, ours),
    ]


def _graphs(directory: Path, processor: Any, pictures: Sequence[str], ours: dict[str, torch.Tensor]) -> list[Check]:
    """Compare the embeddings of onnx/, if it is there, with the model's: its weights may have changed since."""
    files = {path.name: path for path in (directory / FOLDER).glob("*.onnx")}
    if not files:
        return []
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    encoded: Any = tokenizers.encode(processor.tokenizer, list(TEXTS), padding=True, return_tensors="pt")
    inputs = {
        "image": {"pixel_values": processor.image_processor(images, return_tensors="pt")["pixel_values"]},
        "text": {name: encoded[name] for name in ("input_ids", "attention_mask")},
    }
    problems = []
    for name, side in zip(SIDES, inputs, strict=True):
        try:
            graph = files.get(f"{name}{EXACT}.onnx")
            far = _difference(ours[side], run(session(graph), inputs[side])) if graph else 0.0
        except ImportError as error:
            problems.append(f"{error.name} is not installed, so they cannot be tried: pip install 'koclip[onnx]'")
            break
        if not far <= MOST:  # so written, NaN is too much
            problems.append(f"{name}{EXACT}.onnx: embeddings differ by {far:.2g}")
    small = [name for name in files if name.endswith(f"{INT8}.onnx")]
    if small and not (directory / FOLDER / RESULTS).is_file():
        problems += [f"{FOLDER}/{RESULTS} is missing, which says of which weights {', '.join(sorted(small))} are"]
    return [Check("graphs in onnx/ are the model's", problems, f"make them again with --onnx, or delete {FOLDER}/")]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference; infinite if shapes differ, nan if anything is."""
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")


def _pictures(folder: Path) -> list[str]:
    """Draw pictures of different sizes and shades and return their files."""
    files = []
    for number, size in enumerate([(64, 64), (97, 60), (48, 81)]):
        shades = [Image.linear_gradient("L").resize(size).rotate(90 * (number + turn)) for turn in range(3)]
        files.append(str(folder / f"{number}.png"))
        Image.merge("RGB", [shade.resize(size) for shade in shades]).save(files[-1])
    return files


def _ids(directory: Path) -> Check:
    """Compare the tokenizer's special tokens and size with what the text tower's configuration says of them."""
    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    text = config.text_config
    problems = []
    try:
        tokenizers.check(tokenizer, "of this model", text, probes=())
    except ConfigError as error:
        problems.append(str(error))
    largest = max(tokenizer.get_vocab().values())
    if largest >= text.vocab_size:
        problems.append(f"the tokenizer has ids up to {largest}, text_config.vocab_size is {text.vocab_size}")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for name in names if text.model_type == "clip_text_model" else names[2:]:
        theirs, ours = getattr(text, name), getattr(tokenizer, name)
        if theirs != ours:
            problems.append(f"text_config.{name} is {theirs}, the tokenizer's {ours}")
    return Check("the tokenizer's ids are config.json's", problems, "write the tokenizer's ids into config.json")
