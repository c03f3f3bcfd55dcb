"""Nothing is tested on what was fitted without a word: probes by content, and models by what their runs have kept."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fake_encoder import ENGLISH, ColourEncoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs_to_publish import pretrained
from test_evaluate import run as evaluate_recipe
from test_recipes import pretrain

from koclip import config
from koclip.config import ConfigError, EvalSetConfig, SourceConfig
from koclip.data.batches import Batch
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks.probe import linear_probe

KEYS = list(ENGLISH.values())
CLASSES = "".join(f"- {{key: {key}, en: {key}}}\n" for key in KEYS)


@pytest.fixture
def photos(tmp_path: Path, encoded: Callable[..., bytes]) -> Callable[..., SourceConfig]:
    """Return a function that writes photos of these numbers, each with a random label, and returns their source."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")

    def write(name: str, numbers: Sequence[int]) -> SourceConfig:
        labels = np.random.default_rng(0).integers(len(KEYS), size=1_000)
        rows = [
            {
                "image": encoded((number % 256, number // 256, 7)),
                "key": KEYS[labels[number]],
                "ko": f"사진 {number}번",
                "en": f"photo {number}",
            }
            for number in numbers
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        return SourceConfig(path=str(tmp_path / f"{name}.parquet"), label="key", captions={"ko": "ko", "en": "en"})

    return write


class Remembering(ColourEncoder):
    """Gives every picture a feature of its own: a probe of it knows what it was fitted on, and nothing else."""

    def _image_features(self, images: Sequence[Any]) -> torch.Tensor:
        numbers = [image.getpixel((0, 0))[0] + 256 * image.getpixel((0, 0))[1] for image in images]
        return torch.nn.functional.one_hot(torch.tensor(numbers), 1_000).float()


def probe_set(source: SourceConfig, train: SourceConfig | None) -> EvalSet:
    classes = str(Path(source.path).parent / "classes.yaml")
    return open_set(EvalSetConfig(source=source, train=train, classes=classes, tasks=["linear_probe"]))


def test_a_probe_that_is_tested_on_what_it_was_fitted_on_is_refused(photos, tmp_path) -> None:
    source = photos("photos", range(60))
    shutil.copy(source.path, tmp_path / "copy.parquet")
    for train in (source, SourceConfig(path=str(tmp_path / "copy.parquet"), label="key", captions={})):
        with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.train: .* 60 "):
            probe_set(source, train)
    part = photos("part", range(20, 60))
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.train: .* 40 "):
        probe_set(source, part)


def test_training_images_that_the_source_holds_are_left_out_of_training(photos) -> None:
    """With labels drawn at random, a probe of a model that remembers every picture is right by chance only."""
    eval_set = probe_set(photos("photos", range(100, 200)), photos("train", range(300)))
    assert len(eval_set.images) == 100
    assert len(eval_set.train.images) == 200
    assert [skip.key.rsplit("/")[-1] for skip in eval_set.train.skipped] == list(map(str, range(100, 200)))
    assert linear_probe(Embedder(Remembering(), 50), eval_set)["linear_probe/accuracy"].value < 0.45


def test_equal_images_of_one_set_are_not_fitted_and_tested(photos) -> None:
    eval_set = probe_set(photos("photos", [number % 60 for number in range(240)]), None)
    assert linear_probe(Embedder(Remembering(), 50), eval_set)["linear_probe/accuracy"].value < 0.45


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 40), min_size=8, max_size=60),
    st.lists(st.integers(0, 60), min_size=8, max_size=60),
)
def test_no_image_is_both_fitted_and_tested(photos, source, train) -> None:
    """For any two sets of images."""
    try:
        eval_set = probe_set(photos("photos", source), photos("train", train))
    except ConfigError:
        return
    tested, fitted = set(eval_set.images.digests), set(eval_set.train.images.digests)
    assert not tested & fitted
    assert len(eval_set.images) == len(source)
    assert len(eval_set.train.images) + len(eval_set.train.skipped) == len(train)
    assert eval_set.train.in_source == sum(number in source for number in train)


def training(source: SourceConfig, tested: SourceConfig, run: Path, steps: int = 6, **changes: str) -> None:
    sets = [{"source": {**config.to_dict(tested), "label": None}, "tasks": ["retrieval"]}]
    data = [{**config.to_dict(source), "label": None}]
    options = {
        "data.sources": json.dumps(data),
        "eval.sets": json.dumps(sets),
        "train.num_steps": str(steps),
        "optim.warmup_steps": "1",
        "output_dir": str(run),
        **changes,
    }
    pretrain(*(word for name, value in options.items() for word in (f"--{name}", value)))


def trained_on(folder: Path, name: str = "tested") -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["data"][name].get("trained_on")


def kept(run: Path) -> list[int] | None:
    """Return the images that a run has kept."""
    from koclip.training import pictures

    ids = pictures.read_ids(run)
    return None if ids is None else ids.tolist()


@pytest.fixture
def trained(photos, tmp_path) -> tuple[Path, SourceConfig]:
    """Return a run on 40 photos, each seen, and a source of 24 of which 9 are among them."""
    tested = photos("tested", range(31, 55))
    training(photos("photos", range(40)), tested, tmp_path / "run")
    return tmp_path / "run", tested


def test_images_that_a_model_was_trained_on_are_said(trained, tmp_path, capsys) -> None:
    run, tested = trained
    said = "trained on 9 of the 24 test images"
    assert trained_on(run) == {"images": 9, "of": 24, "unknown": []}
    assert len(kept(run)) == 40
    suite = {"device": "cpu", "cache_dir": None, "sets": [{"source": {**config.to_dict(tested), "label": None}}]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    capsys.readouterr()
    evaluate_recipe(tmp_path, "--model", str(run / "model"), "--output_dir", str(tmp_path / "evaluated"))
    assert trained_on(tmp_path / "evaluated") == trained_on(run)
    assert said in capsys.readouterr().out
    for name in ("table.md", "report.html"):
        assert said in (tmp_path / "evaluated" / name).read_text(encoding="utf-8")
    alone = shutil.copytree(run / "model", tmp_path / "elsewhere" / "model")
    evaluate_recipe(tmp_path, "--model", str(alone), "--output_dir", str(tmp_path / "unknown"))
    assert trained_on(tmp_path / "unknown") == {"images": None, "of": 24, "unknown": ["elsewhere/model"]}
    assert "the training images of elsewhere/model are unknown" in capsys.readouterr().out


def test_a_resumed_run_knows_all_of_its_images(trained, photos, tmp_path) -> None:
    run, tested = trained
    ids = kept(run)
    source = SourceConfig(path=str(tmp_path / "photos.parquet"), label="key", captions={"ko": "ko", "en": "en"})
    training(source, tested, tmp_path / "short", steps=2)
    some = kept(tmp_path / "short")
    assert 0 < len(some) <= 16
    assert set(some) < set(ids)
    changes = {"resume": "auto", "resume_with": "[train.num_steps]"}
    training(source, tested, tmp_path / "short", steps=6, **changes)
    assert kept(tmp_path / "short") == ids


def test_a_run_that_goes_on_without_its_record_says_that_it_is_not_known(trained, tmp_path) -> None:
    run, tested = trained
    shutil.rmtree(run / "training_pictures")
    source = SourceConfig(path=str(tmp_path / "photos.parquet"), label="key", captions={"ko": "ko", "en": "en"})
    training(source, tested, run, steps=8, resume="auto", resume_with="[train.num_steps]")
    assert trained_on(run) == {"images": None, "of": 24, "unknown": ["run/model"]}


def batch(numbers: Sequence[int], **changes: object) -> Batch:
    ids = torch.tensor([[0, number] for number in numbers])
    empty = torch.zeros(len(numbers), 1, dtype=torch.long)
    return Batch(empty, empty, ids, [], [], 0, **{"pixel_values": torch.zeros(len(numbers), 1), **changes})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9), max_size=9),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_the_record_holds_each_image_once(tmp_path, batches, waiting, ranks) -> None:
    """For any batches, processes, and however often it is brought up to date."""
    from koclip.training import pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_WAITING", waiting)
        patch.setattr(pictures.distributed, "barrier", lambda: None)
        for rank in range(ranks):
            patch.setattr(pictures.distributed, "rank", lambda rank=rank: rank)
            record = pictures.TrainingPictures(tmp_path, begins=True)
            for numbers in batches[rank::ranks]:
                record.add(batch(numbers))
                record.add(batch([5], pixel_values=None))  # sentences alone
            record.write()
    assert kept(tmp_path) == sorted({number for numbers in batches for number in numbers})


def test_a_base_that_is_not_here_is_not_known(tmp_path) -> None:
    """What an alignment began with was trained before: on what its own run tells, or on something unknown."""
    from koclip.training import pictures
    from koclip.training.pictures import TrainingPictures

    base = tmp_path / "base"
    (base / "model").mkdir(parents=True)
    (base / "config.yaml").write_text("model: {image_width: 32}", encoding="utf-8")
    TrainingPictures(base, begins=True).write()
    for run, clip in (("here", str(base / "model")), ("hub", "owner/clip")):
        (tmp_path / run / "model").mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text(f"model: {{clip: {clip}}}", encoding="utf-8")
        record = TrainingPictures(tmp_path / run, begins=True)
        record.add(batch([3, 1]))
        record.write()
    record = TrainingPictures(base, begins=False)
    record.add(batch([7]))
    record.write()
    known = {run: pictures.of_model(str(tmp_path / run / "model")) for run in ("base", "here", "hub")}
    assert {run: (ids.tolist(), unknown) for run, (ids, unknown) in known.items()} == {
        "base": ([7], []),
        "here": ([1, 3, 7], []),
        "hub": ([1, 3], ["owner/clip"]),
    }
    assert pictures.of_model("owner/clip") == (None, ["owner/clip"])


def test_an_image_is_known_by_its_content() -> None:
    from koclip.data.transforms import digest_of, image_id
    from koclip.training import pictures

    digests = [digest_of(bytes([number])) for number in range(9)]
    ids = np.sort(np.array([image_id(digest) for digest in digests[:4]]))
    assert pictures.count(ids, digests[2:]) == 2
    assert pictures.count(ids, []) == pictures.count(np.empty(0, np.int64), digests) == 0


def test_the_card_says_what_was_left_out_and_trained_on(tmp_path) -> None:
    from koclip.publishing.card import render
    from koclip.publishing.card_inputs import gather

    model = pretrained(tmp_path / "run")
    file = tmp_path / "run" / "results.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    results["data"]["scenes"] |= {"rows": 1_040, "images": 1_000, "skipped": 40}
    results["data"]["scenes"]["trained_on"] = {"images": 12, "of": 1_000, "unknown": ["owner/clip"]}
    file.write_text(json.dumps(results), encoding="utf-8")
    asked = config.PublishConfig(model=str(model), repo_id="someone/thing", data_cards=str(CARDS))
    evaluation = str(render(asked, gather(asked))).split("## Evaluation\n")[1].split("\n## ")[0]
    assert "- scenes: 1,000 of 1,040 rows, 40 left out\n" in evaluation
    assert "- scenes: the model was trained on 12 of the 1,000 test images\n" in evaluation
    assert "- scenes: the training images of owner/clip are unknown" in evaluation


CARDS = Path(__file__).parents[1] / "data_cards"
