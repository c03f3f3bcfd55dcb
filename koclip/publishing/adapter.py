"""Name in an adapter's files the Hub models that it belongs to, which training knew as directories."""

import json
from pathlib import Path

from koclip.publishing.files import ADAPTER, BUILT, CARD, is_hub_id


def name_base(directory: Path, clip: str | None, text_encoder: str | None) -> None:
    """Put Hub ids in the place of directories that adapter/ names. Without an adapter, or an id, nothing happens.

    A base that koclip builds from two models is in no repository: adapter_config.json says so.

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
    named = BUILT if "swap_text_tower" in told else clip
    if named and not is_hub_id(values.get("base_model_name_or_path") or ""):
        values["base_model_name_or_path"] = named
        settings.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    for placeholder, name in (("<model.clip>", clip), ("<model.text_encoder>", text_encoder)):
        told = told.replace(placeholder, name or placeholder)
    readme.write_text(told, encoding="utf-8")
