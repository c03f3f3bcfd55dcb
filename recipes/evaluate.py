"""Measure dual encoders in Korean, in English and between both: results.json, a table, pictures and a report.

python recipes/evaluate.py --model runs/mine/model          # configs/evaluate/scenes.yaml
python recipes/evaluate.py --config recipes/configs/evaluate/local.yaml --models runs/mine/model runs/other/model
python recipes/evaluate.py --model runs/mine/model --source runs/english/model  # and what was forgotten of the source
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/evaluate.py --model runs/mine/model  # same numbers, faster
"""

import time
from pathlib import Path

import koclip
from koclip import config
from koclip.data.transforms import PixelLimit
from koclip.evaluation.embed import Embedder
from koclip.evaluation.report.write import Evaluated, compare_with_source, write, write_model_results
from koclip.evaluation.run import (
    evaluate,
    folders_of,
    open_all,
    processes,
    start,
    surroundings,
    warnings_of,
)
from koclip.evaluation.tasks.zero_shot import add_effective_robustness


def main(cfg: config.EvaluateConfig) -> None:
    """Run the recipe: every model on every data set, then the models side by side."""
    accelerator = processes(cfg)
    device = cfg.device or accelerator.device
    eval_sets = open_all(cfg, PixelLimit(cfg.max_image_pixels, "max_image_pixels"))
    run = start(cfg, eval_sets)
    models: list[Evaluated] = []
    warnings: list[str] = []
    cache = Path(cfg.cache_dir) if cfg.cache_dir else None
    source = Embedder(koclip.load(cfg.source, device), cfg.batch_size, cache, spread=True) if cfg.source else None
    for spec, folder in folders_of(run, cfg.all_models).items():
        began = time.monotonic()
        embedder = Embedder(koclip.load(spec, device), cfg.batch_size, cache, spread=True)
        warnings += warnings_of(embedder, eval_sets)
        models.append(Evaluated(spec, folder, embedder, evaluate(embedder, eval_sets), cfg.source))
        if accelerator.is_main_process:
            write_model_results(models[-1], eval_sets, surroundings())
        accelerator.print(f"Evaluated {spec} in {(time.monotonic() - began) / 60:.1f} minutes")
    add_effective_robustness({model.model: model.metrics for model in models})
    try:
        if source is not None:
            compare_with_source(models, lambda: source, eval_sets, warnings)
    finally:  # if this fails, the models' report is written all the same
        if accelerator.is_main_process:
            write(run, models, eval_sets, surroundings(), list(dict.fromkeys(warnings)))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    config.run(main, config.EvaluateConfig, default=Path(__file__).parent / "configs" / "evaluate" / "scenes.yaml")
