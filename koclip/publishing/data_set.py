"""A directory of `koclip curate` as a data set of the Hub: what is uploaded, and the checks before.

The shards and the pictures of the report are uploaded as they are. The card, the report and the settings are written
again: without keys and captions of dropped rows, and without places on this machine. `dropped.jsonl` stays here: its
keys lead to rows that have personal data, and to rows of sources whose licence is not in the licence chain.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from koclip import storage
from koclip.config import ConfigError, CurateConfig, check, locate, parse, to_dict
from koclip.curation import report
from koclip.curation.batch import IMAGE, caption_column
from koclip.curation.captions import without_personal_data
from koclip.curation.report import card, charts, page
from koclip.curation.scores import SCORE
from koclip.licences import ALLOWS, NOT_STATED, front_matter
from koclip.publishing.checks import PRIVATE_PATH, Check, access_tokens, licence_faults, private_traces

SETTINGS = "config.yaml"
MAX_BYTES, MAX_FILES = 50 * 10**9, 10_000  # of a file, in a folder: huggingface.co/docs/hub/storage-limits
_SHARD = re.compile(r"\d{6}-[0-9a-f]{16}\.parquet")
_PICTURES = (charts.WATERFALL, charts.LENGTHS, charts.QUERIES)
_WRITTEN_AGAIN = (card.FILE, card.LICENCE, report.FILE, page.FILE, SETTINGS)
_RULES = ("captions", "pictures", "duplicates", "pairs", "balance")  # sections of the settings without sources
_FRONT_MATTER = ("license", "language", "size_categories", "task_categories", "configs")
_AGAIN = "run koclip curate again"


class Curated(NamedTuple):
    """A directory of `koclip curate`, its settings and its report.json."""

    directory: Path
    config: CurateConfig
    content: dict[str, Any]

    @property
    def shards(self) -> list[str]:
        """The names of the shards, in order."""
        return sorted(path.name for path in self.directory.iterdir() if _SHARD.fullmatch(path.name))


def read(directory: Path, licenses: Mapping[str, str], data_cards: str | None) -> Curated:
    """Read a directory of `koclip curate`.

    `licenses`, by source name, and the directory `data_cards` replace those that `koclip curate` was given.

    Raises:
        ConfigError: the directory is something else, such as a model; or a licence is not that of a source.
    """
    files = directory / report.FILE, directory / SETTINGS
    is_model = any((directory / name).is_file() for name in ("config.json", "model/config.json"))
    expected = "expected a directory that koclip curate wrote" + "; a model is published with --model" * is_model
    check(all(file.is_file() for file in files), "data", str(directory), expected)
    fix = f"expected the report of this version of koclip curate: {_AGAIN}"
    try:
        content = json.loads(files[0].read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"data: {files[0]} cannot be read: {error}; {fix}") from error
    check("koclip" in content, f"data: {files[0]}", sorted(content), fix)
    config = parse(CurateConfig, ["--config", str(files[1])])
    names = [source["name"] for source in content["sources"]]
    check(set(licenses) <= set(names), "licenses", sorted(licenses), f"expected names of the sources: {names}")
    if licenses or data_cards:
        given = {"licenses": config.card.licenses | dict(licenses), "data_cards": data_cards or config.card.data_cards}
        config = replace(config, card=replace(config.card, **given))  # type: ignore[arg-type]
        counts = {when: {n: own[when] for n, own in enumerate(content["sources"])} for when in ("read", "kept")}
        content["licence"] = card.facts(config, **counts)["licence"]
    return Curated(directory, config, content)


def stage(data: Curated, folder: Path, repo_id: str) -> list[str]:
    """Put what is uploaded as `repo_id` into an empty folder; return the names. Shards and pictures are links."""
    for name in (*data.shards, *(name for name in _PICTURES if (data.directory / name).is_file())):
        (folder / name).symlink_to((data.directory / name).resolve())
    content = _without_rows(data.content)
    card.write(folder, content, data.config, repo_id)
    page.write_numbers(folder, content)
    storage.replace_text(folder / report.FILE, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    settings = yaml.safe_dump(_rules(data.config), sort_keys=False, allow_unicode=True)
    storage.replace_text(folder / SETTINGS, settings)
    return sorted(path.name for path in folder.iterdir())


def listing(folder: Path, files: list[str]) -> str:
    """Return the size in bytes and the name of each file, and their sum."""
    sizes = {name: (folder / name).stat().st_size for name in files}
    lines = [f"{size:>16,}  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()):>16,}  in {len(files):,} files"])


def _without_rows(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of report.json without keys of rows, and without the place of the model that scored."""
    largest = [{key: own[key] for key in ("pictures", "rows_dropped")} for own in content["clusters"]["largest"]]
    public = {**content, "clusters": {**content["clusters"], "largest": largest}}
    if "scores" in content:
        public["scores"] = {**content["scores"], "model": _public(content["scores"]["model"])}
    return public


def _rules(config: CurateConfig) -> dict[str, Any]:
    """Return the settings that are rules, without places on this machine."""
    rules = {name: to_dict(config)[name] for name in _RULES}
    if config.pairs.model is not None:
        rules["pairs"]["model"] = _public(config.pairs.model)
    rules["balance"]["corpus"] = [_public(path) for path in config.balance.corpus]
    return rules


def _public(place: str) -> str:
    """Return the last part of a local path; a Hub id or another spec as it is."""
    return Path(place).name if Path(place).is_absolute() or locate(place).exists() else place


def check_data(data: Curated, folder: Path, files: list[str], repo_id: str) -> list[Check]:
    """Check what is uploaded as `repo_id`: the `files` that `stage` has put into a folder."""
    texts = [name for name in files if name in _WRITTEN_AGAIN]
    faults, personal, paths = _rows_problems(data)
    own_card = "change the data cards of its sources, or state it: --licenses '{source: id}'"
    problems_and_fixes = {
        "card is complete": (_card_problems(folder, files), _AGAIN),
        "licence is stated": (licence_faults(folder, files), own_card),
        "licence allows to pass it on": (_terms_problems(data), f"{own_card}; or leave that source out"),
        "shards are the report's": (faults, f"{_AGAIN}: a shard was changed or is missing"),
        "no foreign files": (_foreign(data), "move these files out of the directory"),
        "files have the Hub's sizes": (_size_problems(folder, files), f"{_AGAIN} with another shard_size"),
        "no personal data in captions": (personal, f"{_AGAIN} with captions.personal_data"),
        "no private paths or names": (
            [*paths, *private_traces(folder, texts, repo_id)],
            f"replace the path in {report.FILE} or in the data card; or name the source, and {_AGAIN}",
        ),
        "no token": (access_tokens(folder, texts), "delete it, and revoke it at hf.co/settings/tokens"),
    }
    return [Check(name, problems, fix) for name, (problems, fix) in problems_and_fixes.items()]


def _card_problems(folder: Path, files: list[str]) -> list[str]:
    metadata, _ = front_matter(folder / card.FILE)
    problems = [f"{card.FILE} has no {key}" for key in _FRONT_MATTER if not metadata.get(key)]
    links = re.findall(r"\]\(([^):]+)\)", (folder / card.FILE).read_text(encoding="utf-8"))
    return problems + [f"{card.FILE} names {name}, which is missing" for name in links if name not in files]


def _terms_problems(data: Curated) -> list[str]:
    """Return the parts of sources that may not be passed on, or whose licence nobody stated."""
    problems = []
    for name, _, part, licence, *answers, stated in data.content["licence"]["terms"]:
        allowed = dict(zip(ALLOWS, answers, strict=True))["redistribution"]
        if allowed == "no" or (licence.startswith(NOT_STATED) and allowed != "yes"):
            problems.append(f"{name}, {part}: {licence} (passing on: {allowed}; stated by {stated})")
    return problems


def _foreign(data: Curated) -> list[str]:
    known = {*data.shards, *_PICTURES, *_WRITTEN_AGAIN, report.DROPPED}
    names = sorted(path.name for path in data.directory.iterdir() if not path.name.startswith("."))
    return [f"{name} is not a file of koclip curate" for name in names if name not in known]


def _size_problems(folder: Path, files: list[str]) -> list[str]:
    sizes = {name: (folder / name).stat().st_size for name in files}
    large = [f"{name} has {size:,} bytes, more than {MAX_BYTES:,}" for name, size in sizes.items() if size > MAX_BYTES]
    return large + [f"{len(files):,} files, more than {MAX_FILES:,}"] * (len(files) > MAX_FILES)


def _rows_problems(data: Curated) -> tuple[list[str], list[str], list[str]]:
    """Read the keys and captions of all shards; return their faults, personal data, and paths of this machine."""
    kept, num_rows = data.content["rows"]["kept"], 0
    faults: list[str] = []
    personal: Counter[str] = Counter()
    paths: dict[str, str] = {}
    for name in data.shards:
        try:
            with pq.ParquetFile(data.directory / name) as shard:
                foreign = sorted(set(shard.schema_arrow.names) - _columns(data))
                faults += [f"{name} has the columns {', '.join(foreign)}"] * bool(foreign)
                num_rows += shard.metadata.num_rows
                for column, text in _texts(shard):
                    if column != "id":
                        personal.update(without_personal_data(text)[1])
                    elif match := PRIVATE_PATH.search(text):
                        paths.setdefault(name, match[0])
        except (pa.ArrowException, OSError) as error:
            faults.append(f"{name} cannot be read: {error}")
    faults += [f"the shards have {num_rows:,} rows, the report {kept:,}"] * (num_rows != kept)
    removed = [f"{kind}: {count:,} in captions" for kind, count in personal.items()]
    return faults, removed, [f"{name} has the key {path}" for name, path in paths.items()]


def _columns(data: Curated) -> set[str]:
    """Return the columns that a shard may have."""
    languages = {"ko", "en"}.union(*(source.captions for source in data.config.sources))
    return {"id", IMAGE, SCORE, *map(caption_column, languages)}


def _texts(shard: pq.ParquetFile) -> Iterator[tuple[str, str]]:
    """Yield the name of the column and the text of each key and each caption."""
    names = [name for name in shard.schema_arrow.names if name not in (IMAGE, SCORE)]
    for batch in shard.iter_batches(columns=names):
        for name, cells in batch.to_pydict().items():
            texts = cells if name == "id" else (text for captions in cells for text in captions or ())
            yield from ((name, text) for text in texts if isinstance(text, str))
