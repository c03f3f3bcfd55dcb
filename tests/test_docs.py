"""The documents: every page in Korean and in English, with the same headings, tables and code; links lead somewhere."""

import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from PIL import Image
from runs_to_publish import pretrained

from koclip import config
from koclip.cli import RECIPES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted({page.with_suffix("").with_suffix("").relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")})
TREE = "https://github.com/koclip/koclip/blob/main/"
FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def text_of(page: str, language: str) -> str:
    return (DOCS / f"{page}.{language}.md").read_text(encoding="utf-8")


def code_of(text: str) -> list[tuple[str, str]]:
    """Return the language and the lines of every code block, without comments, which are translated."""
    blocks = []
    for _, language, code in FENCED.findall(text):
        lines = [re.sub(r"(^|\s+)#( .*|$)", "", line).rstrip() for line in code.splitlines()]
        blocks.append((language, "\n".join(line for line in lines if line)))
    return blocks


def outline_of(text: str) -> list[str]:
    """Return what a page is made of, in order: headings by level, table rows by their columns, API entries by name."""
    prose = FENCED.sub("```", text)
    outline = []
    for line in prose.splitlines():
        if heading := re.match(r"#+ ", line):
            outline.append(heading[0].strip())
        elif line.startswith("|"):
            outline.append("|" * len(re.findall(r"(?<!\\)\|", line)))
        elif line.startswith((":::", "```")):
            outline.append(line)
    return outline


def test_there_are_pages():
    assert "index" in PAGES
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r"([\w/]+)\.md$", nav, re.MULTILINE)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_the_same_in_both_languages(page):
    korean, english = text_of(page, "ko"), text_of(page, "en")
    assert korean.startswith("# ")
    assert outline_of(korean) == outline_of(english)
    assert code_of(korean) == code_of(english)
    prose = [re.sub(r"^:::.*\n.*\n", "", FENCED.sub("", text), flags=re.MULTILINE) for text in (korean, english)]
    assert len(re.findall(r"[가-힣]", prose[0])) > len(prose[1]) / 10, "the Korean page is not in Korean"


@pytest.mark.parametrize("page", PAGES)
def test_tables_have_the_same_numbers_in_both_languages(page):
    rows = [
        [sorted(re.findall(r"\d[\d.,]*\d", line)) for line in text_of(page, language).splitlines() if line[:1] == "|"]
        for language in ("ko", "en")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("language", ["ko", "en"])
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_stay_in_their_language(page, language):
    text = FENCED.sub("", text_of(page, language))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if target.startswith(TREE):
            assert (ROOT / target.removeprefix(TREE)).exists(), target
        elif not re.match(r"https?:|mailto:", target):
            assert (DOCS / page).parent.joinpath(target).is_file(), target
            assert not target.endswith(".md") or target.endswith(f".{language}.md"), target


def test_api_entries_are_there():
    entries = [entry for page in PAGES for entry in re.findall(r"^::: (\S+)$", text_of(page, "en"), re.MULTILINE)]
    assert len(entries) > 40
    for entry in entries:
        text = re.sub(r"`[^`]*`", "", inspect.getdoc(pkgutil.resolve_name(entry)) or "")
        assert text, f"{entry} has no docstring"
        assert not re.search(r"<\w", text), f"{entry}: the site takes <...> for HTML; put it into backticks"


def test_the_page_of_commands_has_every_command_and_section():
    page = text_of("cli", "en")
    assert re.findall(r"^\| `koclip (\w+)`", page, re.MULTILINE) == [*RECIPES, "ls", "cp"]
    schemas = {recipe.schema for recipe in RECIPES.values() if recipe.schema}
    described = {each.__name__ for each in sections_of(schemas) if "Args:" in (each.__doc__ or "")}
    assert set(re.findall(r"^::: koclip\.config\.(?:\w+\.)?(\w+)$", page, re.MULTILINE)) == described


def sections_of(schemas: set[Any]) -> set[Any]:
    """Return configurations with the dataclasses that they inherit from and hold."""
    sections = set(schemas)
    for schema in schemas:
        text = " ".join(str(hint) for hint in get_type_hints(schema).values())
        inner = {getattr(config, name) for name in re.findall(r"koclip\.config\.(?:\w+\.)+(\w+)", text)}
        sections |= sections_of(inner) | {base for base in schema.__bases__ if base is not object}
    return sections


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `runs/quickstart` is a tiny model with a picture."""
    folder = tmp_path_factory.mktemp("quickstart")
    run = folder / "runs" / "quickstart"
    pretrained(run)
    (run / "pictures").mkdir()
    Image.new("RGB", (32, 32), "gray").save(run / "pictures" / "example.png")
    return folder


@pytest.mark.parametrize("document", ["README", "docs/index"])
def test_python_blocks_run(document, quickstart, monkeypatch, capsys):
    """The Korean document has the same code (below, and above for pages)."""
    english = ROOT / (f"{document}.md" if document == "README" else f"{document}.en.md")
    blocks = [code for language, code in code_of(english.read_text(encoding="utf-8")) if language == "python"]
    assert len(blocks) == 1
    monkeypatch.chdir(quickstart)
    exec(compile(blocks[0], document, "exec"), {})
    assert "회색 별" in capsys.readouterr().out


def test_both_readmes_have_the_same_parts():
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    assert outline_of(english) == outline_of(korean)
    assert code_of(english) == code_of(korean)
