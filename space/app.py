"""Show a model in the browser: zero-shot classification, image search, captions and heat maps.

koclip space --model runs/mine/model --index index/     # `koclip index` makes the index
koclip space                                            # the newest run in runs/, and the built-in images

On Hugging Face Spaces, the variables `KOCLIP_MODEL` and `KOCLIP_INDEX` name the model and the index. space/README.md
describes the API.
"""

import argparse
import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
_WORK = tempfile.mkdtemp(prefix="koclip-space-")
atexit.register(shutil.rmtree, _WORK, ignore_errors=True)
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(_WORK) / "files"))

from answers import Answers  # noqa: E402
from examples import examples  # noqa: E402
from guard import MAX_BYTES, SWEPT, Gate, sweep  # noqa: E402
from layout import CSS, THEME, blocks  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from koclip.config import ConfigError, IndexConfig, check  # noqa: E402
from koclip.encoders import Encoder, load  # noqa: E402
from koclip.search import ImageIndex, open_index  # noqa: E402
from koclip.search.build import build  # noqa: E402

_DEMO_IMAGES = 240  # built-in images that are searched if no index is given


def newest_run(root: Path = Path("runs")) -> str:
    """Return the model directory of the newest run.

    Raises:
        ConfigError: there is no run.
    """
    configs = sorted(root.glob("*/model/config.json"), key=lambda path: path.stat().st_mtime)
    fix = "train a model with `koclip pretrain` (4 minutes), or give --model <directory or Hub id>"
    check(bool(configs), "model", None, f"no run in {root}/ has a model; {fix}")
    return str(configs[-1].parent)


def open_collection(directory: str | None, model: str, encoder: Encoder) -> ImageIndex:
    """Open an index. Without a directory, index the built-in images.

    Raises:
        ConfigError: the directory has no index, or the index of another model.
    """
    if directory is None:
        config = IndexConfig(model=model, images="scenes", max_images=_DEMO_IMAGES, approximate="no")
        build(config, encoder, Path(_WORK) / "index")
        return open_index(Path(_WORK) / "index")
    index = open_index(directory)
    ours = index.facts.get("fingerprint") == encoder.fingerprint()
    again = f"make a new one: koclip index --model {model} --images <folder> --output_dir <index>"
    check(ours, "index", directory, f"it has the embeddings of another model ({index.facts.get('model')}); {again}")
    return index


def sweep_for_ever() -> None:
    """Delete old uploads every few minutes. Files that exist at the start (the examples) stay."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    kept = set(folder.rglob("*"))
    while True:
        time.sleep(SWEPT)
        sweep(folder, kept)


def main(args: list[str] | None = None) -> None:
    """Open the model and the index, and serve until the process is stopped."""
    parser = argparse.ArgumentParser(prog="koclip space", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", default=os.environ.get("KOCLIP_MODEL"), help="directory or Hub id; default: the newest run in runs/"
    )
    parser.add_argument(
        "--index",
        default=os.environ.get("KOCLIP_INDEX"),
        help="directory that `koclip index` made; default: built-in images",
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="0.0.0.0: reachable from other machines",
    )
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    options = parser.parse_args(args)
    try:
        model = options.model or newest_run()
        encoder = load(model, options.device)
        index = open_collection(options.index, model, encoder)
    except ConfigError as error:
        print(f"koclip space: error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    path = Path(model)
    name = (path.parent.name if path.name == "model" else path.name) if path.is_dir() else model
    answers = Answers(encoder, index)
    answers.prepare()
    page = blocks(answers, name, examples(index, Path(_WORK) / "examples"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that atexit functions run
    threading.Thread(target=sweep_for_ever, daemon=True).start()
    try:
        launch(page, options)
    except OSError as error:  # gradio's own message would name settings of gradio
        fault = f"port: {options.port} cannot be used ({error}); choose another: --port"
        print(f"koclip space: error: {fault}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def launch(page: Any, options: argparse.Namespace) -> None:
    """Serve until the process is stopped."""
    page.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        show_error=False,
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [Middleware(Gate)], "docs_url": None, "redoc_url": None, "openapi_url": None},
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=["api"],
        theme=THEME,
        css=CSS,
    )


if __name__ == "__main__":
    main()
