"""The notebook runs from its first cell to its last, and is kept without outputs."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "search_in_korean.ipynb"


# A last cell: the nearest images are red; the longer training is better than the shorter, which is better than chance.
CHECK = """
assert all("red" in [thing.colour for thing in drawn[number].things] for number in search("빨간 원")[1][:2])
accuracies = {steps: float(correct.double().mean()) for steps, correct in right.items()}
assert accuracies["600"] > accuracies["150"] > 2 / 40, accuracies
"""


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_and_finds_what_it_is_asked_for(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    command = tmp_path / "bin" / "koclip"  # the koclip of this checkout
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m koclip.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this Python
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
