"""Pre-flight: check a directory before it is published, and compare its embeddings by stock classes with koclip's."""

import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from koclip.config import ConfigError
from koclip.encoders import load
from koclip.evaluation.report.table import console
from koclip.models.router import FILE as ROUTER
from koclip.publishing.checks import Check, check_files
from koclip.publishing.formats.onnx import EXACT, FOLDER, INT8, MOST, RESULTS, SIDES, run, session
from koclip.text import tokenizers

_CLEAN_LOAD = Path(__file__).with_name("clean_load.py")
# From short to long, the order of `encode_texts`: then the embeddings are equal, bit for bit.
TEXTS = ("고양이", "빨간 자전거", "a photo of a dog", "창가에 앉아 밖을 보는 고양이 사진")
_COMPOSED = ("고양이가 창가에 앉아 있다", "꽃밭 위의 벌", "각", "값싼 닭고기", "café déjà vu")
_AGAIN = "save the model again with koclip; undo changes by hand"


def preflight(directory: Path, repo_id: str | None = None, adapter: bool = True) -> list[Check]:
    """Run all checks on a model's directory. Its files may contain the user's name if `repo_id` does.

    Raises:
        ConfigError: the directory has no config.json.
    """
    checks = check_files(directory, repo_id, adapter)
    if checks[0].problems:  # files are missing or broken, so the model cannot be loaded
        return checks
    with tempfile.TemporaryDirectory() as folder:
        return [*checks, *_load_checks(directory, Path(folder)), _ids(directory)]


def print_checks(checks: Sequence[Check]) -> None:
    """Print a table of all checks, with the problems and how to fix them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "", "problems, and how to fix them"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        verdict = Text("fails", style="bold red") if check.problems else Text("ok", style="green")
        lines = [*check.problems, f"→ {check.fix}"] if check.problems else []
        table.add_row(check.name, verdict, Text("\n".join(lines)))
    console().print(table)


def refuse(checks: Sequence[Check], key: str = "model") -> None:
    """Raise a `ConfigError` with the failed checks, if any; `key` is the configuration key of what was checked."""
    failed = [check for check in checks if check.problems]
    if failed:
        problems = "; ".join(f"{check.name}: {check.problems[0]} ({check.fix})" for check in failed)
        raise ConfigError(f"{key}: {len(failed)} of {len(checks)} checks failed, so nothing was pushed. {problems}")


def _load_checks(directory: Path, folder: Path) -> list[Check]:
    """Load the directory in a clean process, and compare its embeddings with koclip's."""
    loads = "loads by stock libraries alone"
    if (directory / ROUTER).exists() and find_spec("sentence_transformers") is None:
        return [Check(loads, ["sentence-transformers is not installed"], "run: pip install 'koclip[peers]'")]
    pictures = _pictures(folder)
    pairs = [[unicodedata.normalize(form, text) for form in ("NFC", "NFD")] for text in _COMPOSED]
    inputs = {"texts": TEXTS, "pictures": pictures, "pairs": pairs, "threads": torch.get_num_threads()}
    (folder / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    home = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ran = subprocess.run(
        [sys.executable, "-I", str(_CLEAN_LOAD), str(directory.resolve()), str(folder)],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        return [Check(loads, [(ran.stderr.strip().splitlines() or ["the process was killed"])[-1]], _AGAIN)]
    answer = json.loads(ran.stdout.splitlines()[-1])
    problems = [f"{kind}: {', '.join(names[:5])}" for kind, names in answer["problems"].items()]
    try:
        encoder = load(directory, device="cpu")
    except ConfigError as error:
        return [Check(loads, [*problems, str(error)], _AGAIN)]
    ours = {"image": encoder.encode_images(pictures), "text": encoder.encode_texts(TEXTS)}
    stock = load_file(folder / "embeddings.safetensors")
    differences = {name: _difference(ours[name], stock[name]) for name in ours}
    unequal = [f"{name} embeddings differ by {value:.2g}" for name, value in differences.items() if value != 0]
    return [
        Check(loads, problems, _AGAIN),
        Check("embeddings are koclip's, to 0.0", unequal, _AGAIN),
        Check(
            "composed and decomposed text: same ids",
            [f"{text!r} has other ids decomposed" for text in answer["unequal"]],
            "load the tokenizer with koclip.text.tokenizers.load, which composes, and save it again",
        ),
        *_graphs(directory, encoder.processor, pictures, ours),
    ]


def _graphs(directory: Path, processor: Any, pictures: Sequence[str], ours: dict[str, torch.Tensor]) -> list[Check]:
    """Compare the embeddings of the graphs in onnx/, if any, with the model's: the graphs may be older."""
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
            difference = _difference(ours[side], run(session(graph), inputs[side])) if graph else 0.0
        except ImportError as error:
            problems.append(f"{error.name} is missing, so the graphs cannot be checked: pip install 'koclip[onnx]'")
            break
        if not difference <= MOST:  # also true for NaN
            problems.append(f"{name}{EXACT}.onnx: embeddings differ by {difference:.2g}")
    quantized = [name for name in files if name.endswith(f"{INT8}.onnx")]
    if quantized and not (directory / FOLDER / RESULTS).is_file():
        problems += [f"{FOLDER}/{RESULTS} is missing, which has the fingerprint of {', '.join(sorted(quantized))}"]
    return [Check("graphs in onnx/ are the model's", problems, f"export them again with --onnx, or delete {FOLDER}/")]


def _difference(ours: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference; infinite if shapes differ, NaN if a number is NaN."""
    return (ours - other).abs().max().item() if ours.shape == other.shape else float("inf")


def _pictures(folder: Path) -> list[str]:
    """Draw images of different sizes and shades and return their files."""
    files = []
    for number, size in enumerate([(64, 64), (97, 60), (48, 81)]):
        shades = [Image.linear_gradient("L").resize(size).rotate(90 * (number + turn)) for turn in range(3)]
        files.append(str(folder / f"{number}.png"))
        Image.merge("RGB", [shade.resize(size) for shade in shades]).save(files[-1])
    return files


def _ids(directory: Path) -> Check:
    """Compare the tokenizer's special tokens and size with the text tower's configuration."""
    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    text = config.text_config
    problems = []
    try:
        tokenizers.check(tokenizer, "of this model", text, probes=())
    except ConfigError as error:
        problems.append(str(error))
    problems += tokenizers.differing_ids(tokenizer, text)
    return Check("the tokenizer's ids are config.json's", problems, "write the tokenizer's ids into config.json")
