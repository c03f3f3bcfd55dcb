"""`koclip curate` on Flickr8k with Korean captions, with noise of each kind planted in 5 % of the rows."""

from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from test_curation import bad_picture, reasons_by_row, settings, write_rows
from test_curation_duplicates import CHANGES

from koclip.config import SourceConfig
from koclip.curation.pipeline import curate
from koclip.data.sources import open_source
from koclip.data.transforms import decode

SHARE = 0.05
BAD_CAPTIONS = {"HTML": "<p>{}</p>", "URL": "{} https://example.com/a", "file name": "DSC_0012.JPG"}
BAD_PICTURES = ("broken picture", "uniform picture")


def test_planted_noise_is_dropped_for_its_reason(shared_data: Path, tmp_path: Path):
    source = open_source(SourceConfig(path=str(shared_data / "flickr8k_ko" / "val.parquet")))
    rows = list(islice(source.iter_rows(), 1_000))
    captions = [row.captions["ko"][0] for row in rows]
    pictures = [row.image for row in rows if isinstance(row.image, bytes)]
    count = round(SHARE * len(rows))
    places = iter(np.random.default_rng(0).permutation(len(rows)).tolist())
    planted: dict[str, set[int]] = {}
    for reason, text in BAD_CAPTIONS.items():
        planted[reason] = set(islice(places, count))
        for place in planted[reason]:
            captions[place] = text.format(captions[place])
    planted["other language"] = set(islice(places, count))
    for place in planted["other language"]:
        captions[place] = rows[place].captions["en"][0]
    for reason in BAD_PICTURES:
        planted[reason] = set(islice(places, count))
        for place in planted[reason]:
            pictures[place] = bad_picture(reason, place)
    copies = {}  # row of the copy: row of the picture
    for change in CHANGES.values():
        for place in islice(places, count):
            image = Image.fromarray(decode(rows[place].image, 10**8).permute(1, 2, 0).numpy())
            copies[len(pictures)] = place
            pictures.append(change(image))
            captions.append(rows[place].captions["ko"][1])
    curate(settings(write_rows(tmp_path / "raw.parquet", captions, pictures), tmp_path / "clean"))
    dropped = reasons_by_row(tmp_path / "clean")
    for reason, expected in planted.items():
        actual = {row for row, own in dropped.items() if own == reason}
        assert len(actual & expected) / len(expected) >= 0.95, reason
        assert len(actual & expected) / len(actual) >= 0.95, reason
    originals = [copies.get(row, row) for row, reason in dropped.items() if reason == "near-duplicate"]
    hits = set(copies.values()) & set(originals)
    assert len(hits) / len(copies) >= 0.95
    assert len(hits) / len(originals) >= 0.95
