"""Zero-shot classification and shift, on colours whose scores can be worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fake_encoder import ENGLISH, ColourEncoder, write_colours

from koclip.config import ConfigError, SourceConfig
from koclip.data.transforms import CORRUPTIONS, corrupt
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet
from koclip.evaluation.tasks.zero_shot import classifier, ensemble, names_of, shift, zero_shot
from koclip.text.classes import fill, has_particle, spelt_out

TEMPLATES = {"ko": ["{label} 사진", "{label:을/를} 찍은 사진", "이것은 {label:이다/다}."], "en": ["a photo of {label}"]}


def run(
    task: Callable[..., dict], eval_set: EvalSet, language: str = "ko", encoder: ColourEncoder | None = None
) -> dict:
    embedder = Embedder(encoder or ColourEncoder(), 8)
    return task(embedder, eval_set, language, embedder.images(eval_set.images))


def test_an_ensemble_is_the_mean_of_unit_norm_prompts_of_unit_norm_again() -> None:
    embedder = Embedder(ColourEncoder(), 3)
    names = ["빨강", "파랑"]
    prompts = classifier(embedder, names, TEMPLATES["ko"])
    by_hand = torch.stack(
        [
            F.normalize(embedder.texts([fill(template, name) for template in TEMPLATES["ko"]]).mean(dim=0), dim=0)
            for name in names
        ]
    )
    assert torch.equal(prompts[1, 2], embedder.texts(["이것은 파랑이다."])[0])
    torch.testing.assert_close(ensemble(prompts), by_hand, atol=1e-7, rtol=0)


def test_colours_are_told_apart(colours: Callable[..., EvalSet]) -> None:
    metrics = run(zero_shot, colours(templates=TEMPLATES))
    assert metrics["zero_shot/accuracy"].value == metrics["zero_shot/mean_per_class"].value == 1.0
    assert metrics["zero_shot/accuracy"].n == 24
    expected = {"zero_shot", "zero_shot_name", "zero_shot_single", "zero_shot_naive", "zero_shot_particles"}
    expected |= {f"zero_shot_template_{number:02d}" for number in range(3)} | {"zero_shot_described"}
    assert {name.split("/")[0] for name in metrics} == expected


def test_accuracies_and_gains_are_those_of_the_hits(colours: Callable[..., EvalSet]) -> None:
    """A model that takes 초록 for 노랑 in one template only: half of what it names right stays."""

    class Confused(ColourEncoder):
        def _text(self, text: str) -> torch.Tensor:
            return super()._text(text.replace("초록", "노랑") if "찍은" in text else text)

    metrics = run(zero_shot, colours(templates={"ko": ["{label} 사진", "{label:을/를} 찍은 사진"]}), encoder=Confused())
    assert metrics["zero_shot_template_00/accuracy"].value == 1.0
    assert metrics["zero_shot_template_01/accuracy"].value == 0.5  # 초록 and 노랑 tie, and a tie is a miss
    assert metrics["zero_shot_template_01/gain_over_name"].value == -0.5
    low, high = metrics["zero_shot_template_01/gain_over_name"].ci95
    assert -0.75 < low < -0.5 < high < -0.25
    assert metrics["zero_shot_single/accuracy"].value == 1.0


def test_four_classes_have_no_accuracy_among_the_first_5(colours: Callable[..., EvalSet]) -> None:
    class Blind(ColourEncoder):
        def _text(self, text: str) -> torch.Tensor:
            return torch.ones(8)

    metrics = run(zero_shot, colours(), encoder=Blind())
    assert metrics["zero_shot/accuracy"].value == 0.0
    assert "zero_shot/accuracy@5" not in metrics


def test_descriptions_are_compared_on_the_names_that_have_one(colours: Callable[..., EvalSet]) -> None:
    class Reader(ColourEncoder):
        def _text(self, text: str) -> torch.Tensor:
            return super()._text(text) if "풀" in text or "초록" not in text else torch.ones(8)

    metrics = run(zero_shot, colours(), encoder=Reader())
    assert metrics["zero_shot/accuracy"].value == 0.75
    assert metrics["zero_shot_described/accuracy"].value == 1.0
    assert metrics["zero_shot_described/gain"].value == 0.25
    assert metrics["zero_shot_described/gain_ambiguous"].value == 1.0
    assert metrics["zero_shot_described/gain_ambiguous"].n == 6


def test_without_classes_captions_are_the_names(colours: Callable[..., EvalSet]) -> None:
    eval_set = colours(None, {"ko": "name"})
    assert names_of(eval_set, "ko").plain == list(ENGLISH)
    assert run(zero_shot, eval_set)["zero_shot/accuracy"].value == 1.0
    assert "zero_shot/mean_per_class" not in run(zero_shot, eval_set)


@pytest.mark.parametrize(
    ("template", "naive"),
    [
        ("{label:을/를} 찍은 사진", "책을(를) 찍은 사진"),
        ("{label}{이/가} 있다", "책이(가) 있다"),
        ("이것은 {label:이다/다}.", "이것은 책(이)다."),
        ("{label} 사진", "책 사진"),
    ],
)
def test_particles_are_spelt_out(template: str, naive: str) -> None:
    assert fill(spelt_out(template), "책") == naive
    assert has_particle(template) == (naive != "책 사진")


def test_a_shifted_set_is_classified_among_the_same_names(
    tmp_path: Path, encoded: Callable[..., bytes], colours: Callable[..., EvalSet]
) -> None:
    """Two of its four colours are swapped, so that half is right."""
    file = write_colours(tmp_path / "others.parquet", encoded)
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(file).to_pylist()
    swap = {"red": "blue", "blue": "red"}
    pq.write_table(pa.Table.from_pylist([row | {"key": swap.get(row["key"], row["key"])} for row in rows]), file)
    other = SourceConfig(path=str(file), label="key", captions={})
    metrics = run(shift, colours(tasks=["shift"], shifted={"swapped": other}))
    assert metrics["shift_none/accuracy"].value == 1.0
    assert metrics["shift_swapped/accuracy"].value == 0.5
    assert metrics["shift_swapped/drop"].value == 0.5


def test_corruptions_of_growing_severity(colours: Callable[..., EvalSet]) -> None:
    metrics = run(shift, colours(tasks=["shift"], corruptions=["noise", "contrast"]))
    assert [name for name in metrics if name.startswith("shift_noise/accuracy_severity_")] == [
        f"shift_noise/accuracy_severity_{severity}" for severity in range(1, 6)
    ]
    drops = [1 - metrics[f"shift_contrast/accuracy_severity_{severity}"].value for severity in range(1, 6)]
    assert metrics["shift_contrast/drop"].value == pytest.approx(sum(drops) / 5)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 224])
def test_corruptions_get_worse_and_are_seeded(name: str, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (1, 3, 16, 16), generator=generator).float()
    image = F.interpolate(coarse, (side, side), mode="bilinear").round().to(torch.uint8)[0]
    distances = []
    for severity in range(1, 6):
        changed = corrupt(image, name, severity, seed=1)
        assert changed.shape == image.shape
        assert changed.dtype == torch.uint8
        assert torch.equal(changed, corrupt(image, name, severity, seed=1))
        distances.append((changed.float() - image.float()).abs().mean().item())
    assert distances == sorted(distances)
    assert distances[0] > 0.5
    assert name != "noise" or not torch.equal(corrupt(image, name, 1, seed=1), corrupt(image, name, 1, seed=2))


def test_an_unknown_corruption_is_named(colours: Callable[..., EvalSet]) -> None:
    with pytest.raises(ConfigError, match=r"fog.*noise"):
        run(shift, colours(tasks=["shift"], corruptions=["fog"]))
