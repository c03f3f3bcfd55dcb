"""Text encoders of every family beside every kind of image tower: exact in training and in stock libraries."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentence_transformers
import torch
import torch.nn.functional as F
import transformers
from align_runs import align, arguments, write_pairs, write_source
from peer_models import VISION, WIDTH, bert_tokenizer, clip_images, saved
from PIL import Image
from runs_to_publish import aligned, beside
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

import koclip
from koclip.align.methods import pooling_report, text_pooling
from koclip.align.unused import freeze_unused
from koclip.config import ConfigError, PublishConfig, SwapConfig
from koclip.models import trim
from koclip.models.pretrained import load_image_side, load_text_encoder, own_pooling
from koclip.models.router import RouterModel
from koclip.models.stock import layout_of, save_stock_model
from koclip.models.swap import swap_text_tower
from koclip.publishing.card import render
from koclip.publishing.card_inputs import gather
from koclip.publishing.formats.onnx import export
from koclip.publishing.formats.sentence_transformers import describe
from koclip.publishing.preflight import preflight
from koclip.text.cleaning import cleaning
from koclip.text.prefix import add_prefix, prefix_of

CLEAN_LOAD = Path(koclip.__file__).parent / "publishing" / "clean_load.py"
TEXTS = ["고양이", "빨간 자전거", "a photo of a dog", "창가에 앉아 밖을 보는 고양이 사진"]
PICTURES = [Image.effect_noise((64, 48), 90).convert("RGB"), Image.linear_gradient("L").convert("RGB")]
TWO_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
COUNTED = {"pad_token_id": 0, "max_position_embeddings": 42}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("bert", TWO_LAYERS),
    "RoBERTa": ("roberta", TWO_LAYERS | COUNTED),
    "XLM-R": ("xlm-roberta", TWO_LAYERS | COUNTED),
    "CamemBERT": ("camembert", TWO_LAYERS | COUNTED),
    "DistilBERT": ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "ELECTRA": ("electra", TWO_LAYERS | {"embedding_size": 32}),
    "ELECTRA, narrow": ("electra", TWO_LAYERS | {"embedding_size": 16}),
    "ALBERT": ("albert", TWO_LAYERS | {"embedding_size": 16}),
    "MPNet": ("mpnet", TWO_LAYERS | COUNTED),
    "ModernBERT": ("modernbert", TWO_LAYERS),
    "DeBERTa": ("deberta", TWO_LAYERS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "DeBERTa v3": (
        "deberta-v2",
        TWO_LAYERS
        | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True}
        | {"type_vocab_size": 0, "position_biased_input": False, "norm_rel_ebd": "layer_norm"},
    ),
    "EuroBERT": ("eurobert", TWO_LAYERS | {"num_key_value_heads": 1}),
    "NomicBERT": ("nomic_bert", TWO_LAYERS),
    "T5": ("t5", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}),
}
IMAGE_TOWERS = ("CLIP", "timm", "SigLIP")


class Cell(NamedTuple):
    """A text family, a pooling and an image tower."""

    family: str
    pooling: str
    image: str

    @property
    def layout(self) -> str:
        """The class that must hold this pair."""
        if self.pooling == "mean" or self.family in ALONE:
            return "RouterModel"
        if self.image == "CLIP" and self.family not in ("ALBERT", "MPNet"):
            return "ChineseCLIPModel"
        return "VisionTextDualEncoderModel"


ALONE = ("ELECTRA, narrow", "ModernBERT", "DeBERTa", "DeBERTa v3", "EuroBERT", "NomicBERT", "T5")


def pairwise() -> list[Cell]:
    """Every family with every image tower, and the pooling alternates: each pair of two factors occurs."""
    cells = []
    for row, family in enumerate(FAMILIES):
        for column, image in enumerate(IMAGE_TOWERS):
            first = (row + column) % 2 == 0 and family != "T5"
            cells.append(Cell(family, "first" if first else "mean", image))
    return cells


CELLS = pairwise()
# The default tests: each layout, each image tower.
FEW = [
    Cell("BERT", "first", "CLIP"),
    Cell("DistilBERT", "first", "SigLIP"),
    Cell("ModernBERT", "mean", "CLIP"),
    Cell("DeBERTa v3", "mean", "timm"),
    Cell("NomicBERT", "mean", "SigLIP"),  # its weights have other names in the file than in the model
]


def test_every_pair_of_factors_occurs() -> None:
    wanted = {(family, pooling) for family in FAMILIES for pooling in ("first", "mean")} - {("T5", "first")}
    assert {(cell.family, cell.pooling) for cell in CELLS} == wanted
    assert {(cell.family, cell.image) for cell in CELLS} == {(f, i) for f in FAMILIES for i in IMAGE_TOWERS}
    assert len({(cell.pooling, cell.image) for cell in CELLS}) == 2 * len(IMAGE_TOWERS)
    assert len(FAMILIES) >= 12
    assert {cell.layout for cell in FEW} == {cell.layout for cell in CELLS}


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases and norms too: a lost weight would show
    return model.eval()


def encoder(family: str) -> PreTrainedModel:
    kind, sizes = FAMILIES[family]
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config: Any = AutoConfig.for_model(kind, **{**ids, **sizes, "vocab_size": len(bert_tokenizer())})
    config.is_decoder = config.is_encoder_decoder = False
    return randomize(transformers.T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config))


def source(image: str) -> Any:
    if image == "CLIP":
        options: dict[str, Any] = {"text_config": WIDTH | {"vocab_size": 40}, "vision_config": VISION}
        return randomize(transformers.CLIPModel(transformers.CLIPConfig(**options, projection_dim=24)))
    if image == "SigLIP":
        options = {"text_config": WIDTH | {"vocab_size": 40}, "vision_config": VISION}
        return randomize(transformers.SiglipModel(transformers.SiglipConfig(**options)))
    tower = randomize(transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="test_vit")))
    tower.config.hidden_size = 64
    return tower


def publish(cell: Cell, directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Save a swapped model; return it, and the embeddings computed from the encoder and the source by hand."""
    original, clip = encoder(cell.family), source(cell.image)
    tokenizer: Any = cleaning(bert_tokenizer())
    side = 160 if cell.image == "timm" else 32
    images = clip_images() if side == 32 else transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )  # fmt: skip
    with torch.no_grad():
        encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
        mask = encoded["attention_mask"]
        states = original(input_ids=encoded["input_ids"], attention_mask=mask).last_hidden_state
        kept = [row[: int(count)] for row, count in zip(states, mask.sum(1), strict=True)]
        pooled = torch.stack([row[0] if cell.pooling == "first" else row.mean(0) for row in kept])
        pixels = images(PICTURES, return_tensors="pt")["pixel_values"]
        tower = clip if cell.image == "timm" else clip.vision_model
        image = tower(pixel_values=pixels).pooler_output
        image = clip.visual_projection(image) if cell.image == "CLIP" else image
    pooling: Any = cell.pooling
    model: Any = swap_text_tower(clip, original, pooling=pooling).eval()
    kind: Any = layout_of(model).processor_class
    save_stock_model(directory, model, kind(images, tokenizer), model.state_dict())
    with torch.no_grad():
        text = model.text_projection(pooled)
    return model, {"text": F.normalize(text, dim=-1), "image": F.normalize(image, dim=-1)}


def reload(directories: Sequence[Path]) -> list[dict[str, torch.Tensor]]:
    """Embed with every directory in one clean process, without koclip."""
    files = []
    for number, picture in enumerate(PICTURES):
        files.append(str(directories[0].parent / f"{number}.png"))
        picture.save(files[-1])
    inputs = {"texts": TEXTS, "pictures": files, "pairs": [], "threads": 1}
    for directory in directories:
        (directory.parent / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    program = (
        "import runpy, sys, pathlib\n"
        "main = runpy.run_path(sys.argv[1])['main']\n"
        "for path in sys.argv[2:]:\n"
        "    problems = main(path, pathlib.Path(path).parent)['problems']\n"
        "    assert not problems, (path, problems)\n"
        "assert sys.modules['koclip'] is None"
    )
    command = [sys.executable, "-I", "-c", program, str(CLEAN_LOAD), *map(str, directories)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-1000:]
    return [load_file(directory.parent / "embeddings.safetensors") for directory in directories]


def check_cells(cells: Sequence[Cell], folder: Path) -> None:
    directories, expected = [], []
    for number, cell in enumerate(cells):
        directory = folder / str(number) / "model"
        directory.parent.mkdir()
        model, embeddings = publish(cell, directory)
        assert type(model).__name__ == cell.layout, cell
        loaded = koclip.load(directory, "cpu")
        assert type(loaded.model) is type(model)
        for side, rows in (("text", loaded.encode_texts(TEXTS)), ("image", loaded.encode_images(PICTURES))):
            torch.testing.assert_close(rows, embeddings[side], atol=1e-6, rtol=0, msg=f"koclip.load, {side}: {cell}")
        directories.append(directory)
        expected.append(embeddings)
    for cell, wanted, got in zip(cells, expected, reload(directories), strict=True):
        for side in ("text", "image"):
            torch.testing.assert_close(got[side], wanted[side], atol=1e-6, rtol=0, msg=f"clean, {side}: {cell}")


@pytest.mark.parametrize(
    ("kind", "pooling", "key"),
    [
        ("gpt2", "mean", "text_encoder"),  # a decoder: the first token sees no other
        ("bart", "mean", "text_encoder"),  # its last hidden states are its decoder's
        ("t5", "first", "pooling"),
        ("fnet", "mean", "text_encoder"),  # it takes no mask
        ("clip_text_model", "mean", "pooling"),
    ],
)
def test_what_is_no_encoder_is_refused_by_name(kind: str, pooling: Any, key: str) -> None:
    if kind == "t5":
        text_encoder = encoder("T5")
    else:
        sizes = {"n_embd": 32, "n_head": 2, "n_layer": 1} if kind == "gpt2" else TWO_LAYERS
        text_encoder = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, vocab_size=40, pad_token_id=0))
    with pytest.raises(ConfigError, match=rf"model\.{key}: got .*({kind}|CLIP)"):
        swap_text_tower(source("CLIP"), text_encoder, pooling=pooling)


def test_a_router_is_a_source_with_its_own_text_tower_or_another(tmp_path: Path) -> None:
    model, embeddings = publish(Cell("ModernBERT", "mean", "CLIP"), tmp_path / "model")
    same, images = load_image_side(str(tmp_path / "model"))
    assert isinstance(same, RouterModel)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in same.state_dict().items())
    assert torch.equal(same.logit_scale, model.logit_scale)
    swapped: Any = swap_text_tower(same, encoder("BERT")).eval()
    assert type(swapped).__name__ == "ChineseCLIPModel"
    with torch.no_grad():
        rows = swapped.get_image_features(images(PICTURES, return_tensors="pt")["pixel_values"]).pooler_output
    torch.testing.assert_close(F.normalize(rows, dim=-1), embeddings["image"], atol=1e-6, rtol=0)
    tower = load_text_encoder(str(tmp_path / "model"))
    assert type(tower).__name__ == "ModernBertModel"
    assert own_pooling(str(tmp_path / "model")) == "mean"


def test_a_bias_and_the_identity_are_kept(tmp_path: Path) -> None:
    """SigLIP has no image projection, so the Router has no Dense for images."""
    publish(Cell("ModernBERT", "mean", "SigLIP"), tmp_path / "model")
    assert not (tmp_path / "model" / "image_1_Dense").exists()
    clip = source("SigLIP")
    loaded = koclip.load(tmp_path / "model", "cpu")
    assert loaded.bias == clip.logit_bias.item()
    assert loaded.scale == clip.logit_scale.exp().item()
    assert torch.equal(loaded.model.visual_projection.weight, torch.eye(32))


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode": "max"}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
    ],
)
def test_an_encoders_own_pooling_is_the_default(settings: dict[str, Any], pooling: str | None, tmp_path: Path) -> None:
    config = SwapConfig(clip="a/clip", text_encoder=str(tmp_path))
    assert text_pooling(config) == "first"
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert text_pooling(replace(config, pooling="first")) == "first"
    if pooling is None:
        with pytest.raises(ConfigError, match=r"model\.pooling: got .*expected cls or mean"):
            text_pooling(config)
    else:
        assert text_pooling(config) == pooling
        assert str(tmp_path) in str(pooling_report(config))


def test_a_pooling_that_cannot_be_read_is_not_taken_for_the_default() -> None:
    """Offline, with a model in the cache that was loaded without its modules.json, for example."""
    with pytest.raises(ConfigError, match=r"set model\.pooling"):
        text_pooling(SwapConfig(clip="a/clip", text_encoder="someone/encoder"))


def test_pooling_is_only_for_a_new_text_encoder() -> None:
    with pytest.raises(ConfigError, match=r"model\.pooling: got 'mean', remove it"):
        SwapConfig(clip="a/clip", text_encoder="same", pooling="mean")


def test_a_prefix_is_a_rule_of_the_tokenizer(tmp_path: Path) -> None:
    """Its ids are those of the text that begins with the prefix; also after it was saved, and given once only."""
    plain: Any = cleaning(bert_tokenizer())
    prefixed: Any = add_prefix(cleaning(bert_tokenizer()), "a photo ")
    texts = [*TEXTS, "  고양이 [SEP] ", "빨간\u200b 자전거"]
    expected = plain([f"a photo {text}" for text in texts])["input_ids"]
    assert prefixed(texts)["input_ids"] == expected
    blank = ["", "  ", "\t\u200b ", "</s>"]
    assert prefixed(blank)["input_ids"] == plain([""] * len(blank))["input_ids"]
    prefixed.save_pretrained(tmp_path)
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert cleaning(loaded) is loaded
    assert prefix_of(loaded) == "a photo "
    assert add_prefix(loaded, "a photo ")(texts)["input_ids"] == expected
    assert loaded(blank)["input_ids"] == plain([""] * len(blank))["input_ids"]
    with pytest.raises(ConfigError, match=r"tokenizer\.prefix: got 'query: '.*'a photo '"):
        add_prefix(loaded, "query: ")
    assert prefix_of(plain) == ""


@pytest.mark.parametrize("prefix", ["", "query: "])
def test_the_mark_of_a_word_is_no_prefix(prefix: str) -> None:
    """Tokenizers like Llama's prepend it by their normalizer."""
    llama: Any = bert_tokenizer()
    llama.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert prefix_of(add_prefix(cleaning(llama), prefix)) == prefix


def test_a_router_is_published_with_a_card_that_says_what_loads_it(tmp_path: Path) -> None:
    publish(Cell("ModernBERT", "mean", "CLIP"), tmp_path / "model")
    beside(tmp_path, aligned("someone/clip", "someone/encoder", "frozen_image"))
    checks = {check.name: check.problems for check in preflight(tmp_path / "model")}
    assert len(checks) > 10
    assert [name for name in checks if checks[name]] == ["licence is stated"]  # there is no card yet
    licences = dict.fromkeys(("someone/clip", "someone/encoder"), "mit")
    cfg = PublishConfig(model=str(tmp_path / "model"), repo_id="someone/router", licenses=licences, dry_run=True)
    card = render(cfg, gather(cfg))
    assert card.data["library_name"] == "sentence-transformers"
    assert "sentence-transformers" in card.data["tags"]
    assert "SentenceTransformer(" in card.text
    assert "AutoModel.from_pretrained" not in card.text
    assert "RouterModel" not in card.text
    with pytest.raises(ConfigError, match=r"onnx: got .*RouterModel"):
        export(tmp_path / "model", tmp_path / "model")
    assert describe(tmp_path / "model") == []  # its files are there


def test_any_one_folder_model_of_sentence_transformers_is_opened_by_the_library(tmp_path: Path) -> None:
    publish(Cell("ModernBERT", "mean", "CLIP"), tmp_path / "model")
    own = koclip.load(tmp_path / "model", "cpu")
    library: Any = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    library.save(str(tmp_path / "saved"), create_model_card=False)  # a Router that koclip did not write
    (tmp_path / "saved" / "config.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"expected sentence_transformers:"):
        koclip.load(tmp_path / "saved", "cpu")
    other = koclip.load(f"sentence_transformers:{tmp_path / 'saved'}", "cpu")
    torch.testing.assert_close(other.encode_texts(TEXTS), own.encode_texts(TEXTS), atol=1e-6, rtol=0)
    torch.testing.assert_close(other.encode_images(PICTURES), own.encode_images(PICTURES), atol=1e-6, rtol=0)
    assert other.unknown_share(TEXTS) == own.unknown_share(TEXTS)
    weights = load_file(tmp_path / "saved" / "text_0_Transformer" / "model.safetensors")
    lost = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(lost, tmp_path / "saved" / "text_0_Transformer" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="missing"):
        koclip.load(f"sentence_transformers:{tmp_path / 'saved'}", "cpu")


def test_a_clean_process_notices_a_routers_lost_weights(tmp_path: Path) -> None:
    publish(Cell("NomicBERT", "mean", "CLIP"), tmp_path / "model")
    file = tmp_path / "model" / "text_0_Transformer" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "layers.1." not in name}, file, {"format": "pt"})
    with pytest.raises(AssertionError, match="text missing_keys"):
        reload([tmp_path / "model"])


def test_a_trimmed_router_embeds_the_same(tmp_path: Path) -> None:
    """Its tokenizer and its configuration are there twice; both are cut."""
    publish(Cell("ModernBERT", "mean", "CLIP"), tmp_path / "model")
    cut = trim.Source(str(tmp_path / "model"))
    used = {number for text in TEXTS for number in cut.tokenizer(text)["input_ids"]}
    kept = sorted({*range(5), *used})
    trim.write_trimmed(cut, tmp_path / "trimmed", kept)
    before, after = (koclip.load(tmp_path / name, "cpu") for name in ("model", "trimmed"))
    assert after.model.text_model.config.vocab_size == len(kept) < before.model.text_model.config.vocab_size
    assert len(after.processor.tokenizer) == len(kept)
    assert torch.equal(after.encode_texts(TEXTS), before.encode_texts(TEXTS))
    assert json.loads((tmp_path / "trimmed" / "config.json").read_text())["text_config"]["vocab_size"] == len(kept)


def test_a_clip_of_sentence_transformers_is_opened_by_the_library(tmp_path: Path) -> None:
    directory = saved("CLIP", tmp_path / "model")
    describe(directory)
    own, other = koclip.load(directory, "cpu"), koclip.load(f"sentence_transformers:{directory}", "cpu")
    torch.testing.assert_close(other.encode_texts(TEXTS), own.encode_texts(TEXTS), atol=1e-6, rtol=0)
    torch.testing.assert_close(other.encode_images(PICTURES), own.encode_images(PICTURES), atol=1e-6, rtol=0)
    assert other.scale == own.scale


@pytest.mark.parametrize("method", ["frozen_image", "lora", "projection"])
def test_an_alignment_trains_and_publishes_a_router(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the pooling that the encoder's directory says, and a prefix; images stay as they were."""
    encoder("ModernBERT").save_pretrained(tmp_path / "text")
    bert_tokenizer().save_pretrained(tmp_path / "text")
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (tmp_path / "text" / "modules.json").write_text(json.dumps([pooling]))
    (tmp_path / "text" / "1_Pooling").mkdir()
    (tmp_path / "text" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    clip = write_source(tmp_path / "clip")
    args = ("--model.text_encoder", str(tmp_path / "text"), "--tokenizer.prefix", "a photo ")
    run = ("--align.method", method, "--output_dir", str(tmp_path / "run"))
    align(*arguments(clip, write_pairs(tmp_path / "pairs.parquet"), *args, *run))
    printed = capsys.readouterr().out
    assert f"Pooling of texts: mean (as {tmp_path / 'text'} says)" in printed
    assert "SentenceTransformer" in printed
    before, after = koclip.load(clip, "cpu"), koclip.load(tmp_path / "run" / "model", "cpu")
    assert after.model.config.pooling == "mean"
    assert torch.equal(after.encode_images(PICTURES), before.encode_images(PICTURES))
    library: Any = sentence_transformers.SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    torch.testing.assert_close(
        library.encode(TEXTS, convert_to_tensor=True), after.encode_texts(TEXTS), atol=1e-6, rtol=0
    )
    trained: Any = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")  # what training used
    ids = library.preprocess(TEXTS)["input_ids"]
    assert torch.equal(ids, trained(TEXTS, padding=True, return_tensors="pt")["input_ids"])
    assert prefix_of(trained) == "a photo "
    problems = {check.name: check.problems for check in preflight(tmp_path / "run" / "model", adapter=False)}
    assert [name for name in problems if problems[name]] == ["licence is stated"]


UNUSED: dict[str, dict[str, Any]] = {
    "bert": TWO_LAYERS,
    "longformer": TWO_LAYERS | {"attention_window": 8},
    "luke": TWO_LAYERS | {"entity_vocab_size": 9, "entity_emb_size": 16},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
}


@pytest.mark.parametrize("kind", UNUSED)
def test_weights_that_no_text_uses_are_frozen(kind: str) -> None:
    """All others get a gradient, without which DDP stops; dropout and random numbers stay as they were."""
    config = AutoConfig.for_model(kind, **UNUSED[kind], vocab_size=40, pad_token_id=0)
    model: Any = swap_text_tower(source("CLIP"), AutoModel.from_config(config), pooling="mean").train()
    before = torch.get_rng_state()
    frozen = freeze_unused(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert bool(frozen) == (kind != "bert")
    ids = torch.tensor([[5, 6, 7, 8, 9], [7, 5, 0, 0, 0]])
    model.get_text_features(input_ids=ids, attention_mask=(ids > 0).long()).pooler_output.square().sum().backward()
    weights = dict(model.text_model.named_parameters())
    assert [name for name, weight in weights.items() if weight.grad is None] == frozen
    assert [name for name, weight in weights.items() if not weight.requires_grad] == frozen


@pytest.mark.parametrize("layout", sorted({cell.layout for cell in FEW}))
def test_a_few_pairs_are_exact_in_stock_libraries(layout: str, tmp_path: Path) -> None:
    check_cells([cell for cell in FEW if cell.layout == layout], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted({cell.layout for cell in CELLS}))
def test_every_pair_of_factors_is_exact_in_stock_libraries(layout: str, tmp_path: Path) -> None:
    cells = [cell for cell in CELLS if cell.layout == layout]
    assert len(cells) > 2
    check_cells(cells, tmp_path)
