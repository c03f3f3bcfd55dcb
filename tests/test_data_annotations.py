"""COCO, Karpathy, Flickr8k, Flickr30k, a JSON file per picture: every caption and every picture is a row, or listed."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_curation import encoded as jpeg
from test_curation import picture
from test_curation import settings as curation

from koclip.config import DataConfig, EvalSetConfig, SourceConfig
from koclip.curation import report
from koclip.curation.pipeline import curate
from koclip.data.formats.files import SourceError
from koclip.data.loader import training_captions
from koclip.data.sources import StreamSource, open_source
from koclip.evaluation.sets import open_set

FORMS = ("NFC", "NFD")
NAMES = ("a.png", "나.png", "d#1.png")
CAPTIONS = (["개 한 마리", "강아지, 공"], ["새", "  ", "참새"], ["바다"])
EXPECTED = {
    "a.png": ["개 한 마리", "강아지, 공"],
    "나.png": ["새", "", "참새"],
    "d#1.png": ["바다"],
}


def write_pictures(folder: Path, names: Any = NAMES, form: Literal["NFC", "NFD"] = "NFC") -> None:
    for number, name in enumerate(names):
        path = folder / unicodedata.normalize(form, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture(number)))


def write_json(path: Path, data: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), **{"encoding": "utf-8", **options})
    return path


def coco_document() -> dict[str, Any]:
    """Return COCO's captions_*.json; the captions of the images follow one another in turns, as in COCO."""
    images = [{"id": 7 + n, "file_name": name, "license": n % 2} for n, name in enumerate(NAMES)]
    pairs = [(place, 7 + n, texts[place]) for n, texts in enumerate(CAPTIONS) for place in range(len(texts))]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (_, image, text) in enumerate(sorted(pairs))]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations}


def karpathy_document(splits: tuple[str, ...] = ("train",) * 3) -> dict[str, Any]:
    images = [
        {
            "filename": name,
            "imgid": n,
            "split": split,
            "sentences": [{"raw": text, "tokens": text.split(), "sentid": n} for text in texts],
        }
        for n, (name, texts, split) in enumerate(zip(NAMES, CAPTIONS, splits, strict=True))
    ]
    return {"dataset": "coco", "images": images}


def coco(folder: Path) -> SourceConfig:
    return config(write_json(folder / "annotations" / "captions.json", coco_document()), "coco")


def karpathy(folder: Path) -> SourceConfig:
    return config(write_json(folder / "annotations" / "dataset.json", karpathy_document()), "karpathy")


def token_file(folder: Path) -> SourceConfig:
    pairs = zip(NAMES, CAPTIONS, strict=True)
    lines = [f"{name}#{n}\t{text}\r\n" for name, texts in pairs for n, text in enumerate(texts)]
    (folder / "results_20130124.token").write_text("".join(lines), encoding="utf-8", newline="")
    return config(folder / "results_20130124.token", "auto")


def caption_file(folder: Path) -> SourceConfig:
    lines = ["image,caption", *(f'{name},"{text}"' for name, own in zip(NAMES, CAPTIONS, strict=True) for text in own)]
    (folder / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    return config(folder / "captions.txt", "flickr")


def json_per_image(folder: Path) -> SourceConfig:
    """Write the layout of AI-Hub's set 71454: pictures in one tree, JSON files with numbered captions in another."""
    for name, texts in zip(NAMES, CAPTIONS, strict=True):
        context = {f"caption_ko_{n + 1}": text for n, text in enumerate(texts)}
        path = folder / "labels" / "TL" / f"{name.removesuffix('.png')}.json"
        write_json(path, {"context": {**context, "caption_en_1": "x"}}, encoding="utf-8-sig")
    labels = str(folder / "labels")
    columns = {"ko": "context.caption_ko_*"}
    return SourceConfig(path=labels, format="json_per_image", captions=columns, image_root=str(folder / "pictures"))


def config(path: Path, kind: str, **options: Any) -> SourceConfig:
    root = str(path.parents[path.parent.name == "annotations"] / "pictures")
    return SourceConfig(
        **{"path": str(path), "format": kind, "captions": {"ko": "captions"}, "image_root": root, **options}
    )


WRITERS = [coco, karpathy, token_file, caption_file, json_per_image]


def changed(source: SourceConfig, **options: Any) -> SourceConfig:
    return replace(source, **options)


def read(source: SourceConfig) -> dict[str, list[str]]:
    """Return the captions by the name of the picture."""
    rows: list[Any] = list(open_source(source).iter_rows())
    assert len({row.key for row in rows}) == len(rows)
    return {unicodedata.normalize("NFC", Path(row.image).name): row.captions.get("ko", []) for row in rows if row.image}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_gives_the_same_rows(tmp_path, write, form, streaming):
    """Korean names of pictures are found in both Unicode forms."""
    write_pictures(tmp_path / "pictures" / "TS", form=form)
    source = changed(write(tmp_path), streaming=streaming)
    if write is not json_per_image:
        source = changed(source, image_root=f"{source.image_root}/TS")
    assert isinstance(open_source(source), StreamSource) == streaming
    assert read(source) == EXPECTED
    images: list[Any] = [row.image for row in open_source(source).iter_rows()]
    assert all(Path(image).is_file() for image in images)


@pytest.mark.parametrize("write", WRITERS)
def test_training_evaluation_and_curation_read_it_and_list_what_is_missing(tmp_path, write):
    write_pictures(tmp_path / "pictures", NAMES[1:])
    source = write(tmp_path)
    texts = [text for text in training_captions(DataConfig(sources=[source])) if text]
    assert sorted(texts) == sorted(text for own in EXPECTED.values() for text in own if text)
    eval_set = open_set(EvalSetConfig(source=source, max_skipped_fraction=0.4))
    assert (eval_set.num_rows, len(eval_set.images), len(eval_set.skipped)) == (3, 2, 1)
    assert "FileNotFoundError" in eval_set.skipped[0].reason
    content = curate(curation(source, tmp_path / "clean"))
    assert content["rows"]["dropped"]["broken picture"] == 1
    dropped = (tmp_path / "clean" / report.DROPPED).read_text(encoding="utf-8")
    assert "FileNotFoundError" in dropped


@pytest.mark.parametrize("write", WRITERS)
def test_a_wrong_folder_of_pictures_is_refused_at_once(tmp_path, write):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="image_root"):
        open_source(changed(write(tmp_path), image_root=str(tmp_path / "empty")))


def test_captions_without_a_listed_image_and_images_without_captions_are_rows(tmp_path):
    write_pictures(tmp_path / "pictures")
    document = coco_document()
    document["images"].append({"id": 90, "file_name": "a.png"})
    document["annotations"].append({"id": 55, "image_id": 91, "caption": "주인 없는 캡션"})
    source = config(write_json(tmp_path / "captions.json", document), "coco")
    rows = list(open_source(source).iter_rows())
    assert [bool(row.image) for row in rows] == [True] * 4 + [False]
    assert rows[3].captions == {}
    assert rows[4].captions == {"ko": ["주인 없는 캡션"]}
    assert "55" in rows[4].key
    assert "91" in rows[4].key
    skipped = open_set(EvalSetConfig(source=source, max_skipped_fraction=0.5)).skipped
    assert [(skip.key, skip.reason) for skip in skipped] == [
        (rows[3].key, "no usable caption"),
        (rows[4].key, "no image"),
    ]


def test_fields_of_a_record_select_rows(tmp_path):
    write_pictures(tmp_path / "pictures")
    assert list(read(changed(coco(tmp_path), where={"license": ["1"]}))) == ["나.png"]


def test_the_split_of_karpathys_file_is_chosen_by_name(tmp_path):
    write_pictures(tmp_path / "pictures")
    source = config(write_json(tmp_path / "dataset.json", karpathy_document(("train", "test", "restval"))), "karpathy")
    cases = {
        "train": ["a.png"],
        "test": ["나.png"],
        "restval": ["d#1.png"],
        "all": list(NAMES),
        "all[1:]": list(NAMES[1:]),
    }
    assert {split: list(read(changed(source, split=split))) for split in cases} == cases
    chosen = changed(source, split="all", where={"split": ["train", "restval"]})
    assert list(read(chosen)) == ["a.png", "d#1.png"]
    with pytest.raises(SourceError, match="restval"):
        open_source(changed(source, split="val"))


def test_the_split_of_flickr8k_is_a_list_of_names_next_to_it(tmp_path):
    write_pictures(tmp_path / "pictures")
    source = token_file(tmp_path)
    with pytest.raises(SourceError, match="no split 'test'"):
        open_source(changed(source, split="test"))
    lists = {"train": NAMES[1:], "dev": NAMES[:1], "test": [NAMES[2], "none.png"]}
    for split, names in lists.items():
        text = "\n".join(unicodedata.normalize("NFD", name) for name in names)
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text(text, encoding="utf-8")
    assert list(read(source)) == list(NAMES[1:])
    assert list(read(changed(source, split="val"))) == list(read(changed(source, split="dev"))) == [NAMES[0]]
    assert read(changed(source, split="test")) == {"d#1.png": ["바다"], "none.png": []}
    assert list(read(changed(source, split="all"))) == list(NAMES)


def broken_coco(change: Any) -> Any:
    def write(folder: Path) -> SourceConfig:
        change(document := coco_document())
        return config(write_json(folder / "captions.json", document), "coco")

    return write


def text_in(name: str, text: str, kind: str) -> Any:
    def write(folder: Path) -> SourceConfig:
        (folder / name).write_text(text, encoding="utf-8")
        return config(folder / name, kind)

    return write


def in_two_splits(folder: Path) -> SourceConfig:
    document = karpathy_document()
    document["images"].append({**document["images"][0], "split": "test"})
    return config(write_json(folder / "dataset.json", document), "karpathy")


def broken_labels(folder: Path) -> SourceConfig:
    source = json_per_image(folder)
    (folder / "labels" / "x.json").write_text('{"context": ', encoding="utf-8")
    (folder / "labels" / "y.json").write_text("[1]", encoding="utf-8")
    return source


def equal_names(folder: Path) -> SourceConfig:
    write_pictures(folder / "pictures" / "other", NAMES[:1])
    return json_per_image(folder)


def wrong_column(folder: Path) -> SourceConfig:
    return changed(json_per_image(folder), captions={"ko": "context.korean_*"})


BROKEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cut": (text_in("c.json", json.dumps(coco_document())[:-20], "coco"), ("c.json", "not JSON")),
    "empty": (text_in("c.json", "", "karpathy"), ("c.json", "not JSON")),
    "not an object": (text_in("c.json", "[]", "coco"), ("c.json", "'images'")),
    "no images": (broken_coco(lambda data: data.pop("images")), ("'images'",)),
    "images by name": (broken_coco(lambda data: data.update(images={"a": 1})), ("'images'",)),
    "no annotations": (broken_coco(lambda data: data.pop("annotations")), ("'annotations'",)),
    "instances": (broken_coco(lambda data: data["annotations"][1].pop("caption")), ("annotations[1]", "'caption'")),
    "no name": (broken_coco(lambda data: data["images"][2].pop("file_name")), ("images[2]", "'file_name'")),
    "number as caption": (broken_coco(lambda data: data["annotations"][0].update(caption=3)), ("annotations[0]",)),
    "an id twice": (broken_coco(lambda data: data["images"][1].update(id=7)), ("images[1]", "same id 7", "a.png")),
    "ids as text": (broken_coco(lambda data: data["images"][0].update(id="7")), ("images[0]", "'id'")),
    "karpathy as coco": (lambda folder: changed(karpathy(folder), format="coco"), ("images[0]", "'file_name'")),
    "coco as karpathy": (lambda folder: changed(coco(folder), format="karpathy"), ("images[0]", "'split'")),
    "two splits": (in_two_splits, ("a.png", "train", "test")),
    "no tab": (text_in("a.token", "a.png#0\t개\na.png#1 새\n", "flickr"), ("a.token", "line 2")),
    "no number": (text_in("a.token", "a.png#0\t개\na.png\t새\n", "flickr"), ("a.token", "line 2")),
    "another table": (text_in("captions.txt", "file,text\na.png,개\n", "flickr"), ("line 1", "file,text")),
    "a comma too many": (text_in("captions.txt", "image,caption\na.png,개, 새\n", "flickr"), ("line 2", "3 fields")),
    "labels": (broken_labels, ("2 of 5 files", "x.json", "y.json")),
    "equal names": (equal_names, ("'a'", "several pictures")),
    "no such field": (wrong_column, ("context.korean_*",)),
    "languages": (lambda folder: changed(coco(folder), captions={"ko": "a", "en": "b"}), ("captions",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_in_a_file_is_said_with_its_place(tmp_path, name):
    write_pictures(tmp_path / "pictures")
    write, expected = BROKEN[name]
    with pytest.raises(SourceError) as caught:
        open_source(write(tmp_path))
    assert [part for part in expected if part not in str(caught.value)] == []


@pytest.mark.parametrize("image", ["image.file_name", "image"])
def test_a_picture_is_named_in_its_json_file_or_has_its_name(tmp_path, image):
    write_pictures(tmp_path / "pictures", ["첫째.png", "2.png"], form="NFD")
    for stem, text in (("첫째", "가"), ("2", "나")):
        record = {"image": {"file_name": f"folder/{stem}.png"}, "annotation": {"caption": [{"korean": text}]}}
        write_json(tmp_path / "labels" / f"{stem if image == 'image' else len(stem)}.json", record)
    source = SourceConfig(
        path=str(tmp_path / "labels" / "*.json"),
        format="json_per_image",
        image=image,
        image_root=str(tmp_path),
        captions={"ko": "annotation.caption.korean"},
    )
    assert read(source) == {"첫째.png": ["가"], "2.png": ["나"]}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=3), min_size=1, max_size=4))
def test_any_captions_are_read_as_from_a_plain_table(tmp_path, texts):
    """COCO's file and Karpathy's give the captions that JSON Lines give."""
    write_pictures(tmp_path, names := [f"{n}.png" for n in range(len(texts))])
    own = list(zip(names, texts, strict=True))
    lines = [json.dumps({"image": name, "captions": captions}) for name, captions in own]
    (tmp_path / "plain.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    annotations = [{"image_id": n, "caption": text} for n, captions in enumerate(texts) for text in captions]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    write_json(tmp_path / "coco.json", {"images": images, "annotations": annotations}, errors="surrogatepass")
    records = [
        {"filename": name, "split": "train", "sentences": [{"raw": text, "tokens": [text]} for text in captions]}
        for name, captions in own
    ]
    write_json(tmp_path / "karpathy.json", {"images": records})
    plain = read(SourceConfig(path=str(tmp_path / "plain.jsonl"), captions={"ko": "captions"}))
    for kind in ("coco", "karpathy"):
        source = SourceConfig(path=str(tmp_path / f"{kind}.json"), format=kind, captions={"ko": "captions"})
        assert read(source) == plain
