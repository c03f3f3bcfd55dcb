"""A program that loads a published directory and embeds with it, without koclip and PEFT.

python -I clean_load.py <directory> <folder> reads folder/inputs.json ({"texts": [...], "pictures": [files], "pairs":
[[NFC, NFD], ...], "threads": n}), writes folder/embeddings.safetensors ("image" (N, D), "text" (M, D), unit norm) and
prints the value of `main` as one line of JSON. A `Router` is loaded by sentence-transformers, any other directory by
transformers.
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

Loaded = tuple[dict[str, torch.Tensor], dict[str, Any], Any]  # embeddings, problems of the weights, tokenizer


def main(directory: str, folder: Path) -> dict[str, Any]:
    """Embed the inputs; return the problems of the weights, and the pairs of texts with unequal ids."""
    inputs = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    torch.set_num_threads(inputs["threads"])
    pictures: list[Image.Image] = [Image.open(file) for file in inputs["pictures"]]
    embed = by_sentence_transformers if (Path(directory) / "router_config.json").exists() else by_transformers
    embeddings, problems, tokenizer = embed(directory, inputs["texts"], pictures)
    save_file({side: rows.contiguous() for side, rows in embeddings.items()}, folder / "embeddings.safetensors")
    ids = [[tokenizer(text)["input_ids"] for text in pair] for pair in inputs["pairs"]]
    return {
        "problems": {kind: sorted(map(str, names)) for kind, names in problems.items() if names},
        "unequal": [nfc for (nfc, _), (first, second) in zip(inputs["pairs"], ids, strict=True) if first != second],
    }


def by_transformers(directory: str, texts: list[str], pictures: list[Image.Image]) -> Loaded:
    """Embed with `AutoModel` and `AutoProcessor`."""
    model, problems = AutoModel.from_pretrained(directory, output_loading_info=True)
    model.eval()
    processor: Any = AutoProcessor.from_pretrained(directory)
    names = [name for name in ("input_ids", "attention_mask") if name in processor.tokenizer.model_input_names]
    padding = True if "attention_mask" in names else "max_length"  # SigLIP was trained on padded texts, without a mask
    encoded = processor(text=texts, images=pictures, padding=padding, truncation=True, return_tensors="pt")
    text_inputs = {name: encoded[name] for name in names}
    with torch.inference_mode():
        features = {
            "image": model.get_image_features(pixel_values=encoded["pixel_values"]).pooler_output,
            "text": model.get_text_features(**text_inputs).pooler_output,
        }
    return {side: F.normalize(rows.float(), dim=-1) for side, rows in features.items()}, problems, processor.tokenizer


def by_sentence_transformers(directory: str, texts: list[str], pictures: list[Image.Image]) -> Loaded:
    """Embed with `SentenceTransformer`, which gives missing weights random values without an error."""
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(directory, device="cpu")
    problems: dict[str, Any] = {}
    for side in ("text", "image"):
        tower = type(model[0].sub_modules[side][0].auto_model)
        _, faults = tower.from_pretrained(Path(directory) / f"{side}_0_Transformer", output_loading_info=True)
        problems |= {f"{side} {kind}": names for kind, names in faults.items()}
    options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False}
    embeddings = {"image": model.encode(pictures, **options), "text": model.encode(texts, **options)}
    return embeddings, problems, model[0].sub_modules["text"][0].tokenizer


if __name__ == "__main__":
    # `python -I` keeps the current directory out of the import path: it may contain koclip.
    sys.stdout.write(json.dumps(main(sys.argv[1], Path(sys.argv[2]))) + "\n")
