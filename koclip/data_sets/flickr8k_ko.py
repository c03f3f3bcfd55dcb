"""Flickr8k with Korean captions: photos and English of Flickr8k, Korean of Kangwon National University."""

import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import datasets
from PIL import Image

from koclip.config import RunError
from koclip.data_sets.archives import member, members
from koclip.data_sets.data_set import IMAGE, TEXT, DataSet, Row, count, encoded, write_table
from koclip.data_sets.downloads import Download, fetch
from koclip.data_sets.morphemes import join

PHOTOS = {"train": 6_000, "val": 1_000}
_SPLIT_FILES = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt"}
_CAPTIONS, _SIDE, _QUALITY = 5, 128, 80  # captions per photo; pixels; of JPEG
_RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
_ARCHIVES = {
    name: Download(file, f"{_RELEASE}/{file}", size, md5=md5)
    for name, file, size, md5 in (
        ("photos", "Flickr8k_Dataset.zip", 1_200_000_000, "f18a1e2920de5bd84dae7cf08ec78978"),
        ("text", "Flickr8k_text.zip", 10_000_000, "bf6c1abcb8e4a833b7f922104de18627"),
    )
}
_COMMIT = "977b23f37497614e08c10268166574221d81af92"
_MNMT = f"https://raw.githubusercontent.com/leeck10/korean_multimodal_data/{_COMMIT}/mnmt"
_COLUMNS = {
    "image": IMAGE,
    "image_id": TEXT,
    "split": TEXT,
    "captions_ko": datasets.List(TEXT),
    "captions_en": datasets.List(TEXT),
}

TERMS = """\
Flickr8k (Hodosh, Young and Hockenmaier 2013): research and education use only. The photos belong to the users of
Flickr who took them. Through the release Flickr8k of https://github.com/jbrownlee/Datasets.
Korean captions: https://github.com/leeck10/korean_multimodal_data, folder mnmt (Kangwon National University, 2016 to
2019); no licence stated.
Do not publish photos, captions or anything made of them: no public repository, no Space, no picture of a model card.
"""


def build(folder: Path, target: Path) -> None:
    """Write train.parquet and val.parquet."""
    text = fetch(_ARCHIVES["text"], folder)
    captions = {split: _captions(split, text, folder) for split in PHOTOS}
    photos = _photos(fetch(_ARCHIVES["photos"], folder), {name for split in captions.values() for name in split})
    for split, by_photo in captions.items():
        write_table(target / f"{split}.parquet", _rows(split, by_photo, photos), _COLUMNS)


def _captions(split: str, text: Path, folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return the Korean and English captions by photo, in the order of the Korean source.

    That source names no photos. Its English lines, in small letters and without most marks, tell which photo it is:
    each group of five is the captions of one.
    """
    korean, english = (_lines(split, language, folder) for language in ("kr", "en"))
    if not len(korean) == len(english) == PHOTOS[split] * _CAPTIONS:
        raise RunError(f"{_MNMT}: {split} has {len(korean)} Korean and {len(english)} English lines, expected as many")
    by_key = {_key(texts): (name, texts) for name, texts in _english(split, text).items()}
    result = {}
    for start in range(0, len(english), _CAPTIONS):
        group = english[start : start + _CAPTIONS]
        name, texts = by_key.get(_key(group), ("", []))
        if not name:
            raise RunError(
                f"{_MNMT}: line {start + 1} of {split}.en.morp.txt begins no photo of Flickr8k: {group[0]!r}"
            )
        texts = list(texts)
        originals = [texts.pop([_letters(text) for text in texts].index(_letters(line))) for line in group]
        result[name] = ([join(line) for line in korean[start : start + _CAPTIONS]], originals)
    return result


def _lines(split: str, language: str, folder: Path) -> list[str]:
    file = f"{split}.{language}.morp.txt"
    return fetch(Download(file, f"{_MNMT}/{file}", 20_000_000), folder).read_text(encoding="utf-8").splitlines()


def _english(split: str, archive: Path) -> dict[str, list[str]]:
    """Return the five captions of each photo of a split."""
    names = member(archive, _SPLIT_FILES[split]).decode().split()
    captions: dict[str, list[str]] = {name: [] for name in names}
    for line in member(archive, "Flickr8k.token.txt").decode().splitlines():
        place, _, caption = line.partition("\t")
        name = place.rpartition("#")[0]
        if name in captions:
            captions[name].append(caption.strip())
    return captions


def _letters(caption: str) -> str:
    return "".join(re.findall(r"[a-z0-9]", caption.lower()))


def _key(captions: list[str]) -> tuple[str, ...]:
    return tuple(sorted(map(_letters, captions)))


def _photos(archive: Path, names: set[str]) -> dict[str, bytes]:
    """Return the photos by name, squashed to a square as JPEG."""
    photos = {}
    for member_name, content in members(archive, r"Flicker8k_Dataset/[^/]+\.jpg", max_bytes=2**25):
        name = Path(member_name).name
        if name in names:
            with Image.open(BytesIO(content)) as image:
                square = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            photos[name] = encoded(square, "JPEG", quality=_QUALITY)
    return photos


def _rows(split: str, captions: dict[str, tuple[list[str], list[str]]], photos: dict[str, bytes]) -> Iterator[Row]:
    rows = (
        {
            "image": {"bytes": photos[name], "path": name},
            "image_id": name,
            "split": split,
            "captions_ko": korean,
            "captions_en": english,
        }
        for name, (korean, english) in captions.items()
        if name in photos
    )
    return count(rows, PHOTOS[split], f"Flickr8k, {split}")


DATA_SET = DataSet(
    name="flickr8k_ko",
    summary="7,000 photos with five English captions each and their Korean translations by people",
    size="downloads 1.1 GB, writes 35 MB",
    licence="research and education only, no redistribution; Korean: no licence stated",
    home="https://github.com/jbrownlee/Datasets, https://github.com/leeck10/korean_multimodal_data",
    terms=TERMS,
    research_only=True,
    build=build,
)
