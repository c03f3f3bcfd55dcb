"""Let `SentenceTransformer(directory)` load a published dual encoder, and embed texts and pictures in one space.

sentence-transformers (5.4 and newer) reads four small files beside the model: which modules there are, and which of the
model's methods embeds what. No weight is written twice, and the directory stays a model of transformers.
"""

import json
from pathlib import Path
from typing import Any

from koclip import storage

MODULES, FOLDER = "modules.json", "1_Normalize"
_MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    (FOLDER, "sentence_transformers.models.Normalize"),
)


def describe(directory: Path) -> list[Path]:
    """Write the files that sentence-transformers needs into a model's directory; return them."""
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
    files = []
    for name, content in contents.items():
        file = directory / name
        storage.replace_text(file, json.dumps(content, indent=2) + "\n")
        files.append(file)
    return files
