"""How fast does koclip turn a JPEG into a training crop next to open_clip, and are the pixels the same?

    python recipes/benchmarks/decode_speed.py                   # a minute on one core

Both turn the bytes of a JPEG into a random crop of 90-100 % of its area, 224 pixels, on one core and in turns:

- open_clip: PIL and its own train transform (torchvision's RandomResizedCrop, bicubic, antialiased), to normalised
  float32;
- koclip: `decode` and `Views` (torchvision's JPEG decoder and v2 transforms), to uint8: the model normalises on its
  device.

Images/s are per second of CPU time, median of the rounds; the ratio is taken within a round, and the table has its
median, lowest and highest value. PSNR and the largest difference (of 255) compare koclip's pixels with open_clip's for
the same crop. Bar of the project: 2x. The pictures are mosaics of Flickr8k photos if data/flickr8k_ko has them, else
drawn ones.
"""

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ratios import hardware, spread
from torch import Tensor

from koclip.config import DataConfig
from koclip.data.transforms import Views, decode

SIZES = ((640, 480), (500, 375))  # pixels
CROP = 224  # pixels
PHOTOS = Path("data/flickr8k_ko/val.parquet")
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # any will do, and these can be undone without loss


def jpegs(count: int, size: tuple[int, int], photos: Sequence[Image.Image]) -> list[bytes]:
    """Return `count` JPEGs of one size, quality 90: mosaics of small photos, or drawn pictures without photos."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        mosaic = Image.new("RGB", size)
        for left in range(0, size[0], 128):
            for top in range(0, size[1], 128):
                mosaic.paste(photos[int(rng.integers(len(photos)))] if photos else drawn(rng), (left, top))
        buffer = io.BytesIO()
        mosaic.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def drawn(rng: np.random.Generator, side: int = 128) -> Image.Image:
    """Return a picture with details at every scale, as in photos: noise whose strength halves with its grain."""
    total = np.zeros((side, side, 3), dtype=np.float32)
    for grain in (2, 4, 8, 16, 32, 64):
        noise = rng.integers(0, 256, (side // grain, side // grain, 3), dtype=np.uint8)
        scaled = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        total += np.asarray(scaled, dtype=np.float32) * grain / 126  # the grains sum to 126
    return Image.fromarray(total.astype(np.uint8))


def small_photos(path: Path) -> list[Image.Image]:
    """Return the first 200 pictures of a parquet file with an image column, none if there is no file."""
    if not path.exists():
        return []
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path, columns=["image"]).slice(0, 200).to_pylist()
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


def pipelines(config: DataConfig) -> dict[str, Callable[[bytes, int], Tensor]]:
    """Return each pipeline: from a JPEG's bytes and a seed to a crop."""
    from open_clip_peer import train_transform

    peer, own = train_transform(CROP, mean=MEAN, std=STD), Views(config, CROP).random

    def open_clip(data: bytes, seed: int) -> Tensor:
        cropped: Tensor = peer(Image.open(io.BytesIO(data)))
        return cropped

    def koclip(data: bytes, seed: int) -> Tensor:
        return own(decode(data, config.max_image_pixels), seed)

    return {"open_clip": open_clip, "koclip": koclip}


def seconds(run: Callable[[bytes, int], Tensor], files: Sequence[bytes]) -> float:
    """Return the CPU seconds that one pass over the files takes."""
    began = time.process_time()
    for seed, data in enumerate(files):
        run(data, seed)
    return time.process_time() - began


def differences(files: Sequence[bytes], runs: dict[str, Callable[[bytes, int], Tensor]]) -> Iterator[Tensor]:
    """Yield koclip's pixels minus open_clip's, (3, 224, 224) of 255, for the same crop of each file."""
    for seed, data in enumerate(files):
        torch.manual_seed(seed)  # both draw the crop from PyTorch's generator in the same way
        reference = (runs["open_clip"](data, seed) * STD[0] + MEAN[0]) * 255
        yield runs["koclip"](data, seed) - reference.round()


def row(size: tuple[int, int], files: Sequence[bytes], rounds: int) -> str:
    """Measure one picture size and return its row of the table."""
    runs = pipelines(DataConfig())
    pixels = torch.stack(list(differences(files, runs)))  # also warms both up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, files))
    speed = {name: len(files) / statistics.median(own) for name, own in times.items()}
    error = pixels.square().mean().item()
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    kilobytes = statistics.mean(len(data) for data in files) / 1000
    return (
        f"| {size[0]}x{size[1]}, {kilobytes:.0f} kB | {speed['open_clip']:.0f} | {speed['koclip']:.0f} "
        f"| {spread(times['koclip'], times['open_clip'])} | {psnr:.0f} dB | {pixels.abs().max():.0f} |"
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    cli.add_argument("--files", type=int, default=64, help="JPEGs of each size (default: 64)")
    return cli


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parser().parse_args(args)
    torch.set_num_threads(1)
    photos = small_photos(PHOTOS)
    print(f"{hardware()}; {'photos of ' + PHOTOS.name if photos else 'drawn pictures'}; {options.rounds} rounds")
    print("| JPEG | open_clip, images/s | koclip, images/s | ratio | PSNR | largest difference |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        print(row(size, jpegs(options.files, size, photos), options.rounds), flush=True)


if __name__ == "__main__":
    main()
