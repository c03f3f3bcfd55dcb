"""Retrieval, the same in two languages, and under stress, on colours whose scores can be worked out by hand."""

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import ColourEncoder
from safetensors.torch import load_file, save_file

from koclip.config import ConfigError
from koclip.data.sources import Row
from koclip.embeddings import store
from koclip.evaluation import embed
from koclip.evaluation.embed import Embedder, Images, collect
from koclip.evaluation.run import evaluate
from koclip.evaluation.sets import EvalSet
from koclip.evaluation.tasks.retrieval import approximated, languages, retrieval, stress
from koclip.metrics import first_ranks, mean
from koclip.text.korean.stress import STRESSES

CAPTIONS = {"ko": "ko", "en": "en"}


def embedded(eval_set: EvalSet, encoder: ColourEncoder | None = None) -> tuple[Embedder, EvalSet, torch.Tensor]:
    embedder = Embedder(encoder or ColourEncoder(), 8)
    return embedder, eval_set, embedder.images(eval_set.images)


def test_equal_captions_are_one_with_several_images() -> None:
    captions = collect([["가", "나"], ["나", "나"], [], ["다"]], ["라", "가"])
    assert captions.texts == ["가", "나", "다", "라"]
    assert captions.images == [[0], [0, 1], [3]]
    assert captions.texts_of == [[0, 1], [1], [], [2]]


def test_recalls_are_those_of_the_whole_matrix(colours: Callable[..., EvalSet]) -> None:
    embedder, eval_set, images = embedded(colours(None, CAPTIONS, tasks=["retrieval"]))
    metrics = retrieval(embedder, eval_set, "ko", images)
    texts = [text for captions in eval_set.captions for text in captions["ko"]]
    positives = torch.zeros(len(texts), 24, dtype=torch.bool)
    for place in range(len(texts)):
        positives[place, place // 2] = True
    similarity = embedder.texts(texts) @ images.T
    for task, ranks in (
        ("text_to_image", first_ranks(similarity, positives)),
        ("image_to_text", first_ranks(similarity.T, positives.T)),
        ("text_to_image_first_caption", first_ranks(similarity[::2], positives[::2])),
        ("image_to_text_first_caption", first_ranks(similarity[::2].T, positives[::2].T)),
    ):
        for k in (1, 5, 10):
            assert metrics[f"{task}/recall@{k}"].value == pytest.approx((ranks < k).double().mean().item()), task
        assert metrics[f"{task}/median_rank"].value == ranks.sort().values[(len(ranks) - 1) // 2].item() + 1
        assert metrics[f"{task}/recall@1"].n == len(ranks)


def test_an_approximation_is_compared_query_by_query() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=-1)
    captions = collect([[f"{number}", f"{number}번"] for number in range(24)], [])
    texts = images.repeat_interleave(2, dim=0) + 0.05 * torch.randn(48, 16, generator=generator)
    other = torch.cat([texts[:24].roll(2, dims=0), texts[24:]])  # half of the captions are those of others
    metrics = approximated(captions, (images, texts), (images, other), "half")
    right = torch.eye(24, dtype=torch.bool).repeat_interleave(2, dim=0)
    for task in ("text_to_image", "image_to_text"):
        forward = task == "text_to_image"
        both = [
            (embedded_texts @ images.T, right) if forward else (images @ embedded_texts.T, right.T)
            for embedded_texts in (texts, other)
        ]
        plain, ranks = (first_ranks(*pair) for pair in both)
        owners = torch.tensor([own[0] for own in captions.images]) if forward else None
        for k in (1, 5):
            assert metrics[f"{task}/recall@{k}"].value == (plain < k).double().mean().item()
            assert metrics[f"{task}_half/recall@{k}"].value == (ranks < k).double().mean().item()
            assert metrics[f"{task}_half/drop@{k}"] == mean((plain < k).double() - (ranks < k).double(), owners)
        assert metrics[f"{task}_half/drop@1"].value > 0
    same = approximated(captions, (images, texts), (images, texts), "same")
    assert {metric.value for name, metric in same.items() if "drop" in name} == {0}


def test_the_gap_is_between_the_same_captions(colours: Callable[..., EvalSet]) -> None:
    """A model that has never learnt English finds what chance finds, and another image than in Korean."""
    embedder, eval_set, images = embedded(colours(None, CAPTIONS), ColourEncoder(english=False))
    metrics = languages(embedder, eval_set, ("ko", "en"), images)
    ko = retrieval(embedder, eval_set, "ko", images)["text_to_image/recall@10"].value
    en = retrieval(embedder, eval_set, "en", images)["text_to_image/recall@10"].value
    assert metrics["languages/gap@10"].value == pytest.approx(ko - en)
    assert metrics["languages/gap@10"].n == 48
    assert metrics["languages/gap@10"].ci95[0] > 0
    assert metrics["languages/same_image"].value < 0.2
    swapped = languages(embedder, eval_set, ("en", "ko"), images)
    assert swapped["languages/gap@10"].value == pytest.approx(en - ko)
    same = languages(embedded(eval_set)[0], eval_set, ("ko", "ko"), images)
    assert same["languages/same_image"].value == 1.0


def test_images_with_unequal_captions_are_not_compared(colours: Callable[..., EvalSet]) -> None:
    embedder, eval_set, images = embedded(colours(None, CAPTIONS))
    for captions in eval_set.captions[1:]:
        captions["en"] = captions["en"][:1]
    first, second = eval_set.captions[0], eval_set.captions[1]
    second["en"] = ["one picture", "another picture"]
    assert languages(embedder, eval_set, ("ko", "en"), images)["languages/gap@1"].n == 4
    first["en"] = second["en"] = ["one picture"]
    with pytest.raises(ConfigError, match="ko and en"):
        languages(embedder, eval_set, ("ko", "en"), images)


def test_stress_drops_are_paired(colours: Callable[..., EvalSet]) -> None:
    """Colours spelt apart or in Latin letters cannot be read; a dropped space changes nothing for this encoder."""
    embedder, eval_set, images = embedded(colours(None, CAPTIONS, tasks=["stress"]))
    metrics = stress(embedder, eval_set, images)
    assert {name.split("/")[0] for name in metrics} == {f"stress_{name}" for name in STRESSES}
    plain = retrieval(embedder, eval_set, "ko", images)["text_to_image/recall@10"].value
    for name in STRESSES:
        recall, drop = (metrics[f"stress_{name}/{kind}@10"] for kind in ("recall", "drop"))
        assert drop.value == pytest.approx(plain - recall.value), name
        assert drop.ci95[0] <= drop.value <= drop.ci95[1]
    assert metrics["stress_jamo/drop@10"].ci95[0] > 0
    assert metrics["stress_nfd/changed"].value == 1.0
    assert metrics["stress_nfd/drop@10"].value > 0  # this encoder knows composed names only
    texts = [unicodedata.normalize("NFD", caption) for caption in eval_set.captions[0]["ko"]]
    assert not any("빨강" in text for text in texts)


def test_a_second_evaluation_embeds_nothing(tmp_path: Path, colours: Callable[..., EvalSet]) -> None:
    sets = [
        colours(None, CAPTIONS, tasks=["retrieval", "languages", "stress"]),
        colours(tasks=["zero_shot", "shift"], corruptions=["noise"]),
    ]
    first, second = ColourEncoder(), ColourEncoder()
    metrics = evaluate(Embedder(first, 8, tmp_path / "kept"), sets)
    assert evaluate(Embedder(second, 8, tmp_path / "kept"), sets) == metrics
    assert first.calls > 0 == second.calls
    third = ColourEncoder()
    assert evaluate(Embedder(third, 8), sets) == metrics
    assert third.calls == first.calls  # without files, too, nothing is embedded twice
    other = ColourEncoder(english=False)  # another model: nothing of the first one's is taken
    evaluate(Embedder(other, 8, tmp_path / "kept"), sets)
    assert other.calls == first.calls


def test_a_broken_file_is_made_again(
    tmp_path: Path, colours: Callable[..., EvalSet], capsys: pytest.CaptureFixture[str]
) -> None:
    eval_set = colours(None, CAPTIONS)
    kept = Embedder(ColourEncoder(), 8, tmp_path / "kept").images(eval_set.images)
    (file,) = (tmp_path / "kept").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(Embedder(ColourEncoder(), 8, tmp_path / "kept").images(eval_set.images), kept)
    assert str(file) in capsys.readouterr().out
    assert torch.equal(load_file(file)["embeddings"], kept)
    assert not list((tmp_path / "kept").rglob("writing-*"))


def test_two_evaluations_may_write_the_same_file(
    tmp_path: Path, colours: Callable[..., EvalSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    eval_set, others = colours(None, CAPTIONS), []

    def meanwhile(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        if not others:
            others.append(Embedder(ColourEncoder(), 8, tmp_path / "kept"))
            others[0].images(eval_set.images)

    monkeypatch.setattr(store, "save_file", meanwhile)
    kept = Embedder(ColourEncoder(), 8, tmp_path / "kept").images(eval_set.images)
    assert torch.equal(others[0].images(eval_set.images), kept)
    assert [file.suffix for file in (tmp_path / "kept").rglob("*.*")] == [".safetensors"]


def test_pictures_of_other_shapes_are_others() -> None:
    pixels = np.arange(48, dtype=np.uint8)
    shapes = [(4, 4, 3), (2, 8, 3), (8, 2, 3)]
    assert len({Images([Row(pixels.reshape(shape), {}, "")]).digest for shape in shapes}) == 3


def test_other_pictures_and_texts_are_not_taken_for_the_same(tmp_path: Path, colours: Callable[..., EvalSet]) -> None:
    eval_set = colours(None, CAPTIONS)
    embedder = Embedder(ColourEncoder(), 8, tmp_path / "kept")
    assert not torch.equal(embedder.images(eval_set.images), embedder.images(eval_set.images.corrupted("noise", 5, 0)))
    assert not torch.equal(embedder.texts(["빨강", "초록"]), embedder.texts(["초록", "빨강"]))
    shutil.rmtree(tmp_path / "kept")
    assert embedder.texts(["빨강"]).shape == (1, 8)


def test_blocks_of_queries_are_ranked_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.rand(37, 8, generator=generator), torch.rand(50, 8, generator=generator)
    positives = [[number, (7 * number) % 50] for number in range(37)]
    whole = embed.search(queries, gallery, positives, spread=False)
    monkeypatch.setattr(embed, "_QUERIES", 5)
    for all_at_once, in_blocks in zip(whole, embed.search(queries, gallery, positives, spread=False), strict=True):
        assert torch.equal(all_at_once, in_blocks)
