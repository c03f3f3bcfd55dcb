"""A program that loads a published directory and embeds with it, without koclip and PEFT.

python -I clean_load.py <directory> <folder> reads folder/inputs.json ({"texts": [...], "pictures": [files], "pairs":
[[NFC, NFD], ...], "threads": n}), writes folder/embeddings.safetensors ("image" (N, D), "text" (M, D), unit norm) and
prints the value of `main` as one line of JSON.
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
    """Embed the inputs; return the problems of the weights, and the pairs of texts with unequal ids."""
    inputs = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    torch.set_num_threads(inputs["threads"])
    model, problems = AutoModel.from_pretrained(directory, output_loading_info=True)
    model.eval()
    processor: Any = AutoProcessor.from_pretrained(directory)
    pictures = [Image.open(file) for file in inputs["pictures"]]
    names = [name for name in ("input_ids", "attention_mask") if name in processor.tokenizer.model_input_names]
    padding = True if "attention_mask" in names else "max_length"  # SigLIP was trained on padded texts, without a mask
    encoded = processor(text=inputs["texts"], images=pictures, padding=padding, truncation=True, return_tensors="pt")
    text_inputs = {name: encoded[name] for name in names}
    with torch.inference_mode():
        features = {
            "image": model.get_image_features(pixel_values=encoded["pixel_values"]).pooler_output,
            "text": model.get_text_features(**text_inputs).pooler_output,
        }
    embeddings = {side: F.normalize(value.float(), dim=-1).contiguous() for side, value in features.items()}
    save_file(embeddings, folder / "embeddings.safetensors")
    ids = [[processor.tokenizer(text)["input_ids"] for text in pair] for pair in inputs["pairs"]]
    return {
        "problems": {kind: sorted(map(str, names)) for kind, names in problems.items() if names},
        "unequal": [nfc for (nfc, _), (first, second) in zip(inputs["pairs"], ids, strict=True) if first != second],
    }


if __name__ == "__main__":
    # `python -I` keeps the current directory out of the import path: it may contain koclip.
    sys.stdout.write(json.dumps(main(sys.argv[1], Path(sys.argv[2]))) + "\n")
