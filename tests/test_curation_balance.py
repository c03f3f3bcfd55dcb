"""Query balance: no query keeps more pairs than the limit, frequent queries lose share, the order does not matter."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from test_curation import reasons_by_row, settings

from koclip.config import BalanceRules, CaptionRules, SourceConfig
from koclip.curation.balance import queries_in
from koclip.curation.pipeline import curate

NUM_ROWS, CAP = 3_000, 40
RULES = BalanceRules(max_per_query=CAP, min_count=5)
SYLLABLES = "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후"


def word(number: int) -> str:
    return SYLLABLES[number % 40] + SYLLABLES[number // 40 % 40] + SYLLABLES[number * 7 % 40]


def zipf_captions() -> list[str]:
    """Return captions of two words; the frequency of a word falls with its rank."""
    ranks = (np.random.default_rng(0).zipf(1.3, (NUM_ROWS, 2)) - 1) % 1_000
    return [f"{word(first)} {word(1_000 + second)} {number}" for number, (first, second) in enumerate(ranks.tolist())]


def source_of(file: Path, captions: list[str]) -> SourceConfig:
    pq.write_table(pa.table({"caption": captions}), file)
    return SourceConfig(path=str(file), image=None, captions={"ko": "caption"})


def test_no_query_exceeds_the_limit_on_a_set_like_zipf(tmp_path):
    source = source_of(tmp_path / "raw.parquet", zipf_captions())
    content = curate(settings(source, tmp_path / "clean", balance=RULES, shard_size=1_000))
    before, after = content["balance"]["before"], content["balance"]["after"]
    assert before["pairs"] == NUM_ROWS
    assert before["largest_query"] > 2 * CAP
    assert after["largest_query"] == CAP
    assert after["pairs"] == content["rows"]["kept"]
    assert after["share_of_100_largest"] < before["share_of_100_largest"]
    assert set(content["rows"]["dropped"]) == {"query is full"}


def test_the_order_and_the_shards_do_not_decide_which_pairs_stay(tmp_path):
    captions = zipf_captions()
    kept = []
    for name, order, size in (("a", range(NUM_ROWS), 1_000), ("b", range(NUM_ROWS - 1, -1, -1), 700)):
        ordered = [captions[place] for place in order]
        source = source_of(tmp_path / f"{name}.parquet", ordered)
        curate(settings(source, tmp_path / name, balance=RULES, shard_size=size))
        dropped = reasons_by_row(tmp_path / name)
        kept.append({caption for number, caption in enumerate(ordered) if number not in dropped})
    assert kept[0] == kept[1]


def test_queries_come_from_a_corpus_and_pairs_without_a_query_can_be_dropped(tmp_path):
    source = source_of(tmp_path / "raw.parquet", ["강아지가 뛴다", "강아지를 안은 사람", "강아지 사진", "먼 산"])
    (tmp_path / "corpus.txt").write_text("강아지는 귀엽다\n강아지와 논다\n", encoding="utf-8")
    rules = BalanceRules(max_per_query=2, min_count=2, corpus=[str(tmp_path / "corpus.txt")], keep_unmatched=False)
    content = curate(settings(source, tmp_path / "clean", balance=rules))
    assert content["rows"]["dropped"] == {"no query": 1, "query is full": 1}
    assert content["balance"]["queries"] == 1


def test_queries_are_words_and_pairs_without_particles():
    assert list(queries_in("강아지가 공을 문다.")) == ["강아지", "공", "문다", "강아지 공", "공 문다"]


def test_without_a_limit_there_is_no_balance(tmp_path):
    source = source_of(tmp_path / "raw.parquet", ["노는 강아지"] * 3)
    content = curate(settings(source, tmp_path / "clean", captions=CaptionRules()))
    assert "balance" not in content
    assert content["rows"]["kept"] == 3
