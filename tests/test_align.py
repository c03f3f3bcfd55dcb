"""Whole runs of recipes/align.py: image spaces that stay, stock classes, and what each method trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from align_runs import align, arguments, write_encoder, write_pairs, write_source
from helpers.tokenizer_families import FAMILIES, strings
from peft import AutoPeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

import koclip
from koclip import config
from koclip.align import methods
from koclip.models.dual_encoder import encode_texts
from koclip.text import tokenizers

KLUE = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 42, "type_vocab_size": 1}
ENCODERS = {
    "klue": ("roberta", KLUE),
    "bert": ("bert", {"max_position_embeddings": 40}),
    "electra": ("electra", {"embedding_size": 32, "max_position_embeddings": 40}),
    "distilbert": ("distilbert", {"max_position_embeddings": 40}),
    "xlm-roberta": ("xlm-roberta", KLUE),
    "camembert": ("camembert", KLUE | {"bos_token_id": 5, "eos_token_id": 6}),
    "kobert": ("bert", {"pad_token_id": 1, "max_position_embeddings": 40}),
}
METHODS = ("frozen_image", "lora", "distill")
RUNS = [(family, METHODS[number % 3]) for number, family in enumerate(ENCODERS)]
RUNS += [(family, method) for family in ("klue", "clip") for method in METHODS if (family, method) not in RUNS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source CLIP, photos, and an encoder of every family."""
    folder = tmp_path_factory.mktemp("align")
    write_source(folder / "source")
    write_pairs(folder / "pairs.parquet")
    for family, (kind, settings) in ENCODERS.items():
        path = folder / family
        path.mkdir()
        FAMILIES[family].write(path)
        size = len(AutoTokenizer.from_pretrained(path))
        (path / "config.json").unlink(missing_ok=True)
        write_encoder(path, kind, size, **settings)
    return folder


def run(place: Path, name: str, *args: str, source: str = "source", **options: bool) -> Path:
    """Align into a new run directory; once."""
    directory = place / "runs" / name
    if not directory.exists():
        rest = ("--output_dir", str(directory), *args)
        align(*arguments(place / source, place / "pairs.parquet", *rest), **options)
    return directory


def aligned(place: Path, family: str, method: str) -> Path:
    encoder = ["--model.text_encoder", str(place / family)]
    if family == "clip":  # a new one, or the source's own where the weights stay
        encoder = ["--model.text_encoder", "same"] if method == "lora" else []
    return run(place, f"{family}-{method}", "--align.method", method, *encoder) / "model"


def images(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What stock transformers makes of five pictures."""
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixels).pooler_output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_the_image_space_stays_bit_for_bit(family: str, method: str, place: Path) -> None:
    model = aligned(place, family, method)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(images(model, dtype), images(place / "source", dtype))
    ours, expected = (AutoModel.from_pretrained(path) for path in (model, place / "source"))
    assert torch.equal(ours.logit_scale, expected.logit_scale)
    assert ours.config.projection_dim == expected.config.projection_dim
    assert type(ours).__name__ == ("CLIPModel" if family == "clip" else "ChineseCLIPModel")


STRANGER = """
import json, sys
sys.modules["koclip"] = sys.modules["peft"] = None  # importing them raises ImportError
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
answer = {}
asked = json.load(sys.stdin)
for folder in asked["folders"]:
    processor = AutoProcessor.from_pretrained(folder)
    kinds = [AutoModel, AutoModel if folder in asked["pairs"] else AutoModelForZeroShotImageClassification]
    loaded = [kind.from_pretrained(folder, output_loading_info=True) for kind in kinds]
    assert not any(info[name] for _, info in loaded for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    labels, picture = ["빨간 공", "파란 상자"], Image.new("RGB", (40, 30), "red")
    inputs = processor(text=labels, images=picture, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = [model.eval()(**inputs).logits_per_image[0] for model, _ in loaded]
    assert torch.equal(*logits)
    scored = pipeline("zero-shot-image-classification", model=folder)(
        picture, candidate_labels=labels, hypothesis_template="{}")
    probabilities = {one["label"]: one["score"] for one in scored}
    answer[folder] = {"logits": logits[0].tolist(), "pipeline": [probabilities[label] for label in labels],
                      "ids": processor.tokenizer(asked["texts"])["input_ids"]}
print(json.dumps(answer))
"""


def test_stock_transformers_loads_what_was_published(place: Path) -> None:
    """In a process that can import neither koclip nor PEFT: the scores, the pipeline's, and the ids of 1,000 texts."""
    folders = {family: str(aligned(place, family, method)) for family, method in RUNS[: len(ENCODERS)]}
    folders["clip"] = str(aligned(place, "clip", "frozen_image"))
    folders["vit"] = str(with_an_image_tower_alone(place))
    asked = {"folders": list(folders.values()), "texts": strings(), "pairs": [folders["vit"]]}
    ran = subprocess.run(
        [sys.executable, "-c", STRANGER], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    answers = json.loads(ran.stdout.splitlines()[-1])
    for family, folder in folders.items():
        encoder = koclip.load(folder, "cpu")
        model = encoder.model
        texts = encoder.encode_texts(["빨간 공", "파란 상자"])
        picture = encoder.encode_images([Image.new("RGB", (40, 30), "red")])
        logits = (model.logit_scale.exp() * picture @ texts.T)[0].detach()
        torch.testing.assert_close(torch.tensor(answers[folder]["logits"]), logits, atol=2e-3, rtol=0)
        torch.testing.assert_close(torch.tensor(answers[folder]["pipeline"]), logits.softmax(0), atol=2e-3, rtol=0)
        if family != "clip":
            source = place / ("klue" if family == "vit" else family)
            tokenizer = tokenizers.load(str(source), 24, AutoModel.from_pretrained(source).config)
            assert answers[folder]["ids"] == tokenizer(strings())["input_ids"]


def with_an_image_tower_alone(place: Path) -> Path:
    """google/vit-*: a classifier's checkpoint, without pooler, without projection, without logit scale."""
    vit = place / "vit"
    if not vit.exists():
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(vit)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(vit)
    return run(place, "vit", "--model.text_encoder", str(place / "klue"), source="vit") / "model"


def test_an_image_tower_alone_gets_a_text_encoder(place: Path) -> None:
    model = with_an_image_tower_alone(place)
    tower = AutoModel.from_pretrained(place / "vit", add_pooling_layer=False).eval()
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        token = tower(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.equal(images(model), token)
    assert weights(model)["logit_scale"] != torch.tensor(1 / 0.07).log()  # new, so it is trained


def test_a_saved_model_names_no_folder_of_this_machine(place: Path) -> None:
    """Its towers were loaded from folders. A VisionTextDualEncoderModel would name them in its config.json."""
    models = [aligned(place, "klue", "frozen_image"), with_an_image_tower_alone(place)]
    models.append(run(place, "mean", "--model.text_encoder", str(place / "klue"), "--model.pooling", "mean") / "model")
    classes = {json.loads((model / "config.json").read_text())["architectures"][0] for model in models}
    assert classes == {"ChineseCLIPModel", "VisionTextDualEncoderModel", "RouterModel"}
    for file in (file for model in models for file in model.rglob("*.json")):
        assert str(place) not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("family", ["klue", "clip"])
def test_an_adapter_straight_from_training_loads_by_itself(family: str, place: Path) -> None:
    """Its base is the source, or what koclip built of it and the new encoder."""
    model = aligned(place, family, "lora")
    base = json.loads((model / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(place / "source" if family == "clip" else model.with_name("adapter_base"))
    encoder = koclip.load(model, "cpu")
    merged, processor = encoder.model, encoder.processor
    inputs = processor(text=["빨간 공 1", "파란 상자 두 개 2"], padding=True, return_tensors="pt")
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = merged.get_text_features(**texts).pooler_output
        start = AutoModel.from_pretrained(base).eval().get_text_features(**texts).pooler_output
        assert (start - expected).abs().max() > 1e-3
        for adapted in (AutoModel.from_pretrained(model / "adapter"), AutoPeftModel.from_pretrained(model / "adapter")):
            features = adapted.eval().get_text_features(**texts).pooler_output
            torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["klue", "bert", "clip", "vit"])
def test_a_text_longer_than_those_of_training_is_refused_or_cut_in_every_class(family: str, place: Path) -> None:
    """By stock transformers, whose pipeline never cuts, it is refused; by koclip it is cut."""
    method = dict(RUNS)[family] if family != "vit" else ""
    folder = aligned(place, family, method) if method else with_an_image_tower_alone(place)
    encoder = koclip.load(folder, "cpu")
    model, processor = encoder.model, encoder.processor
    tokenizer = processor.tokenizer
    assert tokenizer.model_max_length == 24
    long = "빨간 공 파란 상자 두 개 " * 20
    ids = tokenizer(long, return_tensors="pt", verbose=False)["input_ids"]
    with torch.no_grad():
        model.get_text_features(input_ids=ids[:, :24], attention_mask=torch.ones(1, 24, dtype=torch.long))
        for length in (25, ids.shape[1]):
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                model.get_text_features(input_ids=ids[:, :length], attention_mask=torch.ones(1, length, dtype=int))
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        pipeline("zero-shot-image-classification", model=str(folder))(
            Image.new("RGB", (40, 30), "red"), candidate_labels=["공", long], hypothesis_template="{}"
        )
    cut = tokenizers.encode(tokenizer, [long], return_tensors="pt")
    with torch.no_grad():
        expected = encode_texts(model, cut["input_ids"], cut["attention_mask"])
    torch.testing.assert_close(encoder.encode_texts([long]), expected, atol=1e-5, rtol=0)


def test_an_aligned_model_is_a_source_too(place: Path) -> None:
    """Adapters in the text tower of what another run made, BERT's; its tokenizer comes along."""
    aligned(place, "klue", "frozen_image")
    same = ("--model.text_encoder", "same", "--align.method", "lora")
    model = run(place, "again", *same, source="runs/klue-frozen_image/model") / "model"
    first = place / "runs" / "klue-frozen_image" / "model"
    assert torch.equal(images(model), images(place / "source"))
    assert not torch.equal(
        *(weights(path)["text_model.encoder.layer.0.attention.self.query.weight"] for path in (first, model))
    )
    ids = [AutoTokenizer.from_pretrained(path)(strings())["input_ids"] for path in (first, model)]
    assert ids[0] == ids[1]


def test_full_trains_the_image_tower_in_its_second_stage(place: Path) -> None:
    model = run(place, "full", "--align.method", "full", "--align.first_steps", "3") / "model"
    checkpoints = place / "runs" / "full" / "checkpoints"
    source, ours = weights(place / "source"), weights(model)
    first = load_file(checkpoints / "step-00000003" / "state.safetensors")
    for name in source:
        if name.startswith(("vision_model.", "visual_projection")) or name == "logit_scale":
            assert torch.equal(first[f"model.model.{name}"], source[name]), name
            assert not torch.equal(ours[name], source[name]), name


def test_full_trains_the_top_layers_with_smaller_steps_below(place: Path) -> None:
    options = ("--align.image_layers", "1", "--align.layer_decay", "0.1", "--optim.weight_decay", "0")
    model = run(place, "top", "--align.method", "full", *options) / "model"
    source, ours = weights(place / "source"), weights(model)
    for name in source:
        if name.startswith("vision_model."):
            above = ".layers.1." in name or "post_layernorm" in name
            assert torch.equal(ours[name], source[name]) != above, name
    moved = {name: (ours[name] - source[name]).abs().max() for name in source if name.startswith("vi")}
    assert moved["vision_model.encoder.layers.1.mlp.fc1.weight"] < 0.2 * moved["visual_projection.weight"]


def test_wise_ft_lies_between_the_source_and_the_trained(place: Path) -> None:
    """The same text encoder, so that every weight has a start; the same run but for the average at its end."""
    same = ("--align.method", "full", "--model.text_encoder", "same")
    whole, half = run(place, "whole", *same), run(place, "half", *same, "--align.wise_ft", "0.25")
    source, trained, mixed = (weights(path) for path in (place / "source", whole / "model", half / "model"))
    for name, before in source.items():
        torch.testing.assert_close(mixed[name], 0.75 * before + 0.25 * trained[name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(mixed["text_projection.weight"], trained["text_projection.weight"])


def test_wise_ft_mixes_what_an_image_tower_alone_has(place: Path) -> None:
    """Its weights only: the projection, the scale and the text encoder are new."""
    with_an_image_tower_alone(place)
    options = ("--model.text_encoder", str(place / "klue"), "--align.method", "full", "--align.wise_ft")
    trained, mixed = (
        weights(run(place, f"vit-{share}", *options, share, source="vit") / "model") for share in ["1.0", "0.25"]
    )
    changed = {name for name in trained if not torch.equal(mixed[name], trained[name])}
    assert changed
    assert {name.partition(".")[0] for name in changed} == {"vision_model"}


def test_the_anchor_holds_english_in_place(place: Path) -> None:
    """English captions and the teacher beside the photos: English texts move less from where they were."""
    both = ("--model.text_encoder", "same", "--optim.lr", "0.01", "--align.method", "frozen_image")
    rows = f"[{{path: {place / 'pairs.parquet'}, captions: {{ko: captions_ko, en: captions_en}}}}]"
    free = run(place, "free", *both, "--data.sources", rows) / "model"
    held = run(place, "held", *both, "--data.sources", rows, "--distill.anchor", "10") / "model"
    texts = ["a red ball 3", "two blue boxes 5"]
    before, after, anchored = (koclip.load(path, "cpu").encode_texts(texts) for path in (place / "source", free, held))
    assert (before * anchored).sum(1).mean() > (before * after).sum(1).mean() + 0.05


def test_distillation_reads_no_image(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of parallel sentences alone will do."""
    text = place / "parallel.tsv"
    text.write_text("ko\ten\n" + "".join(f"빨간 공 {n}\ta red ball {n}\n" for n in range(30)), encoding="utf-8")
    monkeypatch.setattr("koclip.data.batches.decode", lambda *_: pytest.fail("an image was decoded"))
    source = f"[{{path: {text}, image: null, captions: {{ko: ko, en: en}}}}]"
    losses = [
        json.loads(line)["loss"]
        for line in (
            run(place, "sentences", "--align.method", "distill", "--data.sources", source, "--data.num_crops", "0")
            / "metrics.jsonl"
        ).read_text(encoding="utf-8").splitlines()
    ]  # fmt: skip
    assert losses[-1] < losses[0]


def test_mse_is_of_the_features_before_normalisation(place: Path) -> None:
    """Under a strong pull, the norm of the texts' features comes near the teacher's."""
    args = ("--align.method", "distill", "--distill.mse", "10", "--distill.contrastive", "0", "--distill.cosine", "0")
    directory = run(place, "mse", *args, "--optim.lr", "0.01", "--train.num_steps", "30")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_a_run_leaves_what_the_design_says(place: Path) -> None:
    directory = run(place, "reported", "--align.method", "two_stage", "--align.first_steps", "3", reported=True)
    left = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "results.json", "model/model.safetensors"} <= left
    assert {"pictures/queries-pairs.png", "features/images/embeddings.json", "features/teacher/embeddings.json"} <= left
    assert not [name for name in left if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["seconds"] for line in logged]  # of both stages
    assert len(seconds) > 3
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--align.first_steps", "2"], ["align.first_steps", "frozen_image"]),
        (["--align.method", "two_stage"], ["align.first_steps", "two_stage"]),
        (["--align.method", "full", "--align.first_steps", "9"], ["align.first_steps", "fewer than train.num_steps"]),
        (["--align.layer_decay", "0.5"], ["align.layer_decay", "0.5"]),
        (
            ["--align.method", "lora", "--align.wise_ft", "0.5", "--model.text_encoder", "same"],
            ["align.wise_ft", "lora.alpha"],
        ),
        (["--data.num_crops", "0"], ["data.num_crops", "align.cache"]),
        (["--model.clip", ""], ["model.clip"]),
        (["--distill.anchor", "1", "--distill.language", "fr"], ["captions", "fr", "pairs", "'ko'", "frozen_image"]),
        (
            ["--model.text_encoder", "same", "--align.method", "distill"],
            ["model.text_encoder", "same"],
        ),
        (["--model.text_encoder", "x/y", "--model.text_width", "64"], ["model.text_width", "has its own"]),
        (["--align.method", "lora"], ["model.text_encoder", "lora"]),
        (["--align.method", "litt"], ["align.method"]),
        (["--align.image_layers", "2"], ["align.image_layers", "2"]),
    ],
)
def test_mistakes_are_told_before_anything_is_read(args, words, place, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        align(*arguments(place / "source", place / "pairs.parquet", *args))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_both_tables_of_methods_have_the_same_names() -> None:
    assert set(METHODS) <= set(config.METHODS)
    assert set(config.METHODS) == set(methods.METHODS)
