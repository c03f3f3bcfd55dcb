"""The data card of the result, README.md: rendered from report.json, with the licences of the sources."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import DatasetCard, DatasetCardData

from koclip import installation, storage
from koclip.config import SourceConfig, check
from koclip.config.curation import CurateConfig
from koclip.curation.report import charts
from koclip.data.formats.files import file_format
from koclip.evaluation.report.table import escaped
from koclip.licences import (
    ALLOWS,
    UNSTATED,
    Licence,
    Source,
    chain_rows,
    conclude,
    find_data_card,
    read_data_card,
    stated_parts,
    terms,
)

FILE, LICENCE = "README.md", "LICENSE.md"
# The Hub's names of sizes: up to this many rows.
_SIZES = {10**3: "1K", 10**4: "10K", 10**5: "100K", 10**6: "1M", 10**7: "10M", 10**8: "100M", 10**9: "1B"}
_SIZES |= {10**10: "10B", 10**11: "100B", 10**12: "1T"}
_READ_BY_DEFAULT = {"ko", "en"}  # languages that koclip reads without options


class Origin(NamedTuple):
    """Where a source comes from, and its terms."""

    terms: Source
    origin: str
    hub: str | None  # its id on the Hub


def origins(config: CurateConfig) -> list[Origin]:
    """Return the origin of each source: of its data card, else of the settings.

    Raises:
        ConfigError: a data card cannot be read, a setting contradicts it, or `card.license` is not an id of the Hub.
    """
    own = config.card.data_cards
    check(own is None or Path(own).is_dir(), "card.data_cards", own, "no such directory")
    cards = [*([Path(own)] if own else []), installation.files("data_cards")]
    sources = [_origin(source, config, cards) for source in config.sources]
    _conclude(sources, config)
    return sources


def _conclude(sources: Sequence[Origin], config: CurateConfig) -> Licence:
    return conclude([source.terms for source in sources], config.card.license, "card.license")


def _origin(source: SourceConfig, config: CurateConfig, cards: Sequence[Path]) -> Origin:
    name, settings = source.short_name, {"licenses": config.card.licenses, "origins": config.card.origins}
    hub = source.path if file_format(source) == "hub" and not Path(source.path).exists() else None
    file = find_data_card(name, source.path, cards)
    if file is None:
        stated = settings["licenses"].get(name, UNSTATED)
        parts = stated_parts(stated, "card.licenses of koclip curate", part="pairs")
        return Origin(Source("source", name, parts), settings["origins"].get(name, hub or "not stated"), hub)
    for key, values in settings.items():
        expected = f"expected none: the data card {file} says it; change the card, or the name of the source"
        check(name not in values, f"card.{key}.{name}", values.get(name), expected)
    card = read_data_card(file)
    return Origin(Source("source", name, card.licenses), card.source, hub or card.hub)


def facts(config: CurateConfig, read: Mapping[int, int], kept: Mapping[int, int]) -> dict[str, Any]:
    """Return the sources and the licence of the result for report.json.

    `read` and `kept` are numbers of rows by the number of the source. A source without kept rows has no part in the
    licence.
    """
    sources = origins(config)
    used = [source for place, source in enumerate(sources) if kept[place]]
    licence = _conclude(used, config)
    return {
        "sources": [
            {"name": source.terms.name, "origin": source.origin, "hub": source.hub}
            | {"read": read[place], "kept": kept[place]}
            for place, source in enumerate(sources)
        ],
        "licence": {"id": licence.id, "name": licence.name, "why": licence.why}
        | {"terms": list(chain_rows([source.terms for source in used]))},
    }


def write(folder: Path, content: Mapping[str, Any], config: CurateConfig, hub_id: str | None = None) -> None:
    """Write README.md, and LICENSE.md if the licence is not a common one. `content` is that of report.json.

    With `hub_id`, the card describes the data set of that id on the Hub, which has no dropped rows.
    """
    storage.replace_text(folder / FILE, str(render(content, config, hub_id)))
    licence = content["licence"]
    if licence["name"]:
        text = (
            f"# {licence['name']}\n\nThese data are not under a common licence: {licence['why']}.\n\nTheir sources "
            f"have these terms. The strictest of them apply:\n\n{terms(licence['terms'])}\n"
        )
        storage.replace_text(folder / LICENCE, text)


def render(content: Mapping[str, Any], config: CurateConfig, hub_id: str | None = None) -> DatasetCard:
    """Return the card with its metadata, of a directory or (with `hub_id`) of a data set on the Hub."""
    template = (files("koclip") / "assets" / "data_card.md").read_text(encoding="utf-8")
    names = list(dict.fromkeys(source["name"] for source in content["sources"]))
    fields: dict[str, Any] = {
        "title": escaped(config.card.title or f"Pairs of {', '.join(names)}"),
        "names": escaped(", ".join(names)),
        "content": content,
        "sources": [
            [escaped(source["name"]), escaped(source["origin"]), f"{source['read']:,}", f"{source['kept']:,}"]
            for source in content["sources"]
        ],
        "chain": [[escaped(cell) for cell in (name, *rest)] for name, _, *rest in content["licence"]["terms"]],
        "allows": list(ALLOWS.values()),
        "pictured": any(source.image is not None for source in config.sources),
        "compared": config.duplicates.enabled,
        "cleaned": config.captions.personal_data,
        "source": _source(content, config, hub_id or "'*.parquet'"),
        "hub_id": hub_id,
        "pictures": {"waterfall": charts.WATERFALL, "lengths": charts.LENGTHS, "balance": charts.QUERIES},
        "version": content["koclip"],
    }
    card: DatasetCard = DatasetCard.from_template(_metadata(content, config), template_str=template, **fields)
    return card


def _source(content: Mapping[str, Any], config: CurateConfig, path: str) -> str:
    """Return the result, which is at `path`, as a source of koclip, in one line of YAML."""
    options = [f"path: {path}"]
    options += ["image: null"] * all(source.image is None for source in config.sources)
    languages = set(content["captions"]["kept"])
    if not languages <= _READ_BY_DEFAULT:
        options.append(f"captions: {{{', '.join(f'{code}: captions_{code}' for code in sorted(languages))}}}")
    return f"{{{', '.join(options)}}}"


def _metadata(content: Mapping[str, Any], config: CurateConfig) -> DatasetCardData:
    """Return the front matter."""
    licence, codes = content["licence"], sorted(content["captions"]["kept"])
    languages = sorted({code.split("-")[0] for code in codes})  # the Hub takes ISO 639 here
    other = {"license_name": licence["name"], "license_link": LICENCE} if licence["name"] else {}
    other |= {"language_bcp47": codes} if codes != languages else {}
    pictured = any(source.image is not None for source in config.sources)
    hub = list(dict.fromkeys(source["hub"] for source in content["sources"] if source["hub"] and source["kept"]))
    return DatasetCardData(
        language=languages,
        license=licence["id"],
        **other,
        pretty_name=config.card.title,
        size_categories=[size_category(content["rows"]["kept"])],
        task_categories=["zero-shot-image-classification", "image-to-text"] if pictured else ["sentence-similarity"],
        source_datasets=hub or None,
        tags=["koclip", "image-text pairs" if pictured else "captions"],
        configs=[{"config_name": "default", "data_files": "*.parquet"}],
    )


def size_category(num_rows: int) -> str:
    """Return the Hub's name for a number of rows, such as `1K<n<10K`."""
    lower = ""
    for limit, name in _SIZES.items():
        if num_rows < limit:
            return f"{lower}<n<{name}" if lower else f"n<{name}"
        lower = name
    return f"n>{lower}"
