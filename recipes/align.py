"""Give a CLIP a Korean or multilingual text encoder, or adapt its own text encoder, and keep its image space.

accelerate launch recipes/align.py                          # configs/align/scenes.yaml, a minute on a laptop
accelerate launch recipes/align.py --config recipes/configs/align/klue_roberta_base_frozen.yaml
accelerate launch recipes/align.py --help                   # every key, its unit and default
"""

from pathlib import Path

from koclip import config, losses
from koclip.align.methods import METHODS, AlignedModelWriter, adapt, load_teacher, text_encoder
from koclip.data.batches import Precomputed
from koclip.data.transforms import views_for
from koclip.embeddings.fill import Cache, image_features, teacher_features
from koclip.models.dual_encoder import DualEncoder
from koclip.models.pretrained import load_image_side
from koclip.runs.session import Session

SAVED = """
Saved {model}, a stock {kind}: AutoModel and AutoProcessor load it
{next_steps}"""


def main(cfg: config.AlignConfig) -> None:
    """Run the recipe: source, text side, teacher, one stage of training after the other, evaluation."""
    logit_bias, method = losses.initial_bias(cfg.loss), METHODS[cfg.align.method]
    session = Session.open("align", cfg)
    folder = Path(cfg.align.cache_dir or session.path / "features")
    cache = Cache(folder, cfg.align.cache_dtype, cfg.train.fast)
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
    write = AlignedModelWriter(cfg, model)
    report = method.attach(model, cfg)
    if report:
        session.accelerator.print(report)
    dual_encoder = DualEncoder(model, processor, logit_bias)
    for stage in session.stages():
        method.set_trainable(dual_encoder, cfg, stage, clip)
        images = None
        if cfg.align.cache and stage.images and not dual_encoder.trains("image"):
            views, part = views_for(cfg.data, image_processor), cache.part("images")
            images = image_features(session.accelerator, dual_encoder, cfg.data, views, part)
        session.fit(dual_encoder, processor, stage, precomputed._replace(images=images))
    model_dir = session.finish(processor, write)
    session.accelerator.print(SAVED.format(model=model_dir, kind=type(model).__name__, next_steps=session.next_steps))


if __name__ == "__main__":
    config.run(main, config.AlignConfig, default=Path(__file__).parent / "configs" / "align" / "scenes.yaml")
