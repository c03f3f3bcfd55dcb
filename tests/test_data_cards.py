"""data_cards: complete, in the index, and of the very files at hand."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCardData

from koclip.data import scenes

ROOT = Path(__file__).parents[1]
CARDS = sorted(path for path in (ROOT / "data_cards").glob("*.md") if path.name != "README.md")
KEYS = {"id", "source", "files", "license", "redistributable", "languages", "columns", "rows", "used_by"}


def front_matter(card: Path) -> dict:
    _, front, prose = card.read_text(encoding="utf-8").split("---\n", 2)
    assert len(prose.split()) > 60
    return yaml.safe_load(front)


def test_there_are_cards():
    assert {"scenes", "emoji", "flickr8k_ko", "tiny_imagenet_ko"} <= {card.stem for card in CARDS}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_is_complete(card):
    facts = front_matter(card)
    assert facts.keys() == KEYS
    assert facts["id"] == card.stem
    assert f"]({card.name})" in (ROOT / "data_cards" / "README.md").read_text(encoding="utf-8")
    for config in facts["used_by"]:
        text = (ROOT / config).read_text(encoding="utf-8")
        assert any(path in text for path in facts["files"] or ["path: scenes"]), (
            f"{config} reads no file of {card.stem}"
        )


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_hubs_library_parses_a_card(card):
    facts = front_matter(card)
    data = DatasetCardData(**facts)
    assert data.license == facts["license"]
    assert yaml.safe_load(data.to_yaml()) == facts


def test_the_card_of_scenes_counts_as_the_code_does():
    text = " ".join((ROOT / "data_cards" / "scenes.md").read_text(encoding="utf-8").split())
    assert f"{len(scenes.COLOURS)} colours x {len(scenes.SHAPES)} shapes" in text
    assert f"{len(scenes.HELD_OUT)} of the {len(scenes.PAIRS)} (colour, shape) pairs" in text
    kinds = Counter(scenes.scene("train", 0, 2 * index).kind for index in range(2_000))
    for kind, share in re.findall(r"\| (relation|single|count) \| (\d+) % \|", text):
        assert abs(100 * kinds.pop(kind) / 2_000 - int(share)) < 3
    assert not kinds


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_files_are_those_the_card_describes(card, shared_data):
    from datasets import load_dataset

    facts = front_matter(card)
    for path, checksum in facts["files"].items():
        file = shared_data / Path(path).name
        assert hashlib.sha256(file.read_bytes()).hexdigest() == checksum, path
        if file.suffix == ".parquet":
            table = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            assert set(table.column_names) == facts["columns"].keys()
