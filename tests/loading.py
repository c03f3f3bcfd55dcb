"""What the tests of the loader share: a config of small pools, the first batches, and their comparison."""

import itertools

import torch

from koclip.config import DataConfig, SourceConfig
from koclip.data.batches import Batch
from koclip.data.loader import train_loader
from koclip.data.order import Shard
from koclip.data.transforms import Views

SCENES = SourceConfig(scenes_size=80)
ALONE = Shard(8)


def config(source: SourceConfig, *others: SourceConfig, **options) -> DataConfig:
    return DataConfig(sources=[source, *others], **{"length_pool": 3, "shuffle_buffer": 6, **options})


def batches(config: DataConfig, tokenizer, count: int, shard: Shard = ALONE, **start) -> list[Batch]:
    return list(itertools.islice(train_loader(config, tokenizer, Views(config, 16), shard, **start), count))


def assert_equal(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.pixel_values, other.pixel_values)
        assert torch.equal(one.pair_ids, other.pair_ids)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.attention_mask, other.attention_mask)
        assert one.skipped == other.skipped
