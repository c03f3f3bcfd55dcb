"""The benchmark of frozen-image alignment runs, at tiny sizes; open_clip's side where open_clip is installed."""

import sys
from pathlib import Path

import pytest
import torch
from align_runs import write_pairs

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for the script that it runs

import align_speed  # noqa: E402
import pairs  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Two epochs over 16 noise photos in batches of 8, with a vocabulary of all syllables."""
    pieces = [*map(chr, range(0xAC00, 0xD7A4)), *"0123456789"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    data = write_pairs(tmp_path / "pairs.parquet")
    sizes = ["--image_tower", "tiny", "--text_width", "64", "--text_layers", "2"]
    sizes += ["--pairs", "16", "--batch_size", "8", "--epochs", "2"]
    return [*sizes, "--data", str(data), "--vocab", str(tmp_path / "vocab.txt"), "--lr", "1e-3"]


def test_the_commands_in_the_first_lines_parse() -> None:
    script = "python recipes/benchmarks/align_speed.py"
    commands = [line.split("  #")[0].split() for line in align_speed.__doc__.splitlines() if script in line]
    assert len(commands) == 2
    for words in commands:
        align_speed.parser().parse_args(words[2:])


@pytest.mark.parametrize("wrong", [["--pairs", "12"], ["--vocab", "nowhere.txt"], ["--data", "nowhere.parquet"]])
def test_what_cannot_be_measured_is_refused(wrong: list[str], arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        align_speed.main([*arguments, *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_koclips_side_trains_text_against_images_encoded_once(arguments: list[str], tmp_path: Path) -> None:
    options = align_speed.parser().parse_args(arguments)
    photos = pairs.some_pairs(options.data, options.pairs, tmp_path)
    start = align_speed.starting_point(options, photos.captions, tmp_path / "encoder")
    ours = align_speed.Koclip(start, align_speed.config_of(options, photos.source), tmp_path / "features")
    ours.prepare()
    before = {name: weight.clone() for name, weight in ours.model.state_dict().items()}
    ours.model.vision_model.register_forward_pre_hook(lambda *_: pytest.fail("an image was encoded again"))
    for _ in range(options.epochs):
        ours.train(2)
    trained = {
        name.split(".")[0] for name, weight in ours.model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert trained == {"text_model", "text_projection"}
    assert len(photos.files) == len(set(photos.captions)) == 16
    assert len(ours.features) == 16
    pixels = ours.first_batch().pixel_values
    assert pixels is not None
    assert len(pixels) == align_speed.CHECKED


def test_the_totals_have_the_cache_in_them() -> None:
    peer, koclip = ([align_speed.Seconds(wall, wall / 2) for wall in side] for side in ((8, 12), (1, 2)))
    turns = align_speed.Turns(peer, koclip, cache=align_speed.Seconds(2, 1))
    rows = align_speed.table(turns, cpu_time=False).splitlines()
    assert rows[-1] == "| 10 epochs in all | 100.0 | 17.0 | 5.88 (5.45-6.67) |"
    assert rows[-2] == "| an epoch | 10.0 (8.0-12.0) | 1.5 (1.0-2.0) | 7.00 (6.00-8.00) |"


def test_equal_captions_find_each_others_images() -> None:
    images = torch.eye(12)
    others = torch.ones(12, 12) - images  # the last place for the caption's own
    assert align_speed.recall_at_10(others, images, [*"abcdefghijkl"]).startswith("0.0% (0.0%-")
    assert align_speed.recall_at_10(others, images, ["a"] * 12).startswith("100.0% (")


def test_both_are_compared(arguments: list[str], capsys) -> None:
    align_speed.main([*arguments, "--cpu_time"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 10 epochs in all") for line in lines) == 2
    (losses,) = [line.split() for line in lines if line.startswith("first loss")]
    assert float(losses[3].rstrip(",")) == pytest.approx(float(losses[5]), abs=1e-3)
