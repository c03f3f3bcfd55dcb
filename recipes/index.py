"""Make a collection of images searchable: embeddings, captions and thumbnails, for `koclip.search` and the Space.

python recipes/index.py --model runs/mine/model --images photos/ --output_dir index/
python recipes/index.py --model runs/mine/model --images scenes --output_dir index/    # the built-in pictures
python recipes/index.py --model runs/mine/model --images photos/ --output_dir index/ --calibration.path validation.csv

After an interruption, run the same command again: it continues. It also embeds pictures and captions again that have
changed since.
"""

from pathlib import Path

import koclip
from koclip import config, storage
from koclip.search.build import build
from koclip.search.calibrate import Calibration, calibrate


def main(cfg: config.IndexConfig) -> None:
    """Run the recipe."""
    directory = Path(cfg.output_dir)
    encoder = koclip.load(cfg.model, cfg.device)
    num_images, skipped = build(cfg, encoder, directory)
    if cfg.calibration:
        calibration = calibrate(cfg, encoder, directory)
        skipped += calibration.left_out
        show(calibration)
    (directory / "skipped.jsonl").unlink(missing_ok=True)  # of an earlier run
    storage.append_lines(directory / "skipped.jsonl", [skip._asdict() for skip in skipped])
    left = f"; {len(skipped)} skipped, listed in {directory / 'skipped.jsonl'}" if skipped else ""
    print(f"{num_images} images in {directory}{left}")
    print(f"Show them: koclip space --model {cfg.model} --index {directory}")


def show(calibration: Calibration) -> None:
    """Print the thresholds, and the promises that the calibration set is too small for."""
    for language, facts in calibration.facts["languages"].items():
        print(f"{language}: {facts['queries']} queries without a match, of {facts['images']} images")
        for alpha, threshold in facts["thresholds"].items():
            if threshold is not None:
                print(f"  at most {float(alpha):.3g} of such queries show something above the score {threshold:.4f}")
    for line in calibration.too_small:
        print(f"too few queries: {line}")


if __name__ == "__main__":
    config.run(main, config.IndexConfig)
