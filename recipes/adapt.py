"""Build a classifier from a few labelled images per class, starting from the names of the classes.

python recipes/adapt.py --model runs/mine/model --images shelf/ --output_dir classifier/    # a folder for each class
python recipes/adapt.py --config recipes/configs/adapt/emoji_kinds.yaml --model runs/mine/model

Every method is fitted in every language; the best on held-out images is kept, and zero-shot if none is better.
"""

from pathlib import Path

import koclip
from koclip import config, storage
from koclip.evaluation.adapt import adapt, open_pictures
from koclip.evaluation.embed import Embedder
from koclip.evaluation.report import classifier


def main(cfg: config.AdaptConfig) -> None:
    """Run the recipe."""
    pictures = open_pictures(cfg)
    encoder = koclip.load(cfg.model, cfg.device)
    cache = Path(cfg.cache_dir) if cfg.cache_dir else None
    result = adapt(cfg, Embedder(encoder, cfg.batch_size, cache), pictures)
    directory = classifier.write(cfg, result, encoder)
    (directory / "skipped.jsonl").unlink(missing_ok=True)  # of an earlier run
    storage.append_lines(directory / "skipped.jsonl", [skip._asdict() for skip in pictures.all_skipped()])
    classifier.show(result)
    print(f'Saved {directory}. Use it: koclip.load_classifier("{directory}").predict(["photo.jpg"])')


if __name__ == "__main__":
    config.run(main, config.AdaptConfig)
