"""Name in an adapter's files the Hub models that it belongs to, which training knew as directories."""

import json
from pathlib import Path

from koclip.publishing.files import ADAPTER, CARD


def name_base(directory: Path, clip: str | None, text_encoder: str | None) -> None:
    """Put Hub ids in the place of what adapter/ could not name. Without an adapter, or an id, nothing happens.

    Args:
        directory: The model's.
        clip: Hub id of what was aligned.
        text_encoder: Hub id of the text encoder that it got.
    """
    readme, settings = directory / ADAPTER / CARD, directory / ADAPTER / "adapter_config.json"
    if not readme.is_file() or not settings.is_file():
        return
    told = readme.read_text(encoding="utf-8")
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError:
        return  # broken, which the pre-flight tells
    if clip and values.get("base_model_name_or_path") is None and "swap_text_tower" not in told:
        values["base_model_name_or_path"] = clip
        settings.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    for placeholder, name in (("<model.clip>", clip), ("<model.text_encoder>", text_encoder)):
        told = told.replace(placeholder, name or placeholder)
    readme.write_text(told, encoding="utf-8")
