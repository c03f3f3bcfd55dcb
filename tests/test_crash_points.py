"""Whatever file operation is the last one: a checkpoint, a shard, an index and a model are the old or the new ones."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_encoder import COLOURS, ColourEncoder
from helpers.crash_points import crash_everywhere, tree
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModel, AutoProcessor

from koclip import storage
from koclip.config import ConfigError, DataConfig, IndexConfig, SourceConfig
from koclip.embeddings import fill
from koclip.embeddings.fill import Work
from koclip.embeddings.readers import CaptionReader, ItemBatch
from koclip.embeddings.store import Shard, Store
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.models.stock import save_stock_model
from koclip.runs.checkpoints import Checkpoints, Snapshot
from koclip.search import build, open_index

pytestmark = pytest.mark.timeout(300)


def checkpoint(folder: Path, step: int, seed: int, keep: int = 1) -> None:
    """Save a checkpoint, and all that a run does with it."""
    series = Checkpoints(folder / "checkpoints")
    snapshot = Snapshot({"weights": torch.full((8,), seed)}, {"step": step, "seed": seed})
    series.finish(series.begin(step), snapshot.write, keep)
    series.wait()


@pytest.mark.parametrize("step", [2, 1], ids=["another step", "the same step"])
def test_a_checkpoint_is_the_old_or_the_new_one(step: int, tmp_path: Path) -> None:
    before = tmp_path / "before"
    checkpoint(before, 1, seed=1)
    old = tree(before / "checkpoints" / "step-00000001")
    checkpoint(tmp_path / "after", step, seed=2)
    new = tree(tmp_path / "after" / "checkpoints" / f"step-{step:08d}")
    seen = []

    def check(root: Path) -> None:
        newest = Checkpoints(root / "checkpoints").newest_intact()
        assert newest is not None
        seen.append(tree(newest))
        assert seen[-1] in (old, new)
        checkpoint(root, 3, seed=3)  # and the run goes on
        assert [path.name for path in (root / "checkpoints").iterdir()] == ["step-00000003"]

    count = crash_everywhere(before, lambda root: checkpoint(root, step, seed=2), check)
    print(f"checkpoint, {step}: {count} crash points")  # noqa: T201 - the issue asks for the count
    assert old in seen
    assert new in seen


def test_a_shard_of_features_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "SHARD_ROWS", 4)
    config = DataConfig(sources=[SourceConfig(scenes_size=8)])

    def embed(piece: ItemBatch) -> torch.Tensor:
        return torch.tensor([[[float(len(text)), 1.0]] for text in piece.inputs])

    work = Work(CaptionReader("en"), embed, torch.float16, "captions")

    def filled(root: Path) -> None:
        fill.fill(Store(root / "features", "align.cache_dir"), {"features": "lengths"}, config, work)

    filled(tmp_path / "whole")
    (tmp_path / "before").mkdir()
    counts = []

    def check(root: Path) -> None:
        shards = [Shard(path, "") for path in sorted((root / "features").rglob("shard-*"))]
        for shard in shards:
            shard.verify()
        counts.append(len(shards))
        filled(root)
        leftover = [path for path in (root / "features").rglob("writing-*") if path.is_file()]
        assert not leftover
        assert tree(root) == tree(tmp_path / "whole")

    count = crash_everywhere(tmp_path / "before", filled, check)
    print(f"features: {count} crash points")  # noqa: T201 - the issue asks for the count
    assert set(counts) == {0, 1, 2}


def indexed(root: Path) -> None:
    """Build an index of a folder of pictures, in shards of two."""
    config = IndexConfig(model="colours", images=str(root.parent / "photos"), batch_size=2, approximate="no")
    build.build(config, ColourEncoder(), root / "index")


def paint(folder: Path, name: str, colour: str) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (12, 8), COLOURS[colour]).save(folder / name)


@pytest.mark.parametrize("anew", [True, False], ids=["a new index", "an index of changed pictures"])
def test_an_index_is_the_old_or_the_new_one(anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", 2)
    before = tmp_path / "before"
    before.mkdir()
    for number in range(4):
        paint(tmp_path / "photos", f"{number}.png", "빨강")
    if not anew:
        indexed(before)
        paint(tmp_path / "photos", "0.png", "파랑")
        paint(tmp_path / "photos", "3.png", "초록")
    old = None if anew else colours(before / "index")
    indexed(tmp_path / "whole")
    new, states = colours(tmp_path / "whole" / "index"), []

    def check(root: Path) -> None:
        try:
            states.append(colours(root / "index"))
            assert states[-1] in (old, new)
        except ConfigError:
            assert anew  # it is not there yet, or said not to be finished
        indexed(root)
        assert colours(root / "index") == new

    count = crash_everywhere(before, indexed, check)
    print(f"index, {'new' if anew else 'changed'}: {count} crash points")  # noqa: T201 - the issue asks for the count
    assert new in states
    assert anew or old in states


def colours(directory: Path) -> list[Any]:
    """Return what is in an index."""
    index = open_index(directory)
    return [(index.entry(place), index._shards.gather(torch.tensor([place])).tolist()) for place in range(len(index))]


@pytest.mark.parametrize("there", [False, True], ids=["nothing", "a model"])
def test_a_model_directory_is_the_old_or_the_new_one(there: bool, tmp_path: Path) -> None:
    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    encoder = DualEncoder(model, processor)
    weights = {name: weight.clone() for name, weight in encoder.state_dict().items()}

    def saved(root: Path, scale: float) -> None:
        with storage.atomic(root / "model") as partial:
            save_stock_model(partial, model, processor, {**weights, "model.logit_scale": torch.tensor(scale)})

    before = tmp_path / "before"
    before.mkdir()
    if there:
        saved(before, 1.0)
    saved(tmp_path / "after", 2.0)
    old, new, states = tree(before / "model"), tree(tmp_path / "after" / "model"), []

    def check(root: Path) -> None:
        states.append(tree(root / "model"))
        assert states[-1] in (old, new)

    count = crash_everywhere(before, lambda root: saved(root, 2.0), check)
    print(f"model over {'a model' if there else 'nothing'}: {count} crash points")  # noqa: T201 - the issue asks for the count
    assert old in states
    assert new in states
    shutil.copytree(tmp_path / "after" / "model", tmp_path / "loaded")
    assert AutoModel.from_pretrained(tmp_path / "loaded").logit_scale.item() == 2.0
    AutoProcessor.from_pretrained(tmp_path / "loaded")


def test_where_directories_cannot_be_swapped_the_old_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems that are mounted over a network."""
    monkeypatch.setattr(storage, "_swap", lambda *_: False)

    def saved(root: Path, text: str) -> None:
        with storage.atomic(root / "model") as partial:
            partial.mkdir()
            (partial / "config.json").write_text(text)
            (partial / "weights").write_text(text)

    saved(tmp_path / "before", "old")
    saved(tmp_path / "after", "new")
    old, new, states = tree(tmp_path / "before" / "model"), tree(tmp_path / "after" / "model"), []

    def check(root: Path) -> None:
        states.append(tree(root / "model"))
        assert states[-1] in (old, new) or (states[-1] is None and tree(root / "replaced-model") == old)
        saved(root, "new")
        assert tree(root) == tree(tmp_path / "after")

    crash_everywhere(tmp_path / "before", lambda root: saved(root, "new"), check)
    assert {len(state or ()) for state in states} == {0, 2}


@pytest.mark.parametrize("forget", ["sync", "name"])
def test_a_write_that_is_not_atomic_is_found(forget: str, tmp_path: Path) -> None:
    """This test of tests fails if files are written under their name, or renamed before they are on disk."""
    (tmp_path / "before").mkdir()
    save_file({"a": torch.zeros(100)}, tmp_path / "before" / "file")
    old, new = tree(tmp_path / "before"), None
    states = []

    def work(root: Path) -> None:
        target = root / "file" if forget == "name" else root / "writing-file"
        save_file({"a": torch.ones(100)}, target)
        target.replace(root / "file")
        storage.sync(root / "file")

    (tmp_path / "after").mkdir()
    work(tmp_path / "after")
    new = tree(tmp_path / "after")
    crash_everywhere(tmp_path / "before", work, lambda root: states.append(tree(root)))
    assert any({name: state[name] for name in ("file",)} not in (old, new) for state in states)
