"""Make the pictures of the documents from a model that was trained on the built-in scenes.

    accelerate launch recipes/pretrain.py --output_dir runs/quickstart       # 4 minutes on 2 CPU cores
    python docs/make_pictures.py --model runs/quickstart/model               # 5 minutes more

It needs the extra `dev` and Chromium (`apt-get install chromium`). The pictures go to docs/pictures.
"""

import argparse
import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from playwright import sync_api as playwright

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "search_in_korean.ipynb"
CHARTS = {"queries-scenes": "queries", "stress-scenes": "stress"}  # of the report
DESKTOP = {"viewport": {"width": 1_120, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 800}, "device_scale_factor": 1.5}
TABS = {"classify": "제로샷 분류", "search": "이미지 검색", "heatmap": "어디를 보았나"}
PICTURES = {"desktop": ("classify", "search", "heatmap"), "phone": ("search",)}  # of the Space
COLOURS = 192  # of a picture's palette: small files, no visible change


def main() -> None:
    """Evaluate the model, show it in the Space, run the notebook, and save the pictures of all three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="runs/quickstart/model", help="directory; trained on the built-in scenes")
    parser.add_argument("--output_dir", default=str(ROOT / "docs" / "pictures"))
    options = parser.parse_args()
    output, model = Path(options.output_dir), Path(options.model).resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        report = evaluated(model, Path(folder) / "evaluation")
        for chart, name in CHARTS.items():
            save((report.parent / "pictures" / f"{chart}.png").read_bytes(), output / f"{name}.png")
        save(search_of_notebook(Path(folder)), output / "notebook_search.png")
        page = opened.new_page(**DESKTOP)
        page.goto(report.as_uri())
        save(page.screenshot(), output / "report.png")
        with space(model) as address:
            for device, tabs in PICTURES.items():
                page = opened.new_page(**(PHONE if device == "phone" else DESKTOP))
                page.goto(address)
                for tab in tabs:
                    show(page, tab)
                    save(page.screenshot(full_page=device == "desktop"), output / f"space_{tab}_{device}.png")


def evaluated(model: Path, folder: Path) -> Path:
    """Evaluate the model on scenes; return its report."""
    command = [sys.executable, ROOT / "recipes" / "evaluate.py", "--model", model, "--output_dir", folder]
    subprocess.run([str(part) for part in command], check=True)
    return folder / "report.html"


def search_of_notebook(folder: Path) -> bytes:
    """Run the notebook in a folder; return the picture that it draws."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return base64.b64decode(
        next(output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    )


def show(page: playwright.Page, tab: str) -> None:
    """Open a tab, click its first example, and wait for the answer."""
    open_tab(page, TABS[tab])
    page.locator(".examples:visible :is(tbody tr, button.gallery-item)").first.click()
    answers = {"classify": ".confidence-set", "search": ".gallery .grid-container img", "heatmap": "img[src*=webp]"}
    page.locator(answers[tab]).filter(visible=True).first.wait_for()
    page.wait_for_load_state("networkidle")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1_000)  # until nothing moves


def open_tab(page: playwright.Page, name: str) -> None:
    """Open a tab, through the menu of tabs that a phone has no room for."""
    tab = page.get_by_role("tab", name=name).filter(visible=True)
    menu = page.locator(".overflow-menu > button").filter(visible=True)
    tab.or_(menu).first.wait_for()
    if tab.count():
        tab.first.click()
        return
    menu.first.click()
    page.locator(".overflow-dropdown button", has_text=name).click()


@contextmanager
def browser() -> Iterator[playwright.Browser]:
    """Start the system's Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def space(model: Path) -> Iterator[str]:
    """Start the Space with the model and the built-in images; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "space" / "app.py"), "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"space/app.py does not answer at {address}; its output is above") from error
                time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def save(picture: bytes, path: Path) -> None:
    """Write a picture as a small PNG."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


if __name__ == "__main__":
    main()
