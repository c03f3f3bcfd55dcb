"""koclip publish --data: a set of `koclip curate` becomes a data set on the Hub, without its dropped rows."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import HubServer
from test_curation import contents, encoded, picture, settings, write_rows

from koclip.config import (
    BalanceRules,
    CardRules,
    ConfigError,
    CurateConfig,
    PairRules,
    PublishConfig,
    SourceConfig,
    parse,
)
from koclip.curation import report
from koclip.curation.pipeline import curate
from koclip.curation.report import page
from koclip.licences import front_matter
from koclip.publishing import data_set
from koclip.publishing.checks import publishable

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "writes" * 6
NUM_ROWS, DROPPED, SEEN = 30, 4, 5  # rows; the row with a dropped caption; the row whose caption loses a phone number
SECRET = "a dog runs over the grass"
STRANGER = """
import datasets, sys
pairs = datasets.load_dataset("org/set", split="train")
print(*pairs.column_names, len(pairs), pairs[0]["image"].size, *pairs[0]["captions_ko"])
assert "koclip" not in sys.modules
from koclip.config import SourceConfig
from koclip.data.sources import open_source
rows = [list(open_source(SourceConfig(path=path)).iter_rows()) for path in ("org/set", sys.argv[1])]
facts = [[(row.captions, row.image) for row in own] for own in rows]
assert facts[0] == facts[1] and facts[0][0][0]["ko"] == pairs[0]["captions_ko"], facts[0][0]
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    captions = [f"바닷가를 걷는 사람 {number}명" for number in range(NUM_ROWS)]
    captions[DROPPED] = SECRET
    captions[SEEN] += " 문의 010-1234-5678"
    pictures = [encoded(picture(number)) for number in range(NUM_ROWS)]
    return write_rows(tmp_path_factory.mktemp("raw") / "raw.parquet", captions, pictures)


@pytest.fixture(scope="module")
def original(raw: SourceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "clean"
    curate(settings(raw, folder, shard_size=20, card=CardRules(licenses={"raw": "cc-by-sa-4.0"})))
    return folder


@pytest.fixture
def clean(original: Path, tmp_path: Path) -> Path:
    """Return a copy of a curated set of two shards."""
    (tmp_path / "clean").mkdir()
    for file in original.iterdir():
        (tmp_path / "clean" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "clean"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer({TOKEN: "write"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def publish() -> Callable[..., None]:
    main = runpy.run_path(str(ROOT / "recipes" / "publish.py"))["main"]
    return lambda folder, **options: main(PublishConfig(data=str(folder), repo_id="org/set", **options))


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def test_a_set_goes_up_in_one_commit_and_comes_down(hub, clean, publish, capsys, tmp_path):
    before = contents(clean)
    publish(clean, tag="v1")
    repo = hub.repos["datasets/org/set"]
    assert len(repo.commits) == 2  # the Hub's own and ours
    assert repo.tags == {"v1": repo.commits[-1]}
    files = repo.files
    written = {"README.md", "report.json", "report.html", "config.yaml"}
    assert set(files) == {*parts(clean), "waterfall.png", "lengths.png", *written}
    assert {name: files[name] for name in set(files) - written} == {name: before[name] for name in set(files) - written}
    publish(clean, tag="v1")
    assert "nothing new, tagged v1" in capsys.readouterr().out
    assert len(repo.commits) == 2
    assert contents(clean) == before
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", STRANGER, f"{clean}/*.parquet"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [
        *("id", "image", "captions_en", "captions_ko", str(NUM_ROWS - 1)),
        *("(48,", "40)", "바닷가를", "걷는", "사람", "0명"),
    ]


def test_a_changed_set_replaces_its_shards_and_moves_no_tag(hub, clean, publish, raw, tmp_path):
    publish(clean, tag="v1")
    repo = hub.repos["datasets/org/set"]
    foreign = {"notes.txt": (b"x", False), "old.parquet": (b"x", False)}
    repo.commit(repo.trees[repo.commits[-1]] | foreign)
    curate(settings(raw, tmp_path / "new", shard_size=64, card=CardRules(licenses={"raw": "cc-by-4.0"})))
    with pytest.raises(ConfigError, match="tag: got 'v1'"):
        publish(tmp_path / "new", tag="v1")
    publish(tmp_path / "new", tag="v2")
    assert [name for name in repo.files if name.endswith(".parquet")] == parts(tmp_path / "new")
    assert "notes.txt" in repo.files
    assert set(repo.tags) == {"v1", "v2"}


def test_a_dry_run_lists_what_would_go_up_and_writes_nothing(hub, clean, publish, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    before = contents(clean) | {"config.yaml": (clean / "config.yaml").read_bytes()}
    publish(clean, dry_run=True)
    printed = capsys.readouterr().out
    for name in (*parts(clean), "README.md", "report.html", "config.yaml"):
        assert name in printed
    assert report.DROPPED not in printed
    assert not hub.calls
    assert contents(clean) | {"config.yaml": (clean / "config.yaml").read_bytes()} == before


def staged(data: data_set.Curated, folder: Path) -> dict[str, str]:
    """Return the texts that go up, by file."""
    folder.mkdir()
    names = data_set.stage(data, folder, "org/set")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names if not name.endswith((".png", "quet"))}


def test_dropped_rows_and_places_of_this_machine_stay_here(clean, tmp_path):
    data = data_set.read(clean, {}, None)
    place = str(tmp_path / "secret_folder" / "scorer")
    content = data.content | {"scores": {"model": place, "scored": 1, "without_score": 0}}
    content["clusters"] = {
        "number": 1,
        "sizes": {"3": 1},
        "largest": [{"pictures": 3, "kept": "raw/1", "rows_dropped": 2, "dropped": ["raw/secret_key", "raw/3"]}],
    }
    pairs, balance = PairRules(model=place, drop_share=0.1), BalanceRules(corpus=[f"{place}.txt"])
    config = replace(data.config, pairs=pairs, balance=balance)
    texts = staged(data._replace(content=content, config=config), tmp_path / "staged")
    assert SECRET in (clean / page.FILE).read_text(encoding="utf-8")
    for name, text in texts.items():
        for secret in (SECRET, "secret", str(tmp_path), "raw.parquet", "raw/1"):
            assert secret not in text, (name, secret)
    assert yaml.safe_load(texts["config.yaml"])["pairs"]["model"] == "scorer"
    assert json.loads(texts["report.json"])["rows"] == content["rows"]


def test_the_card_is_that_of_the_hub_and_its_rules_can_be_used_again(clean, tmp_path, raw):
    texts = staged(data_set.read(clean, {}, None), tmp_path / "staged")
    metadata, text = front_matter(tmp_path / "staged" / "README.md")
    assert metadata["license"] == "cc-by-sa-4.0"
    assert metadata["configs"] == [{"config_name": "default", "data_files": "*.parquet"}]
    assert 'load_dataset("org/set", split="train")' in text
    assert '--data.sources "[{path: org/set}]"' in text
    assert report.DROPPED not in text
    assert texts["config.yaml"]
    given = parse(
        CurateConfig, ["--config", str(tmp_path / "staged" / "config.yaml"), "--sources", f"[{{path: {raw.path}}}]"]
    )
    first = settings(raw, clean)
    assert (given.captions, given.pictures, given.duplicates) == (first.captions, first.pictures, first.duplicates)


def failed(folder: Path, tmp_path: Path, **licenses: str) -> dict[str, list[str]]:
    """Return the problems of each check that fails."""
    (tmp_path / "staged").mkdir()
    data = data_set.read(folder, licenses, None)
    files = data_set.stage(data, tmp_path / "staged", "org/set")
    checks = data_set.check_data(data, tmp_path / "staged", files, "org/set")
    return {check.name: check.problems for check in checks if check.problems}


def change_rows(folder: Path, column: str, value: Any) -> None:
    """Give the first row of the first shard another value; a new column if there is none of that name."""
    file = folder / parts(folder)[0]
    table = pq.read_table(file)
    values = table[column].to_pylist() if column in table.column_names else [None] * table.num_rows
    values[0] = value
    kept = table.drop([column]) if column in table.column_names else table
    pq.write_table(kept.append_column(column, pa.array(values)), file)


def change_report(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / report.FILE).read_text(encoding="utf-8"))
    change(content)
    (folder / report.FILE).write_text(json.dumps(content), encoding="utf-8")


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nothing": ("", lambda folder: None),
    "hidden file": ("", lambda folder: (folder / ".hidden").write_text("x")),
    "another file": ("no foreign files", lambda folder: (folder / "notes.txt").write_text("x")),
    "another table": ("no foreign files", lambda folder: (folder / "raw.parquet").write_text("x")),
    "lost shard": ("shards are the report's", lambda folder: (folder / parts(folder)[0]).unlink()),
    "cut shard": ("shards are the report's", lambda folder: os.truncate(folder / parts(folder)[0], 200)),
    "another column": ("shards are the report's", lambda folder: change_rows(folder, "phone", "x")),
    "lost picture": ("card is complete", lambda folder: (folder / "waterfall.png").unlink()),
    "phone": (
        "no personal data in captions",
        lambda folder: change_rows(folder, "captions_ko", ["문의 010-1234-5678"]),
    ),
    "path": ("no private paths or names", lambda folder: change_rows(folder, "id", "/home/someone/a.jpg")),
    "path of a source": (
        "no private paths or names",
        lambda folder: change_report(folder, lambda content: content["sources"][0].update(origin="/home/someone/a")),
    ),
    "token": (
        "no token",
        lambda folder: change_report(folder, lambda content: content["sources"][0].update(origin="hf_" + "a" * 30)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_pre_flight_finds(fault, clean, tmp_path):
    name, plant = FAULTS[fault]
    plant(clean)
    assert set(failed(clean, tmp_path)) == ({name} if name else set())


@pytest.mark.parametrize(("name", "limit"), [("MAX_BYTES", 5_000), ("MAX_FILES", 3)])
def test_sizes_are_bounded(name, limit, clean, tmp_path, monkeypatch):
    monkeypatch.setattr(data_set, name, limit)
    assert set(failed(clean, tmp_path)) == {"files have the Hub's sizes"}


@pytest.mark.parametrize(
    ("licence", "fails"),
    [("cc-by-4.0", False), ("cc-by-nc-4.0", False), ("our own terms", False), ("unstated", True), ("none", True)],
)
def test_a_licence_may_be_named_later_and_must_be_named(licence, fails, clean, tmp_path):
    problems = failed(clean, tmp_path, raw=licence)
    assert ("licence allows to pass it on" in problems) == fails
    metadata, _ = front_matter(tmp_path / "staged" / "README.md")
    assert (metadata["license"] == "other") == ((tmp_path / "staged" / "LICENSE.md").exists())


def test_a_source_that_may_not_be_passed_on_is_refused(clean, tmp_path):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "raw.md").write_text(
        "---\nid: raw\nsource: example.com\nlicenses:\n  - {part: photos, id: other, source: its page, words: for "
        "research, redistribution: false}\nlanguages: [ko]\nrows: {train: 9}\n---\n**Limits.** Few.\n\n**Harms.** "
        "None known.\n",
        encoding="utf-8",
    )
    given = (clean / "config.yaml").read_text(encoding="utf-8")
    (clean / "config.yaml").write_text(given.replace("  licenses:\n    raw: cc-by-sa-4.0\n", ""), encoding="utf-8")
    data = data_set.read(clean, {}, str(tmp_path / "cards"))
    assert "photos" in data_set._terms_problems(data)[0]


def test_the_wrong_directory_is_named(clean, tmp_path, publish):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    for folder in (model, model.parent):
        with pytest.raises(ConfigError, match=r"data: got .*published with --model"):
            publish(folder)
    with pytest.raises(ConfigError, match=r"data: got .*koclip curate wrote"):
        publish(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"model: got .*published with --data"):
        publishable(clean)
    with pytest.raises(ConfigError, match="licenses: got"):
        publish(clean, dry_run=True, licenses={"other": "mit"})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "model"),
        ({"model": "a", "data": "b"}, "data"),
        ({"data": "b", "onnx": "fp32"}, r"data: got \['onnx'\]"),
        ({"data": "b", "clip": "org/a", "space": "org/b"}, r"data: got \['clip', 'space'\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, key):
    with pytest.raises(ConfigError, match=key):
        PublishConfig(repo_id="org/set", **options)
