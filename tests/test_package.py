"""What is installed: the wheel's files, the extras and what needs them, and commands in environments of their own."""

import ast
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomlkit
from align_runs import write_source

from koclip import cli, installation
from koclip.publishing import card_inputs

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
GUARDED = {"accelerate", "deepspeed", "faiss", "onnx", "onnxruntime", "onnxscript", "timm", "jsonargparse", "ray"}


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
    assert {recipe.extra for recipe in cli.RECIPES.values()} <= set(installation.EXTRAS)
    assert requirements("all") >= set().union(*(requirements(extra) for extra in installation.EXTRAS))


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    names = requirements() | requirements("dev")
    assert len(names) > 30
    assert {name.lower().replace("_", "-") for name in names if not name.startswith("types-")} <= pins


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
        if path.name == "clean_load.py":  # a program that must not import koclip; `preflight` checks the extra before
            continue
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
    extra = cli.RECIPES[command].extra
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


def test_a_bare_install_embeds_and_searches():
    libraries = {library.split(".")[0] for each in installation.EXTRAS.values() for library in each} - {"google"}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(libraries)})); import koclip.encoders, koclip.search"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_data_card_of_the_user_goes_before_that_of_koclip(tmp_path):
    cards = [tmp_path, installation.files("data_cards")]
    assert card_inputs._find_card("scenes", None, cards) == ROOT / "data_cards" / "scenes.md"
    (tmp_path / "scenes.md").write_text("mine", encoding="utf-8")
    assert card_inputs._find_card("scenes", None, cards) == tmp_path / "scenes.md"


def test_a_recipe_is_named_by_its_command_however_it_is_started():
    for program in ("koclip pretrain", "pretrain.py", str(installation.files("recipes") / "pretrain.py")):
        assert installation.command([program, "--resume", "auto"]) == ["koclip", "pretrain", "--resume", "auto"]
    assert installation.command(["koclip", "ls"]) == ["koclip", "ls"]
    assert installation.command(["/somewhere/train.py"]) == ["train.py"]


def test_the_commit_is_that_of_the_code_not_of_the_folder(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    assert installation.commit() == head.strip()
    monkeypatch.setattr(installation.shutil, "which", lambda _: None)  # no git
    assert installation.commit() is None


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


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the project's files: setuptools writes beside what it reads."""
    copy = tmp_path_factory.mktemp("copy") / "project"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def wheel(project: Path) -> Path:
    """Build the wheel, without the network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(project.parent), str(project)], check=True, timeout=300)
    return next(project.parent.glob("*.whl"))


class Environment:
    """A virtual environment, and an empty folder from which its commands run."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.folder = folder / "venv" / "bin", folder / "elsewhere"
        self.folder.mkdir()
        venv.create(folder / "venv", with_pip=True)

    def run(self, *words: str, code: int = 0) -> str:
        """Run a program of the environment, which exits with `code`; return what it prints."""
        settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        settings |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": f"{self.bin}:/usr/bin:/bin"}
        command = [str(self.bin / words[0]), *words[1:]]
        done = subprocess.run(
            command, cwd=self.folder, env=settings, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Return an environment that sees the libraries of this one, but not its koclip."""
    created = Environment(tmp_path)
    created.run("pip", "uninstall", "--quiet", "--yes", "setuptools")  # venv's is too old to build koclip
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    return created


def test_the_wheel_holds_every_file_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == tracked()
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_commands_run_from_any_folder(kind, project, wheel, environment):
    source = [str(wheel)] if kind == "wheel" else ["--no-build-isolation", "--editable", str(project)]
    environment.run("pip", "install", "--quiet", "--no-deps", *source)
    home = environment.run("python", "-c", "import koclip.recipes as r; print(*r.__path__)").strip()
    assert home == str(project / "recipes") if kind == "editable" else home.startswith(str(environment.bin.parent))
    assert "align/klue_roberta_base_two_stage" in environment.run("koclip", "ls")
    environment.run("koclip", "cp", "align/klue_roberta_base_two_stage", "my.yaml")
    copied = (environment.folder / "my.yaml").read_bytes()
    assert copied == (ROOT / "recipes/configs/align/klue_roberta_base_two_stage.yaml").read_bytes()
    cards = "from koclip import installation as i; print(i.checkout(), *i.files('data_cards').glob('scenes.md'))"
    checkout, card = environment.run("python", "-c", cards).split()
    assert (checkout == "None") == (kind == "wheel")
    assert Path(card).read_bytes() == (ROOT / "data_cards" / "scenes.md").read_bytes()
    assert "--max_images" in environment.run("python", "-m", "koclip.recipes.index", "--help")


TINY = [
    *("--train.num_steps", "4", "--optim.warmup_steps", "1", "--train.batch_size", "8", "--train.tracker", "none"),
    *("--model.image_layers", "1", "--model.text_layers", "1", "--data.num_workers", "0"),
    *("--tokenizer.train_captions", "500", "--tokenizer.vocab_size", "600"),
    *("--eval.sets", "[{source: {scenes_part: test, scenes_size: 20}}]"),
]
EMBED = """
import koclip
from PIL import Image
encoder = koclip.load("model")
print(*encoder.encode_texts(["빨간 원"]).shape, *encoder.encode_images([Image.new("RGB", (50, 40))]).shape)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_empty_environment_trains_and_publishes_and_a_bare_one_embeds(wheel, tmp_path):
    """Install from the package registry: first without extras, then with `all`; no file of the checkout is used."""
    environment = Environment(tmp_path)
    install = ["pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    model = write_source(environment.folder / "model")
    assert model.is_dir()
    environment.run(*install, str(wheel))
    assert environment.run("python", "-c", EMBED).split()[0] == "1"
    for command in (["koclip", "pretrain"], ["python", "-c", "import koclip.training.loop"]):
        error = environment.run(*command, code=2 if command[0] == "koclip" else 1)
        assert "'koclip[train]'" in error.splitlines()[-1]
    environment.run("koclip", "ls")

    environment.run(*install, f"{wheel}[all]")
    environment.run("koclip", "pretrain", "--config", "pretrain/scenes", *TINY, "--output_dir", "runs/a")
    launch = ["launch", "--num_processes", "1", "-m", "koclip.recipes.pretrain"]
    environment.run("accelerate", *launch, *TINY, "--output_dir", "runs/b")
    facts = json.loads((environment.folder / "runs/a/environment.json").read_text(encoding="utf-8"))
    assert facts["commit"] is None
    for name in ("a", "b"):
        assert (environment.folder / "runs" / name / "model" / "model.safetensors").is_file()
    printed = environment.run("koclip", "publish", "--model", "runs/a/model", "--repo_id", "org/a", "--dry_run")
    assert "Nothing was pushed" in printed
    environment.run("koclip", "evaluate", "--model", "runs/a/model", "--output_dir", "runs/measured", *SMALL_SET)
    environment.run("koclip", "index", "--model", "model", "--images", "scenes", "--output_dir", "index", *FEW)
    for name in cli.RECIPES:
        environment.run("koclip", name, "--help")


SMALL_SET = ["--sets", "[{source: {path: scenes, scenes_part: test, scenes_size: 20}}]"]
FEW = ["--max_images", "20"]
