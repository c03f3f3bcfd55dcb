"""Measure dual encoders in Korean, in English and between them: results.json, a table, pictures and a report.

python recipes/evaluate.py --model runs/mine/model          # configs/evaluate/scenes.yaml
python recipes/evaluate.py --config recipes/configs/evaluate/local.yaml --models runs/mine/model runs/other/model
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/evaluate.py --model runs/mine/model  # same numbers, sooner
"""

import time
from pathlib import Path

import koclip
from koclip import config
from koclip.data.transforms import PixelLimit
from koclip.evaluation.embed import Embedder
from koclip.evaluation.evaluate import evaluate, open_all, warnings_of
from koclip.evaluation.report.finish import Measured
from koclip.evaluation.report.present import keep, present
from koclip.evaluation.suite import folders_of, processes, start
from koclip.evaluation.tasks.ratings import people
from koclip.evaluation.tasks.robustness import add_effective_robustness


def main(cfg: config.EvaluateConfig) -> None:
    """Run the recipe: every model on every data set, then the models side by side."""
    accelerator = processes(cfg)
    limit = PixelLimit(cfg.max_image_pixels, "max_image_pixels")
    sets = open_all(cfg.sets, limit)
    run = start(cfg, sets)
    metrics, embedders, warnings = {}, {}, []
    for spec in cfg.all_models:
        began = time.monotonic()
        encoder = koclip.load(spec, cfg.device or accelerator.device)
        embedder = Embedder(encoder, cfg.batch_size, Path(cfg.cache_dir) if cfg.cache_dir else None, spread=True)
        warnings += [warning for warning in warnings_of(embedder, sets) if warning not in warnings]
        found = evaluate(embedder, sets)
        for rated in cfg.ratings:
            found |= {
                f"{rated.name}/{rated.language}/{name}": one for name, one in people(embedder, rated, limit).items()
            }
        metrics[spec], embedders[spec] = found, embedder
        if accelerator.is_main_process:
            keep(folders_of(run, cfg.all_models)[spec], Measured(spec, embedder.fingerprint), found, sets)
        accelerator.print(f"Evaluated {spec} in {(time.monotonic() - began) / 60:.1f} minutes")
    add_effective_robustness(metrics)
    if accelerator.is_main_process:
        present(run, metrics, embedders, sets, warnings)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    config.run(main, config.EvaluateConfig, default=Path(__file__).parent / "configs" / "evaluate" / "scenes.yaml")
