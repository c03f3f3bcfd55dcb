"""Rules of the house: which room imports which, that every YAML loads, that every documented command parses."""

import ast
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers.skips import known_reason

from koclip import installation
from koclip.cli import RECIPES
from koclip.config import SourceConfig, parse

ROOT = Path(__file__).parents[1]
# A room imports only from rooms to its left.
ROOMS = (
    "installation",
    "storage",
    "config",
    "licences",
    "text",
    "data",
    "data_sets",
    "distributed",
    "losses",
    "models",
    "encoders",
    "embeddings",
    "optim",
    "align",
    "training",
    "metrics",
    "classifiers",
    "evaluation",
    "runs",
    "planning",
    "search",
    "curation",
    "publishing",
    "cli",
)
# By recipe, which is the folder of its configurations; and what must be said besides them.
SCHEMAS = {name: recipe.schema for name, recipe in RECIPES.items() if recipe.schema}
REQUIRED = {name: ["--model", "runs/some/model"] for name in ("evaluate", "index", "adapt")}
# Ceilings that only go down. The goal is 95 files.
MAX_FILES, MAX_VAGUE_NAMES = 177, 0
VAGUE_NAMES = {"one", "found", "made", "theirs", "told"}
# Functions of more than 50 lines or 5 parameters, with the reason.
LARGE_FUNCTIONS = {
    "koclip/losses/tiled.py _Tiled.forward": "torch.autograd.Function takes tensors by position",
    "koclip/models/dual_encoder.py DualEncoder.forward": "the parts of a Batch by name, as transformers calls a model",
    "recipes/benchmarks/open_clip_peer.py OpenClip.__init__": "open_clip's own training options",
    "space/pieces.py add_examples": "what an event of gradio takes: inputs, outputs and a function",
    "space/pieces.py text_box": "it passes options on to gradio",
}
WRITES = {"write_text", "write_bytes", "savefig", "save_file", "save_pretrained"}
# They write into a temporary folder, or into the one that storage.atomic or a new checkpoint gives them.
WRITERS = {
    "koclip/storage.py",
    "koclip/align/lora.py",
    "koclip/classifiers/directory.py",
    "koclip/data_sets/data_set.py",
    "koclip/data_sets/downloads.py",
    "koclip/data_sets/emoji.py",
    "koclip/data_sets/xtd10.py",
    "koclip/embeddings/store.py",
    "koclip/evaluation/report/charts.py",
    "koclip/models/router.py",
    "koclip/models/stock.py",
    "koclip/models/trim.py",
    "koclip/publishing/clean_load.py",
    "koclip/publishing/formats/onnx.py",
    "koclip/publishing/preflight.py",
    "koclip/publishing/push.py",
    "koclip/runs/checkpoints.py",
    "koclip/runs/session.py",
}
YAMLS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
DOCS = [ROOT / name for name in ("README.md", "README.ko.md", "CONTRIBUTING.md", "recipes/README.md")]
DOCS += sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = {*RECIPES, "ls", "cp"}  # of `koclip`


def python_files(*folders: str) -> dict[str, ast.Module]:
    """Return the syntax tree of every Python file in folders of the repository, by its path from the root."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert len(paths) > len(folders)
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported_names(tree: ast.Module) -> set[str]:
    """Return what a file imports, by full name: modules, and the names that are taken from modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def room_of(module: str) -> str:
    """Return the room that a module of koclip is in; "" for koclip itself."""
    return module.removeprefix("koclip").lstrip(".").split(".")[0]


def test_rooms_import_only_from_rooms_to_their_left():
    checked = 0
    for path, tree in python_files("koclip").items():
        if path == "koclip/__init__.py":
            continue
        rooms = {room_of(name) for name in imported_names(tree) if name.startswith("koclip.")}
        right = {room for room in rooms if ROOMS.index(room) > ROOMS.index(Path(path).with_suffix("").parts[1])}
        assert not right, f"{path} imports from rooms to its right: {sorted(right)}"
        checked += bool(rooms)
    assert checked > 20


def test_the_guide_lists_the_rooms():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = re.search(r"^\w+ → [\w → \n]+$", guide, re.MULTILINE)
    assert rooms is not None
    assert tuple(re.split(r"\s*→\s*", rooms[0].strip())) == ROOMS


@pytest.mark.parametrize("folder", ["koclip", "recipes/benchmarks", "space"])
def test_imports_form_no_circle(folder):
    """Modules of koclip have their full names; those beside a script have the names by which it imports them."""
    trees = {
        ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
        if folder == "koclip"
        else Path(path).stem: tree
        for path, tree in python_files(folder).items()
    }
    imports = {
        module: {name if name in trees else name.rpartition(".")[0] for name in imported_names(tree)} & set(trees)
        for module, tree in trees.items()
    }
    assert sum(map(len, imports.values())) > 10
    list(TopologicalSorter(imports).static_order())  # raises CycleError


def test_nothing_imports_a_recipe():
    for path, tree in python_files("koclip", "recipes", "space").items():
        recipes = {name for name in imported_names(tree) if name.split(".")[0] == "recipes"}
        assert not recipes, f"{path} imports {recipes}"


def test_rooms_stay_small():
    paths = [Path(path) for path in python_files("koclip")]
    assert len(paths) <= MAX_FILES, f"koclip/ has {len(paths)} files"
    rooms = Counter(path.parent.as_posix() for path in paths if path.name != "__init__.py")
    assert not {room: count for room, count in rooms.items() if count > 12}


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function of a file under its name, which begins with the class or function that it is in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner + node.name, node
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(node, f"{owner}{node.name}." if named else owner)


def test_files_and_functions_stay_short():
    large = set()
    for path, tree in python_files("koclip", "recipes", "space").items():
        num_lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        assert num_lines <= 400, f"{path} has {num_lines} lines"
        for name, function in functions(tree):
            length = (function.end_lineno or 0) - function.lineno + 1
            arguments = function.args
            parameters = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs]
            parameters = [each for each in [*parameters, arguments.kwarg] if each and each.arg not in {"self", "cls"}]
            if length > 50 or len(parameters) > 5:
                large.add(f"{path} {name}")
    assert large <= set(LARGE_FUNCTIONS), f"more than 50 lines or 5 parameters: {large - set(LARGE_FUNCTIONS)}"
    assert set(LARGE_FUNCTIONS) <= large, f"no longer large: {set(LARGE_FUNCTIONS) - large}"


def identifiers(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a file gives or uses, once per place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            yield node.asname or node.name
        elif not isinstance(node, ast.Constant | ast.ImportFrom):
            for field in ("id", "arg", "attr", "name", "rest"):
                if isinstance(name := getattr(node, field, None), str):
                    yield name


def test_names_say_what_they_are():
    counts = Counter(
        name for tree in python_files("koclip", "recipes", "space", "tests").values() for name in identifiers(tree)
    )
    assert counts["self"] > 500
    count = sum(counts[name] for name in VAGUE_NAMES)
    assert count <= MAX_VAGUE_NAMES, f"{count} uses of {sorted(VAGUE_NAMES)}: use the name of the thing"


def test_files_are_written_whole_by_the_storage_alone():
    for path, tree in python_files("koclip").items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
        assert not names & WRITES or path in WRITERS, f"{path} calls {names & WRITES}: write through koclip.storage"


def test_the_report_knows_no_task():
    for path, tree in python_files("koclip/evaluation/report").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("koclip.evaluation.tasks"):
                assert node.module == "koclip.evaluation.tasks", path
                assert {alias.name for alias in node.names} <= {"SPECS", "TASKS"}, path


def test_the_conditions_of_the_loop_stand_once():
    periods = {"eval_every", "save_every", "log_every"}
    places = [
        (path, node.attr)
        for path, tree in python_files("koclip", "recipes").items()
        if path != "koclip/config/training.py" and not path.startswith("recipes/benchmarks")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in periods
    ]
    assert sorted(places) == [("koclip/runs/session.py", period) for period in sorted(periods)]


def test_there_are_configs():
    assert len(YAMLS) >= 18


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_every_config_loads_and_says_how_to_run(file):
    recipe = file.parent.name
    parse(SCHEMAS[recipe], ["--config", str(file), *REQUIRED.get(recipe, [])])
    commands = [words for words in koclip_commands(file) if words[0] == recipe and "--config" in words]
    named = {words[words.index("--config") + 1] for words in commands}
    assert f"{recipe}/{file.stem}" in named, (
        f"{file.name}'s header lacks `koclip {recipe} --config {recipe}/{file.stem}`"
    )


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
        if not words[recipe].startswith("recipes/benchmarks"):
            check_command(where, Path(words[recipe]).stem, words[recipe + 1 :])


def check_command(where: str, recipe: str, args: list[str]) -> None:
    """Fail if a recipe does not take these arguments."""
    default = ROOT / "recipes" / "configs" / recipe / "scenes.yaml"
    if "--help" in args:
        return
    try:
        first = RECIPES[recipe].first
        parse(SCHEMAS[recipe], args, default=default if default.exists() else None, first=first)
    except SystemExit:
        pytest.fail(f"does not parse: {where}")


def koclip_commands(document: Path) -> Iterator[list[str]]:
    """Yield the words after `koclip` of every command in a document's code blocks, or in a configuration's header."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".yaml":
        blocks = [re.sub("^#", "", text.split("\n\n")[0], flags=re.MULTILINE)]
    else:
        blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"\s*(?:\w+=\S+ )*koclip (.*)", line):
                yield shlex.split(match[1], comments=True)


def test_every_documented_koclip_command_parses(monkeypatch):
    """A name of a configuration stands for its file; so does the file that `koclip cp` has written before."""
    monkeypatch.chdir(ROOT)
    count = 0
    for document in [*DOCS, *YAMLS]:
        files = {name: str(file) for name, file in installation.configs().items()}
        for command, *args in koclip_commands(document):
            where = f"{document.relative_to(ROOT)}: koclip {command} {shlex.join(args)}"
            assert command.startswith("--") or command in COMMANDS, where
            if command == "cp":
                names = [word for word in args if not word.startswith("--")]
                assert names[0] in files, where
                files[names[1]] = files[names[0]]
            elif command in SCHEMAS:
                count += 1
                if "--launch" in args:
                    del args[args.index("--launch") : args.index("--launch") + 2]
                check_command(where, command, [files.get(word, word) for word in args])
    assert count >= 8


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", makefile(), re.MULTILINE))


def test_every_documented_make_target_exists():
    for document in DOCS:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in make_targets(), f"{document.name}: make {target}"


def test_links_between_documents_lead_somewhere():
    documents = [*DOCS[:4], *(ROOT / "data_cards").glob("*.md"), ROOT / "CHANGELOG.md"]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def test_every_source_of_a_config_has_a_data_card():
    cards = {card.stem for card in (ROOT / "data_cards").glob("*.md")}
    for file in YAMLS:
        recipe = file.parent.name
        config = parse(SCHEMAS[recipe], ["--config", str(file), *REQUIRED.get(recipe, [])])
        if recipe == "evaluate":
            sources = [
                source for each in config.sets for source in (each.source, each.train, *each.shifted.values()) if source
            ]
        elif recipe == "adapt":
            sources = list(config.parts.values())
        elif recipe == "index":
            sources = [config.source or SourceConfig(path=config.images)]
        elif recipe in ("trim", "curate"):
            sources = config.sources
        else:
            sources = config.data.sources
        for source in sources:
            yours = "webdataset" in file.stem or source.path.startswith("data/")
            known = yours or source.short_name in cards
            assert known, f"{file.name}: no card data_cards/{source.short_name}.md"


def test_ci_runs_documented_commands():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:exec )?make ([^#\n]+)", script, re.MULTILINE)
    targets = [word for line in lines for word in line.split() if word in make_targets()]
    assert targets == ["check", "docs", "test", "slow"]
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^make (\w+)", guide, re.MULTILINE)) >= {"check", "docs", "test", "slow"}


def test_a_job_runs_every_marked_test():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^markers = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert block is not None
    markers = re.findall(r'^    "(\w+):', block[1], re.MULTILINE)
    assert markers == ["slow", "hub"]
    assert f"-m '{' and '.join(f'not {marker}' for marker in markers)}'" in project  # what `make test` leaves out
    slow = re.search(r"^slow:.*\n((?:\t.*\n)+)", makefile(), re.MULTILINE)
    assert slow is not None
    assert re.findall(r"-m (\w+)$", slow[1], re.MULTILINE) == markers
    ignored = re.findall(r"--ignore (\S+)", slow[1])
    documents = re.search(r"^docs:.*\n((?:\t.*\n)+)", makefile(), re.MULTILINE)
    assert documents is not None
    assert all(file in documents[1] for file in ignored)  # another job runs them, the marked tests too
    assert "-m 'slow or not slow'" in documents[1]


def test_the_slow_job_has_an_hour():
    slow = re.search(r"^slow:.*\n((?:\t.*\n)+)", makefile(), re.MULTILINE)
    assert slow is not None
    minutes = re.findall(r"timeout --kill-after=30 (\d+)m ", slow[1])
    assert len(minutes) == slow[1].count("\n")
    assert sum(map(int, minutes)) <= 60


def test_the_lowest_versions_are_tested_with_files_that_are_there():
    names = re.findall(r"\w+\.py", re.search(r"^LOWEST_TESTS := (.*)$", makefile(), re.MULTILINE)[1])  # type: ignore[index]
    assert len(names) >= 5
    assert [name for name in names if not (ROOT / "tests" / f"test_{name}").exists()] == []


def skip_reasons(tree: ast.Module) -> list[str]:
    """Return the reason of every call in a test file that may skip a test; "" where it gives none."""
    reasons = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"skip", "skipif", "importorskip", "xfail"}
        ):
            given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            given += node.args[:1] if node.func.attr == "skip" else []
            reasons.append(str(given[0].value) if given and isinstance(given[0], ast.Constant) else "")
    return reasons


def test_every_skip_has_a_known_reason():
    reasons = [(path, reason) for path, tree in python_files("tests").items() for reason in skip_reasons(tree)]
    assert 0 < len(reasons) <= 8, "a test that nobody runs does not count: make it run instead"
    assert [(path, reason) for path, reason in reasons if known_reason(reason) is None] == []
