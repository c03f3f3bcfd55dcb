"""`align.method: projection`: only projections learn, on cached and standardised features of two frozen towers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import align, arguments, write_encoder, write_pairs, write_source
from helpers.tokenizer_families import FAMILIES
from peer_models import saved
from safetensors.torch import load_file, save_file
from test_swap import encoder, tokens
from tiny import tiny_dual_encoder
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import koclip
from koclip.align.features import least_varied, moments, standardize
from koclip.config import ConfigError, OptimConfig
from koclip.data import transforms
from koclip.embeddings import fill
from koclip.embeddings.store import Shards
from koclip.models.dual_encoder import pooled_texts
from koclip.models.stock import parts
from koclip.models.swap import swap_text_tower
from koclip.optim import adamw, projection_decay

STEPS = 6
TEXTS = ["빨간 공 3", "파란 상자 두 개 5", "초록 나무 아래 개"]
HOME = "encoder.layer.1.output.LayerNorm"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source CLIP, an image tower alone, photos, and a BERT with dropout."""
    folder = tmp_path_factory.mktemp("projection")
    weights = load_file(write_source(folder / "source") / "model.safetensors")
    weights["logit_scale"].fill_(1.0)  # a large scale would enlarge the rounding of embeddings in the loss
    save_file(weights, folder / "source" / "model.safetensors", {"format": "pt"})
    torch.manual_seed(2)
    width: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    ViTModel(ViTConfig(**width, image_size=32, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    write_pairs(folder / "pairs.parquet")
    (folder / "bert").mkdir()
    FAMILIES["bert"].write(folder / "bert")
    size = len(AutoTokenizer.from_pretrained(folder / "bert"))
    write_encoder(folder / "bert", "bert", size, hidden_dropout_prob=0.1, max_position_embeddings=40)
    return folder


def run(place: Path, name: str, *args: str, source: str = "source") -> Path:
    directory = place / "runs" / name
    if not directory.exists():
        rest = ["--align.method", "projection", "--model.text_encoder", str(place / "bert")]
        rest += ["--align.cache_dtype", "fp32", "--output_dir", str(directory), *args]
        align(*arguments(place / source, place / "pairs.parquet", *rest))
    return directory


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def texts_of(model: Any, processor: Any) -> Tensor:
    inputs = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return pooled_texts(model, inputs["input_ids"], inputs["attention_mask"])


@pytest.mark.parametrize("more", [[], ["--align.image_projection_decay", "0.5"]], ids=["text", "both"])
def test_no_tower_runs_in_a_step_and_the_steps_are_the_same(
    more: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: Counter[str] = Counter()
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: forwards.update([type(module).__name__])
    )
    decode = transforms._decode
    monkeypatch.setattr(transforms, "_decode", lambda *args: (forwards.update(["decode"]), decode(*args))[1])
    numbers = {}
    for cached in ("true", "false"):
        forwards.clear()
        name = f"equal {len(more)} {cached}"
        directory = run(place, name, *more, "--align.cache", cached, "--eval.sets", "[]")
        numbers[cached] = losses(directory), dict(forwards)
    hook.remove()
    (kept, counts), (plain, other) = numbers["true"], numbers["false"]
    assert kept == pytest.approx(plain, abs=1e-5)  # small deviations enlarge the rounding of a batch's embeddings
    assert other["decode"] - counts["decode"] == 8 * STEPS - 24  # 24 photos, each once
    assert other["ChineseCLIPTextModel"] - counts["ChineseCLIPTextModel"] == STEPS
    first, second = (
        load_file(place / "runs" / f"equal {len(more)} {cached}/model/model.safetensors")
        for cached in ("true", "false")
    )
    # All together: AdamW divides by the size of a gradient, so a weight with hardly any gradient follows rounding.
    assert (first["text_projection.weight"] - second["text_projection.weight"]).norm() <= 5e-5


def test_only_the_projection_learns(place: Path) -> None:
    model = load_file(run(place, "alone") / "model" / "model.safetensors")
    source, bert = (load_file(place / name / "model.safetensors") for name in ("source", "bert"))
    for name, value in model.items():
        if name.startswith(("vision_model.", "visual_projection")) or name == "logit_scale":
            assert torch.equal(value, source[name]), name
        elif name.startswith("text_model.") and HOME not in name and "word_embeddings" not in name:
            rows = len(value)  # positions are cut to the longest text
            assert torch.equal(value, bert[name.removeprefix("text_model.")][:rows]), name


def test_the_published_text_tower_gives_the_standardised_features(place: Path) -> None:
    """After saving and reloading: (feature - mean) / deviation of the encoder's own features, by hand, and a constant.

    The direction of the constant is the one that BERT's last layer norm leaves no variance in.
    """
    directory = run(place, "alone")
    shards = Shards(sorted((directory / "features" / "texts-ko").rglob("shard-*")), "test")
    assert len(shards) == 48
    stored = torch.cat([rows.float() for rows in shards.rows])
    mean, deviation = moments([shards])
    torch.testing.assert_close(mean, stored.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(deviation, stored.std(0, correction=0), atol=1e-6, rtol=0)
    constant = least_varied([shards], mean, deviation)
    assert ((stored - mean) / deviation @ constant).abs().max() < 1e-2  # stored with three digits
    loaded = koclip.load(directory / "model", "cpu")
    inputs = loaded.processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        first = AutoModel.from_pretrained(place / "bert").eval()(**inputs).last_hidden_state[:, 0]
    by_hand = (first - mean) / deviation + constant
    features = texts_of(loaded.model, loaded.processor)
    assert ((features - by_hand) * deviation).abs().max() < 1e-6  # in the units of the encoder's features
    embeddings = nn.functional.normalize(by_hand @ parts(loaded.model).text_projection.weight.T, dim=-1)
    torch.testing.assert_close(loaded.encode_texts(TEXTS), embeddings.detach(), atol=5e-5, rtol=0)  # by 1 / deviation


def test_the_image_projection_learns_if_asked(place: Path) -> None:
    args = ("--align.image_projection_decay", "0.5")
    model, source = run(place, "both", *args, source="vit") / "model", AutoModel.from_pretrained(place / "vit").eval()
    aligned: Any = AutoModel.from_pretrained(model)
    assert not torch.equal(aligned.visual_projection.weight, torch.eye(48))
    towers = aligned.vision_model.state_dict(), source.state_dict()
    assert all(torch.equal(towers[0][name], value) for name, value in towers[1].items())


def test_the_image_projection_has_its_own_decay() -> None:
    encoder = tiny_dual_encoder()
    decays = projection_decay(encoder, 0.5)
    groups = adamw(encoder, OptimConfig(weight_decay=0.1), decays=decays).param_groups
    by_decay = {group["weight_decay"]: group["params"] for group in groups}
    assert [id(weight) for weight in by_decay[0.5]] == [id(parts(encoder.model).image_projection.weight)]
    assert len(by_decay[0.1]) > 10
    assert projection_decay(encoder, None) == {}


def test_runs_share_the_text_features(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed, another image tower and one language more: a language that is stored is not read again."""
    shared = ("--align.cache_dir", str(place / "shared"), "--eval.sets", "[]")
    run(place, "first", *shared)
    counted: list[int] = []

    def counting(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        counted.append(len(ids))
        return pooled_texts(model, ids, mask)

    monkeypatch.setattr(fill, "pooled_texts", counting)
    pairs = f"[{{path: {place / 'pairs.parquet'}, captions: {{ko: captions_ko, en: captions_en}}}}]"
    run(place, "second", *shared, "--model.seed", "1", "--data.sources", pairs)
    assert {path.name for path in (place / "shared").iterdir()} == {"images", "texts-ko", "texts-en"}
    english = Shards(sorted((place / "shared" / "texts-en").rglob("shard-*")), "test")
    assert sum(counted) == len(english) > 0


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "clip_text_model"])
def test_the_last_norm_takes_up_the_shift_and_the_scale(kind: str) -> None:
    text = encoder(kind)
    model, wanted, place = standardised(swap_text_tower(tiny_dual_encoder().model, text), text.config.pad_token_id)
    assert place is not None
    assert place.endswith(("LayerNorm", "final_layer_norm"))
    torch.testing.assert_close(features(model, text.config.pad_token_id), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_mean_over_tokens_is_standardised_too(pooling: Any) -> None:
    """Every token gets the same shift and scale. ModernBERT's norms have no shift."""
    text, other = encoder("bert"), encoder("modernbert", pad_token_id=0)
    model, wanted, place = standardised(swap_text_tower(tiny_dual_encoder().model, text, 0, pooling), 0)
    assert place is not None
    torch.testing.assert_close(features(model, 0), wanted, atol=5e-4, rtol=0)  # small deviations
    assert standardised(swap_text_tower(tiny_dual_encoder().model, other, 0, pooling), 0)[2] is None


def test_a_trained_pooler_cannot(place: Path) -> None:
    """Its tanh comes after every shift and scale. Then the model stays as it was, bit for bit."""
    tower = AutoModel.from_pretrained(place / "vit")
    pair: Any = VisionTextDualEncoderModel(vision_model=tower, text_model=encoder("bert"))
    pair.text_model.pooler.dense.weight.data.normal_(std=0.5)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    model, _, changed = standardised(pair, 0)
    assert changed is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def standardised(model: Any, pad: int) -> tuple[Any, Tensor, str | None]:
    """Standardise the text features of a model; return it, what the features must become, and the changed module."""
    before = features(model.eval(), pad)
    mean, deviation = before.mean(0), before.std(0)
    return model, (before - mean) / deviation, standardize(model, tokens(pad), mean, deviation)


def features(model: Any, pad: int) -> Tensor:
    with torch.no_grad():
        return pooled_texts(model, *tokens(pad))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data.word_dropout", "0.1"], ["data.word_dropout", "projection", "align.cache"]),
        (["--align.first_steps", "2"], ["align.first_steps", "projection"]),
        (
            ["--align.method", "full", "--align.image_projection_decay", "0"],
            ["align.image_projection_decay", "projection"],
        ),
        (["--align.image_projection_decay", "-1"], ["align.image_projection_decay", "-1"]),
        (["--data.num_crops", "0"], ["data.num_crops", "align.cache"]),
    ],
)
def test_mistakes(args: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(place, "never", *args)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_a_source_without_a_text_projection_is_refused(place: Path) -> None:
    saved("SigLIP 2", place / "siglip")
    args = ("--model.text_encoder", "same", "--loss.name", "sigmoid")
    with pytest.raises(ConfigError, match=r"align\.method: got projection, but a Siglip\w*Model"):
        run(place, "siglip", *args, source="siglip")


def test_a_projection_of_the_source_is_kept_and_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its shift has no place without a change of the embeddings, so nothing is standardised."""
    model = load_file(run(place, "same", "--model.text_encoder", "same") / "model" / "model.safetensors")
    source = load_file(place / "source" / "model.safetensors")
    changed = {name for name in source if not torch.equal(model[name], source[name])}
    assert changed == {"text_projection.weight"}
    assert "not standardised" in capsys.readouterr().out
