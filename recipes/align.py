"""Give a CLIP a Korean or multilingual text encoder, or adapt its own; its image space stays unless it is trained.

accelerate launch recipes/align.py                          # configs/align/scenes.yaml, a minute on a laptop
accelerate launch recipes/align.py --config recipes/configs/align/klue_roberta_base_frozen.yaml
accelerate launch recipes/align.py --help                   # every key, its unit and default
"""

from functools import partial
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import ProcessorMixin

import koclip
from koclip import config, losses, training
from koclip.align import lora
from koclip.align.build import adapt, load_teacher, text_encoder
from koclip.align.save import publish_aligned
from koclip.align.trainable import layer_rates, select
from koclip.data.batches import Assembler, Precomputed
from koclip.data.loader import Start, train_loader, training_captions
from koclip.data.order import Shard
from koclip.data.survey import CaptionLengths
from koclip.data.transforms import PixelLimit, Views, centre_view, view_size
from koclip.embeddings.sources import Cache, image_features, teacher_features
from koclip.encoders.transformers import TransformersEncoder
from koclip.evaluation.embed import Embedder
from koclip.evaluation.evaluate import evaluate, open_all
from koclip.evaluation.report.write import report
from koclip.evaluation.sets import EvalSet
from koclip.models.dual_encoder import DualEncoder
from koclip.models.pretrained import load_image_side
from koclip.runs.directory import Run

NEXT = """
Saved {model}, a stock {kind}: AutoModel and AutoProcessor load it. Next:
  python -c "import koclip; print(koclip.load('{model}').encode_texts(['해변을 달리는 개']))"
"""


def main(cfg: config.AlignConfig) -> None:
    """Run the recipe: source, text side, teacher, one stage of training after the other, evaluation."""
    logit_bias = losses.initial_bias(cfg.loss)
    accelerator = training.start(cfg.train)
    run = Run("align", cfg.output_dir, resume=cfg.resume == "auto")
    run.start(cfg, accelerator)
    cache = Path(cfg.align.cache_dir or run.path / "features")

    eval_sets = open_all(cfg.eval, PixelLimit(cfg.data.max_image_pixels))
    if accelerator.is_main_process:
        run.list_skipped([skip for one in eval_sets for skip in one.all_skipped()])
    clip, image_processor = load_image_side(cfg.model.clip)
    known = Precomputed(language=cfg.distill.language)
    if cfg.taught:
        teacher = load_teacher(clip, cfg.model.clip)
        made = teacher_features(
            accelerator, teacher, cfg.data, known.language, Cache(cache / "teacher", cfg.align.cache_dtype)
        )
        known = known._replace(teacher=made)
    encoder = text_encoder(cfg.model, clip)
    tokenizer = run.tokenizer(cfg.text_tokenizer, training_captions(cfg.data), encoder.config if encoder else None)
    surveys = training.survey(cfg.data, tokenizer)
    run.check_data(surveys)
    lengths = [one.lengths for one in surveys]
    model, processor = adapt(cfg.model, clip, encoder, image_processor, tokenizer)
    source = {name: one.clone() for name, one in model.state_dict().items()} if cfg.align.wise_ft < 1 else {}
    if cfg.align.method == "lora":
        lora.attach(model, cfg.lora, new_text=cfg.model.text_encoder != "same", seed=cfg.model.seed)
        accelerator.print(lora.report(model))
    dual_encoder = DualEncoder(model, processor, logit_bias)

    trainer = None
    for stage in cfg.stages:
        if run.step >= stage.end and stage != cfg.stages[-1]:
            continue  # the checkpoint is of a later stage
        if trainer is not None:
            dual_encoder, trainer = training.release(trainer), None
        if cfg.align.method != "lora":
            select(dual_encoder, cfg, stage, clip)
        trainer = train(cfg, accelerator, run, dual_encoder, processor, stage, known, lengths, cache, eval_sets)
        if trainer is None:
            return

    assert trainer is not None
    model_dir = run.save_model(trainer, processor, partial(publish_aligned, config=cfg, source=source))
    if accelerator.is_main_process:
        saved = koclip.load(model_dir)
        report(run.path, Embedder(saved, cfg.eval.batch_size), eval_sets)
        print(NEXT.format(model=model_dir, kind=type(model).__name__))


def train(
    cfg: config.AlignConfig,
    accelerator: Accelerator,
    run: Run,
    dual_encoder: DualEncoder,
    processor: ProcessorMixin,
    stage: config.Stage,
    known: Precomputed,
    lengths: list[CaptionLengths | None],
    cache: Path,
    eval_sets: list[EvalSet],
) -> training.Trainer | None:
    """Train one stage; return None if the run was asked to stop."""
    images = processor.image_processor
    views = Views(cfg.data, view_size(images), centre_view(images)) if stage.images else None
    known = known if stage.taught else known._replace(teacher=None)
    if views and cfg.align.cache and not dual_encoder.trains("image"):
        made = image_features(
            accelerator, dual_encoder, cfg.data, views, Cache(cache / "images", cfg.align.cache_dtype)
        )
        known = known._replace(images=made)
    rates = layer_rates(dual_encoder, cfg.align.layer_decay)
    trainer = training.prepare(accelerator, dual_encoder, cfg.loss, cfg.optim, cfg.train, stage, cfg.distill, rates)

    progress = run.load(trainer, stage.start)
    train = cfg.train
    shard = Shard(train.batch_size, accelerator.process_index, accelerator.num_processes, train.micro_batch_size)
    assembler = Assembler(cfg.data, processor.tokenizer, views, known)
    start = Start(progress.step, progress.all_positions, stage.start)
    loader = train_loader(assembler, shard, start, lengths)
    batches = run.watch(loader, cfg.data.max_skipped_fraction)
    steps = training.steps(trainer, batches, progress.step, stage.end, train.log_every)
    bar = tqdm(steps, stage.name, stage.end, initial=progress.step, disable=not accelerator.is_main_process)
    with training.StopRequest(accelerator.device) as stop:
        for step, stats in bar:
            last, stopping = step == stage.end, stop.asked()
            if stats:
                run.log(step, stats)
                bar.set_postfix_str(training.progress_text(stats))
            run.list_events(trainer.health.take_events())
            if train.eval_every and step % train.eval_every == 0 and step != train.num_steps:
                with trainer.evaluating() as whole:
                    embedder = Embedder(TransformersEncoder(whole, processor), cfg.eval.batch_size)
                    run.log(step, {name: metric.value for name, metric in evaluate(embedder, eval_sets).items()})
            if last or stopping or (train.save_every and step % train.save_every == 0):
                run.save(trainer, step, train.keep_checkpoints, wait=last or stopping)
            if stopping and step != train.num_steps:
                accelerator.print(f"Stopped at step {step}; to go on, add: --resume auto --output_dir {run.path}")
                return None
    return trainer


if __name__ == "__main__":
    config.run(main, config.AlignConfig, default=Path(__file__).parent / "configs" / "align" / "scenes.yaml")
