"""What is installed: the wheel's files, the extras and what needs them, and commands in environments of their own."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomlkit

from koclip import cli, installation

ROOT = Path(__file__).parents[1]
PROJECT = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()["project"]
# Distributions by the name that is imported, where the two differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "google": "protobuf",
    "google.protobuf": "protobuf",
    "koreanize_matplotlib": "koreanize-matplotlib",
    "pyarrow": "datasets",  # brings it
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Imports inside functions that say themselves what is missing, or are of a launcher that has them.
GUARDED = {"accelerate", "deepspeed", "faiss", "onnx", "onnxruntime", "onnxscript", "timm", "jsonargparse"}


def requirements(extra: str | None = None) -> set[str]:
    """Return the distributions of an extra, with those of the extras in it; None: of koclip without extras."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    names: set[str] = set()
    for line in lines:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", line).groups()  # type: ignore[union-attr]
        names |= {name} if name != "koclip" else set[str]().union(*(requirements(each) for each in extras.split(",")))
    return names


def distribution(library: str) -> str:
    return DISTRIBUTIONS.get(library, library)


def test_the_table_of_libraries_is_that_of_the_project():
    for extra, libraries in installation.EXTRAS.items():
        assert {distribution(library) for library in libraries} == requirements(extra), extra
    assert {extra for _, extra in cli.RECIPES.values()} <= set(installation.EXTRAS)
    assert requirements("all") >= set().union(*(requirements(extra) for extra in installation.EXTRAS))


def guards(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, extra) of the checks for extras in a file and, as line 0, in the packages that it is in."""
    parents = [folder / "__init__.py" for folder in path.parents if (ROOT / "koclip") in (folder, *folder.parents)]
    for file in filter(Path.is_file, {path, *parents}):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                call = node.value
                if ast.unparse(call.func) == "installation.require" and isinstance(call.args[0], ast.Constant):
                    yield (node.lineno if file == path else 0), str(call.args[0].value)


def third_party(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield line, top-level name and whether it is at the module's level, of every import of another library."""
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in {str(name).split(".")[0] for name in names} - {"koclip", *sys.stdlib_module_names}:
            yield node.lineno, name, node in tree.body  # type: ignore[attr-defined]


def test_an_import_that_needs_an_extra_comes_after_a_check_for_it():
    checked = 0
    for path in sorted((ROOT / "koclip").rglob("*.py")):
        checks = list(guards(path))
        for line, name, at_top in third_party(ast.parse(path.read_text(encoding="utf-8"))):
            if distribution(name) in requirements() or (not at_top and name in GUARDED):
                continue
            extras = [extra for place, extra in checks if place < line]
            where = f"{path.relative_to(ROOT)}:{line} imports {name}"
            assert any(distribution(name) in requirements(extra) for extra in extras), f"{where}: no extra is checked"
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("command", cli.RECIPES)
def test_a_command_without_its_extra_says_which(command, monkeypatch, capsys):
    extra = cli.RECIPES[command][1]
    hidden = installation.EXTRAS[extra][-1]
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert hidden in error
    assert f"'koclip[{extra}]'" in error
    assert error.count("\n") == 1


def test_an_import_without_its_extra_says_which():
    code = "import sys; sys.modules['psutil'] = None; import koclip.training.loop"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "psutil" in done.stderr.splitlines()[-1]
    assert "'koclip[train]'" in done.stderr.splitlines()[-1]


def tracked() -> set[str]:
    """Return the names that the project's files have in the wheel."""
    moved = {"recipes": "koclip/recipes", "data_cards": "koclip/data_cards", "space": "koclip/space"}
    names = set()
    for top in ("koclip", *moved):
        for path in (ROOT / top).rglob("*"):
            name = path.relative_to(ROOT)
            left_out = "__pycache__" in name.parts or name.parts[1] == "benchmarks" or path.suffix == ".pyi"
            if path.is_file() and not left_out:
                names.add(str(Path(moved.get(top, top), *name.parts[1:]).as_posix()))
    return names - {"koclip/recipes/README.md"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, without the network, from a copy of the project: setuptools writes beside what it reads."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "project"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(copy)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == tracked()
    assert len(names) == len(set(names))
