"""Build a clean set of pairs from raw pairs: Parquet shards, the dropped rows with reasons, a report and a data card.

python recipes/curate.py --sources "[{path: raw.parquet}]" --output_dir curated
python recipes/curate.py --config recipes/configs/curate/raw_pairs.yaml --num_workers 2

After an interruption, run the same command again: it continues. The result does not depend on the number of workers.
"""

from pathlib import Path

from koclip import config
from koclip.curation import report
from koclip.curation.pipeline import curate
from koclip.curation.report import card, page


def main(cfg: config.CurateConfig) -> None:
    """Run the recipe."""
    content = curate(cfg)
    folder = Path(cfg.output_dir)
    print(report.table(content))
    print(f"Saved {folder}; the dropped rows, with reasons, are in {folder / report.DROPPED}")
    print(f"Read {folder / page.FILE}, and the data card {folder / card.FILE}")
    print(f"Use it: koclip pretrain --data.sources '[{{path: {folder}/*.parquet}}]'")


if __name__ == "__main__":
    config.run(main, config.CurateConfig)
