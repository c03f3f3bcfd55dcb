"""What an adapter adapts, as data beside its weights: adapter/adapter_base.json."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER, FILE = "adapter", "adapter_base.json"
SAME = "same"


@dataclass(frozen=True)
class AdapterBase:
    """The base of an adapter.

    Args:
        base_model: Hub id of `model.clip`; None if that was a local directory.
        text_encoder: Hub id of `model.text_encoder`; `same` if the base keeps its text tower; None if that was a local
            directory.
        method: `LoRA` or `DoRA`.
    """

    base_model: str | None
    text_encoder: str | None
    method: str

    @property
    def is_built(self) -> bool:
        """Whether koclip built the base from two models, so that no repository holds it."""
        return self.text_encoder != SAME

    @property
    def unnamed(self) -> list[str]:
        """The configuration keys whose Hub ids are not known."""
        ids = {"model.clip": self.base_model, "model.text_encoder": self.text_encoder}
        return [key for key, hub_id in ids.items() if hub_id is None]

    def write(self, folder: Path) -> None:
        """Write the file into `folder`, which is adapter/."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")


def read(folder: Path) -> AdapterBase | None:
    """Read the file of `folder`, which is adapter/; return None if it is missing, broken or of other keys."""
    try:
        return AdapterBase(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
