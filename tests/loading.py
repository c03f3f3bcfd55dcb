"""What the tests of the loader share: small pools, the first batches and their comparison, sources in memory."""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence

import datasets
import pytest
import torch
from PIL import Image

from koclip.config import DataConfig, SourceConfig
from koclip.data import loader
from koclip.data.batches import Assembler, Batch
from koclip.data.loader import Start, train_loader
from koclip.data.order import BatchPart
from koclip.data.sources import MapSource, Row, StreamSource
from koclip.data.transforms import Views

SCENES = SourceConfig(scenes_size=80)
ALONE = BatchPart(8)


def config(source: SourceConfig, *others: SourceConfig, **options) -> DataConfig:
    return DataConfig(sources=[source, *others], **{"length_pool": 3, "shuffle_buffer": 6, **options})


def batches(
    config: DataConfig, tokenizer, count: int, shard: BatchPart = ALONE, start_step: int = 0, positions: Sequence = ()
) -> list[Batch]:
    assembler = Assembler(config, tokenizer, Views(config, 16))
    return list(itertools.islice(train_loader(assembler, shard, Start(start_step, positions)), count))


def assert_equal(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others)
    for batch, other in zip(ones, others, strict=True):
        assert batch.keys == other.keys
        assert torch.equal(batch.pixel_values, other.pixel_values)
        assert torch.equal(batch.pair_ids, other.pair_ids)
        assert torch.equal(batch.input_ids, other.input_ids)
        assert torch.equal(batch.attention_mask, other.attention_mask)
        assert batch.skipped == other.skipped


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class Pile(MapSource):
    """A map source in memory. Rows in `broken` have no picture, or no caption, by turns."""

    def __init__(self, name: str, size: int, broken: set[int], weight: float | None = None, group: int = 1) -> None:
        self.config = SourceConfig(path=name, captions={"ko": "ko", "en": "en"}, weight=weight)
        self.group, self._rows = group, [pile_row(name, number, broken) for number in range(size)]
        self.broken = [f"{name}/{number}" for number in sorted(broken)]
        self.good = [row.key for row in self._rows if row.key not in self.broken]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        return [self._rows[index] for index in indices]

    def captions(self, indices: Sequence[int]) -> list[dict[str, list[str]]]:
        return [self._rows[index].captions for index in indices]


def pile_row(name: str, number: int, broken: set[int]) -> Row:
    captions = {"ko": [f"{number}번 " + "사진 " * (number % 5)], "en": [f"picture {number}", "a picture"]}
    captionless = number in broken and number % 2
    return Row(b"junk" if number in broken else picture(number), {} if captionless else captions, f"{name}/{number}")


def stream(name: str, sizes: Sequence[int], broken: set[int], weight: float | None = None) -> StreamSource:
    """Return a stream of shards of these sizes; its rows are those of a `Pile`."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]

    def records(shards: list[tuple[int, int]]) -> Iterator[dict[str, object]]:
        for start, size in shards:
            for number in range(start, start + size):
                row = pile_row(name, number, broken)
                yield {"image": row.image, **{key: row.captions.get(key) for key in ("ko", "en")}, "id": str(number)}

    shards = list(zip(starts, sizes, strict=True))
    table = datasets.IterableDataset.from_generator(records, gen_kwargs={"shards": shards})
    return StreamSource(table, SourceConfig(path=name, captions={"ko": "ko", "en": "en"}, weight=weight))


@contextlib.contextmanager
def opening(*sources: Pile | StreamSource) -> Iterator[list[SourceConfig]]:
    """Let the loader open these sources, and yield their configs."""
    by_name = {source.config.path: source for source in sources}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "open_source", lambda config, seed: by_name[config.path])
        yield [source.config for source in sources]
