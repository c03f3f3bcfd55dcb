"""koclip's side of the comparison with CLIP_benchmark; the other where that is installed."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))  # as Python does for a script

import parity_clip_benchmark as parity

pytestmark = pytest.mark.usefixtures("as_before")
SEVERAL = parity.made_up_pairs(0, counts=[1, 4, 2], num_images=60)
CLASSES = parity.made_up_classes(0, num_classes=8, num_images=80)


def test_the_commands_in_its_first_lines_parse():
    commands = [line.split("  #")[0].split() for line in parity.__doc__.splitlines() if "python recipes/" in line]
    assert len(commands) == 2
    for words in commands:
        parity.parser().parse_args(words[2:])
    with pytest.raises(SystemExit, match="2"):
        parity.main(["--model", "runs/x/model"])


def test_a_missing_clip_benchmark_is_a_message_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip_benchmark.metrics", None)
    monkeypatch.delitem(sys.modules, "clip_benchmark_peer", raising=False)
    with pytest.raises(SystemExit, match="pip install --no-deps clip-benchmark"):
        importlib.import_module("clip_benchmark_peer")


def test_koclips_recalls_are_those_of_sorting():
    numbers = parity.koclip_retrieval(SEVERAL)
    owners = torch.tensor([image for image, own in enumerate(SEVERAL.captions) for _ in own])
    texts = F.normalize(torch.stack([SEVERAL.texts[text] for own in SEVERAL.captions for text in own]), dim=-1)
    scores = texts @ F.normalize(SEVERAL.images, dim=-1).T
    for k in (1, 5, 10):
        forward = (scores.topk(k).indices == owners[:, None]).any(dim=1).double().mean()
        backward = (owners[scores.T.topk(k).indices] == torch.arange(60)[:, None]).any(dim=1).double().mean()
        assert numbers[f"text_to_image/recall@{k}"] == pytest.approx(forward.item(), abs=1e-12)
        assert numbers[f"image_to_text/recall@{k}"] == pytest.approx(backward.item(), abs=1e-12)
    assert 0.1 < numbers["text_to_image/recall@1"] < numbers["text_to_image/recall@10"] < 1


def test_koclips_accuracies_are_those_of_sorting():
    numbers = parity.koclip_zero_shot(CLASSES)
    prompts = [[parity.fill(template, name) for template in parity.TEMPLATES] for name in CLASSES.names]
    one_by_one = torch.stack(
        [F.normalize(torch.stack([CLASSES.texts[text] for text in own]), dim=-1) for own in prompts]
    )
    scores = F.normalize(CLASSES.images, dim=-1) @ F.normalize(one_by_one.mean(dim=1), dim=-1).T
    hits = (scores.argmax(dim=1) == CLASSES.labels).double()
    among_five = (scores.topk(5).indices == CLASSES.labels[:, None]).any(dim=1).double()
    by_class = [hits[CLASSES.labels == label].mean().item() for label in range(8)]
    assert numbers == pytest.approx(
        {
            "zero_shot/accuracy": hits.mean().item(),
            "zero_shot/accuracy@5": among_five.mean().item(),
            "zero_shot/mean_per_class": sum(by_class) / 8,
        },
        abs=1e-12,
    )
    assert 0.1 < numbers["zero_shot/accuracy"] < numbers["zero_shot/accuracy@5"] < 1


def test_captions_that_occur_twice_are_left_out_and_images_that_have_no_other():
    texts = {name: torch.eye(4)[place] for place, name in enumerate("abcd")}
    pairs = parity.Pairs(torch.eye(3, 4), texts, [["a", "b"], ["b", "c"], ["d", "d"]])
    once = parity.unique(pairs)
    assert once.captions == [["a"], ["c"]]
    assert torch.equal(once.images, pairs.images[:2])


def test_a_models_embeddings_of_a_table_are_koclips(tmp_path, write_table):
    from tiny import tiny_config, tiny_tokenizer

    import koclip
    from koclip.models.dual_encoder import from_scratch

    model, processor = from_scratch(tiny_config(), tiny_tokenizer())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pairs = parity.real_pairs(str(tmp_path / "model"), write_table("rows.parquet", 12), "ko", max_images=7)
    assert [len(own) for own in pairs.captions] == [1] * 7
    loaded = koclip.load(str(tmp_path / "model"))
    text = pairs.captions[3][0]
    torch.testing.assert_close(pairs.texts[text], loaded.encode_texts([text])[0])
    assert pairs.images.shape[0] == 7


def test_a_difference_is_printed_and_fails(monkeypatch, capsys):
    lines = [parity.Line("case", "recall@1", 0.5, 0.5), parity.Line("case", "recall@5", 0.9, 0.90001)]
    monkeypatch.setattr(parity, "made_up", lambda seeds: lines[: len(seeds)])
    assert parity.main(["--seeds", "1"]) == 0
    assert "equal: largest difference of 1 numbers 0.0e+00" in capsys.readouterr().out
    assert parity.main(["--seeds", "2"]) == 1
    assert "DIFFERENT: largest difference of 2 numbers 1.0e-05" in capsys.readouterr().out


def test_both_measure_the_same():
    pytest.importorskip("clip_benchmark", reason="clip_benchmark is not installed; it belongs into a venv of its own")
    lines = [
        *parity.compare_retrieval("several", SEVERAL),
        *parity.compare_retrieval("first", parity.first_captions(SEVERAL)),
        *parity.compare_zero_shot("classes", CLASSES),
    ]
    assert len(lines) == 15
    assert max(line.difference for line in lines) < parity.TOLERANCE
