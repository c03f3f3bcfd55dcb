"""XTD10: 1,000 photos of COCO with a Korean caption each, from Adobe's repository and COCO's server."""

from collections.abc import Iterator
from pathlib import Path

from koclip.config import RunError
from koclip.data_sets.data_set import IMAGE, TEXT, DataSet, Row, count, write_table
from koclip.data_sets.downloads import Download, fetch, fetch_all

ROWS = 1_000
_COMMIT = "f2ce7e3b87f871c655a49542ea59ccf4c065089e"
_REPOSITORY = f"https://raw.githubusercontent.com/adobe-research/Cross-lingual-Test-Dataset-XTD10/{_COMMIT}"
# No checksum of these is published: the commit fixes the texts, and the first download is recorded.
_TEXTS = {
    name: Download(Path(path).name, f"{_REPOSITORY}/{path}", 10**6)
    for name, path in {
        "names": "XTD10/test_image_names.txt",
        "ko": "XTD10/test_1kcaptions_ko.txt",
        "en": "MIC/test_1kcaptions_en.txt",
        "licence": "LICENSE.md",
    }.items()
}
_PHOTOS = "http://images.cocodataset.org"  # its host has no certificate of its own
_PHOTO_BYTES = 10**7

TERMS = """\
XTD10 (Aggarwal and Kale 2020): https://github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10.
Korean captions: Adobe Research License, noncommercial research only; its text, LICENSE-captions.md, has to travel with
them. English captions: MIC (Rajendran et al., arXiv 1510.03519), no licence stated.
Photos: MS-COCO 2014, https://cocodataset.org. Their rights stay with the Flickr users; research use only.
800 of the photos are COCO's train2014 and 200 its val2014: no test of a model that was trained on COCO.
"""


def build(folder: Path, target: Path) -> None:
    """Write test.parquet, and the licence that has to be passed on."""
    texts = {name: fetch(download, folder).read_text(encoding="utf-8") for name, download in _TEXTS.items()}
    names = texts["names"].splitlines()
    if any(Path(name).name != name or not name.startswith("COCO_") for name in names):
        raise RunError(f"{_TEXTS['names'].url}: expected names such as COCO_val2014_000000000042.jpg in every line")
    photos = [Download(name, f"{_PHOTOS}/{name.split('_')[1]}/{name}", _PHOTO_BYTES) for name in names]
    files = fetch_all(photos, folder, "photos of COCO")
    rows = _rows(files, texts["ko"].splitlines(), texts["en"].splitlines())
    columns = {"image": IMAGE, "image_name": TEXT, "ko": TEXT, "en": TEXT}
    write_table(target / "test.parquet", count(rows, ROWS, "XTD10"), columns)
    (target / "LICENSE-captions.md").write_text(texts["licence"], encoding="utf-8")


def _rows(files: list[Path], ko: list[str], en: list[str]) -> Iterator[Row]:
    if not len(files) == len(ko) == len(en):
        raise RunError(
            f"XTD10: got {len(files)} photos, {len(ko)} Korean and {len(en)} English captions, expected as many"
        )
    for file, korean, english in zip(files, ko, en, strict=True):
        image = {"bytes": file.read_bytes(), "path": file.name}
        yield {"image": image, "image_name": file.name, "ko": korean, "en": english}


DATA_SET = DataSet(
    name="xtd10",
    summary="1,000 photos of COCO, one Korean caption and its English original each; to test on",
    size="downloads about 170 MB in 1,000 files, writes as much",
    licence="noncommercial research only",
    home="https://github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10 and https://cocodataset.org",
    terms=TERMS,
    research_only=True,
    build=build,
)
