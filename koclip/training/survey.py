"""What a run learns of its data before the first step, each process from its share of it."""

import itertools
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from koclip import distributed
from koclip.config import DataConfig
from koclip.data.sources import open_source
from koclip.data.survey import BLOCK, Survey, join, look


def survey(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Survey]:
    """Look at every source once; call it on every process.

    Args:
        config: The sources, and what batches are grouped by.
        tokenizer: Measures the captions.

    Raises:
        SourceError: a source cannot be opened.
    """
    surveys = []
    rank, world_size = distributed.rank(), distributed.world_size()
    for one in config.sources:
        source = open_source(one, config.seed)
        blocks = look(source, config, tokenizer, rank, world_size)
        # The bar appears where it takes longer than five seconds.
        options: dict[str, Any] = {"unit": " rows", "unit_scale": BLOCK * world_size, "delay": 5, "disable": rank > 0}
        mine = list(tqdm(blocks, f"reading the captions of {one.short_name}", **options))
        everyone = itertools.chain(*distributed.gather_objects(mine))
        surveys.append(join(source, config, tokenizer, list(everyone)))
    return surveys
