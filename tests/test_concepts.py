"""The concepts name files that exist, and their examples print what the pages say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "concepts").glob("*.md"))
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_there_are_pages():
    assert len(PAGES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    names = re.findall(r"`((?:koclip|tests|recipes)/[\w/.]+)[` ]", page.read_text(encoding="utf-8"))
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("language", ["ko", "en"])
def test_examples_of_korean_text_print_what_the_page_says(language):
    page = (ROOT / "docs" / "concepts" / f"korean_text.{language}.md").read_text(encoding="utf-8")
    examples = EXAMPLE.findall(page)
    assert len(examples) >= 3
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(example, {})
        expected = re.findall(r"^# (.*)$", example, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected
