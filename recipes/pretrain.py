"""Train a CLIP from random weights on (image, caption) pairs, and save a model that stock transformers loads.

accelerate launch recipes/pretrain.py                       # configs/pretrain/scenes.yaml, minutes on a laptop
accelerate launch recipes/pretrain.py --config recipes/configs/pretrain/flickr8k_ko_small.yaml
accelerate launch recipes/pretrain.py --help                # every key, its unit and default
"""

from pathlib import Path

from koclip import config, losses
from koclip.evaluation.sets import EvalSet
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.runs.session import Session, measures_other_data
from koclip.text.normalize import usable

TRY = """\
Try it:
  python -c "from transformers import pipeline; print(pipeline('zero-shot-image-classification', model='{model}')\
('{run}/pictures/example.png', candidate_labels={labels}, hypothesis_template='{{}}'))"
"""
NOTHING_MEASURED = "It was not evaluated: eval.sets is empty\n"
QUOTES = str.maketrans("'\"", "  ")  # a shell interprets them


def main(cfg: config.PretrainConfig) -> None:
    """Run the recipe: data, model, training, then evaluation of the saved model."""
    logit_bias = losses.initial_bias(cfg.loss)
    session = Session.open("pretrain", cfg)
    tokenizer = session.tokenizer(cfg.tokenizer)
    model, processor = from_scratch(cfg.model, tokenizer)
    dual_encoder = DualEncoder(model, processor, logit_bias)
    for stage in session.stages():
        session.fit(dual_encoder, processor, stage)
    model_dir = session.finish(processor)
    labels = labels_of(session.eval_sets)
    example = "" if measures_other_data(cfg) else TRY.format(model=model_dir, run=session.path, labels=labels)
    session.accelerator.print(f"\nSaved {model_dir}, a stock transformers model")
    session.accelerator.print((example if labels else NOTHING_MEASURED) + session.next_steps)


def labels_of(eval_sets: list[EvalSet]) -> list[str]:
    """Return up to three different captions of the sets, without characters that a shell interprets."""
    captions = [usable(texts)[0] for eval_set in eval_sets for row in eval_set.captions for texts in row.values()]
    return list(dict.fromkeys(text.translate(QUOTES) for text in captions))[:3]


if __name__ == "__main__":
    config.run(main, config.PretrainConfig, default=Path(__file__).parent / "configs" / "pretrain" / "scenes.yaml")
