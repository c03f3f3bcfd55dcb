"""Write the same three rows in every form that a source can have."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from koclip.config import SourceConfig
from koclip.data.sources import Row, Source
from koclip.data.transforms import decode

COLOURS = {"빨강": (250, 10, 10), "초록": (10, 250, 10), "파랑": (10, 10, 250)}
EXPECTED = [
    (colour, {"ko": [name, f"{name} 사진"], "en": [f"number {n}"]}) for n, (name, colour) in enumerate(COLOURS.items())
]
CAPTIONS = {"ko": "captions_ko", "en": "caption_en"}
# A new format: a file of koclip/data/formats.
TOY_FORMAT = '''"""Rows as `<image file>|<caption>`, one on each line."""

from koclip.data.formats import Format
from koclip.data.formats.files import files_of
from koclip.data.formats.text_files import open_records


def _records(file, task):
    for line in open(file, encoding="utf-8"):
        image, caption = line.rstrip("\\n").split("|")
        yield {"image": image, "text": caption}


def _open(config, seed):
    files = files_of(config, "toy")
    return open_records(config, _records, files, [""] * len(files))


FORMATS = {"toy": Format(_open, (".toy",))}
'''
Records = list[dict[str, object]]


def write_images(folder: Path, records: Records) -> Records:
    """Write the images to files and return records that name them."""
    folder.mkdir(exist_ok=True)
    for number, record in enumerate(records):
        (folder / f"{number}.png").write_bytes(record["image"])
    return [{**record, "image": f"{folder.name}/{number}.png"} for number, record in enumerate(records)]


def write_tar(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples, start=first):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def features() -> datasets.Features:
    text = datasets.Value("string")
    return datasets.Features({"image": datasets.Image(), "captions_ko": datasets.List(text), "caption_en": text})


def parquet(folder: Path, records: Records) -> SourceConfig:
    datasets.Dataset.from_list(records, features=features()).to_parquet(folder / "rows.parquet")
    return SourceConfig(path=str(folder / "rows.parquet"), captions=CAPTIONS)


def parquet_of_bytes(folder: Path, records: Records) -> SourceConfig:
    pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
    return SourceConfig(path=str(folder / "rows.parquet"), captions=CAPTIONS)


def parquet_of_paths(folder: Path, records: Records) -> SourceConfig:
    pq.write_table(pa.Table.from_pylist(write_images(folder / "pictures", records)), folder / "rows.parquet")
    return SourceConfig(path=str(folder / "rows.parquet"), captions=CAPTIONS)


def nested_parquet(folder: Path, records: Records) -> SourceConfig:
    nested = [
        {"sample": {"image": r["image"], "told": [{"ko": t} for t in r["captions_ko"]]}, "en": r["caption_en"]}
        for r in records
    ]
    captions = datasets.List({"ko": datasets.Value("string")})
    shape = datasets.Features({"sample": {"image": datasets.Image(), "told": captions}, "en": datasets.Value("string")})
    datasets.Dataset.from_list(nested, features=shape).to_parquet(folder / "rows.parquet")
    return SourceConfig(
        path=str(folder / "rows.parquet"), image="sample.image", captions={"ko": "sample.told.ko", "en": "en"}
    )


def arrow(folder: Path, records: Records) -> SourceConfig:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return SourceConfig(path=str(folder / "rows.arrow"), captions=CAPTIONS)


def json_array(folder: Path, records: Records) -> SourceConfig:
    rows = write_images(folder / "pictures", records)
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return SourceConfig(path=str(folder / "rows.json"), captions=CAPTIONS)


def json_lines(folder: Path, records: Records) -> SourceConfig:
    lines = [json.dumps(row) for row in write_images(folder / "pictures", records)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(path=str(folder / "rows.jsonl"), captions=CAPTIONS)


def separated(folder: Path, records: Records, name: str, separator: str) -> SourceConfig:
    rows = write_images(folder / "pictures", records)
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["image", "ko", "ko2", "caption_en"])
        writer.writerows([row["image"], *row["captions_ko"], row["caption_en"]] for row in rows)
    return SourceConfig(path=str(folder / name), captions={"ko": "ko", "en": "caption_en"})


def csv_file(folder: Path, records: Records) -> SourceConfig:
    return separated(folder, records, "rows.csv", ",")


def tsv_file(folder: Path, records: Records) -> SourceConfig:
    return separated(folder, records, "rows.tsv", "\t")


def image_folder(folder: Path, records: Records) -> SourceConfig:
    rows = write_images(folder / "train", records)
    lines = [json.dumps({"file_name": Path(row.pop("image")).name, **row}) for row in rows]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(path=str(folder), captions=CAPTIONS)


def webdataset(folder: Path, records: Records) -> SourceConfig:
    for number, record in enumerate(records):
        text = json.dumps({"ko": record["captions_ko"], "other": None}).encode()
        sample = {"png": record["image"], "json": text, "txt": record["caption_en"].encode()}
        write_tar(folder / f"shard-{number:03d}.tar", [sample], first=number)
    return SourceConfig(path=str(folder / "shard-*.tar"), image="png", captions={"ko": "json.ko", "en": "txt"})


def annotations(folder: Path, records: Records) -> SourceConfig:
    rows = [
        {"file_path": row["image"], "captions": row["captions_ko"]}
        for row in write_images(folder / "pictures", records)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return SourceConfig(path=str(folder / "rows.json"), format="annotations")


def hub(folder: Path, records: Records) -> SourceConfig:
    (folder / "data").mkdir()
    datasets.Dataset.from_list(records, features=features()).to_parquet(
        folder / "data" / "train-00000-of-00001.parquet"
    )
    return SourceConfig(path=str(folder), format="hub", captions=CAPTIONS)


WRITERS = [
    *(parquet, parquet_of_bytes, parquet_of_paths, nested_parquet, arrow, json_array, json_lines, csv_file, tsv_file),
    *(image_folder, webdataset, annotations, hub),
]


def all_rows(source: Source) -> list[Row]:
    return list(source.iter_rows())


def colour(row: Row) -> tuple[int, ...]:
    return tuple(decode(row.image, 10_000)[:, 0, 0].tolist())
