"""What 8 bits lose in retrieval: the numbers of the card are those of the graphs, and a broken graph shows."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from test_recipes import SMALL, pretrain
from transformers import AutoProcessor

from koclip import config
from koclip.config import ConfigError, EvalSetConfig, PublishConfig, SourceConfig
from koclip.encoders import load
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet
from koclip.evaluation.tasks.retrieval import retrieval
from koclip.metrics import first_ranks
from koclip.publishing.card import render
from koclip.publishing.card_inputs import gather
from koclip.publishing.checks import check_files, publishable
from koclip.publishing.formats import int8 as quantized
from koclip.publishing.formats.int8 import measure, open_sets, read
from koclip.publishing.formats.onnx import export

ROOT = Path(__file__).parents[1]
SCENES = "[{source: {scenes_part: test, scenes_size: 60}}]"
RECALLS = [f"{task}/recall@{k}" for task in ("text_to_image", "image_to_text") for k in (1, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that has learnt something, with its graphs and their measurement."""
    run = tmp_path_factory.mktemp("runs") / "run"
    options = ("--train.num_steps", "60", "--train.batch_size", "32", "--optim.lr", "3e-3", "--eval.sets", SCENES)
    pretrain(*options, "--output_dir", str(run), base=SMALL)
    export(run / "model", run / "model", int8=True)
    measure(run / "model", sets(run / "model"), "org/name")
    return run / "model"


def sets(model: Path) -> list[EvalSet]:
    """Open what is measured on if nothing is named: what the run was evaluated on."""
    return open_sets([], json.loads((model.parent / "results.json").read_text(encoding="utf-8"))["data"])


def numbers(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "onnx" / "results.json").read_text(encoding="utf-8"))["metrics"])


def card_of(model: Path) -> str:
    cfg = PublishConfig(model=str(model), repo_id="org/name", data_cards=str(ROOT / "data_cards"))
    return str(render(cfg, gather(cfg), year=2026))


def embedded(model: Path, pictures: Any, texts: list[str], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed with graphs, one by one."""
    processor = AutoProcessor.from_pretrained(model)
    sides = []
    for side, items in (("vision", pictures), ("text", texts)):
        session = onnxruntime.InferenceSession(str(model / "onnx" / f"{side}_model{kind}.onnx"))
        rows = []
        for item in items:
            inputs = processor(**({"images": item} if side == "vision" else {"text": item}), return_tensors="np")
            rows.append(session.run(None, {entry.name: inputs[entry.name] for entry in session.get_inputs()})[0])
        sides.append(torch.from_numpy(np.concatenate(rows)))
    return sides[0], sides[1]


@pytest.mark.parametrize("language", ["ko", "en"])
def test_the_numbers_are_those_of_the_whole_matrix(model: Path, language: str) -> None:
    (eval_set,) = sets(model)
    assert len(eval_set.images) == 60
    measured_metrics = numbers(model)
    embedder = Embedder(load(model, "cpu"), 1)
    plain = retrieval(embedder, eval_set, language, embedder.images(eval_set.images))
    texts = list(dict.fromkeys(text for own in eval_set.captions for text in own[language]))
    images, captions = embedded(model, eval_set.images, texts, "_quantized")
    similarity = captions @ images.T
    right = torch.tensor([[text in own[language] for own in eval_set.captions] for text in texts])
    ranks = {"text_to_image": first_ranks(similarity, right), "image_to_text": first_ranks(similarity.T, right.T)}
    for name in RECALLS:
        task, measured = name.split("/")
        k = int(measured.split("@")[1])
        exact, int8, drop = (
            measured_metrics[f"scenes/{language}/{key}"]
            for key in (name, f"{task}_int8/{measured}", f"{task}_int8/drop@{k}")
        )
        assert exact["value"] == pytest.approx(plain[name].value, abs=0.02)  # one picture of 60, if two nearly tie
        assert exact["n"] == plain[name].n
        assert int8["value"] == (ranks[task] < k).double().mean().item()
        assert drop["value"] == pytest.approx(exact["value"] - int8["value"])
        assert int8["n"] == drop["n"] == len(ranks[task])
        assert abs(drop["value"]) < 0.1
    assert measured_metrics[f"scenes/{language}/text_to_image/recall@5"]["value"] > 0.25  # chance: 0.08


def test_the_card_says_what_was_measured(model: Path) -> None:
    section = card_of(model).split("## ONNX in 8 bits\n")[1].split("\n## ")[0]
    megabytes = [
        sum((model / "onnx" / f"{side}_model{kind}.onnx").stat().st_size for side in ("text", "vision")) / 1e6
        for kind in ("_quantized", "")
    ]
    assert "8 bits: {:.1f} MB instead of {:.1f} MB.".format(*megabytes) in section
    assert "Measured on scenes (60 images; R@1 by chance: about 1.7 %)." in section
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| scenes")]
    assert [row[1] for row in rows] == ["ko"] * 4 + ["en"] * 4
    metrics = numbers(model)
    for language in ("ko", "en"):
        for name, row in zip(RECALLS, [row for row in rows if row[1] == language], strict=True):
            task, measured = name.split("/")
            k = measured.split("@")[1]
            assert row[2] == f"{task.replace('_', ' ')}, R@{k}"
            for cell, key in zip(row[3:5], (name, f"{task}_int8/{measured}"), strict=True):
                assert float(cell) == round(100 * metrics[f"scenes/{language}/{key}"]["value"], 1)
            drop = metrics[f"scenes/{language}/{task}_int8/drop@{k}"]
            low, high = drop["ci95"]
            numbers_of_cell = [float(word.strip("()*")) for word in row[5].replace(" to ", " ").split() if word != "*"]
            assert numbers_of_cell == [round(100 * value, 1) for value in (drop["value"], low, high)]
            assert row[5].endswith("*") == (low > 0 or high < 0)
            assert row[6] == f"{drop['n']:,}"


def test_what_is_published_names_nothing_of_this_machine(model: Path) -> None:
    assert "onnx/results.json" in publishable(model)
    wrong = [problem for check in check_files(model, "org/name") for problem in check.problems if "onnx" in problem]
    assert wrong == []
    assert "command" not in (model / "onnx" / "results.json").read_text(encoding="utf-8")


def test_a_broken_graph_shows(model: Path, tmp_path: Path) -> None:
    """The weights of a layer in other rows: shapes, names and norms are as they were."""
    import onnx
    from onnx import numpy_helper

    shutil.copytree(model.parent, tmp_path / "run")
    broken = tmp_path / "run" / "model"
    file = broken / "onnx" / "text_model_quantized.onnx"
    graph = onnx.load(file)
    small = (tensor for tensor in reversed(graph.graph.initializer) if tensor.data_type == onnx.TensorProto.UINT8)
    weights = next(tensor for tensor in small if len(tensor.dims) == 2)  # the others are zero points
    rolled = np.roll(numpy_helper.to_array(weights), 5, axis=0)
    weights.CopyFrom(numpy_helper.from_array(rolled, weights.name))
    onnx.save(graph, file)
    losses = measure(broken, sets(model), "org/name")
    for language in ("ko", "en"):
        drop = numbers(broken)[f"scenes/{language}/text_to_image_int8/drop@5"]
        assert drop["value"] > 0.1
        assert drop["ci95"][0] > 0
    lost = next(row for row in losses.rows if row[1:3] == ("ko", "text to image, R@5"))
    assert lost[5].startswith("+")
    assert lost[5].endswith("*")
    assert " | ".join(lost) in card_of(broken)


def test_graphs_that_were_not_asked_for_again_are_gone(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    measured = json.loads((model.parent / "results.json").read_text(encoding="utf-8"))["fingerprint"]
    assert read(tmp_path / "model", measured) is not None
    export(tmp_path / "model", tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model" / "onnx").iterdir()) == [
        "text_model.onnx",
        "vision_model.onnx",
    ]
    assert read(tmp_path / "model", measured) is None


def test_a_card_without_graphs_in_8_bits_says_nothing_of_them(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model.parent, tmp_path / "run")
    (tmp_path / "run" / "model" / "onnx" / "results.json").unlink()
    assert "8 bits" not in card_of(tmp_path / "run" / "model")


def described(**changes: object) -> dict[str, object]:
    source = SourceConfig(scenes_part="test", scenes_size=30)
    return {"source": config.to_dict(EvalSetConfig(source=source, tasks=["retrieval", "stress"])) | changes}


def test_what_is_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    named = EvalSetConfig(source=SourceConfig(name="mine", scenes_part="test", scenes_size=20))
    assert [eval_set.name for eval_set in open_sets([named], {"scenes": described()})] == ["mine"]
    retrieved = {"scenes": described(), "cifar10": described(tasks=["zero_shot"])}
    gallery = described(gallery=[config.to_dict(SourceConfig(scenes_part="train", scenes_size=40))])
    assert [len(eval_set.images) for eval_set in open_sets([], retrieved)] == [30]
    (eval_set,) = open_sets([], {"scenes": gallery})
    assert len(eval_set.gallery["ko"]) >= 40
    assert [len(eval_set.images) for eval_set in open_sets([], {"scenes": described(max_images=8)})] == [8]
    monkeypatch.setattr(quantized, "_MOST", 12)
    assert [len(eval_set.images) for eval_set in open_sets([], retrieved)] == [12]
    (eval_set,) = open_sets([], {"cifar10": described(tasks=["zero_shot"])})
    assert (eval_set.name, eval_set.config) == ("scenes", EvalSetConfig())


@pytest.mark.parametrize("change", [{"path": "gone.parquet"}, {"colour": "red"}])
def test_what_cannot_be_read_is_named_with_a_remedy_that_works(change: dict[str, str]) -> None:
    source = config.to_dict(SourceConfig()) | change
    with pytest.raises(ConfigError, match=r"int8_sets: the data set scenes of .*(gone.parquet|colour)") as raised:
        open_sets([], {"scenes": described(source=source)})
    remedy = shlex.split(str(raised.value)[str(raised.value).index("--int8_sets") :])
    cfg = config.parse(PublishConfig, ["--model", "a", "--repo_id", "org/a", "--onnx", "int8", *remedy])
    assert cfg.int8_sets == [EvalSetConfig()]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--int8_sets", SCENES], "int8_sets: got ['scenes'], "),
        (
            ["--onnx", "int8", "--int8_sets", "[{source: {path: a}}, {source: {path: b/a.csv}}]"],
            "int8_sets[].source.name: got ['a', 'a']",
        ),
        (["--onnx", "int8", "--int8_sets", "[{tasks: [stress], source: {path: a}}]"], "expected retrieval"),
    ],
)
def test_mistakes_are_told(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(PublishConfig, ["--model", "a", "--repo_id", "org/a", *args])
    assert words in capsys.readouterr().err
