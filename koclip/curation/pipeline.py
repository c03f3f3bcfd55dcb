"""Run the steps over sources: check units, compare all rows, write shards. `koclip.curation` describes the stages."""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from PIL import Image
from tqdm.auto import tqdm

import koclip
from koclip import storage
from koclip.config import RunError, SourceConfig, check, dump, to_dict
from koclip.config.curation import CurateConfig
from koclip.curation import report
from koclip.curation.balance import collect_queries, decide_balance, drop_unbalanced
from koclip.curation.batch import (
    DETAIL,
    IMAGE,
    KEY,
    LOST,
    NOTES,
    REASON,
    Batch,
    batch_of,
    caption_column,
    kept_places,
)
from koclip.curation.captions import (
    check_known_languages,
    collect_captions,
    decide_repeated,
    drop_repeated,
    filter_captions,
)
from koclip.curation.duplicates import HASHES, SMALL, add_hashes, collect_pictures, decide_duplicates, drop_duplicates
from koclip.curation.engines import ENGINES, Engine, Unit, Work
from koclip.curation.overlap import collect_overlap, decide_overlap, drop_overlap
from koclip.curation.pictures import PICTURE, PIXELS, filter_pictures
from koclip.curation.report import card
from koclip.curation.scores import (
    EMBEDDING,
    SCORE,
    add_scores,
    collect_scores,
    decide_threshold,
    drop_low_scores,
    scorer,
)
from koclip.data.formats import MapSource, Row
from koclip.data.formats.files import stamp, stored_files
from koclip.data.sources import StreamSource, open_source
from koclip.data.transforms import read

ROWS = 256  # rows in memory at a time
CHECKED = "checked"  # the first stage
_FREE = ("output_dir", "engine", "num_workers", "report", "card")  # settings that the shards do not depend on
_CAPTIONS = pa.list_(pa.string())
_COLUMNS = {KEY: pa.string(), REASON: pa.string(), DETAIL: pa.string(), NOTES: _CAPTIONS, LOST: _CAPTIONS}
_COLUMNS |= {PIXELS: pa.int64(), PICTURE: pa.int64(), HASHES: pa.binary(), SMALL: pa.binary(), SCORE: pa.float32()}
_COLUMNS |= {EMBEDDING: pa.binary()}
_LOOKS = (HASHES, SMALL, EMBEDDING)  # large columns: they stay in the tables of the first stage


class GlobalStep(NamedTuple):
    """A step that compares rows: see `koclip.curation`."""

    used: Callable[[CurateConfig], bool]
    collect: Callable[[Batch, CurateConfig], Any]
    decide: Callable[[Iterator[Any], CurateConfig], Any]
    apply: Callable[[Batch, Any, CurateConfig], Batch]
    numbers: Callable[[Any], dict[str, Any]] = lambda decision: {}  # of a decision, for the report
    reads: tuple[str, ...] = ()  # columns of `_LOOKS` that `collect` reads


Item = TypeVar("Item")

# To add a step, add a line.
LOCAL: tuple[Callable[[Batch, CurateConfig], Batch], ...] = (filter_captions, filter_pictures, add_hashes, add_scores)
_OF_PICTURES = (filter_pictures, add_hashes, add_scores)  # left out for sources without pictures
GLOBAL: dict[str, GlobalStep] = {
    "repeated": GlobalStep(
        lambda config: config.captions.max_repeats > 0, collect_captions, decide_repeated, drop_repeated
    ),
    "overlap": GlobalStep(
        lambda config: bool(config.overlap.sources),
        collect_overlap,
        decide_overlap,
        drop_overlap,
        lambda decision: decision.numbers,
        (HASHES, SMALL),
    ),
    "duplicates": GlobalStep(
        lambda config: config.duplicates.enabled, collect_pictures, decide_duplicates, drop_duplicates, reads=_LOOKS
    ),
    "scores": GlobalStep(
        lambda config: config.pairs.model is not None,
        collect_scores,
        decide_threshold,
        drop_low_scores,
        lambda decision: decision.numbers,
    ),
    "balance": GlobalStep(
        lambda config: config.balance.max_per_query > 0,
        collect_queries,
        decide_balance,
        drop_unbalanced,
        lambda decision: decision.numbers,
    ),
}


def curate(config: CurateConfig, engine: Engine | None = None) -> dict[str, Any]:
    """Build the clean set in `config.output_dir`; return the content of report.json.

    `engine` replaces the engine that the settings name.

    Raises:
        ConfigError: `output_dir` holds something else, a source cannot be opened, or no row is left.
        RunError: a source changed during the run.
    """
    _opened.cache_clear()  # the files may have changed since an earlier call
    target = Path(config.output_dir)
    check_known_languages(config)
    free = not target.exists() or not any(target.iterdir()) or (target / report.FILE).is_file()
    check(free, "output_dir", config.output_dir, "expected a new directory, or one with an earlier result")
    card.origins(config)  # faults are named before the work
    work = Folder(target.with_name(f"{target.name}.partial"), _fingerprint(config))
    units = list(_units(config))
    _on_engine("check", partial(_check_unit, config=config, folder=work), units, config, engine)
    compared, numbers = _compare(config, work, units)
    _on_engine("write", partial(_write_unit, config=config, folder=work, compared=compared), units, config, engine)
    with storage.atomic(target) as partial_target:
        partial_target.mkdir()
        for unit in units:
            shard = work.shard(unit, compared)
            if shard.exists():
                shard.rename(partial_target / shard.name)
        content = report.write(partial_target, config, Rows(config, work, units, compared), _left_out(config), numbers)
        dump(config, partial_target / "config.yaml")
    shutil.rmtree(work.path)
    return content


def _on_engine(title: str, work: Work, units: Sequence[Unit], config: CurateConfig, engine: Engine | None) -> None:
    """Do the work for every unit, and show the number of finished rows."""
    sizes = [unit.stop - unit.start for unit in units if unit.stop >= 0]
    total = sum(sizes) if len(sizes) == len(units) else None  # of streams it is not known before they are read
    with tqdm(total=total, desc=title, unit=" rows") as bar:
        for num_rows in (engine or ENGINES[config.engine])(title, work, units, config.num_workers):
            bar.update(num_rows)


class Folder(NamedTuple):
    """Where the tables and shards of an unfinished run are. Their names contain the fingerprint of the run."""

    path: Path
    fingerprint: str

    def table(self, stage: str, unit: Unit) -> Path:
        """Return the path of a unit's table after a stage."""
        return self.path / stage / f"{unit.number:06d}-{self.fingerprint}.parquet"

    def load(self, stage: str, unit: Unit, looks: Sequence[str] = ()) -> Batch:
        """Return a unit's table after a stage; of the columns of `_LOOKS`, those that are named."""
        names = [name for name in pq.read_schema(self.table(stage, unit)).names if name not in _LOOKS]
        columns: Batch = pq.read_table(self.table(stage, unit), columns=names).to_pydict()
        if looks:
            columns |= pq.read_table(self.table(CHECKED, unit), columns=list(looks)).to_pydict()
        return columns

    def shard(self, unit: Unit, stage: str) -> Path:
        """Return the path of a unit's shard; its name contains a hash of the unit's table, thus of its content."""
        content = xxhash.xxh3_64_hexdigest(self.table(stage, unit).read_bytes())
        return self.path / "shards" / f"{unit.number:06d}-{content}.parquet"


class Rows(NamedTuple):
    """The rows after a stage: see `koclip.curation.batch.Rows`."""

    config: CurateConfig
    folder: Folder
    units: Sequence[Unit]
    stage: str

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield the number of the source and the table of each unit."""
        for unit in self.units:
            yield unit.source, self.folder.load(self.stage, unit)

    def batches_with(self, keys: set[str]) -> Iterator[Batch]:
        """Yield the tables of the units that have one of these keys."""
        for unit, _ in self._places(keys):
            yield self.folder.load(self.stage, unit)

    def pictures(self, keys: set[str]) -> Iterator[Row]:
        """Read the rows of these keys again; of a stream's file, all rows up to the last of them."""
        for unit, places in self._places(keys):
            source = _source(self.config, unit.source)
            if isinstance(source, StreamSource):
                for place, row in enumerate(islice(source.rows_of_shard(unit.start), places[-1] + 1)):
                    if place in places:
                        yield row
            else:
                yield from source.rows([unit.start + place for place in places])

    def _places(self, keys: set[str]) -> Iterator[tuple[Unit, list[int]]]:
        """Yield the units that have one of these keys, with the places of the rows."""
        for unit in self.units:
            own = pq.read_table(self.folder.table(self.stage, unit), columns=[KEY])[KEY].to_pylist()
            if places := [place for place, key in enumerate(own) if key in keys]:
                yield unit, places


def _fingerprint(config: CurateConfig) -> str:
    """Return a hash of what the tables depend on: the settings, koclip's version and the files of the sources."""
    settings = {name: value for name, value in to_dict(config).items() if name not in _FREE}
    sources = [*config.sources, *config.overlap.sources]
    files = [[str(file), stamp(file)] for source in sources for file in stored_files(source)]
    facts = [settings, koclip.__version__, files, scorer(config)]
    return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _units(config: CurateConfig) -> Iterator[Unit]:
    number = 0
    for place in range(len(config.sources)):
        source = _source(config, place)
        if isinstance(source, StreamSource):
            ranges = [(shard, -1) for shard in range(source.num_shards)]
        else:
            size = config.shard_size
            ranges = [(start, min(start + size, len(source))) for start in range(0, len(source), size)]
        for start, stop in ranges:
            yield Unit(number, place, start, stop)
            number += 1


def _source(config: CurateConfig, place: int) -> MapSource | StreamSource:
    return _opened(json.dumps(to_dict(config.sources[place])))


@functools.lru_cache(maxsize=16)
def _opened(settings: str) -> MapSource | StreamSource:
    """Open a source once in each process."""
    return open_source(SourceConfig(**json.loads(settings)))


def _rows(config: CurateConfig, unit: Unit) -> Iterator[Row]:
    source = _source(config, unit.source)
    if isinstance(source, StreamSource):
        yield from source.rows_of_shard(unit.start)
        return
    for start in range(unit.start, unit.stop, ROWS):
        yield from source.rows(range(start, min(start + ROWS, unit.stop)))


def _blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the items in lists of `ROWS`."""
    remaining = iter(items)
    while block := list(islice(remaining, ROWS)):
        yield block


@contextmanager
def _single_thread() -> Iterator[None]:
    """Let torch use one thread: forked workers must not start threads, and more threads would round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _languages(config: CurateConfig) -> list[str]:
    """Return all languages of the result: with `ko` and `en`, koclip reads it without options."""
    return sorted({"ko", "en"}.union(*(source.captions for source in config.sources)))


def _schema(config: CurateConfig, without: Sequence[str] = ()) -> pa.Schema:
    """Return the columns of a table, without some of them."""
    columns = _COLUMNS | {caption_column(language): _CAPTIONS for language in _languages(config)}
    return pa.schema({name: kind for name, kind in columns.items() if name not in without})


def _check_unit(unit: Unit, config: CurateConfig, folder: Folder) -> Iterator[int]:
    """Take the local steps for a unit, and write its table; yield the number of rows of each block."""
    file = folder.table(CHECKED, unit)
    if file.exists():
        yield pq.read_metadata(file).num_rows
        return
    pictured = config.sources[unit.source].image is not None
    steps = [step for step in LOCAL if pictured or step not in _OF_PICTURES]
    languages, schema = _languages(config), _schema(config)
    with _single_thread(), _writer(file, schema) as writer:
        for rows in _blocks(_rows(config, unit)):
            batch = batch_of(rows, languages)
            for step in steps:
                batch = step(batch, config)
            _append(writer, batch, schema)
            yield len(rows)


@contextmanager
def _writer(file: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a Parquet file; it appears when the block ends. Several processes may write different files."""
    with storage.atomic(file, shared=True) as partial_file, pq.ParquetWriter(partial_file, schema) as writer:
        yield writer


def _append(writer: pq.ParquetWriter, batch: Batch, schema: pa.Schema) -> None:
    """Write the columns of the schema; a column that no step added is empty."""
    empty = [None] * len(batch[KEY])
    columns = {name: batch.get(name, empty) for name in schema.names}
    writer.write_table(pa.Table.from_pydict(columns, schema=schema))


@_single_thread()
def _compare(config: CurateConfig, folder: Folder, units: Sequence[Unit]) -> tuple[str, dict[str, Any]]:
    """Take the global steps over the tables of all units; return the name of the last stage, and numbers by step."""
    before, numbers, schema = CHECKED, {}, _schema(config, _LOOKS)
    for name, step in GLOBAL.items():
        if not step.used(config):
            continue
        bar = tqdm(units, f"compare: {name}", unit=" tables", leave=False)
        decision = step.decide((step.collect(folder.load(before, unit, step.reads), config) for unit in bar), config)
        if step_numbers := step.numbers(decision):
            numbers[name] = step_numbers
        for unit in tqdm(units, f"mark: {name}", unit=" tables", leave=False):
            batch = step.apply(folder.load(before, unit), decision, config)
            with _writer(folder.table(name, unit), schema) as writer:
                _append(writer, batch, schema)
        before = name
    return before, numbers


def _write_unit(unit: Unit, config: CurateConfig, folder: Folder, compared: str) -> Iterator[int]:
    """Read a unit again, and write its kept rows as a shard; yield the number of rows of each block."""
    file = folder.shard(unit, compared)
    batch = folder.load(compared, unit)
    kept = set(kept_places(batch))
    if file.exists() or not kept:
        yield len(batch[KEY])
        return
    features = {"id": datasets.Value("string")}
    pictured = any(source.image is not None for source in config.sources)
    if pictured:
        features[IMAGE] = datasets.Image()
    captions = [caption_column(language) for language in _languages(config)]
    features |= {name: datasets.List(datasets.Value("string")) for name in captions}
    copied = captions
    if config.pairs.model:
        features[SCORE], copied = datasets.Value("float32"), [*captions, SCORE]
    schema = datasets.Features(features).arrow_schema
    with _writer(file, schema) as writer:
        for rows in _blocks(enumerate(_rows(config, unit))):
            places = [place for place, _ in rows if place in kept]
            columns: Batch = {"id": [batch[KEY][place] for place in places]}
            columns |= {name: [batch[name][place] for place in places] for name in copied}
            if pictured:
                columns[IMAGE] = [_stored(row, batch, place) for place, row in rows if place in kept]
            writer.write_table(pa.Table.from_pydict(columns, schema=schema))
            yield len(rows)


def _stored(row: Row, batch: Batch, place: int) -> dict[str, Any] | None:
    """Return the cell of a row's picture: its bytes as they are in the source, and its name."""
    if row.key != batch[KEY][place]:
        raise RunError(
            f"sources: row {batch[KEY][place]} is now {row.key}: the source changed during the run. Run the "
            "command again: it starts over"
        )
    if row.image is None:
        return None
    content = read(row.image)
    if isinstance(content, np.ndarray):
        buffer = BytesIO()
        Image.fromarray(content).save(buffer, format="PNG")
        content = buffer.getvalue()
    return {"bytes": content, "path": row.key.rpartition("/")[2]}


def _left_out(config: CurateConfig) -> list[dict[str, str]]:
    """Return the files of the sources that are not rows."""
    skips = chain.from_iterable(_source(config, place).left_out for place in range(len(config.sources)))
    return [{"key": skip.key, "reason": "not a row", "detail": skip.reason} for skip in skips]
