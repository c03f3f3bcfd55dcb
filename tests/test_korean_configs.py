"""The configurations of Korean encoders run end to end, with vocabularies of real size and random weights.

KLUE's encoder has the 32,200 pieces of KoELECTRA in the order of KLUE's special tokens, KoBERT's has 8,002 pieces of
Korean sentences. Towers are small; every other setting but the numbers of steps and rows is that of the configuration.
"""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from align_runs import align, write_source
from helpers.kobert_files import write as write_kobert
from helpers.tokenizer_families import BERT, KLUE, settle
from transformers import AutoConfig, AutoModel, ViTImageProcessor

import koclip
from koclip.text import kobert

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs" / "align"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PIECES = {"klue": 32_200, "kobert": 8_002}
RUNS = {
    "klue_roberta_base_frozen": "klue",
    "klue_roberta_base_distill": "klue",
    "klue_roberta_base_two_stage": "klue",
    "klue_roberta_large_frozen": "klue",
    "kobert_frozen": "kobert",
}


def write_klue(folder: Path, vocabulary: Path) -> None:
    folder.mkdir()
    pieces = vocabulary.read_text(encoding="utf-8").split("\n")
    assert tuple(pieces[: len(BERT)]) == BERT
    (folder / "vocab.txt").write_text("\n".join([*KLUE, *pieces[len(BERT) :]]), encoding="utf-8")
    settle(folder, "roberta", tokenizer_class="BertTokenizer", do_lower_case=False, model_max_length=512)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    sizes = {"vocab_size": PIECES["klue"], "max_position_embeddings": 514, "type_vocab_size": 1}
    write_tower(folder, "roberta", **sizes, layer_norm_eps=1e-5, **ids)


def write_tower(folder: Path, kind: str, **settings: object) -> None:
    """Write a small tower with random weights."""
    AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, **settings)).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, an image tower alone, both encoders, KoBERT's converted tokenizer, and 24 photos."""
    folder = tmp_path_factory.mktemp("korean")
    torch.manual_seed(0)
    write_source(folder / "clip")
    write_tower(folder / "vit", "vit", image_size=32, patch_size=8)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    write_klue(folder / "klue", shared_data / "text" / "vocab_koelectra.txt")
    sentences = (shared_data / "text" / "kornlu.txt").read_text(encoding="utf-8").splitlines()
    original = write_kobert(folder / "kobert", "monologg", sentences[:20_000], PIECES["kobert"] - 2)
    kobert.convert(original).save_pretrained(folder / "kobert_tokenizer")
    write_tower(folder / "kobert", "bert", vocab_size=PIECES["kobert"], pad_token_id=1)
    photos = pq.read_table(shared_data / "flickr8k_ko" / "val.parquet")
    pq.write_table(photos.slice(0, 24), folder / "photos.parquet")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_configuration_of_a_korean_encoder_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned, measured, and opened again; its tokenizer reads Korean without unknown pieces."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    kind, clip = RUNS[name], "vit" if "large" in name else "clip"
    rows = f"path: {place / 'photos.parquet'}, captions: {{ko: captions_ko, en: captions_en}}"
    args = ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(place / name)]
    args += ["--model.clip", str(place / clip), "--model.text_encoder", str(place / kind)]
    args += ["--data.sources", f"[{{{rows}, languages: {{ko: 1.0}}}}]", "--eval.sets", f"[{{source: {{{rows}}}}}]"]
    args += ["--train.num_steps", "4", "--train.batch_size", "8", "--train.micro_batch_size", "4"]
    args += ["--optim.warmup_steps", "1", "--data.num_workers", "0", "--train.eval_every", "0"]
    args += ["--train.tracker", "none", "--train.num_threads", "1"]
    if kind == "kobert":
        args += ["--tokenizer.path", str(place / "kobert_tokenizer")]
    if "two_stage" in name:
        args += ["--align.first_steps", "2"]
    align(*args, reported=True)
    encoder = koclip.load(str(place / name / "model"))
    tokenizer = encoder.processor.tokenizer
    assert len(tokenizer) == PIECES[kind]
    texts = ["빨간 자전거를 탄 아이가 공원을 달린다", "눈 덮인 산을 오르는 사람들"]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(texts)["input_ids"])
    assert encoder.encode_texts(texts).isfinite().all()
    assert (place / name / "results.json").exists()
