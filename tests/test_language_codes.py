"""Languages are BCP 47 codes wherever they are named, and the code that is likely meant is named."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koclip.config import ConfigError, DistillConfig, EvalSetConfig, PretrainConfig, RatingsConfig, SourceConfig, parse
from koclip.text.classes import load_classes


@pytest.mark.parametrize(
    "language",
    ["ko", "en", "ja", "zh", "zh-Hant", "zh-TW", "pt-BR", "es-419", "sr-Latn-RS", "yue", "gsw", "en-x-simple", "kau"],
)
def test_codes_are_taken(language: str) -> None:
    assert SourceConfig(captions={language: "text"}).captions == {language: "text"}


@pytest.mark.parametrize(
    ("language", "meant"),
    [
        *(
            ("kr", "ko"),
            ("jp", "ja"),
            ("cn", "zh"),
            ("gr", "el"),
            ("ua", "uk"),
            ("cz", "cs"),
            ("dk", "da"),
            ("vn", "vi"),
        ),
        *(("tw", "zh-Hant"), ("kor", "ko"), ("eng", "en"), ("chi", "zh"), ("ger", "de"), ("deu", "de"), ("iw", "he")),
        *(
            ("korean", "ko"),
            ("Korean", "ko"),
            ("한국어", "ko"),
            ("KO", "ko"),
            ("EN-us", "en-US"),
            ("zh_Hant", "zh-Hant"),
        ),
        *(("kr-KR", "ko-KR"), ("zh-hant", "zh-Hant"), ("ko ", "ko")),
    ],
)
def test_the_likely_code_is_named(language: str, meant: str) -> None:
    for make in (
        lambda: SourceConfig(captions={language: "text"}),
        lambda: RatingsConfig(path="ratings.tsv", language=language),
        lambda: DistillConfig(language=language),
        lambda: EvalSetConfig(templates={language: ["{}"]}, tasks=["zero_shot"]),
    ):
        with pytest.raises(ConfigError, match=rf"(captions|language|templates).*\b{meant}\b"):
            make()


@pytest.mark.parametrize("language", ["", "x", "xx", "captions_ko", "ko,en", "k o", "ko-", "1"])
def test_what_is_no_code_is_refused(language: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\[\]\.captions.*BCP 47"):
        SourceConfig(captions={language: "text"})


def test_norwegian_without_quotes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML reads `no` as false."""
    (tmp_path / "no.yaml").write_text("data: {sources: [{path: a.csv, captions: {no: text}}]}", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--config", str(tmp_path / "no.yaml")])
    assert 'write "no"' in capsys.readouterr().err


def test_names_of_classes_are_in_such_languages(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text("- {key: a, kr: 가}\n- {key: b, kr: 나}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"class 0 \(a\).*'kr'.* mean ko\b"):
        load_classes(tmp_path / "classes.yaml")


@given(st.text(max_size=12))
def test_any_text_is_taken_or_refused_by_name(language: str) -> None:
    refused = ""
    try:
        SourceConfig(captions={language: "text"})
    except ConfigError as error:
        refused = str(error)
    assert not refused or refused.startswith(f"data.sources[].captions: got {language!r}, expected")
