"""Say what a training run will take, before it starts: parameters, FLOPs, memory, disk, time and price.

python recipes/plan.py pretrain/vit_b32_webdataset --device h100 --num_devices 8 --price_per_hour 3
python recipes/plan.py pretrain/scenes --steps 20 --watts 60      # measure 20 steps on this machine

No data is read and no weights are downloaded: models are built from their configurations. Keys of the planned run
follow, as in its own command: --train.batch_size 512.
"""

import json
from pathlib import Path

from koclip import config, storage
from koclip.planning.plan import plan
from koclip.planning.report import show


def main(cfg: config.PlanConfig) -> None:
    """Run the recipe."""
    result = plan(cfg, cfg.read_run())
    show(result)
    if cfg.output_file is not None:
        storage.replace_text(Path(cfg.output_file), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"Saved {cfg.output_file}")


if __name__ == "__main__":
    config.run(main, config.PlanConfig, first="run")
