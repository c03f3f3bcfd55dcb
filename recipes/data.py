"""Build a public data set from its source, where the configurations read it: data/<name>/.

python recipes/data.py                                             # list the data sets
python recipes/data.py emoji
python recipes/data.py tiny_imagenet_ko --accept_terms tiny_imagenet_ko

Downloads are checked by sha256 and kept in data/<name>/downloads, which may be deleted afterwards.
"""

import difflib
from pathlib import Path

from koclip import config
from koclip.data_sets import DATA_SETS, build


def main(cfg: config.DataSetConfig) -> None:
    """Run the recipe."""
    if not cfg.name:
        for name, each in DATA_SETS.items():
            print(f"{name}: {each.summary}\n  {each.size}\n  {each.licence}\n  {each.home}\n")
        print("To build one in data/emoji: koclip data emoji")
        return
    near = difflib.get_close_matches(cfg.name, DATA_SETS, n=1)
    fix = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(DATA_SETS)}"
    config.check(cfg.name in DATA_SETS, "name", cfg.name, fix)
    data_set = DATA_SETS[cfg.name]
    print(data_set.terms)
    accepted = not data_set.research_only or cfg.accept_terms == cfg.name
    fix = f"read the terms above; to accept them: --accept_terms {cfg.name}"
    config.check(accepted, "accept_terms", cfg.accept_terms, fix)
    for file in build(data_set, Path(cfg.output_dir or f"data/{cfg.name}")):
        print(file)


if __name__ == "__main__":
    config.run(main, config.DataSetConfig, first="name")
