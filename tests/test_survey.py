"""What a run learns of its data first: lengths of captions that batches are grouped by, digests that tell changes."""

import itertools
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.kobert_files import CORPUS
from helpers.tokenizer_families import FAMILIES, LENGTH
from loading import Pile, config, stream

from koclip.config import DataConfig, SourceConfig
from koclip.data import survey
from koclip.data.formats.files import SourceError
from koclip.data.order import CaptionChooser
from koclip.data.sources import MapSource, open_source
from koclip.runs.directory import survey_sources
from koclip.text import tokenizers


class Captions(Pile):
    """Rows of captions out of a corpus, of any number, some of them missing."""

    def __init__(self, corpus: list[str], size: int) -> None:
        super().__init__("captions", 0, set())
        rng = random.Random(0)
        self._all = [
            {
                language: [rng.choice([*corpus, ""]) for _ in range(rng.randint(1, 3))]
                for language in ("ko", "en")
                if rng.random() < 0.9
            }
            for _ in range(size)
        ]

    def __len__(self) -> int:
        return len(self._all)

    def captions(self, indices: Any) -> list[dict[str, list[str]]]:
        return [self._all[index] for index in indices]


@pytest.mark.parametrize("word_dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_those_of_the_captions_that_are_drawn(name: str, word_dropout: float, tmp_path: Path) -> None:
    """To the token; with word dropout a byte-level tokenizer's are estimates: it takes blanks into its tokens."""
    FAMILIES[name].write(tmp_path)
    tokenizer = tokenizers.load(str(tmp_path), LENGTH, FAMILIES[name].config, CORPUS)
    source = Captions(CORPUS, 60)
    data = config(source.config, word_dropout=word_dropout)
    lengths = survey.survey_source(source, data, tokenizer).lengths
    chooser = CaptionChooser(data)
    estimates, exact = [], []
    for row, epoch in itertools.product(range(len(source)), range(3)):
        caption = (chooser.caption(source.captions([row])[0], 0, (0, epoch, 0, row)) or (None,) * 3)[2]
        choice = chooser.choose(lengths.row(row), 0, (0, epoch, 0, row))
        assert (caption is None) == (choice is None)
        if caption is not None:
            language, place, rng = choice
            parts = lengths.row(row)[language][place]
            estimates.append(lengths.total(chooser.keep(parts, rng) if word_dropout else parts))
            exact.append(len(tokenizers.encode(tokenizer, [caption])["input_ids"][0]))
    assert len(exact) > 100
    if name == "roberta" and word_dropout:
        assert statistics.correlation(estimates, exact) > 0.9
    else:
        assert estimates == exact


def blocks(source: MapSource, data: DataConfig, tokenizer: Any, world_size: int) -> list[list[survey.Block]]:
    return [list(survey.look(source, data, tokenizer, rank, world_size)) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_processes_finds_the_same(world_size: int, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks at its share: no row is looked at twice."""
    monkeypatch.setattr(survey, "BLOCK", 4)
    source, data = Pile("rows", 41, {3, 8}), config(SourceConfig(captions={"ko": "ko", "en": "en"}))
    alone, shares = blocks(source, data, tokenizer, 1), blocks(source, data, tokenizer, world_size)
    assert max(map(len, shares)) <= -(-11 // world_size)
    single, many = (survey.join(source, data, tokenizer, [*itertools.chain(*parts)]) for parts in (alone, shares))
    assert single.facts == many.facts
    assert [single.lengths.row(row) for row in range(41)] == [many.lengths.row(row) for row in range(41)]


def test_workers_find_the_same(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "BLOCK", 2)
    source, data = Pile("rows", 41, {3, 8}), SourceConfig(captions={"ko": "ko", "en": "en"})
    surveys = [survey.survey_source(source, config(data, num_workers=count), tokenizer) for count in (0, 2)]
    assert surveys[0].facts == surveys[1].facts
    assert surveys[0].lengths.row(40) == surveys[1].lengths.row(40)


def test_equal_captions_are_tokenised_once(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    encode = tokenizers.encode
    monkeypatch.setattr(
        tokenizers, "encode", lambda tokenizer, batch, **options: texts.extend(batch) or encode(tokenizer, batch)
    )
    source = Pile("rows", 20, set())
    survey.survey_source(source, config(source.config), tokenizer)
    assert len(texts) == len(set(texts)) == 20 + 20 + 1


def write(folder: Path, rows: list[dict[str, Any]], kind: str, encoded: Callable[..., bytes]) -> SourceConfig:
    """Write rows of `colour` and `ko` as a source of this kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"captions": {"ko": "ko"}}
    if kind in ("parquet", "filtered", "streamed"):
        records = [{"image": encoded(size=row["size"]), "ko": row["ko"], "kept": "yes"} for row in rows]
        if kind == "filtered":
            records.insert(3, {**records[0], "kept": "no"})
        for number, half in enumerate((records[: len(rows) // 2], records[len(rows) // 2 :])):
            pq.write_table(pa.Table.from_pylist(half), folder / f"part-{number}.parquet")
        where = {"where": {"kept": ["yes"]}} if kind == "filtered" else {}
        return SourceConfig(path=f"{folder}/*.parquet", streaming=kind == "streamed", **where, **columns)
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(encoded(size=row["size"]))
    lines = [
        json.dumps({"image": f"{number}.png", "file_name": f"{number}.png", "ko": row["ko"]})
        for number, row in enumerate(rows)
    ]
    name = "metadata.jsonl" if kind == "image_folder" else "rows.jsonl"
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(path=str(folder if kind == "image_folder" else folder / name), **columns)


KINDS = ["parquet", "filtered", "streamed", "files", "image_folder"]
ROWS = [{"size": (8 + number, 6), "ko": f"{number}번 사진"} for number in range(8)]
CHANGES = {
    "grown": [*ROWS, {"size": (8, 6), "ko": "새 사진"}],
    "cut": ROWS[:-1],
    "reordered": [ROWS[1], ROWS[0], *ROWS[2:]],
    "caption": [{**ROWS[0], "ko": "1번 사진"}, *ROWS[1:]],
    "picture": [*ROWS[:-1], {**ROWS[-1], "size": (99, 70)}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_data_has_other_facts(kind: str, tmp_path: Path, tokenizer, encoded) -> None:
    def facts(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        source = write(folder, rows, kind, encoded)
        return [learnt.facts for learnt in survey_sources(DataConfig(sources=[source], length_pool=1), tokenizer)]

    before = facts("before", ROWS)
    assert facts("copy", ROWS) == before
    assert [name for name, rows in CHANGES.items() if facts(name, rows) == before] == []


def test_facts_do_not_depend_on_the_tokenizer_or_the_pool(tokenizer, table) -> None:
    facts = [survey_sources(DataConfig(sources=[table], length_pool=pool), tokenizer)[0].facts for pool in (1, 4)]
    assert facts[0] == facts[1]
    assert facts[0]["rows"] == 50


def test_another_shard_of_a_large_stream_is_noticed(tmp_path: Path, tokenizer) -> None:
    """Looked at in three places each, not read as a whole."""
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(bytes(500_000))
    source = stream("shards", [1], set())
    source.config = SourceConfig(path=f"{tmp_path}/*.tar", image="png", captions={"ko": "txt"})
    looks = [blocks(source, config(source.config), tokenizer, 1)]  # type: ignore[arg-type]
    for place in (0, 250_000, 499_999):
        content = bytearray(500_000)
        content[place] = 1
        (tmp_path / "1.tar").write_bytes(content)
        looks.append(blocks(source, config(source.config), tokenizer, 1))  # type: ignore[arg-type]
    assert len({repr(look) for look in looks}) == 4


def test_another_commit_of_a_stream_from_the_hub_is_noticed(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stream("pairs", [1], set())
    source.config = SourceConfig(path="owner/name", format="hub", captions={"ko": "ko"}, streaming=True)
    data, commits = config(source.config), ["a" * 40, "b" * 40]

    def info(self: object, repository: str, revision: str | None) -> SimpleNamespace:
        assert (repository, revision) == ("owner/name", None)
        if not commits:
            raise OSError("offline")
        return SimpleNamespace(sha=commits.pop())

    monkeypatch.setattr(survey.HfApi, "dataset_info", info)
    facts = [survey.join(source, data, tokenizer, []).facts for _ in range(2)]
    assert [fact["revision"][0] for fact in facts] == ["b", "a"]
    with pytest.raises(SourceError, match=r"owner/name.*offline"):
        survey.join(source, data, tokenizer, [])


def test_pictures_of_a_table_are_not_read(table, monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    source = open_source(table)
    monkeypatch.setattr(source, "rows", lambda *_: pytest.fail("a picture was read"))
    assert survey.survey_source(source, config(table), tokenizer).facts["rows"] == 50  # type: ignore[arg-type]
