"""Which models answer English: from written numbers, and from whole runs of tiny towers; the small text encoder."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from align_runs import align, write_encoder, write_pairs
from helpers.tokenizer_families import FAMILIES
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CLIPImageProcessor,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from koclip import config
from koclip.config import SourceConfig
from koclip.metrics import Metric
from koclip.models.pretrained import load_image_side, load_text_encoder
from koclip.text import tokenizers

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for the script that it runs

import cross_lingual  # noqa: E402
import masked_lm  # noqa: E402
import recipe_runs  # noqa: E402
from cross_lingual import BASE, RUNS, Run  # noqa: E402
from recipe_runs import Cost  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_before")


def test_each_run_differs_from_the_base_in_one_factor_but_the_last() -> None:
    changes = [sum(own != base for own, base in zip(run, BASE, strict=True)) for run in RUNS]
    assert sorted(changes[:-1]) == [0] + [1] * (len(RUNS) - 2)
    assert RUNS[-1] == Run("random", "random", BASE.steps)
    assert len({run.name for run in RUNS}) == len(RUNS)


def test_the_configuration_trains_on_korean_alone_and_measures_both_languages() -> None:
    parsed = config.parse(config.AlignConfig, ["--config", cross_lingual.parser().parse_args([]).config])
    assert parsed.data.sources[0].languages == {"ko": 1.0}
    assert list(parsed.eval.sets[0].source.captions) == ["ko", "en"]
    assert (parsed.align.method, parsed.train.num_steps) == ("projection", BASE.steps)


def test_the_commands_in_the_first_lines_parse() -> None:
    for script in (cross_lingual, masked_lm):
        assert f"python recipes/benchmarks/{script.__name__}.py" in (script.__doc__ or "")
    assert masked_lm.parser().parse_args(["ko.txt"]).output_dir == cross_lingual.parser().parse_args([]).korean


ENGLISH = {Run("multilingual", "imagenet", 700): 0.2, Run("multilingual", "imagenet", 100): 0.05}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[config.AlignConfig]:
    """Replace the runs: parse their commands, and write the numbers that they would write."""
    parsed: list[config.AlignConfig] = []

    def start(recipe: str, *words: str) -> Cost:
        assert recipe == "align.py"
        parsed.append(config.parse(config.AlignConfig, list(words)))
        folder = Path(parsed[-1].output_dir or "")
        english = next((value for run, value in ENGLISH.items() if run.name == folder.name), 0.01)
        metrics = {
            f"photos/{language}/text_to_image/recall@10": Metric(value, (value - 0.01, value + 0.03), 99).to_dict()
            for language, value in (("ko", 0.456), ("en", english))
        }
        folder.mkdir(parents=True)
        results = {"metrics": metrics, "data": {"photos": {"images": 500}}}
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        return Cost(2.0, 1.0, 0.5)

    monkeypatch.setattr(recipe_runs, "start", start)
    monkeypatch.setattr(cross_lingual, "save_random_tower", lambda path, source, folder: folder.mkdir())
    monkeypatch.setattr(cross_lingual, "save_random_encoder", lambda path, folder: folder.mkdir())
    return parsed


def test_table_and_picture_come_from_the_files_of_the_runs(tmp_path: Path, started: list[Any], capsys) -> None:
    words = ["--output_dir", str(tmp_path), "--multilingual", "m", "--korean", "k"]
    cross_lingual.main(words)
    assert len(started) == len(RUNS)
    assert [run.train.num_steps for run in started[:4]] == [100, 300, 700, 1_500]
    encoders = {Path(run.model.text_encoder or "").name for run in started}
    assert encoders >= {"m", "random_encoder", "k", "korean_random_encoder"}
    assert (tmp_path / "cross_lingual.png").stat().st_size > 1_000
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("45.6 (44.6 to 48.6)", "20.0 (19.0 to 23.0)", "5.0 (4.0 to 8.0)", "2.0"))
    cross_lingual.main([*words, "--runs", RUNS[0].name, BASE.name])  # they exist: nothing runs again
    assert len(started) == len(RUNS)
    assert "random" not in capsys.readouterr().out


def test_runs_share_the_features_of_a_tower(tmp_path: Path) -> None:
    args = cross_lingual.parser().parse_args(["--output_dir", str(tmp_path)])
    folders = {(run.text, run.image): cross_lingual.features(run, args) for run in RUNS}
    images = {pair: (folder / "images").resolve() for pair, folder in folders.items()}
    texts = {pair: (folder / "texts-ko").resolve() for pair, folder in folders.items()}
    for pair in folders:
        for other in folders:
            assert (texts[pair] == texts[other]) == (pair[0] == other[0])
            assert (images[pair] == images[other]) == (pair[1] == other[1])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Photos, a BERT, an image tower with batch norms, and a configuration for them."""
    (tmp_path / "bert").mkdir()
    FAMILIES["bert"].write(tmp_path / "bert")
    size = len(AutoTokenizer.from_pretrained(tmp_path / "bert"))
    write_encoder(tmp_path / "bert", "bert", size, max_position_embeddings=40)
    torch.manual_seed(3)
    TimmWrapperModel(TimmWrapperConfig(architecture="test_resnet")).save_pretrained(tmp_path / "resnet")
    sizes: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained(tmp_path / "resnet")
    pairs = str(write_pairs(tmp_path / "pairs.parquet"))
    settings = yaml.safe_load(Path(cross_lingual.parser().parse_args([]).config).read_text(encoding="utf-8"))
    settings["data"]["sources"][0]["path"] = settings["eval"]["sets"][0]["source"]["path"] = pairs
    settings["tokenizer"]["max_tokens"] = 24
    settings["optim"]["warmup_steps"] = 1
    settings["train"] |= {"batch_size": 8, "tracker": "none"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path


def test_whole_runs_of_tiny_towers(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With pretrained and with random towers. The second run takes the images of the first, the third its texts."""
    runs = (Run("multilingual", "imagenet", 3), Run("random", "imagenet", 3), Run("random", "random", 3))
    monkeypatch.setattr(cross_lingual, "RUNS", runs)

    def start(recipe: str, *words: str) -> Cost:
        align(*words, reported=True)
        return Cost(2.0, 1.0, 0.5)

    monkeypatch.setattr(recipe_runs, "start", start)
    towers = ["--multilingual", str(place / "bert"), "--imagenet", str(place / "resnet")]
    folder = place / "runs"
    cross_lingual.main([*towers, "--config", str(place / "tiny.yaml"), "--output_dir", str(folder)])
    assert "random" in capsys.readouterr().out
    features = {path.parent.name for path in (folder / "features").glob("*/embeddings.json")}
    assert {name for name in features if "-ko" not in name} >= {"images-imagenet", "images-random"}
    models = [load_file(folder / run.name / "model" / "model.safetensors") for run in runs]
    differs = [[not torch.equal(models[0][name], model[name]) for name in sorted(models[0])] for model in models[1:]]
    towers_of = [name.split(".")[0] for name in sorted(models[0])]
    for changed, own in zip(differs, ({"text_model"}, {"text_model", "vision_model"}), strict=True):
        named = {side for side, change in zip(towers_of, changed, strict=True) if change}
        assert named & {"text_model", "vision_model"} == own


def test_the_random_tower_has_other_weights_and_the_statistics_of_photos(place: Path) -> None:
    source = SourceConfig(path=str(place / "pairs.parquet"))
    towers = []
    for name in ("first", "second"):
        cross_lingual.save_random_tower(str(place / "resnet"), source, place / name)
        towers.append(load_image_side(str(place / name))[0].state_dict())
    pretrained = load_image_side(str(place / "resnet"))[0].state_dict()
    kernels = [name for name, value in pretrained.items() if value.ndim == 4]
    means = [name for name in pretrained if name.endswith("running_mean")]
    assert kernels
    assert means
    for name in [*kernels, *means]:
        assert torch.equal(towers[0][name], towers[1][name])
        assert not torch.equal(towers[0][name], pretrained[name])


LINES = ["고양이가 창가에 앉아 있다", "개가 공을 물고 달린다", "아이가 빨간 공을 던진다", "새가 나무에 앉아 있다"]


def written(folder: Path) -> list[str]:
    file = folder / "ko.txt"
    file.write_text("\n".join([*LINES, "", LINES[0], "개가 TV를 본다", "a dog"]), encoding="utf-8")
    return [str(file), "--output_dir", str(folder / "encoder"), "--vocab_size", "200", "--width", "64", "--layers", "1"]


def test_the_small_encoder_reads_korean_lines_alone_and_is_a_text_encoder(tmp_path: Path) -> None:
    words = written(tmp_path)
    assert masked_lm.read_lines([words[0]]) == LINES
    masked_lm.main([*words, "--num_steps", "2", "--batch_size", "4", "--max_tokens", "32"])
    encoder = load_text_encoder(words[2])
    tokenizer = tokenizers.load(words[2], 32, encoder.config, LINES)
    dog, cat, unknown = tokenizer(["a dog", "a cat", "狗"])["input_ids"]
    assert tokenizer.unk_token_id not in [*dog, *cat]
    assert tokenizer.unk_token_id in unknown
    assert not any(
        len(piece.removeprefix("##")) > 1 and piece.isascii() for piece in set(tokenizer.get_vocab()) - SPECIAL
    )


SPECIAL = set(masked_lm.SPECIAL.values())


def test_files_without_korean_are_refused(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("a dog\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"en\.txt"):
        masked_lm.read_lines([str(tmp_path / "en.txt")])


def test_the_loss_is_that_of_transformers_and_falls(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).eval()
    ids = torch.randint(5, 50, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.3, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    torch.testing.assert_close(masked_lm.masked_loss(model, batch), model(**batch).loss)
    tokenizer = masked_lm.train_tokenizer(LINES, 200, 32)
    losses = []
    for steps in ("1", "60"):
        args = masked_lm.parser().parse_args([*written(tmp_path), "--num_steps", steps, "--lr", "0.01"])
        trained = masked_lm.train(LINES, tokenizer, args)
        collate = masked_lm.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=1)
        encoded: Any = tokenizer(LINES * 8, return_special_tokens_mask=True)
        features = [{name: encoded[name][place] for name in encoded} for place in range(len(LINES) * 8)]
        losses.append(masked_lm.masked_loss(trained, collate(features)).item())
    assert losses[1] < 0.6 * losses[0]
