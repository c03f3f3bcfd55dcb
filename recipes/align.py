"""Give a CLIP a Korean or multilingual text encoder, or adapt its own text encoder, and keep its image space.

accelerate launch recipes/align.py                          # configs/align/scenes.yaml, a minute on a laptop
accelerate launch recipes/align.py --config recipes/configs/align/klue_roberta_base_frozen.yaml
accelerate launch recipes/align.py --help                   # every key, its unit and default
"""

from dataclasses import replace
from pathlib import Path

from koclip import config, losses
from koclip.align.features import standardized_texts
from koclip.align.methods import METHODS, AlignedModelWriter, adapt, load_teacher, pooling_report, text_encoder
from koclip.data.batches import Precomputed
from koclip.data.transforms import views_for
from koclip.embeddings.fill import Cache, image_features, teacher_features
from koclip.evaluation.report.write import Source
from koclip.models.dual_encoder import DualEncoder
from koclip.models.open_clip import stock_source
from koclip.models.pretrained import load_image_side
from koclip.models.stock import is_stock, layout_of
from koclip.runs.session import Session

SAVED = """
Saved {model}, a {kind}: {loaded_by}
{next_steps}"""


def main(cfg: config.AlignConfig) -> None:
    """Run the recipe: source, text side, teacher, one stage of training after the other, evaluation."""
    logit_bias, method = losses.initial_bias(cfg.loss), METHODS[cfg.align.method]
    session = Session.open("align", cfg)
    folder = Path(cfg.align.cache_dir or session.path / "features")
    cache = Cache(folder, cfg.align.cache_dtype, cfg.train.fast)
    named = cfg.model.clip
    cfg = replace(cfg, model=replace(cfg.model, clip=stock_source(named, session.path / "source")))
    clip, image_processor = load_image_side(cfg.model.clip)
    precomputed = Precomputed(language=cfg.distill.language)
    if cfg.taught:
        teacher = load_teacher(clip, cfg.model.clip)
        part = cache.part("teacher")
        features = teacher_features(session.accelerator, teacher, cfg.data, precomputed.language, part)
        precomputed = precomputed._replace(teacher=features)
    encoder = text_encoder(cfg.model, clip)
    tokenizer = session.tokenizer(cfg.text_tokenizer, encoder.config if encoder else None)
    model, processor = adapt(cfg.model, clip, encoder, image_processor, tokenizer)
    write = AlignedModelWriter(cfg, model, clip)
    dual_encoder = DualEncoder(model, processor, logit_bias)
    source_images = None
    if any(stage.preserves and stage.trains_image for stage in cfg.stages):  # before adapters change the image tower
        views = views_for(cfg.data, image_processor)
        source_images = image_features(session.accelerator, dual_encoder, cfg.data, views, cache.part("images"))
    for line in filter(None, (pooling_report(cfg.model), method.attach(model, cfg))):
        session.accelerator.print(line)
    for stage in session.stages():
        method.set_trainable(dual_encoder, cfg, stage, clip)
        known = precomputed
        if dual_encoder.trains_tower("image"):
            known = known._replace(source_images=source_images)
        elif stage.images and cfg.align.cache:
            pooled = dual_encoder.trains_projection("image")
            views, part = views_for(cfg.data, image_processor), cache.part("images-pooled" if pooled else "images")
            images = image_features(session.accelerator, dual_encoder, cfg.data, views, part)
            known = known._replace(images=images, images_pooled=pooled)
        if stage.text_layers == 0:
            texts = standardized_texts(session.accelerator, dual_encoder.model, processor.tokenizer, cfg, cache)
            known = known._replace(texts=texts)
        session.fit(dual_encoder, processor, stage, known)
    source = (
        Source(named, cfg.model.clip, folder / "evaluation") if cfg.align.compare_source and is_stock(clip) else None
    )
    model_dir = session.finish(processor, write, source)
    facts = {"kind": type(model).__name__, "loaded_by": layout_of(model).loaded_by, "next_steps": session.next_steps}
    session.accelerator.print(SAVED.format(model=model_dir, **facts))


if __name__ == "__main__":
    config.run(main, config.AlignConfig, default=Path(__file__).parent / "configs" / "align" / "scenes.yaml")
