"""Sources of data, training batches and the tokenizer."""

import hashlib
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from koclip.config.checks import (
    all_faults,
    check,
    check_encoding,
    check_languages,
    check_least,
    check_pixels,
    check_share,
)

_NO_NUL = "expected no NUL character: file names cannot have one"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A data set of images with captions.

    Args:
        path: `scenes` (built in), a local file, folder or glob, or a Hub data set id such as `owner/name`. The name of
            an existing file is never read as a glob.
        format: How to read it: `scenes`, `hub`, `parquet`, `arrow`, `json`, `csv`, `image_folder`, `webdataset`,
            `annotations`, `coco`, `karpathy`, `flickr`, `json_per_image`, `img2dataset`, `save_to_disk`, `pictures`, or
            another with a file in koclip/data/formats/. `auto` decides by the file name, in any letter case, with or
            without `.gz`, `.bz2` or `.xz`; a folder is read as an image folder, or as what `datasets` saved with
            `save_to_disk` or img2dataset wrote. For a folder of other files, name the format: `parquet` reads all its
            Parquet files as one split, `hub` lets `datasets` find the splits.
            `annotations`: files of `[{"file_path": ..., "captions": [...]}]`, the format of KoCLIP and COCO.
            `coco`: captions_*.json. `karpathy`: dataset_*.json. `flickr`: Flickr8k.token.txt, results_20130124.token,
            captions.txt. These three have the column `captions`. `json_per_image`: a JSON file for each picture, as in
            sets of AI-Hub; the pictures are below `image_root`, and `*` in a caption column takes all matching fields.
            `img2dataset`: its output folder, with the columns of the list of URLs.
            `pictures`: every picture of a folder, without captions. In CSV, fields may be quoted; in `.tsv`, a quote
            is text.
        name: Short name in logs and metric names. Default: the last part of the path.
        split: Split to read, or a slice of it such as `train[:1000]`. In an image folder, `datasets` finds the splits
            by the names of folders and files; `all` reads every picture. In `karpathy`, the split of a picture; in
            `flickr`, a list next to the file, such as Flickr_8k.testImages.txt.
        subset: Configuration of a Hub data set that has several.
        revision: Git revision of a Hub data set. Default: its main branch.
        streaming: Read rows as they arrive instead of first preparing the whole data set on disk. WebDataset shards
            are always streamed.
        image: Column that holds the image (bytes, a file path, or an Image feature). Dots reach into nested columns.
            Of several columns, such as `[jpg, png]`, each row's first one with a value is read. null: sentences without
            images, for `align.method: distill`.
        image_root: Folder that relative image paths start from. Default: the folder of `path`.
        columns: Names of the columns of a CSV or TSV file that has no header line.
        encoding: Encoding of CSV, TSV and JSON files, and of the texts in tar shards, for example `cp949` for files
            of Korean Excel. A byte-order mark (UTF-8, UTF-16, UTF-32) in the file overrides it.
        captions: Caption column by language (a BCP 47 code: ko, en, zh-Hant, pt-BR), for example
            `{ko: captions_ko, en: captions_en}`. A cell is a string or a list of strings, which may be written as text
            (`["a", "b"]`, `['a', 'b']`). Caption i in one language corresponds to caption i in another; empty captions
            count. Several rows may have the same image. May be empty (`{}`) for evaluation with `label`.
        label: Column that holds the class of the image, as a name or a number, for evaluation by classes.
        languages: Relative chance of drawing a caption in each language. Default: equal chances.
        where: Keep only rows whose column holds one of the listed values, for example `{vendor: [noto, twemoji]}`.
        image_range: Keep only rows whose image is in this range. A hash of an image's bytes gives it a place from 0 to
            1, so `[0, 0.1]` keeps about a tenth of the images. `[0, 0.1]` to choose settings and `[0.1, 1]` to train
            have no image in common, also if rows repeat images.
        weight: Relative number of rows drawn from this source if there are several. Default: its number of rows, or 1
            for streamed sources.
        scenes_size: Number of images in `scenes`; must be even, because they come in pairs.
        scenes_part: `train` or `test`, which have no scene in common. Neither contains the (colour, shape) pairs that
            zero-shot evaluation tests.
    """

    path: str = "scenes"
    format: str = "auto"
    name: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    image: str | list[str] | None = "image"
    image_root: str | None = None
    columns: list[str] | None = None
    encoding: str = "utf-8"
    captions: dict[str, str] = field(default_factory=lambda: {"ko": "captions_ko", "en": "captions_en"})
    label: str | None = None
    languages: dict[str, float] | None = None
    where: dict[str, list[str]] | None = None
    image_range: list[float] | None = None
    weight: float | None = None
    scenes_size: int = 100_000
    scenes_part: Literal["train", "test"] = "train"

    @all_faults()
    def __post_init__(self) -> None:
        bounds = [0.0, 1.0] if self.image_range is None else self.image_range
        ordered = len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= 1
        check(ordered, "data.sources[].image_range", self.image_range, "expected two numbers, 0 <= first < second <= 1")
        pictured = self.image_range is None or self.image is not None
        check(pictured, "data.sources[].image_range", self.image_range, "expected none with `image: null`")
        named = bool(self.captions or self.label)
        check(named, "data.sources[].captions", self.captions, "name at least one caption column")
        check(self.image != [], "data.sources[].image", self.image, "name at least one column, or null for no images")
        for name in ("path", "image_root"):
            check("\0" not in (getattr(self, name) or ""), f"data.sources[].{name}", getattr(self, name), _NO_NUL)
        check_languages("data.sources[].captions", self.captions)
        unknown = set(self.languages or {}) - set(self.captions)
        check(
            not unknown,
            "data.sources[].languages",
            sorted(unknown),
            f"expected some of {sorted(self.captions)}",
        )
        for language, chance in (self.languages or {}).items():
            check(chance >= 0, f"data.sources[].languages.{language}", chance, "expected 0 or more")
        drawn = self.languages is None or sum(self.languages.values()) > 0
        check(drawn, "data.sources[].languages", self.languages, "expected a chance above 0 for at least one language")
        even = self.scenes_size >= 2 and self.scenes_size % 2 == 0
        check(even, "data.sources[].scenes_size", self.scenes_size, "expected an even number, 2 or more")
        check(self.weight is None or self.weight > 0, "data.sources[].weight", self.weight, "expected more than 0")
        check_encoding("data.sources[].encoding", self.encoding)

    @property
    def short_name(self) -> str:
        """The name that logs and metrics use for this source."""
        stem = Path(self.path.rstrip("/")).name.split(".")[0].replace("*", "all")
        return self.name or unicodedata.normalize("NFC", stem)

    @property
    def images(self) -> list[str]:
        """The columns that may hold the image."""
        return [self.image] if isinstance(self.image, str) else self.image or []

    @cached_property
    def key(self) -> str:
        """Prefix of the keys of its rows: the short name, and a hash of the settings that select rows and cells."""
        read = (self.path, self.subset, self.split, self.revision, self.image, self.image_root)
        cells = (self.columns, sorted(self.captions.items()), self.label)
        return f"{self.short_name}~{hashlib.sha256(repr((read, cells)).encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, augmentation and batches.

    Args:
        sources: Sources of the pairs. Several sources are mixed by their `weight`.
        num_crops: Fixed crops per image. 0: a new random crop at every step (cannot be cached). 1: the evaluation crop
            only. N: the evaluation crop plus N-1 random crops, which can be cached.
        crop_scale: Smallest and largest share of the image's area in a random crop.
        horizontal_flip: Probability of mirroring an image. Keep it 0 if captions say "left" and "right".
        rotation: Largest rotation in degrees, in either direction; corners are filled with white.
        color_jitter: Largest relative change of brightness, contrast and saturation. The hue never changes, because
            captions name colours.
        grayscale: Probability of converting an image to greyscale.
        word_dropout: Probability of dropping each word of a caption; at least one word stays.
        length_pool: Group captions of similar length into the same batch, within pools of this many batches. 1: no
            grouping. With word_dropout, lengths are estimated as sums over the words. Each reader of a stream holds the
            rows of its pool in memory.
        num_workers: Worker processes that decode images, per training process. 0: decode in the training process. Each
            worker that reads a stream assembles whole batches in advance.
        shuffle_buffer: Size of the shuffle buffer of a streamed source, in rows.
        max_skipped_fraction: Stop the run if more than this share of the drawn rows is unusable.
        max_image_pixels: Skip images with more pixels (width x height), in training and in its evaluation. Protects
            from decompression bombs.
        seed: Seed of the order of the rows, the choice of captions and the augmentation.
    """

    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    num_crops: int = 0
    crop_scale: tuple[float, float] = (0.9, 1.0)
    horizontal_flip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0
    word_dropout: float = 0.0
    length_pool: int = 8
    num_workers: int = 0
    shuffle_buffer: int = 10_000
    max_skipped_fraction: float = 0.1
    max_image_pixels: int = 89_478_485
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        check(len(self.sources) > 0, "data.sources", self.sources, "list at least one source")
        for source in self.sources:
            check(bool(source.captions), "data.sources[].captions", source.captions, "name at least one caption column")
        check_least(self, "data.", 0, "num_crops", "num_workers")
        check_least(self, "data.", 1, "length_pool", "shuffle_buffer")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "expected 0 < low <= high <= 1")
        for name in ("horizontal_flip", "color_jitter", "grayscale"):
            check(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "expected 0 to 1")
        check_share("data.word_dropout", self.word_dropout)
        check(0 <= self.rotation <= 180, "data.rotation", self.rotation, "expected 0 to 180")
        check_share("data.max_skipped_fraction", self.max_skipped_fraction)
        check_pixels("data.max_image_pixels", self.max_image_pixels)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The text tokenizer.

    Args:
        path: Directory or Hub id of a tokenizer. Default: the tokenizer of the text encoder if there is one, else a
            byte-level BPE is trained on the captions.
        vocab_size: Size of the trained vocabulary, including 512 byte symbols and 2 special tokens.
        max_tokens: Longest caption in tokens, including 2 special tokens; longer captions are cut.
        train_captions: Train the tokenizer on at most this many captions, the first of the sources.
        prefix: Text before every text, such as "query: " for multilingual-e5. It becomes a rule of the tokenizer, so
            users of the published model must not add it. A blank text gets none. Default: that of the tokenizer.
    """

    path: str | None = None
    vocab_size: int = 1_000
    max_tokens: int = 32
    train_captions: int = 1_000_000
    prefix: str = ""

    @all_faults()
    def __post_init__(self) -> None:
        check(self.vocab_size > 514, "tokenizer.vocab_size", self.vocab_size, "expected more than 514 (512 bytes + 2)")
        check(self.max_tokens >= 3, "tokenizer.max_tokens", self.max_tokens, "expected 3 or more")
