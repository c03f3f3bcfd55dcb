"""A Space on the Hub that shows a published model: the files of space/, and the variable that names the model."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard

from koclip.config import check
from koclip.publishing.files import CARD
from koclip.publishing.push import Pushed, Repository, push, repeat

MODEL = "KOCLIP_MODEL"  # what space/app.py reads


def space_files(source: Path) -> list[str]:
    """Return the files of the app, sorted, relative to its directory.

    Raises:
        ConfigError: it is no directory of an app.
    """
    found = sorted(path.name for path in source.glob("*") if path.suffix in (".py", ".md", ".txt"))
    whole = {"app.py", "requirements.txt", CARD} <= set(found)
    check(whole, "space", str(source), f"expected a directory with app.py, requirements.txt and {CARD}")
    return found


def push_space(source: Path, repo: Repository, model_id: str, message: str) -> Pushed:
    """Make a Space show a model of the Hub; nothing is done that is done already.

    Args:
        source: Directory of the app.
        repo: The Space; it is made if it is missing.
        model_id: The model.
        message: The commit's first line.

    Raises:
        ConfigError: `source` holds no app, or the Hub refuses.
        RunError: the Hub does not answer. The Space is as it was, or complete.
    """
    files = space_files(source)
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            shutil.copy(source / name, folder)
        _pin(Path(folder) / "requirements.txt", source)
        card = SpaceCard.load(Path(folder) / CARD)
        card.data.title, card.data.models = repo.repo_id.split("/")[1], [model_id]
        card.save(Path(folder) / CARD)
        pushed = push(Path(folder), files, repo, message)
    repeat(lambda: _name_model(repo.repo_id, model_id), f"setting {MODEL} of {repo.repo_id}", repo.key)
    return pushed


def _pin(requirements: Path, source: Path) -> None:
    """Let the Space install the koclip that the app comes with, if that is a commit which its remote has."""
    git = ["git", "-C", str(source)]
    pushed = [*git, "for-each-ref", "refs/remotes", "--contains", "HEAD", "--count=1"]
    if shutil.which("git") and subprocess.run(pushed, capture_output=True, check=False).stdout:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        text = requirements.read_text(encoding="utf-8")
        pinned = re.sub(r"(@ git\+https://[^\s@]+)$", rf"\g<1>@{head}", text, flags=re.MULTILINE)
        requirements.write_text(pinned, encoding="utf-8")


def _name_model(space_id: str, model_id: str) -> None:
    """Set the variable, which restarts the Space, unless it is set so."""
    known = HfApi().get_space_variables(space_id).get(MODEL)
    if known is None or known.value != model_id:
        HfApi().add_space_variable(space_id, MODEL, model_id)
