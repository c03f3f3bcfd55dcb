"""data_cards: complete, in the index, of the very files at hand, and honest about what nobody could read."""

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCardData
from huggingface_hub.utils import validate_repo_id

from koclip.data.formats import scenes
from koclip.licences import read_data_card

ROOT = Path(__file__).parents[1]
CARDS = sorted(path for path in (ROOT / "data_cards").glob("*.md") if path.name != "README.md")
KEYS = {"id", "source", "files", "licenses", "languages", "columns", "rows", "used_by"}
OPTIONAL = {"hub", "revision", "unverified"}
OWN = {"scenes", "class_names"}  # made by koclip's code, or part of it
every_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)


def front_matter(card: Path) -> dict[str, Any]:
    _, front, prose = card.read_text(encoding="utf-8").split("---\n", 2)
    assert len(prose.split()) > 60
    facts: dict[str, Any] = yaml.safe_load(front)
    return facts


def blocks(card: Path) -> list[str]:
    """Return a card's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", card.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_there_are_cards():
    named = {"scenes", "emoji", "flickr8k_ko", "tiny_imagenet_ko"}
    fetched = {"coco_ko", "kocc3m", "kocc12m", "wit_ko", "xtd10", "crossmodal_3600"}
    assert named | fetched <= {card.stem for card in CARDS}


@every_card
def test_a_card_is_complete(card):
    facts = front_matter(card)
    assert facts.keys() >= KEYS
    assert facts.keys() <= KEYS | OPTIONAL
    assert facts["id"] == card.stem
    row = re.search(rf"^\|.*\]\({card.name}\).*$", (ROOT / "data_cards" / "README.md").read_text("utf-8"), re.MULTILINE)
    assert row, "not in the index"
    passed_on = {part.redistribution for part in read_data_card(card).licenses}
    answer = "**no**" if False in passed_on else "not stated" if None in passed_on else "yes"
    assert row[0].split("|")[4].strip().startswith(answer)
    for config in facts["used_by"]:
        text = (ROOT / config).read_text(encoding="utf-8")
        assert re.search(rf"^[ -]*(name|path): {card.stem}$", text, re.MULTILINE), f"{config} reads no {card.stem}"


@every_card
def test_the_hubs_library_parses_a_card(card):
    facts = front_matter(card)
    assert yaml.safe_load(DatasetCardData(**facts).to_yaml()) == facts


@every_card
def test_what_nobody_could_read_is_said(card):
    """Every card has checksums or a commit, or says why not; and of what is unverified, where it is to be checked."""
    facts = front_matter(card)
    unverified = facts.get("unverified", {})
    assert unverified.keys() <= (KEYS | OPTIONAL) - {"id", "licenses", "used_by", "unverified"}
    for key, text in unverified.items():
        assert re.fullmatch(r"\S.{15,}; check \S.{15,}", text), f"{key}: where from; check where"
    if "hub" in facts:
        validate_repo_id(facts["hub"])
        assert ("revision" in facts) != ("revision" in unverified)
    if "revision" in facts:
        assert re.fullmatch("[0-9a-f]{40}", facts["revision"])
    pinned = facts["files"] or "revision" in facts or card.stem in OWN
    assert pinned or unverified.keys() & {"files", "revision"}
    has_sources = "**Sources.**" in card.read_text(encoding="utf-8")
    assert has_sources or not unverified, "a paragraph **Sources.** says where the rest was read"


def test_the_card_of_scenes_counts_as_the_code_does():
    text = " ".join((ROOT / "data_cards" / "scenes.md").read_text(encoding="utf-8").split())
    assert f"{len(scenes.COLOURS)} colours x {len(scenes.SHAPES)} shapes" in text
    assert f"{len(scenes.HELD_OUT)} of the {len(scenes.PAIRS)} (colour, shape) pairs" in text
    kinds = Counter(scenes.scene("train", 0, 2 * index).kind for index in range(2_000))
    for kind, share in re.findall(r"\| (relation|single|count) \| (\d+) % \|", text):
        assert abs(100 * kinds.pop(kind) / 2_000 - int(share)) < 3
    assert not kinds


def test_the_files_that_results_were_measured_on_are_those_at_hand(shared_data):
    """A card names each of them with its sha256 beside the results."""
    count = 0
    for card in CARDS:
        text = " ".join(card.read_text(encoding="utf-8").split())
        for name, checksum in re.findall(r"`([^`]+)` \(sha256 ([0-9a-f]{64})\)", text):
            count += 1
            assert hashlib.sha256((shared_data / card.stem / name).read_bytes()).hexdigest() == checksum, name
    assert count == 7


@pytest.mark.parametrize("name", ["emoji", "flickr8k_ko", "tiny_imagenet_ko"])
def test_a_card_counts_the_columns_of_the_files_at_hand(name, shared_data):
    facts = front_matter(ROOT / "data_cards" / f"{name}.md")
    for file in (shared_data / name).glob("*.parquet"):
        schema = pq.read_schema(file)
        only_built = {"family", "keywords_ko", "keywords_en", "sentences_ko"} if name == "emoji" else set()
        assert {*schema.names} | only_built == facts["columns"].keys()


@every_card
def test_a_card_names_the_call_that_loads_its_data(card, monkeypatch):
    """The Hub's are run up to the call; built and made-up files are read in test_data_sets.py and in layouts."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)))
    for block in blocks(card):
        assert "load_dataset(" in block
        compile(block, card.name, "exec")
        if "hub" in front_matter(card) and "json" not in block:
            exec(block, {})
    facts = front_matter(card)
    assert bool(blocks(card)) == (card.stem not in OWN)
    assert len(asked) == ("hub" in facts)
    for args, options in asked:
        assert args == (facts["hub"],)
        assert options["split"] in facts["rows"]
        assert options.get("revision") == facts.get("revision")
        assert options.keys() <= {"split", "streaming", "revision"}


def test_the_card_of_xtd10_counts_what_leaks(shared_data):
    card = ROOT / "data_cards" / "xtd10.md"
    rows = [line.split("\t") for line in (shared_data / "text" / "xtd10_ko_en.tsv").read_text("utf-8").splitlines()]
    parts = Counter(name.split("_")[1] for name, _, _ in rows)
    assert f"{parts['train2014']} of the 1,000 photos are COCO train2014 and {parts['val2014']} are" in card.read_text(
        "utf-8"
    )
    lengths = sorted(len(korean) for _, korean, _ in rows)
    middle = (lengths[499] + lengths[500]) // 2
    said = f"{middle} characters in the median, {lengths[0]} at least, {lengths[-1]} at most"
    assert said in " ".join(card.read_text(encoding="utf-8").split())
    assert all(len({row[column] for row in rows}) == 1_000 for column in range(3))
