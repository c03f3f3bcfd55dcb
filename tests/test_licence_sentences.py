"""Sentences about licences: none of them, wherever it stands, may give a model a licence that is free."""

import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from runs_to_publish import aligned, beside

from koclip import config
from koclip.config import ConfigError, PublishConfig
from koclip.publishing.card import render
from koclip.publishing.card_inputs import gather

CLIP = "openai/clip-vit-base-patch32"
CARD = """\
---
id: mine
source: somebody
{terms}
languages: [ko]
rows: {{train: 10}}
---
**Limits.** Few.

**Harms.** None known.
"""
SENTENCES = [
    "cc-by-4.0 (주석), 사진은 비상업적 연구 목적으로만 이용 가능, 재배포 금지",
    "MIT code, no commercial use of the data",
    "CC-BY-4.0, commercial use prohibited",
    "CC-BY-4.0 without commercial use",
    "MIT licence, personal use only",
    "cc-by-4.0, academic use",
    "cc-by-4.0 for universities",
    "apache-2.0, nur für Forschungszwecke",
    "MIT 라이선스이나 상업적 이용은 별도 문의",
    "CC0-1.0 for the captions, pictures belong to their owners",
    "Apache-2.0 code and CC-BY-NC data",
    "cc-by-4.0/cc-by-nc-4.0",
    "mit and the terms of AI Hub",
    "BSD-3-Clause; 학습용으로만 사용 가능",
    "public domain in the US, ask elsewhere",
    "unlicense? ask the author",
    "CDLA-Permissive-2.0 until 2025",
    "ISC but evaluation must be internal",
    "mit\nno commercial use",
    "MIT | commercial use: no",
    "同意书之后可用, MIT",
    "mit*",
    "mit (see LICENSE)",
    "MIT-like",
    "Apache License 2.0 with Commons Clause",
    "free",
    "licence: mit",
    "other",
    "none",
    "cc-by-nd-4.0",
    "openrail",
]
FREE = {"apache-2.0", "mit", "cc-by-4.0", "bsd-3-clause", "cc0-1.0"}
every_sentence = pytest.mark.parametrize("sentence", SENTENCES)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a run that was trained on the data set `mine`."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    results = (run / "results.json").read_text(encoding="utf-8")
    (run / "results.json").write_text(results.replace(str(trained), str(run)), encoding="utf-8")
    source = config.SourceConfig(path="mine.csv", name="mine", captions={"ko": "ko"})
    config.dump(config.PretrainConfig(data=config.DataConfig(sources=[source])), run / "config.yaml")
    shutil.copytree(Path(__file__).parents[1] / "data_cards", run / "cards")
    return run


def card_of(run: Path, **changes: object) -> ModelCard | None:
    """Return the model's card; None if publishing it is refused."""
    cards = str(run / "cards")
    cfg = PublishConfig(model=str(run / "model"), repo_id="org/name", data_cards=cards, **changes)  # type: ignore[arg-type]
    try:
        return render(cfg, gather(cfg), year=2026)
    except ConfigError:
        return None


def with_terms(run: Path, terms: object) -> ModelCard | None:
    (run / "cards" / "mine.md").write_text(CARD.format(terms=yaml.safe_dump(terms, allow_unicode=True)), "utf-8")
    return card_of(run)


@every_sentence
def test_the_licence_of_a_data_card(run, sentence):
    card = with_terms(run, {"license": sentence})
    assert card is None or card.data["license"] not in FREE
    (run / "cards" / "mine.md").write_text(CARD.format(terms=f"license: {sentence!r}"), "utf-8")
    card = card_of(run)
    assert card is None or card.data["license"] not in FREE


@every_sentence
def test_the_fields_of_a_data_card(run, sentence):
    """As an id, as the terms of an id that is free, as terms whose answers all are free, as what is said of none."""
    right, free = {"part": "captions", "source": "its README"}, {"commercial": True, "redistribution": True}
    for part in (
        {"id": sentence},
        {"id": "cc-by-4.0", "words": sentence},
        {"id": "other", "words": sentence},
        {"id": "other", "words": sentence, "share_alike": False, **free},
        {"id": "none", "words": sentence},
        {"id": "none", "words": sentence, **free},
    ):
        card = with_terms(run, {"licenses": [{**right, **part}]})
        assert card is None or (card.data["license"] == "other" and card.data["license_name"])
        if card is not None and "words" in part:
            assert " ".join(sentence.split()).replace("|", "\\|") in card.text


@every_sentence
def test_the_licence_of_a_tower_in_words(run, sentence):
    beside(run, aligned(CLIP, "same", "lora"))
    card = card_of(run, licenses={CLIP: sentence})
    assert card is not None
    assert card.data["license"] == "other"
    if sentence != "none":
        assert f"{' '.join(sentence.split())}".replace("|", "\\|") in card.text


def test_a_card_that_is_written_rightly_gives_what_it_says(run):
    right = {"part": "captions", "source": "its README"}
    for id_, licence in (("cc-by-4.0", "apache-2.0"), ("cc-by-sa-4.0", "cc-by-sa-4.0"), ("cc-by-nc-4.0", "other")):
        card = with_terms(run, {"licenses": [{**right, "id": id_}]})
        assert card is not None
        assert card.data["license"] == licence
        assert f"| mine | training | captions | {id_} |" in card.text
