"""koclip.text.kobert: the ids of the original tokenizers, whose code is repeated here over sentencepiece itself."""

import json
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from helpers.kobert_files import CORPUS, SPECIAL, read, write
from tokenizers import Tokenizer
from tokenizers.normalizers import NFKD

from koclip.config import ConfigError
from koclip.text import kobert, tokenizers

LAYOUTS = ["monologg", "skt", "skt-user-defined"]
EXPECTED = "한국어 모델을 공유합니다."  # whose ids the skt repository's README gives
EXPECTED_IDS = [2, 4958, 6855, 2046, 7088, 1050, 7843, 54, 3]


class Original:
    """What the slow tokenizers of both publications do; see koclip/text/kobert.py for where their code is."""

    def __init__(self, folder: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(next(folder.glob("*.model"))))
        self.id = self.model.piece_to_id
        if (folder / "vocab.txt").exists():
            with (folder / "vocab.txt").open(encoding="utf-8") as lines:
                ids = {line.strip(): number for number, line in enumerate(lines)}
            self.id = lambda piece: ids.get(piece, ids["[UNK]"])

    def pieces(self, text: str) -> list[str]:
        text = " ".join(text.strip().split()).replace("``", '"').replace("''", '"')
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        pieces = []
        for piece in self.model.encode(text, out_type=str):
            if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
                again = self.model.encode(piece[:-1].replace("▁", ""), out_type=str)
                if piece[0] != "▁" and again[0][0] == "▁":
                    again = again[1:] if len(again[0]) == 1 else [again[0][1:], *again[1:]]
                pieces += [*again, ","]
            else:
                pieces.append(piece)
        return pieces

    def __call__(self, text: str) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
        ids = [[SPECIAL.index(part)] if part in SPECIAL else map(self.id, self.pieces(part)) for part in parts]
        return [2, *(number for group in ids for number in group), 3]


def fuzz(count: int, lines: list[str]) -> list[str]:
    """Return strings of everything that a rule of the tokenizers or a step of the conversion is there for."""
    rng = random.Random(0)
    blocks = [
        [(0xAC00, 0xD7A4)], [(0x1100, 0x1200), (0xA960, 0xA980), (0xD7B0, 0xD800)], [(0x3130, 0x3190)], [(0x20, 0x7F)],
        [(0x00, 0x20), (0x7F, 0xA1)], [(0xA0, 0x2000)], [(0x2000, 0x2070)], [(0x300, 0x370)], [(0xFF01, 0xFFEF)],
        [(0x2070, 0xD800), (0xE000, 0x10000)], [(0x1F300, 0x1FB00), (0x10000, 0x110000)],
    ]  # fmt: skip
    spaces = [" ", "   ", "\t\n", "\r\n", "\x1c", "\x85", "\xa0", "\u2028", "\u200b", "\u3000", "\ufeff", "▁", "▁▁"]
    marks = ["9,", "1,234원", "\uff13,", "12, 34", "``", "''", "`'", "\xad", "\u0301", "é", "½"]
    emoji = ["👩\u200d👧", "❤\ufe0f", "🇰🇷", "👍🏽"]
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "[SEP]")  # full-width letters: special once normalised
    hidden = [wide, "[C\u0301LS]", "[MA\u0301SK]", "[UNK\u200b]", "[cls]", "[[MASK]]", "<s>", "</s>", "<unk>"]

    def part() -> str:
        kind = rng.randrange(6)
        if kind == 0:
            line = rng.choice(lines)
            start = rng.randrange(len(line))
            return unicodedata.normalize(rng.choice(["NFC", "NFD"]), line[start : start + rng.randrange(1, 40)])
        if kind < 4:
            return rng.choice([spaces, marks + emoji, hidden + SPECIAL][kind - 1])
        return chr(rng.randrange(*rng.choice(rng.choice(blocks))))

    texts = ["".join(part() for _ in range(rng.choice([1, 2, 3, 5, 8]))) for _ in range(count - 7)]
    many = [lines[0] * 300, "가" * 5_000, "▁" * 3_000, " " * 3_000, "\u0301" * 3_000]
    return [text for text in [*texts, *many, "", "▁ ▁"] if old(text)]


def old(text: str) -> bool:
    """Tell whether `tokenizers` knows what NFKD makes of every character: its tables are those of Unicode 12.0."""
    return unicodedata.normalize("NFKD", text) == NFKD().normalize_str(text)


def mismatches(tokenizer: Tokenizer, texts: list[str], expected: list[list[int]]) -> list[str]:
    encoded = tokenizer.encode_batch(texts)
    return [text for text, ours, ids in zip(texts, encoded, expected, strict=True) if ours.ids != ids]


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("kobert"), request.param)


@pytest.fixture(scope="module")
def converted(folder):
    return kobert.convert(folder)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return fuzz(6_000, CORPUS)


@pytest.fixture(scope="module")
def expected(folder, texts) -> list[list[int]]:
    return list(map(Original(folder), texts))


def test_ids_are_the_originals(converted, texts, expected) -> None:
    assert len(texts) > 5_000
    assert mismatches(converted.backend_tokenizer, texts, expected) == []
    assert 1_000 < sum(0 in ids for ids in expected) < 5_000  # unknown tokens hide differences


def test_no_step_can_be_left_out(converted, texts, expected) -> None:
    texts, expected = texts[:1_500], expected[:1_500]
    state = converted.backend_tokenizer.to_str()
    for place in range(len(json.loads(state)["normalizer"]["normalizers"])):
        broken = json.loads(state)
        step = broken["normalizer"]["normalizers"].pop(place)
        assert mismatches(Tokenizer.from_str(json.dumps(broken)), texts, expected), step
    uncut = json.loads(state) | {"pre_tokenizer": None}
    assert mismatches(Tokenizer.from_str(json.dumps(uncut)), texts, expected)


def test_decomposed_text_has_the_ids_of_composed_text(converted, texts) -> None:
    composed, decomposed = ([unicodedata.normalize(form, text) for text in texts] for form in ("NFC", "NFD"))
    assert converted(composed)["input_ids"] == converted(decomposed)["input_ids"]
    assert composed != decomposed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_the_originals_with_a_larger_vocabulary(layout, shared_data, tmp_path) -> None:
    lines = (shared_data / "text" / "kornlu.txt").read_text(encoding="utf-8").splitlines()
    folder = write(tmp_path, layout, [*lines[:5_000], *CORPUS * 5], 4_000)
    backend, original = kobert.convert(folder).backend_tokenizer, Original(folder)
    texts = fuzz(5_500, lines) + lines[-2_000:]
    ties = mismatches(backend, texts, list(map(original, texts)))
    assert len(ties) < 5, ties
    for text in ties:  # two orders of the same pieces: the one case that the docstring names
        assert sorted(backend.encode(text).ids) == sorted(original(text)), text


def test_only_the_order_of_pieces_can_differ_in_runs(tmp_path) -> None:
    folder = write(tmp_path, "monologg", ["ㅋㅋㅋ ㅋㅋ ㅋ ??? ?? ? ... .. 하하 하 하하하", *CORPUS] * 9)
    backend, original = kobert.convert(folder).backend_tokenizer, Original(folder)
    for text in (mark * count for mark in "ㅋ?.하" for count in range(1, 60)):
        assert sorted(backend.encode(text).ids) == sorted(original(text)), text


def test_stock_transformers_reload_it_with_the_same_ids(texts, tmp_path) -> None:
    ids = {}
    for layout in LAYOUTS:
        converted = kobert.convert(write(tmp_path / f"original-{layout}", layout))
        ids[layout] = converted(texts)["input_ids"]
        converted.save_pretrained(tmp_path / layout)
        settings = json.loads((tmp_path / layout / "tokenizer_config.json").read_text(encoding="utf-8"))
        stored = json.loads((tmp_path / layout / "tokenizer.json").read_text(encoding="utf-8"))
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "auto_map" not in settings
        assert (stored["padding"], stored["truncation"]) == (None, None)
    code = """
import json, sys
sys.modules["koclip"] = sys.modules["sentencepiece"] = None
from transformers import AutoTokenizer, PreTrainedTokenizerFast
texts, ids = json.load(sys.stdin), {}
for layout in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(layout)
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.padding_side == "right"
    ids[layout] = tokenizer(texts)["input_ids"]
print(json.dumps(ids))
"""
    command = [sys.executable, "-c", code, *LAYOUTS]
    run = subprocess.run(command, cwd=tmp_path, input=json.dumps(texts), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == ids


def test_it_pads_on_the_right_and_knows_its_special_tokens(converted) -> None:
    assert [getattr(converted, f"{name}_token_id") for name in ("unk", "pad", "cls", "sep", "mask")] == [0, 1, 2, 3, 4]
    batch = converted(["고양이", "고양이가 창가에 앉아 밖을 보고 있는 사진입니다."], padding=True)
    assert (batch["input_ids"][0][0], batch["input_ids"][0][-1]) == (2, 1)
    assert batch["attention_mask"][0] == sorted(batch["attention_mask"][0], reverse=True)
    ids = converted("빨간 우산", "강아지", return_token_type_ids=True)
    assert (ids["input_ids"].count(3), sorted(set(ids["token_type_ids"]))) == (2, [0, 1])
    assert converted.decode(converted("빨간 우산 아래").input_ids, skip_special_tokens=True) == "빨간 우산 아래"
    assert converted.model_max_length == 512
    tokenizers.check(converted, "kobert")


def test_an_unknown_layout_is_named(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere'.*tokenizer_78b3253a26\.model"):
        kobert.convert(tmp_path / "nowhere")
    model = next(folder.glob("*.model")).read_bytes()
    (tmp_path / "tokenizer_78b3253a26.model").write_bytes(model)
    with pytest.raises(ConfigError, match=r"\['tokenizer_78b3253a26\.model'\].*vocab\.txt"):
        kobert.convert(tmp_path)
    (tmp_path / "vocab.txt").touch()
    (tmp_path / "tokenizer_78b3253a26.model").write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")
    with pytest.raises(ConfigError, match="Git LFS"):
        kobert.convert(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.pieces[-1], "piece", "9,"), r"pieces of a digit and a comma: got \['9,'\]"),
        (
            lambda proto: setattr(proto.pieces[-1], "piece", "[SEPT"),
            r"control token: got '\[SEP\]'",
        ),
        (lambda proto: setattr(proto.pieces[-1], "piece", "한"), r"tokens: got 'duplicates'"),
        (lambda proto: setattr(proto.pieces[3], "piece", "</s>"), r"tokens without an id: got \['\[SEP\]'\]"),
        (lambda proto: setattr(proto.trainer_spec, "model_type", 2), r"model_type: got 2"),
        (lambda proto: setattr(proto.normalizer_spec, "name", "identity"), r"normalizer: got 'identity'"),
        (lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False), r"add_dummy_prefix: got False"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(change, message, tmp_path) -> None:
    folder = write(tmp_path, "skt")
    proto = read(folder / "spiece.model")
    change(proto)
    (folder / "spiece.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ConfigError, match=message):
        kobert.convert(folder)


def test_other_settings_and_vocabularies_are_refused(tmp_path) -> None:
    folder = write(tmp_path, "monologg")
    (folder / "tokenizer_config.json").write_text('{"keep_accents": true, "do_lower_case": false}', encoding="utf-8")
    with pytest.raises(ConfigError, match="keep_accents: got True"):
        kobert.convert(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, ","]), encoding="utf-8")
    with pytest.raises(ConfigError, match="tokens without an id"):
        kobert.convert(folder)


@pytest.mark.hub
@pytest.mark.parametrize("repository", ["monologg/kobert", "skt/kobert-base-v1"])
def test_the_published_tokenizers(repository) -> None:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, allow_patterns=["*.model", "vocab.txt", "tokenizer_config.json"]))
    converted, original = kobert.convert(folder), Original(folder)
    assert converted(EXPECTED).input_ids == original(EXPECTED) == EXPECTED_IDS
    for text in fuzz(6_000, CORPUS):
        assert sorted(converted(text).input_ids) == sorted(original(text)), text
