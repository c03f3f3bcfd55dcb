"""Settings of `koclip curate`: the rules for captions and pictures, duplicates, balance, and the whole command."""

from dataclasses import dataclass, field
from typing import Literal

from koclip.config.checks import all_faults, check, check_languages, check_least, check_pixels, check_share
from koclip.config.data import DataConfig, SourceConfig


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """Which captions are dropped. All captions are NFC and have single spaces before they are checked.

    Args:
        min_length: Shortest caption, characters.
        max_length: Longest caption, characters.
        min_hangul: Smallest share of Hangul among the letters of a Korean caption (language `ko`). 0: no check.
        min_language: Smallest probability that a caption is in the language of its column, by py3langid. It is small,
            because a short caption may be in several languages. 0: no check.
        html: Drop captions with HTML tags.
        urls: Drop captions with addresses of web pages.
        file_names: Drop captions that are names of files, such as IMG_1234.jpg.
        max_repeats: Drop captions that more than this many rows have. 0: no limit.
        personal_data: Remove phone numbers, resident-registration numbers and e-mail addresses from captions, and
            count them. The rest of the caption stays.
    """

    min_length: int = 2
    max_length: int = 1_000
    min_hangul: float = 0.5
    min_language: float = 0.01
    html: bool = True
    urls: bool = True
    file_names: bool = True
    max_repeats: int = 100
    personal_data: bool = True

    @all_faults()
    def __post_init__(self) -> None:
        check_least(self, "captions.", 1, "min_length")
        check_least(self, "captions.", 0, "max_repeats")
        check(self.max_length >= self.min_length, "captions.max_length", self.max_length, "expected min_length or more")
        check_share("captions.min_hangul", self.min_hangul)
        check_share("captions.min_language", self.min_language)


@dataclass(frozen=True, kw_only=True)
class PictureRules:
    """Which pictures are dropped, with their rows. Sources with `image: null` have no pictures to check.

    Args:
        min_side: Smallest shorter side, pixels.
        max_ratio: Largest ratio of the longer side to the shorter side.
        min_deviation: Smallest standard deviation of the brightness, on a scale of 0 to 255. Pictures below it are
            almost uniform. 0: no check.
        max_pixels: Drop pictures with more pixels (width x height). Protects from decompression bombs.
    """

    min_side: int = 32
    max_ratio: float = 4.0
    min_deviation: float = 4.0
    max_pixels: int = DataConfig.max_image_pixels

    @all_faults()
    def __post_init__(self) -> None:
        check_least(self, "pictures.", 1, "min_side", "max_ratio")
        check_least(self, "pictures.", 0, "min_deviation")
        check_pixels("pictures.max_pixels", self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class DuplicateRules:
    """Which pictures are near-duplicates. Of a group, the picture with the most pixels stays.

    Rows that repeat the same stored picture with other captions stay; a repeated pair is dropped.

    Args:
        enabled: Drop near-duplicates and repeated pairs.
        max_distance: Largest number of different bits between the hashes (63 bits) of near-duplicates.
        crops: Also find pictures that are cropped by up to a tenth of each side. Compares 38 instead of 2 hashes for
            each picture.
        min_cosine: Pictures whose embeddings by `pairs.model` have at least this cosine are near-duplicates, too. Each
            picture is compared with every other: for sets of up to some 100,000 pictures. Default: hashes alone.
    """

    enabled: bool = True
    max_distance: int = 7
    crops: bool = True
    min_cosine: float | None = None

    @all_faults()
    def __post_init__(self) -> None:
        distance = self.max_distance
        check(0 <= distance <= 16, "duplicates.max_distance", distance, "expected 0 to 16 of 63 bits")
        least = self.min_cosine
        check(least is None or -1 <= least <= 1, "duplicates.min_cosine", least, "expected a cosine, -1 to 1")
        check(self.enabled or least is None, "duplicates.min_cosine", least, "expected duplicates.enabled, too")


@dataclass(frozen=True, kw_only=True)
class OverlapRules:
    """Which rows are dropped because they are in an evaluation set.

    Args:
        sources: Evaluation sets. Rows whose picture is a near-duplicate of one of their pictures are dropped, by
            `duplicates.max_distance` and `duplicates.crops`.
        captions: Also drop rows with a caption of an evaluation set. Letter case and spaces do not count.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    captions: bool = False

    @all_faults()
    def __post_init__(self) -> None:
        check(
            bool(self.sources) or not self.captions, "overlap.captions", self.captions, "expected overlap.sources, too"
        )


@dataclass(frozen=True, kw_only=True)
class PairRules:
    """Which rows are dropped because their picture and captions do not fit, by a model.

    The score of a row is the mean of the cosines of its picture and its captions, -1 to 1. Rows without a score stay.

    Args:
        model: The model that scores: a directory such as a run's `model/`, a Hub id, or another spec of `koclip.load`.
            Default: no scores. Without `drop_share` and `min_score`, every row stays and gets its score.
        drop_share: Share of the scored rows that is dropped, those with the lowest scores.
        min_score: Smallest score.
        languages: Languages whose captions are scored. Default: all.
        device: Device of the model; default: a GPU if there is one, else the CPU. A GPU needs `num_workers: 1`.
    """

    model: str | None = None
    drop_share: float = 0.0
    min_score: float | None = None
    languages: list[str] = field(default_factory=list)
    device: str | None = None

    @all_faults()
    def __post_init__(self) -> None:
        check_share("pairs.drop_share", self.drop_share)
        least = self.min_score
        check(least is None or -1 <= least <= 1, "pairs.min_score", least, "expected a cosine, -1 to 1")
        used = self.model is not None or (not self.drop_share and least is None)
        check(used, "pairs.model", self.model, "expected a model for pairs.drop_share and pairs.min_score")
        check_languages("pairs.languages", self.languages)


@dataclass(frozen=True, kw_only=True)
class BalanceRules:
    """How many pairs each query keeps. Queries are frequent words, and frequent pairs of adjacent words.

    A pair belongs to the rarest query in its captions. A hash of the content chooses which pairs of a query stay.

    Args:
        max_per_query: Most pairs of a query. 0: no balance. CLIP's makers took 20,000.
        min_count: Words, and pairs of words, that occur in at least this many texts of the corpus are queries.
        corpus: Text files (`.txt`) or data sets with the texts that are counted, as for `koclip trim --texts`. Default:
            the captions of the pairs themselves.
        keep_unmatched: Keep pairs without a query. CLIP's makers had none.
    """

    max_per_query: int = 0
    min_count: int = 100
    corpus: list[str] = field(default_factory=list)
    keep_unmatched: bool = True

    @all_faults()
    def __post_init__(self) -> None:
        check_least(self, "balance.", 0, "max_per_query")
        check_least(self, "balance.", 1, "min_count")


@dataclass(frozen=True, kw_only=True)
class ReportRules:
    """What report.html shows.

    Args:
        thumbnails: Small pictures beside the examples of dropped rows: `none`, `blurred` (16 pixels, enlarged: people
            cannot be recognised) or `clear`. The pictures of the examples are read again; of a stream, their files up
            to the picture.
    """

    thumbnails: Literal["none", "blurred", "clear"] = "none"


@dataclass(frozen=True, kw_only=True)
class CardRules:
    """What the data card of the result, README.md, says about the sources.

    Args:
        title: Name of the result. Default: the names of the sources.
        data_cards: Directory of the data cards of your own sources. Those of koclip are read after it.
        licenses: Licences of sources without a data card, by source name: an id of SPDX or of the Hub, or `unstated`.
            With any other text, the card shows the text and the licence of the result is `other`.
        origins: Where sources without a data card come from, by source name: who made them, and where they are.
        license: Licence of the result if its sources allow any, as the Hub spells it.
    """

    title: str | None = None
    data_cards: str | None = None
    licenses: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    license: str = "cc-by-4.0"


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Build a clean set of pairs from raw pairs.

    Args:
        sources: Data sets of raw pairs. Only their images, captions and keys are copied.
        output_dir: Directory of the result: Parquet shards, `dropped.jsonl`, the report (`report.html`, `report.json`,
            pictures) and its data card `README.md`. It appears when everything is complete. If the command is
            interrupted, run it again: it continues. An earlier result is replaced; another directory that is not empty
            is refused.
        captions: Rules for captions.
        pictures: Rules for pictures.
        overlap: Evaluation sets whose pictures and captions are dropped.
        duplicates: Rules for near-duplicates.
        pairs: Rules for pairs whose picture and captions do not fit.
        balance: Rules for the number of pairs of each query.
        report: What report.html shows.
        card: What the data card says about the sources.
        shard_size: Rows read for each shard. Of a stream, each file becomes a shard.
        engine: What divides the work: `local` (processes on this machine) or `ray` (a local Ray, or the cluster of the
            variable RAY_ADDRESS). The result does not depend on it.
        num_workers: Processes that check and write shards. A Ray cluster uses all its CPUs instead. The result does not
            depend on it.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    output_dir: str = "curated"
    captions: CaptionRules = field(default_factory=CaptionRules)
    pictures: PictureRules = field(default_factory=PictureRules)
    overlap: OverlapRules = field(default_factory=OverlapRules)
    duplicates: DuplicateRules = field(default_factory=DuplicateRules)
    pairs: PairRules = field(default_factory=PairRules)
    balance: BalanceRules = field(default_factory=BalanceRules)
    report: ReportRules = field(default_factory=ReportRules)
    card: CardRules = field(default_factory=CardRules)
    shard_size: int = 10_000
    engine: Literal["local", "ray"] = "local"
    num_workers: int = 1

    @all_faults()
    def __post_init__(self) -> None:
        check(bool(self.sources), "sources", self.sources, "list data sets: --sources '[{path: raw.parquet}]'")
        for source in self.sources:
            check(bool(source.captions), "sources[].captions", source.captions, "name at least one caption column")
        unknown = sorted(set(self.pairs.languages).difference(*(source.captions for source in self.sources)))
        check(not unknown, "pairs.languages", unknown, "expected languages of sources[].captions")
        least = self.duplicates.min_cosine
        embedded = self.pairs.model is not None or least is None
        check(embedded, "duplicates.min_cosine", least, "expected pairs.model, whose embeddings are compared")
        check_least(self, "", 1, "shard_size", "num_workers")
        names = sorted({source.short_name for source in self.sources})
        for key in ("licenses", "origins"):
            unknown = sorted(set(getattr(self.card, key)) - set(names))
            check(not unknown, f"card.{key}", unknown, f"expected names of the sources: {names}")
