"""Run as a program: load a published directory where neither koclip nor PEFT exists, and embed with it.

python -I clean_load.py <directory> <folder> reads folder/inputs.json ({"texts": [...], "pictures": [files], "pairs":
[[NFC, NFD], ...], "threads": n}), writes folder/stranger.safetensors ("image" (N, D), "text" (M, D), unit norm) and
prints one line of JSON with what it saw.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["koclip"] = sys.modules["peft"] = None  # type: ignore[assignment]  # importing them raises ImportError

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402


def main(directory: str, folder: Path) -> dict[str, Any]:
    """Embed the inputs; return the model's class, what was wrong with its weights, and pairs with unequal ids."""
    inputs = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    torch.set_num_threads(inputs["threads"])
    model, problems = AutoModel.from_pretrained(directory, output_loading_info=True)
    model.eval()
    processor: Any = AutoProcessor.from_pretrained(directory)
    pictures = [Image.open(file) for file in inputs["pictures"]]
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    encoded = processor(text=inputs["texts"], images=pictures, **options)
    wanted = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        made = {
            "image": model.get_image_features(pixel_values=encoded["pixel_values"]).pooler_output,
            "text": model.get_text_features(**wanted).pooler_output,
        }
    embeddings = {name: F.normalize(one.float(), dim=-1).contiguous() for name, one in made.items()}
    save_file(embeddings, folder / "stranger.safetensors")
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "problems": {kind: sorted(map(str, names)) for kind, names in problems.items() if names},
        "unequal": [one for one, other in inputs["pairs"] if _ids(processor, one) != _ids(processor, other)],
    }


def _ids(processor: Any, text: str) -> Any:
    return processor.tokenizer(text)["input_ids"]


if __name__ == "__main__":
    # koclip must not be found by its files either: `python -I` leaves the current directory out of the path.
    sys.stdout.write(json.dumps(main(sys.argv[1], Path(sys.argv[2]))) + "\n")
