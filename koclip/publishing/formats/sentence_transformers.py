"""Let `SentenceTransformer(directory)` load a published dual encoder, and embed texts and images in one space.

sentence-transformers (5.4 and newer) reads four small files beside the model: its modules, and the methods of the model
that embed texts and images. The directory stays a model of transformers, with one copy of the weights.
"""

import json
from pathlib import Path
from typing import Any

from koclip import storage
from koclip.models import router

MODULES, FOLDER = "modules.json", "1_Normalize"
_MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    (FOLDER, "sentence_transformers.models.Normalize"),
)


def describe(directory: Path) -> list[Path]:
    """Write the files for sentence-transformers into a model's directory; return them. A `Router` has them already."""
    if (directory / router.FILE).exists():
        return []
    features = {side: f"get_{side}_features" for side in ("text", "image")}
    contents: dict[str, Any] = {
        MODULES: [
            {"idx": number, "name": str(number), "path": path, "type": kind}
            for number, (path, kind) in enumerate(_MODULES)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                side: {"method": method, "method_output_name": "pooler_output"} for side, method in features.items()
            },
            "module_output_name": "sentence_embedding",
        },
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
        f"{FOLDER}/config.json": {},
    }
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "attention_mask" not in settings.get("model_input_names", ["attention_mask"]):  # SigLIP: padded, without a mask
        padded = {"padding": "max_length", "max_length": settings["model_max_length"], "truncation": True}
        contents["sentence_bert_config.json"]["processing_kwargs"] = {"text": padded}
    for name, content in contents.items():
        storage.replace_text(directory / name, json.dumps(content, indent=2) + "\n")
    return [directory / name for name in contents]
