"""The report of `koclip curate`: numbers, examples of each reason, the page, the licence chain and the data card."""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_curation import contents, encoded, picture, settings, write_rows
from test_curation_balance import CAP, NUM_ROWS, RULES, source_of, zipf_captions
from test_report import Reader

from koclip.config import CardRules, ConfigError, CurateConfig, ReportRules, SourceConfig
from koclip.curation import report
from koclip.curation.captions import text_hash
from koclip.curation.pipeline import curate
from koclip.curation.report import card, page
from koclip.data.sources import open_source
from koclip.licences import front_matter

HOSTILE = "<script>alert('강아지')</script>"
FILE = "<script>.png"
GUIDES = [Path(__file__).parents[1] / "docs" / "guides" / f"curate.{language}.md" for language in ("en", "ko")]
NUM_PICTURES, NUM_FOREIGN = 60, 30
COPIES = {50: 3, 51: 3, 52: 3, 53: 4}  # rows with a smaller copy of another row's picture
SEEN = 7  # rows whose picture has a telephone number in its caption


def rows(name: str = "raw") -> tuple[list[str], list[dict[str, Any]]]:
    """Return captions and pictures: English captions, HTML, copies, a broken picture, personal data, hostile names."""
    captions = [f"바닷가를 걷는 사람 {number}명" for number in range(NUM_PICTURES)]
    contents_ = [encoded(picture(number, 120, 100)) for number in range(NUM_PICTURES)]
    for number in range(10, 10 + NUM_FOREIGN):
        captions[number] = f"a dog {number}"
    captions[8], captions[9] = HOSTILE, f"{HOSTILE} 010-1234-5678"
    captions[SEEN] = "문의 010-1234-5678 강아지 분양"
    for place, original in COPIES.items():
        contents_[place] = encoded(picture(original, 120, 100).resize((60 + place, 50 + place)), "JPEG", quality=80)
    contents_[48] = contents_[48][:70]
    images = [{"bytes": own, "path": f"{number}{FILE}"} for number, own in enumerate(contents_)]
    return captions, images


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    file = tmp_path_factory.mktemp("raw") / "raw.parquet"
    captions, images = rows()
    pq.write_table(pa.table({"image": images, "caption": captions}), file)
    return SourceConfig(path=str(file), name="raw", captions={"ko": "caption"})


@pytest.fixture(scope="module")
def result(raw: SourceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result") / "clean"
    described = CardRules(licenses={"raw": "cc-by-nc-4.0"}, origins={"raw": f"a shop | {HOSTILE}"})
    curate(settings(raw, folder, report=ReportRules(thumbnails="clear"), card=described))
    return folder


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / report.FILE).read_text(encoding="utf-8"))
    return content


def page_of(folder: Path) -> Reader:
    reader = Reader()
    reader.feed((folder / page.FILE).read_text(encoding="utf-8"))
    return reader


def test_all_files_are_equal_on_any_number_of_workers(raw, result, tmp_path):
    described = CardRules(licenses={"raw": "cc-by-nc-4.0"}, origins={"raw": f"a shop | {HOSTILE}"})
    curate(settings(raw, tmp_path / "two", report=ReportRules(thumbnails="clear"), card=described, num_workers=2))
    names = {"report.html", "report.json", "dropped.jsonl", "waterfall.png", "lengths.png", "README.md", "LICENSE.md"}
    assert names <= set(contents(result))
    assert contents(tmp_path / "two") == contents(result)


def test_the_page_escapes_what_the_data_say(result):
    reader = page_of(result)
    assert not [tag for tag, _ in reader.tags if tag in ("script", "link", "iframe", "object")]
    for text in (f"{HOSTILE} HTML", f"a shop | {HOSTILE}"):
        assert text in re.sub(r"\s+", " ", reader.text)
    assert re.search(rf"raw~\w+/48/48{re.escape(FILE)}", reader.text)
    assert "<script" not in (result / page.FILE).read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(result):
    reader = page_of(result)
    for tag, attributes in reader.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in reader.text
    assert "@import" not in reader.text
    anchors = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    links = {attributes["href"].removeprefix("#") for tag, attributes in reader.tags if tag == "a"}
    assert links
    assert links <= anchors


def test_personal_data_that_was_removed_is_in_no_file_of_the_report(result):
    for file in result.iterdir():
        if file.suffix in (".html", ".json", ".jsonl", ".md"):
            assert "1234-5678" not in file.read_text(encoding="utf-8"), file.name
    assert content_of(result)["personal_data_removed"] == {"phone number": 2}


def test_twenty_examples_of_each_reason_are_shown_those_with_the_smallest_hashes(result):
    text = (result / page.FILE).read_text(encoding="utf-8")
    numbers = {reason: int(count) for reason, count in re.findall(r"<summary>([\w -]+) \((\d+)\)</summary>", text)}
    assert numbers == {"other language": 20, "near-duplicate": 4, "HTML": 2, "broken picture": 1}
    lines = [json.loads(line) for line in (result / report.DROPPED).read_text(encoding="utf-8").splitlines()]
    keys = [line["key"] for line in lines if line["reason"] == "other language"]
    assert len(keys) == NUM_FOREIGN
    shown = page_of(result).text
    assert {key for key in keys if key in shown} == set(sorted(keys, key=text_hash)[:20])


def test_examples_do_not_depend_on_batches():
    batch: dict[str, list[Any]] = {
        "key": [f"k{number}" for number in range(100)],
        "reason": ["HTML" if number % 2 else "" for number in range(100)],
        "detail": [""] * 100,
        "notes": [["ko/0: URL"] if number % 3 == 0 else [] for number in range(100)],
        "lost": [["www.example.com"] if number % 3 == 0 else [] for number in range(100)],
        "captions_ko": [["", "강아지"]] * 100,
    }
    whole: page.Examples = {}
    page.add_examples(whole, batch)
    parts: page.Examples = {}
    for start in reversed(range(0, 100, 7)):
        page.add_examples(parts, {name: column[start : start + 7] for name, column in batch.items()})
    assert whole == parts
    assert {reason: len(own) for reason, own in whole.items()} == {"HTML": 20, "URL": 20}
    assert whole["URL"][0].captions == [("ko", "강아지", ""), ("ko", "www.example.com", "URL")]


def test_near_duplicates_show_both_pictures(result):
    reader = page_of(result)
    named = [attributes["alt"] for tag, attributes in reader.tags if tag == "img" and "picture of" in attributes["alt"]]
    numbers = Counter(int(name.split("/")[1]) for name in named)
    assert {number: numbers[number] for number in (3, 4, *COPIES)} == {3: 3, 4: 1} | dict.fromkeys(COPIES, 1)
    assert 48 not in numbers  # broken
    assert "no picture that can be decoded" in reader.text


@pytest.mark.parametrize("kind", ["none", "blurred"])
def test_pictures_are_shown_only_on_request(raw, tmp_path, kind):
    curate(settings(raw, tmp_path / "clean", report=ReportRules(thumbnails=kind)))
    images = [own["src"] for tag, own in page_of(tmp_path / "clean").tags if tag == "img"]
    assert len([image for image in images if image.startswith("data:image/jpeg")]) == (0 if kind == "none" else 30)


@pytest.mark.parametrize("form", [(640, 480), (480, 640)])
def test_of_a_blurred_picture_only_the_means_of_large_blocks_are_left(form):
    side = max(form) // 16
    generator = np.random.default_rng(0)
    means = generator.integers(60, 190, (form[1] // side, form[0] // side, 3), np.uint8)
    blocks = means.repeat(side, 0).repeat(side, 1)
    detail = np.where(np.indices(blocks.shape[:2]).sum(0) // 5 % 2, 50, -50).astype(np.int16)[..., None]
    shown = {
        kind: [page.thumbnail(torch.from_numpy(own).permute(2, 0, 1), kind) for own in (blocks, drawn)]
        for drawn in [(blocks + detail).astype(np.uint8)]
        for kind in ("blurred", "clear")
    }
    assert shown["blurred"][0] == shown["blurred"][1]
    assert shown["clear"][0] != shown["clear"][1]


@pytest.mark.parametrize("form", [(640, 480), (3000, 40), (20, 20), (1, 1)])
def test_thumbnails_keep_the_form_of_the_picture(form):
    pixels = torch.zeros(3, form[1], form[0], dtype=torch.uint8)
    sizes = [decoded(page.thumbnail(pixels, kind)).size for kind in ("blurred", "clear")]
    scale = min(1, 160 / max(form))
    assert sizes == [tuple(max(1, round(scale * side)) for side in form)] * 2


def decoded(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_clusters_are_a_picture_that_stays_and_those_dropped_for_it(result):
    clusters = content_of(result)["clusters"]
    assert clusters["number"] == 2
    assert clusters["sizes"] == {"2": 1, "4": 1}
    assert [(int(own["kept"].split("/")[1]), own["pictures"], own["rows_dropped"]) for own in clusters["largest"]] == [
        (3, 4, 3),
        (4, 2, 1),
    ]
    assert [int(key.split("/")[1]) for key in clusters["largest"][0]["dropped"]] == [50, 51, 52]


def test_rows_of_one_dropped_picture_are_one_picture_of_a_cluster():
    copies = [("a", 1, "k1"), ("a", 1, "k2"), ("b", 3, "k3"), *(("c", number, f"m{number}") for number in range(30))]
    clusters = report.clusters(copies)
    assert clusters["sizes"] == {"2": 2, "31": 1}
    assert [(own["kept"], own["pictures"], own["rows_dropped"]) for own in clusters["largest"]] == [
        ("c", 31, 30),
        ("a", 2, 2),
        ("b", 2, 1),
    ]
    assert len(clusters["largest"][0]["dropped"]) == 20


def test_captions_are_counted_before_and_after(raw, result):
    content = content_of(result)
    captions, _ = rows()
    assert content["captions"]["read"] == {"ko": len(captions)}
    assert content["captions"]["kept"] == {"ko": content["rows"]["kept"]}
    kept = [row.captions["ko"][0] for row in open_source(SourceConfig(path=f"{result}/*.parquet")).iter_rows()]
    assert content["lengths"]["ko"]["kept"] == report.quantiles(Counter(map(len, kept)))
    read = content["lengths"]["ko"]["read"]
    assert (read["shortest"], read["longest"]) == (len("a dog 10"), max(map(len, captions)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_quantiles_are_those_of_the_list(lengths):
    quantiles = report.quantiles(Counter(lengths))
    for name, share in report._QUANTILES.items():
        assert quantiles[name] == np.quantile(lengths, share, method="inverted_cdf")


def test_balance_on_a_set_like_zipf_and_the_table_of_the_guide(tmp_path):
    source = source_of(tmp_path / "raw.parquet", zipf_captions())
    content = curate(settings(source, tmp_path / "clean", balance=RULES, shard_size=1_000))
    before, after = content["balance"]["before"], content["balance"]["after"]
    for numbers in (before, after):
        ranks, counts = zip(*numbers["curve"], strict=True)
        assert list(ranks) == sorted(set(ranks))
        assert list(counts) == sorted(counts, reverse=True)
        assert (ranks[0], counts[0], ranks[-1]) == (1, numbers["largest_query"], content["balance"]["queries"])
    assert max(count for _, count in after["curve"]) <= CAP < before["largest_query"]
    assert after["share_of_100_largest"] < before["share_of_100_largest"]
    cells = [
        [f"{NUM_ROWS:,}", f"{after['pairs']:,}"],
        [f"{before['largest_query']:,}", f"{after['largest_query']:,}"],
        [f"{own['share_of_100_largest']:.1%}".replace("%", " %") for own in (before, after)],
    ]
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        for row in cells:
            assert f"| {' | '.join(row)} |" in text, guide.name
    assert Image.open(tmp_path / "clean" / "balance.png").width > 300
    assert "balance.png" in (tmp_path / "clean" / "README.md").read_text(encoding="utf-8")


def test_the_data_card_says_what_the_report_says(result):
    metadata, text = front_matter(result / card.FILE)
    assert metadata["language"] == ["ko"]
    assert metadata["license"] == "other"
    assert metadata["license_link"] == card.LICENCE
    assert metadata["size_categories"] == ["n<1K"]
    content = content_of(result)
    for reason, count in content["rows"]["dropped"].items():
        assert f"| {reason} | {count} |" in text
    assert f"| {NUM_PICTURES} | {content['rows']['kept']} |" in text
    assert "| phone number | 2 |" in text
    assert "<script" not in text.replace(r"\<script", "")
    assert "cc-by-nc-4.0" in (result / card.LICENCE).read_text(encoding="utf-8")
    assert content["licence"]["why"] in text
    for picture_ in re.findall(r"!\[[^]]+\]\((\S+)\)", text):
        assert (result / picture_).is_file()


def test_the_code_of_the_data_card_runs(result, monkeypatch, tmp_path):
    monkeypatch.chdir(result)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    text = (result / card.FILE).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    assert len(names["pairs"]) == content_of(result)["rows"]["kept"]
    (given_source,) = re.findall(r"--data.sources \"\[(.*)\]\"", text)
    assert given_source == "{path: '*.parquet'}"


@pytest.mark.parametrize(
    ("licenses", "kept", "expected"),
    [
        ({}, {0: 1, 1: 1}, ("other", "unstated-sources")),
        ({"a": "mit", "b": "cc0-1.0"}, {0: 1, 1: 1}, ("cc-by-4.0", None)),
        ({"a": "mit", "b": "cc-by-sa-4.0"}, {0: 1, 1: 1}, ("cc-by-sa-4.0", None)),
        ({"a": "mit", "b": "cc-by-nc-4.0"}, {0: 1, 1: 1}, ("other", "non-commercial-sources")),
        ({"a": "mit", "b": "cc-by-nc-4.0"}, {0: 1, 1: 0}, ("cc-by-4.0", None)),
        ({"a": "mit", "b": "ask us"}, {0: 1, 1: 1}, ("other", "terms-of-sources")),
    ],
)
def test_the_strictest_source_with_kept_rows_decides_the_licence(licenses, kept, expected):
    licence = card.facts(two_sources(CardRules(licenses=licenses)), {0: 9, 1: 9}, kept)["licence"]
    assert (licence["id"], licence["name"]) == expected
    assert len(licence["terms"]) == sum(map(bool, kept.values()))


def two_sources(rules: CardRules, name: str = "b") -> CurateConfig:
    sources = [SourceConfig(path="a.parquet"), SourceConfig(path=f"{name}.parquet")]
    return CurateConfig(sources=sources, card=rules)


def test_terms_come_from_data_cards(tmp_path):
    (tmp_path / "b.md").write_text(
        "---\nid: b\nsource: example.com\nlicenses:\n  - {part: captions, id: cc-by-4.0, source: its page}\n"
        "languages: [ko]\nrows: {train: 9}\n---\n**Limits.** Few.\n\n**Harms.** None known.\n",
        encoding="utf-8",
    )
    facts = card.facts(
        two_sources(CardRules(data_cards=str(tmp_path), licenses={"a": "mit"})), {0: 9, 1: 9}, {0: 9, 1: 9}
    )
    assert facts["sources"][1]["origin"] == "example.com"
    assert [row[2:4] for row in facts["licence"]["terms"]] == [["pairs", "mit"], ["captions", "cc-by-4.0"]]
    emoji = card.origins(two_sources(CardRules(licenses={"a": "mit"}), "emoji"))[1]
    assert len(emoji.terms.parts) > 1
    with pytest.raises(ConfigError, match=r"card\.licenses\.b"):
        card.origins(two_sources(CardRules(data_cards=str(tmp_path), licenses={"b": "mit"})))


@pytest.mark.parametrize(
    ("rules", "key"),
    [
        ({"licenses": {"c": "mit"}}, "card.licenses"),
        ({"origins": {"c": "a shop"}}, "card.origins"),
        ({"license": "no-such-licence"}, "card.license"),
        ({"data_cards": "no/such/folder"}, "card.data_cards"),
    ],
)
def test_faults_of_the_card_are_named_before_the_work(rules, key, tmp_path):
    source = write_rows(tmp_path / "raw.parquet", ["노는 강아지"], [encoded(picture(1))])
    with pytest.raises(ConfigError, match=re.escape(key)):
        curate(settings(source, tmp_path / "clean", card=CardRules(**rules)))
    assert not (tmp_path / "clean.partial").exists()


@pytest.mark.parametrize(
    ("num_rows", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (2 * 10**8, "100M<n<1B"), (10**12, "n>1T")],
)
def test_sizes_have_the_names_of_the_hub(num_rows, name):
    assert card.size_category(num_rows) == name


def test_sets_without_pictures_and_of_other_languages_say_how_to_read_them(tmp_path):
    pq.write_table(
        pa.table({"text": ["ein Hund", "eine Katze"], "ko": ["개가 논다", "고양이가 논다"]}), tmp_path / "raw.parquet"
    )
    source = SourceConfig(path=str(tmp_path / "raw.parquet"), image=None, captions={"de-AT": "text", "ko": "ko"})
    curate(settings(source, tmp_path / "clean"))
    metadata, text = front_matter(tmp_path / "clean" / card.FILE)
    assert metadata["language"] == ["de", "ko"]
    assert metadata["language_bcp47"] == ["de-AT", "ko"]
    assert "image: null, captions: {de-AT: captions_de-AT, ko: captions_ko}" in text
    assert "captions_de-AT" in text
