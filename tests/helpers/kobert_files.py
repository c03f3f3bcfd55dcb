"""KoBERT tokenizers, small, in the layouts of both publications."""

import io
from pathlib import Path

import sentencepiece
from transformers.convert_slow_tokenizer import import_protobuf

SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
CORPUS = r"""빨간 자전거 한 대가 나무 옆에 서 있다.
나무 옆에 서 있는 아이가 빨간 풍선을 들고 있다.
강아지 두 마리가 바닷가에서 공을 쫓아 뛰어간다.
바닷가에서 사람들이 파란 우산 아래 앉아 책을 읽는다.
고양이가 창가에 앉아 밖을 보고 있는 사진입니다.
한국어 모델을 공유합니다. 한국의 겨울 바다는 춥다.
할머니가 시장에서 1,234원짜리 사과 3개와 배 12개를 샀다, 그리고 웃었다.
2013년 7월 21일, 서울의 낮 기온은 30.5도(체감 33도)였다!
"여기가 어디예요?" 하고 여자가 물었다. '글쎄요' ㅋ ㅠ
A red bicycle is leaning against a tree by the sea.
Two dogs are running on the beach [photo] <LG> CLS SEP PAD UNK MASK;
The children are reading books & eating 5 apples = 100% fun_time ~ #1 @home */-+^{}|$`:
""".splitlines()


def write(folder: Path, layout: str, corpus: list[str] = CORPUS * 3, vocab_size: int = 400) -> Path:
    """Train a tokenizer and write it in a publication's layout. No piece ends in a digit and a comma, as in KoBERT."""
    options, model = {}, io.BytesIO()
    if layout != "monologg":
        symbols = "control_symbols" if layout == "skt" else "user_defined_symbols"
        options = {"unk_piece": "[UNK]", "pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
        options |= {"pad_id": 1, "bos_id": 2, "eos_id": 3, symbols: ["[MASK]"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=vocab_size, hard_vocab_limit=False,
        split_digits=True, character_coverage=1.0, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    name = "tokenizer_78b3253a26.model" if layout == "monologg" else "spiece.model"
    (folder / name).write_bytes(model.getvalue())
    if layout == "monologg":
        pieces = sorted(piece.piece for piece in read(folder / name).pieces if piece.type == 1)
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *pieces]) + "\n", encoding="utf-8")
    return folder


def read(path: Path):
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto
