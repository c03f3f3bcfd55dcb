"""An index of images, and its calibration."""

from dataclasses import dataclass, field
from typing import Literal

from koclip.config.checks import all_faults, check, check_least, check_pixels
from koclip.config.data import DataConfig, SourceConfig


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Make a collection of images searchable.

    Args:
        model: Directory or Hub id of a dual encoder, or any model that `koclip evaluate` takes.
        images: Folder of pictures, including its subfolders; or a data set: `scenes`, a file or a Hub id.
        source: Data set with column names, instead of `images`.
        output_dir: Directory of the index. If the command is interrupted, run it again: it continues.
        max_images: Index only the first images, at most this many. 0: all.
        max_image_pixels: Skip images with more pixels (width x height). Protects from decompression bombs.
        thumbnail_size: Longer side of the stored thumbnails, pixels. 0: no thumbnails.
        approximate: Also build an approximate index: `yes`, `no`, or `auto` (from `approximate_from` images on). Needs
            `pip install 'koclip[search]'`.
        approximate_from: Number of images. An exact search over fewer images takes a tenth of a second.
        calibration: Captions of images that are not in the index, such as a validation set. They show which scores
            queries without a match reach, and the index keeps thresholds. An image of the set that is in the index
            (the same file) is left out where its own captions are scored. Calibrating a finished index embeds no image.
        alphas: The shares of queries without a match that may show something. Each gets a threshold.
        batch_size: Images encoded at a time.
        device: Device name of PyTorch. Default: a GPU if available.
    """

    model: str = ""
    images: str = ""
    source: SourceConfig | None = None
    output_dir: str = "index"
    max_images: int = 0
    max_image_pixels: int = DataConfig.max_image_pixels
    thumbnail_size: int = 256
    approximate: Literal["auto", "yes", "no"] = "auto"
    approximate_from: int = 1_000_000
    calibration: SourceConfig | None = None
    alphas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2])
    batch_size: int = 64
    device: str | None = None

    @all_faults()
    def __post_init__(self) -> None:
        check(bool(self.model), "model", self.model, "name a directory or Hub id: --model runs/<run>/model")
        some = bool(self.images) or self.source is not None
        check(some, "images", self.images, "name a folder of pictures or a data set: --images photos/")
        check_least(self, "", 0, "max_images")
        check_least(self, "", 1, "approximate_from", "batch_size")
        check_pixels("max_image_pixels", self.max_image_pixels)
        size = self.thumbnail_size
        check(size == 0 or 16 <= size <= 1_024, "thumbnail_size", size, "expected 16 to 1024, or 0 for none")
        shares = bool(self.alphas) and all(0 < alpha < 1 for alpha in self.alphas)
        check(shares, "alphas", self.alphas, "expected shares above 0 and below 1, such as [0.05, 0.1]")
        captioned = self.calibration is None or bool(self.calibration.captions)
        check(captioned, "calibration.captions", {}, "name the caption column of each language")
