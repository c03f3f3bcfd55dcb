"""Cut the vocabulary of a text encoder or a dual encoder to the pieces that your texts use. Nothing is trained.

python recipes/trim.py --model intfloat/multilingual-e5-small --texts captions.txt --output_dir e5_small_ko_en
python recipes/trim.py --config recipes/configs/trim/e5_small_ko_en.yaml

Texts whose pieces are all kept get the same embeddings, bit for bit. The command checks this before it writes
anything. trim.json lists the texts that change.
"""

from pathlib import Path

from koclip import config
from koclip.data.texts import read_texts
from koclip.models.trim import Source, trim


def main(cfg: config.TrimConfig) -> None:
    """Run the recipe."""
    texts = read_texts(cfg.texts, cfg.sources, cfg.encoding)
    source = Source(cfg.model)
    report = trim(source, texts, cfg)
    for name in ("pieces", "bytes"):
        before, after = report[name]["before"], report[name]["after"]
        print(f"{name}: {before:,} -> {after:,} ({after / before:.1%})")
    for name, group in report["texts"].items():
        print(f"{name} texts that change: {group['changed']:,} of {group['texts']:,} ({group['share']:.2%})")
    compared = report["embeddings_compared"]
    result = f"{compared} texts of kept pieces compared, all equal" if compared else "not compared: all texts change"
    print(f"embeddings: {result}")
    print(f"Saved {cfg.output_dir}, and the texts that change in {Path(cfg.output_dir) / 'trim.json'}")
    print(f"Use it: koclip align --model.text_encoder {cfg.output_dir}")


if __name__ == "__main__":
    config.run(main, config.TrimConfig)
