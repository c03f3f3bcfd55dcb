"""Train a CLIP from random weights on (image, caption) pairs; leave a model that stock transformers loads.

accelerate launch recipes/pretrain.py                       # configs/pretrain/scenes.yaml, minutes on a laptop
accelerate launch recipes/pretrain.py --config recipes/configs/pretrain/flickr8k_ko_small.yaml
accelerate launch recipes/pretrain.py --help                # every key, its unit and default
"""

from pathlib import Path

from tqdm.auto import tqdm

import koclip
from koclip import config, losses, training
from koclip.data.batches import Assembler
from koclip.data.loader import Start, train_loader, training_captions
from koclip.data.order import Shard
from koclip.data.transforms import PixelLimit, Views, centre_view, view_size
from koclip.encoders.transformers import TransformersEncoder
from koclip.evaluation.embed import Embedder
from koclip.evaluation.evaluate import evaluate, open_all
from koclip.evaluation.report.write import report
from koclip.evaluation.sets import EvalSet
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.runs.directory import Run
from koclip.text.normalize import usable

NEXT = """
Saved {model}, a stock transformers model. Next:
  python -c "from transformers import pipeline; print(pipeline('zero-shot-image-classification', model='{model}')\
('{run}/pictures/example.png', candidate_labels={labels}, hypothesis_template='{{}}'))"
  tensorboard --logdir {run}
  accelerate launch recipes/pretrain.py --data.sources "[{{path: pairs.csv, image: file, captions: {{ko: caption}}}}]"
"""
QUOTES = str.maketrans("'\"", "  ")  # what a shell would read


def main(cfg: config.PretrainConfig) -> None:
    """Run the recipe: data, model, training, then evaluation of the saved model."""
    logit_bias = losses.initial_bias(cfg.loss)
    accelerator = training.start(cfg.train)
    run = Run("pretrain", cfg.output_dir, resume=cfg.resume == "auto")
    run.start(cfg, accelerator)

    eval_sets = open_all(cfg.eval, PixelLimit(cfg.data.max_image_pixels))
    if accelerator.is_main_process:
        run.list_skipped([skip for one in eval_sets for skip in one.all_skipped()])
    tokenizer = run.tokenizer(cfg.tokenizer, training_captions(cfg.data))
    surveys = training.survey(cfg.data, tokenizer)
    run.check_data(surveys)
    model, processor = from_scratch(cfg.model, tokenizer)
    dual_encoder = DualEncoder(model, processor, logit_bias)
    trainer = training.prepare(accelerator, dual_encoder, cfg.loss, cfg.optim, cfg.train)
    progress = run.load(trainer)
    train = cfg.train
    shard = Shard(train.batch_size, accelerator.process_index, accelerator.num_processes, train.micro_batch_size)
    views = Views(cfg.data, view_size(processor.image_processor), centre_view(processor.image_processor))
    start = Start(progress.step, progress.all_positions)
    loader = train_loader(Assembler(cfg.data, tokenizer, views), shard, start, [one.lengths for one in surveys])
    batches = run.watch(loader, cfg.data.max_skipped_fraction)

    steps = training.steps(trainer, batches, progress.step, train.num_steps, train.log_every)
    bar = tqdm(steps, "training", train.num_steps, initial=progress.step, disable=not accelerator.is_main_process)
    with training.StopRequest(accelerator.device) as stop:
        for step, stats in bar:
            last, stopping = step == train.num_steps, stop.asked()
            if stats:
                run.log(step, stats)
                bar.set_postfix_str(training.progress_text(stats))
            run.list_events(trainer.health.take_events())
            if train.eval_every and step % train.eval_every == 0 and not last:
                with trainer.evaluating() as whole:
                    embedder = Embedder(TransformersEncoder(whole, processor), cfg.eval.batch_size)
                    run.log(step, {name: metric.value for name, metric in evaluate(embedder, eval_sets).items()})
            if last or stopping or (train.save_every and step % train.save_every == 0):
                run.save(trainer, step, train.keep_checkpoints, wait=last or stopping)
            if stopping and not last:
                accelerator.print(f"Stopped at step {step}; to go on, add: --resume auto --output_dir {run.path}")
                return

    model_dir = run.save_model(trainer, processor)
    if accelerator.is_main_process:
        saved = koclip.load(model_dir)  # as a user loads it
        report(run.path, Embedder(saved, cfg.eval.batch_size), eval_sets)
        labels = labels_of(eval_sets)
        measured = NEXT.format(model=model_dir, run=run.path, labels=labels)
        print(measured if labels else f"Saved {model_dir}, a stock transformers model; nothing was measured: eval.sets")


def labels_of(eval_sets: list[EvalSet]) -> list[str]:
    """Return the first three different captions of the sets, or fewer, without the letters that a shell reads."""
    captions = [usable(texts)[0] for eval_set in eval_sets for row in eval_set.captions for texts in row.values()]
    return list(dict.fromkeys(text.translate(QUOTES) for text in captions))[:3]


if __name__ == "__main__":
    config.run(main, config.PretrainConfig, default=Path(__file__).parent / "configs" / "pretrain" / "scenes.yaml")
