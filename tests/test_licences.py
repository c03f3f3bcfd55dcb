"""What a model's sources leave it: by the fields of data cards and by ids of licences, never by a sentence."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koclip.config import ConfigError
from koclip.licences import ALLOWS, Part, Source, conclude, read_data_card, read_parts, stated_parts
from koclip.storage import read_table

IDS = {id_: (terms, hub) for id_, terms, hub in read_table("licences.tsv")}
FREE = sorted(id_ for id_, (terms, _) in IDS.items() if terms == "free")
CARD = """\
---
source: somebody
languages: [ko]
rows: {train: 10}
%s
---
**Limits.** Few.

**Harms.** None known.
"""


def parts_of(*parts: dict[str, Any]) -> tuple[Part, ...]:
    """Read the parts of a data card that are written rightly."""
    named = [{"part": f"part {place}", "source": "its README", **part} for place, part in enumerate(parts)]
    known, faults = read_parts(named) if named else ([], [])
    assert not faults, faults
    return tuple(known)


def conclusion(*sources: tuple[Part, ...], wish: str = "apache-2.0") -> tuple[str, str | None]:
    licence = conclude([Source("training", f"s{place}", parts) for place, parts in enumerate(sources)], wish)
    return licence.id, licence.name


def words(id_: str = "other", **stated: object) -> dict[str, object]:
    return {"id": id_, "words": "as they say", **stated}


@pytest.mark.parametrize(
    ("parts", "licence"),
    [
        ([], ("apache-2.0", None)),
        ([{"id": "mit"}, {"id": "CC-BY-4.0"}], ("apache-2.0", None)),
        ([{"id": "CC BY 4.0"}, {"id": "Apache 2.0"}], ("apache-2.0", None)),  # the same ids, as people write them
        ([{"id": "mit"}, {"id": "cc-by-sa-4.0"}], ("cc-by-sa-4.0", None)),
        ([{"id": "GPL-3.0"}], ("gpl-3.0", None)),
        ([{"id": "cc-by-sa-2.0"}], ("other", "cc-by-sa-2.0")),  # the Hub knows 3.0 and 4.0
        ([{"id": "cc-by-sa-3.0"}, {"id": "cc-by-sa-4.0"}], ("other", "share-alike-sources")),
        ([{"id": "cc-by-sa-4.0"}, words()], ("other", "terms-of-sources")),
        ([words(commercial=True, redistribution=True, share_alike=False)], ("other", "terms-of-sources")),
        ([{"id": "openrail"}], ("other", "terms-of-sources")),
        ([{"id": "cc-by-nd-4.0"}], ("other", "terms-of-sources")),  # what is changed may not be passed on
        ([{"id": "none"}, words()], ("other", "unstated-sources")),
        ([{"id": "none"}, words(commercial=False)], ("other", "non-commercial-sources")),
        ([{"id": "none", "commercial": False}], ("other", "non-commercial-sources")),
        ([{"id": "gemma", "commercial": False}], ("other", "non-commercial-sources")),
        ([{"id": "cc-by-nc-sa-4.0"}, {"id": "cc-by-sa-4.0"}], ("other", "non-commercial-sources")),
        ([words(commercial="unstated")], ("other", "terms-of-sources")),
    ],
)
def test_the_strictest_part_decides(parts, licence):
    assert conclusion(parts_of(*parts)) == licence
    assert conclusion(*(parts_of(part) for part in parts)) == licence


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        ("mit", "apache-2.0"),
        ("Apache-2.0", "apache-2.0"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0"),
        (["mit", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["mit", "cc-by-nc-4.0"], "other"),
        ("unstated", "other"),
        (None, "other"),
        ([], "other"),
        ("", "other"),
        ("other", "other"),
        ("unknown", "other"),
        ("my-licence-1.0", "other"),
        ("mit; apache-2.0", "other"),
    ],
)
def test_the_licence_of_a_models_weights(stated, licence):
    assert conclusion(stated_parts(stated, "the Hub"))[0] == licence


def test_an_id_that_nothing_is_known_of_is_shown():
    assert [part.licence for part in stated_parts(["llama4", "my-licence"], "the Hub")] == [
        "llama4",
        "other (“my-licence”)",
    ]


@pytest.mark.parametrize("wish", ["", "none", "other", "unknown", "MIT, no commercial use", "unicode-3.0", "apache2"])
def test_what_the_makers_wish_is_a_licence_that_the_hub_knows(wish):
    with pytest.raises(ConfigError, match="license: got"):
        conclusion(wish=wish)
    assert conclusion(wish="cc-by-nc-4.0") == ("cc-by-nc-4.0", None)


def test_the_table_of_licences_agrees_with_their_names():
    assert len(IDS) == len(read_table("licences.tsv")) > 90
    for id_, (terms, hub) in IDS.items():
        assert id_ == "-".join(id_.lower().split())
        assert terms in ("free", "alike", "nc", "nc-alike", "own")
        assert hub in ("hub", "-")
        if id_.startswith("cc-by"):
            words = id_.split("-")
            assert ("nc" in words) == terms.startswith("nc")
            assert ("sa" in words) == terms.endswith("alike")
            assert "nd" not in words or terms in ("own", "nc")
        if "gpl" in id_.split("-")[0] and id_ != "lgpl-lr":
            assert terms == "alike"


values = st.sampled_from([True, False, "unstated"])
known = st.sampled_from(sorted(IDS)).map(lambda id_: {"id": id_})
own = st.fixed_dictionaries({"words": st.sampled_from(["MIT", "free for all"])}, optional=dict.fromkeys(ALLOWS, values))
parts = st.one_of(known, own.map(lambda stated: {"id": "other", **stated}), st.just({"id": "none"}))


@given(st.lists(parts, max_size=4), parts)
def test_no_source_makes_a_licence_freer(some, another):
    def freedom(listed: list[dict[str, Any]]) -> int:
        """Return 2 if the makers may choose, 1 if the sources' licence is shared, 0 if they have terms of their own."""
        id_, name = conclusion(parts_of(*listed))
        return 0 if id_ == "other" and name != "share-alike-sources" and name not in IDS else 2 - (id_ != "apache-2.0")

    assert freedom([*some, another]) <= freedom(some)
    if another["id"] not in FREE:
        assert conclusion(parts_of(*some, another), wish="mit")[0] != "mit"


RIGHT = {"part": "captions", "id": "cc-by-4.0", "source": "its README"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"part": None}, ".part: got None"),
        ({"id": None}, ".id: got None"),
        ({"id": 4.0}, ".id: got 4.0"),
        ({"source": " "}, ".source: got ' '"),
        ({"comercial": False}, ".comercial: unknown key"),
        ({"commercial": "no"}, ".commercial: got 'no', expected true, false or unstated"),
        ({"commercial": 0}, ".commercial: got 0"),
        ({"share_alike": None}, ".share_alike: got None"),
        ({"commercial": False}, ".commercial: got False, expected true with the id cc-by-4.0"),
        ({"share_alike": True}, ".share_alike: got True, expected false"),
        ({"redistribution": "unstated"}, ".redistribution: got 'unstated', expected true"),
        ({"words": "no commercial use"}, ".words: got 'no commercial use', expected no words with the id"),
        ({"id": "cc-by-4"}, ".id: got 'cc-by-4', expected the id of a licence.*did you mean cc-by"),
        ({"id": "CC-BY-4.0, academic use"}, ".id: got 'CC-BY-4.0, academic use'"),
        ({"id": "other"}, ".words: got None"),
        ({"id": "other", "words": ""}, ".words: got ''"),
        ({"id": "none", "commercial": True}, ".commercial: got True, expected false or unstated"),
        ({"id": "none", "redistribution": True}, ".redistribution: got True"),
    ],
)
def test_a_part_that_is_written_wrongly_is_refused(changes, fault, tmp_path):
    part = {key: value for key, value in {**RIGHT, **changes}.items() if value is not None or key in ALLOWS}
    file = card(tmp_path, f"licenses: [{RIGHT}, {part}]".replace("None", "null"))
    with pytest.raises(ConfigError, match=rf"card.md: licenses\[1\]{fault}"):
        read_data_card(file)


@pytest.mark.parametrize(
    ("front", "fault"),
    [
        ("license: cc-by-4.0", "license: got 'cc-by-4.0', expected `licenses`, a list of parts"),
        ("id: card", "licenses: got None, expected `licenses`, a list of parts"),
        ("licenses: cc-by-4.0", "licenses: got 'cc-by-4.0', expected a list"),
        ("licenses: []", r"licenses: got \[\], expected a list"),
        ("licenses: [cc-by-4.0]", r"licenses\[0\]: got 'cc-by-4.0', expected a mapping"),
        (f"licenses: [{RIGHT}, {RIGHT}]", r"licenses: got the parts \['captions', 'captions'\], expected each once"),
        (f"licenses: [{RIGHT}]\nlicenses: [{RIGHT}]", "the key 'licenses' twice"),
        (f"licenses: [{RIGHT}]\nlicence: mit", "licence: unknown key"),
        (f"licenses: [{RIGHT}]\nid: other", "id: got 'other', expected card"),
        (f"licenses: [{RIGHT}]\nfiles: [a.csv]", r"files: got \['a.csv'\]"),
        (f"licenses: [{RIGHT}]\nunverified: {{licenses: a page}}", "unverified.licenses"),
        ("licenses: [{part: a, id: [}", "front matter cannot be read"),
    ],
)
def test_a_card_that_is_written_wrongly_is_refused(front, fault, tmp_path):
    with pytest.raises(ConfigError, match=f"card.md: .*{fault}"):
        read_data_card(card(tmp_path, front))


def test_all_faults_of_a_card_are_named_at_once(tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: mit\nlanguages: ko\nrows: 10\n---\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_data_card(tmp_path / "card.md")
    faults = [fault.split(": ")[1] for fault in str(refused.value).split("; ") if "card.md: " in fault]
    assert faults == ["license", "source", "languages", "rows", "**Limits.**", "**Harms.**"]


def test_a_card_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "card.md").write_bytes("---\nsource: 출처\n---\n".encode("cp949"))
    with pytest.raises(ConfigError, match=r"card\.md: "):
        read_data_card(tmp_path / "card.md")


def test_the_answers_that_an_id_gives_may_be_repeated(tmp_path):
    stated = "commercial: true, redistribution: true, share_alike: false"
    (part,) = read_data_card(card(tmp_path, f"licenses: [{{part: a, id: MIT, source: b, {stated}}}]")).licenses
    assert part == Part("a", "mit", "b", "", True, True, False)


def test_every_mix_of_answers_of_other_terms_is_kept():
    for stated in product([True, False, "unstated"], repeat=3):
        answers: dict[str, Any] = dict(zip(ALLOWS, stated, strict=True))
        (part,) = parts_of(words(**answers))
        assert [part.commercial, part.redistribution, part.share_alike] == [
            None if answer == "unstated" else answer for answer in stated
        ]


def card(folder: Path, front: str) -> Path:
    (folder / "card.md").write_text(CARD % front, encoding="utf-8")
    return folder / "card.md"
