"""Rules of the house: which room imports which, that every YAML loads, that every documented command parses."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from koclip.config import (
    AlignConfig,
    EvaluateConfig,
    IndexConfig,
    PretrainConfig,
    PublishConfig,
    SourceConfig,
    parse,
)

ROOT = Path(__file__).parents[1]
# A room imports only from rooms to its left.
ROOMS = (
    "storage",
    "config",
    "text",
    "data",
    "distributed",
    "losses",
    "models",
    "encoders",
    "embeddings",
    "optim",
    "align",
    "training",
    "metrics",
    "evaluation",
    "runs",
    "search",
    "publishing",
)
# By recipe, which is the folder of its configurations; and what must be said besides them.
SCHEMAS = {
    "pretrain": PretrainConfig,
    "align": AlignConfig,
    "evaluate": EvaluateConfig,
    "publish": PublishConfig,
    "index": IndexConfig,
}
REQUIRED = {name: ["--model", "runs/some/model"] for name in ("evaluate", "index")}
YAMLS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
DOCS = [ROOT / name for name in ("README.md", "README.ko.md", "CONTRIBUTING.md", "recipes/README.md")]


def room_imports(file: Path) -> set[str]:
    """Return the rooms that a file of the package imports."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] if node.module != "koclip" else [f"koclip.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("koclip.")}


def test_data_flows_one_way():
    found = 0
    for file in sorted((ROOT / "koclip").rglob("*.py")):
        parts = file.relative_to(ROOT / "koclip").with_suffix("").parts
        if parts[0] == "__init__":
            continue
        room = ROOMS.index(parts[0])
        right = {name for name in room_imports(file) if ROOMS.index(name) > room}
        assert not right, f"{file.relative_to(ROOT)} imports from rooms to its right: {sorted(right)}"
        found += 1
    assert found > 20


def test_nothing_imports_a_recipe():
    for file in [*(ROOT / "koclip").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        assert not re.search(r"^\s*(from|import) recipes", file.read_text(encoding="utf-8"), re.MULTILINE), file


def test_files_and_functions_stay_short():
    for file in [*(ROOT / "koclip").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        source = file.read_text(encoding="utf-8")
        assert source.count("\n") <= 400, f"{file.relative_to(ROOT)} has {source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 55, f"{file.relative_to(ROOT)}: {node.name}() has {length} lines"


def test_there_are_configs():
    assert len(YAMLS) >= 18


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_every_config_loads_and_says_how_to_run(file):
    recipe = file.parent.name
    parse(SCHEMAS[recipe], ["--config", str(file), *REQUIRED.get(recipe, [])])
    header = file.read_text(encoding="utf-8").split("\n\n")[0]
    assert header.startswith("#"), f"{file.name} has no header comment"
    command = f"recipes/{recipe}.py --config recipes/configs/{recipe}/{file.name}"
    assert command in " ".join(header.replace("\\\n#", "").split()), f"{file.name}'s header lacks {command}"


def documented_commands() -> list[tuple[str, list[str]]]:
    """Return (document, words) of every recipe launched in a document or in a config's header."""
    commands = []
    for document in [*DOCS, *YAMLS, *(ROOT / "recipes").glob("*.py")]:
        text = re.sub(r"\\\n#?", " ", document.read_text(encoding="utf-8"))  # lines that go on
        for line in re.findall(r"(?:accelerate launch|torchrun|python)[^`\n]*recipes/\w+\.py[^`\n]*", text):
            if document.suffix == ".py":  # in a format string, braces are doubled
                line = line.replace("{{", "{").replace("}}", "}")
            words = shlex.split(line.split("  #")[0])
            commands.append((f"{document.name}: {line}", words))
    return commands


def test_every_documented_recipe_command_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = documented_commands()
    assert len(commands) >= 8
    for where, words in commands:
        recipe = next(place for place, word in enumerate(words) if re.fullmatch(r"recipes/.*\.py", word))
        assert (ROOT / words[recipe]).exists(), where
        args = words[recipe + 1 :]
        if "--help" in args or words[recipe].startswith("recipes/benchmarks"):
            continue
        try:
            name = Path(words[recipe]).stem
            default = ROOT / "recipes" / "configs" / name / "scenes.yaml"
            parse(SCHEMAS[name], args, default=default if default.exists() else None)
        except SystemExit:
            pytest.fail(f"does not parse: {where}")


def test_every_documented_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"help", "quickstart", "test", "check"} <= targets
    for document in DOCS:
        for target in re.findall(r"`?make ([a-z]+)", document.read_text(encoding="utf-8")):
            assert target in targets, f"{document.name}: make {target}"


def test_links_between_documents_lead_somewhere():
    documents = [*DOCS, *(ROOT / "data_cards").glob("*.md"), ROOT / "CHANGELOG.md"]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def test_every_source_of_a_config_has_a_data_card():
    cards = {card.stem for card in (ROOT / "data_cards").glob("*.md")}
    for file in YAMLS:
        recipe = file.parent.name
        config = parse(SCHEMAS[recipe], ["--config", str(file), *REQUIRED.get(recipe, [])])
        if recipe == "evaluate":
            sources = [one for each in config.sets for one in (each.source, each.train, *each.shifted.values()) if one]
        elif recipe == "index":
            sources = [config.source or SourceConfig(path=config.images)]
        else:
            sources = config.data.sources
        for source in sources:
            yours = "webdataset" in file.stem or source.path.startswith("data/")
            known = yours or source.short_name in cards
            assert known, f"{file.name}: no card data_cards/{source.short_name}.md"


def test_ci_runs_what_the_readme_says():
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_constraints_pin_every_dependency():
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert block is not None
    names = re.findall(r'^    "([A-Za-z0-9_-]+)', block[1], re.MULTILINE)
    assert len(names) > 10
    assert {name.lower().replace("_", "-") for name in names} <= pins
