"""`koclip curate`: planted noise of each kind is found, any number of workers gives equal bytes, a run can continue."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from koclip import config
from koclip.config import CaptionRules, ConfigError, CurateConfig, PictureRules, SourceConfig
from koclip.curation import report
from koclip.curation.captions import hangul_share, language_probability, without_personal_data
from koclip.curation.engines import Unit, Work, on_one_machine
from koclip.curation.pipeline import GLOBAL, curate
from koclip.data.sources import open_source

NUM_ROWS, PLANTED = 200, 10  # rows, and rows of each kind of noise
CAPTIONS = ("공원에서 노는 강아지 {}마리", "바닷가를 걷는 사람 {}명", "iPhone {} 옆에 놓인 노트", "빨간 자동차 {}대")
BAD_CAPTIONS = {
    "HTML": "강아지 사진<br>더 보기 {}",
    "URL": "더 많은 사진은 https://example.com/{}",
    "file name": "IMG_{:04d}.JPG",
    "other language": "a dog runs over the grass {}",
    "too short": "개",
    "too long": "긴 설명 {} " * 60,
}


def picture(number: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return a picture of smooth random colours."""
    values = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(120, 124, (40, 48, 3), np.uint8)


def bad_picture(reason: str, number: int) -> bytes:
    images = {
        "uniform picture": Image.fromarray(noise(number)),
        "small picture": picture(number, 24, 48),
        "long picture": picture(number, 400, 40),
    }
    return encoded(images[reason]) if reason in images else encoded(picture(number))[:60]


BAD_PICTURES = ("broken picture", "uniform picture", "small picture", "long picture")


def write_rows(file: Path, captions: Sequence[str], pictures: Sequence[bytes]) -> SourceConfig:
    images = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(pictures)]
    pq.write_table(pa.table({"image": images, "caption": list(captions)}), file)
    return SourceConfig(path=str(file), name="raw", captions={"ko": "caption"})


def planted(file: Path) -> tuple[SourceConfig, list[str]]:
    """Write rows of which some have noise; return the source and the reason that each row should get."""
    captions = [CAPTIONS[number % 4].format(number) for number in range(NUM_ROWS)]
    pictures = [encoded(picture(number)) for number in range(NUM_ROWS)]
    reasons = [""] * NUM_ROWS
    places = iter(np.random.default_rng(0).permutation(NUM_ROWS).tolist())
    for reason, text in BAD_CAPTIONS.items():
        for place in [next(places) for _ in range(PLANTED)]:
            captions[place], reasons[place] = text.format(*[place] * text.count("{")), reason
    for reason in BAD_PICTURES:
        for place in [next(places) for _ in range(PLANTED)]:
            pictures[place], reasons[place] = bad_picture(reason, place), reason
    return write_rows(file, captions, pictures), reasons


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceConfig, list[str]]:
    return planted(tmp_path_factory.mktemp("raw") / "raw.parquet")


def settings(source: SourceConfig, folder: Path, **changes: object) -> CurateConfig:
    rules = {"captions": CaptionRules(max_length=200), "shard_size": 64, **changes}
    return CurateConfig(sources=[source], output_dir=str(folder), **rules)  # type: ignore[arg-type]


def reasons_by_row(folder: Path) -> dict[int, str]:
    """Return the reason of each dropped row, by its number."""
    lines = [json.loads(line) for line in (folder / report.DROPPED).read_text(encoding="utf-8").splitlines()]
    return {int(line["key"].split("/")[1]): line["reason"] for line in lines if line["reason"]}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file; those of config.yaml differ by the name of the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.yaml"}


@pytest.fixture(scope="module")
def clean(raw: tuple[SourceConfig, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "clean"
    curate(settings(raw[0], folder))
    return folder


def test_planted_noise_is_dropped_for_its_reason(raw, clean):
    expected = {number: reason for number, reason in enumerate(raw[1]) if reason}
    assert len(expected) == PLANTED * 10
    assert reasons_by_row(clean) == expected
    rows = json.loads((clean / report.FILE).read_text(encoding="utf-8"))["rows"]
    assert rows["read"] == NUM_ROWS
    assert rows["kept"] == NUM_ROWS - len(expected)
    assert set(rows["dropped"].values()) == {PLANTED}


def test_the_result_is_read_without_options(raw, clean):
    original = {row.key: row for row in open_source(raw[0]).iter_rows()}
    rows = list(open_source(SourceConfig(path=f"{clean}/*.parquet")).iter_rows())
    keys = pq.read_table([str(path) for path in sorted(clean.glob("*.parquet"))])["id"].to_pylist()
    assert len(rows) == len(keys) == raw[1].count("")
    for key, row in zip(keys, rows, strict=True):
        assert row.image == original[key].image
        assert row.captions == original[key].captions


def test_workers_and_interruptions_do_not_change_the_bytes(raw, clean, tmp_path):
    curate(settings(raw[0], tmp_path / "two", num_workers=2))
    assert contents(tmp_path / "two") == contents(clean)

    done: list[Unit] = []

    def dying(title: str, work: Work, units: Sequence[Unit], num_workers: int) -> Iterator[int]:
        yield from on_one_machine(title, work, units[:2] if title == "write" else units, num_workers)
        if title == "write":
            raise KeyboardInterrupt

    def counting(title: str, work: Work, units: Sequence[Unit], num_workers: int) -> Iterator[int]:
        before = set((tmp_path / "again.partial").rglob("*.parquet"))
        yield from on_one_machine(title, work, units, num_workers)
        written = set((tmp_path / "again.partial").rglob("*.parquet")) - before
        done.extend(unit for unit in units if any(path.name.startswith(f"{unit.number:06d}") for path in written))

    with pytest.raises(KeyboardInterrupt):
        curate(settings(raw[0], tmp_path / "again"), dying)
    assert not (tmp_path / "again").exists()
    curate(settings(raw[0], tmp_path / "again"), counting)
    assert [unit.number for unit in done] == [2, 3]
    assert contents(tmp_path / "again") == contents(clean)
    assert not (tmp_path / "again.partial").exists()


def test_other_settings_do_not_continue_an_old_run(raw, tmp_path):
    def dying(title: str, work: Work, units: Sequence[Unit], num_workers: int) -> Iterator[int]:
        yield from on_one_machine(title, work, units, num_workers)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(settings(raw[0], tmp_path / "clean"), dying)
    rules = PictureRules(min_side=20)
    content = curate(settings(raw[0], tmp_path / "clean", pictures=rules))
    assert "small picture" not in content["rows"]["dropped"]


def test_an_earlier_result_is_replaced_and_other_files_are_not(raw, tmp_path):
    source = write_rows(tmp_path / "raw.parquet", ["노는 강아지"], [encoded(picture(1))])
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="output_dir"):
        curate(settings(source, tmp_path / "clean"))
    (tmp_path / "clean" / "mine.txt").unlink()
    for _ in range(2):
        assert curate(settings(source, tmp_path / "clean"))["rows"]["kept"] == 1
    assert len(list((tmp_path / "clean").glob("*.parquet"))) == 1


def test_nothing_is_written_if_no_row_is_left(tmp_path):
    source = write_rows(tmp_path / "raw.parquet", ["a dog"], [encoded(picture(1))])
    with pytest.raises(ConfigError, match="other language"):
        curate(settings(source, tmp_path / "clean"))
    assert not (tmp_path / "clean").exists()


def test_repeated_captions_are_dropped_and_others_of_the_row_stay(tmp_path):
    captions = ["상품 이미지"] * 4 + [f"노는 강아지 {number}" for number in range(4)]
    source = write_rows(tmp_path / "raw.parquet", captions, [encoded(picture(number)) for number in range(8)])
    rules = CaptionRules(max_repeats=3)
    content = curate(settings(source, tmp_path / "clean", captions=rules, shard_size=3))
    assert content["rows"] == {"read": 8, "kept": 4, "dropped": {"repeated caption": 4}}
    assert content["captions"] == {"read": {"ko": 8}, "kept": {"ko": 4}, "dropped": {"repeated caption": 4}}
    rules = CaptionRules(max_repeats=4)
    assert curate(settings(source, tmp_path / "clean", captions=rules))["rows"]["kept"] == 8


def test_captions_of_one_row_are_dropped_alone_and_keep_their_places(tmp_path):
    table = {"ko": [["www.example.com", "노는 강아지"]], "en": [["a dog", "a dog that plays"]]}
    pq.write_table(pa.table(table), tmp_path / "raw.parquet")
    source = SourceConfig(path=str(tmp_path / "raw.parquet"), image=None, captions={"ko": "ko", "en": "en"})
    content = curate(settings(source, tmp_path / "clean"))
    assert content["captions"]["dropped"] == {"URL": 1}
    rows = open_source(SourceConfig(path=f"{tmp_path}/clean/*.parquet", image=None)).iter_rows()
    assert [row.captions for row in rows] == [{"ko": ["", "노는 강아지"], "en": ["a dog", "a dog that plays"]}]


@pytest.mark.parametrize(
    ("caption", "kept", "kinds"),
    [
        ("문의 010-1234-5678 강아지 분양", "문의 강아지 분양", ["phone number"]),
        ("전화 02-123-4567", "전화", ["phone number"]),
        ("전화 +82 10 1234 5678", "전화", ["phone number"]),
        ("홍길동 900101-1234567 등록", "홍길동 등록", ["resident-registration number"]),
        ("가려진 번호 900101-1******", "가려진 번호", ["resident-registration number"]),
        ("kim.koclip@example.co.kr로 보내요", "로 보내요", ["e-mail address"]),
        ("010-1111-2222, 010-3333-4444", ",", ["phone number", "phone number"]),
        ("2024-01-01에 찍은 사진 1234장", "2024-01-01에 찍은 사진 1234장", []),
        ("바코드 8801234567890", "바코드 8801234567890", []),
        ("991331-1234567은 날짜가 아니에요", "991331-1234567은 날짜가 아니에요", []),
    ],
)
def test_personal_data_is_removed_and_counted(caption, kept, kinds):
    assert without_personal_data(caption) == (kept, kinds)


def test_hangul_share_counts_letters_only():
    assert hangul_share("강아지 3마리!") == 1
    assert hangul_share("강아지 dog") == pytest.approx(3 / 6)
    assert hangul_share("123") == 0


def test_the_recipe_prints_a_table(raw, tmp_path, monkeypatch, capsys):
    source = write_rows(tmp_path / "raw.parquet", ["노는 강아지", "a dog"], [encoded(picture(n)) for n in (1, 2)])
    config.dump(settings(source, tmp_path / "clean"), tmp_path / "mine.yaml")
    parsed = config.parse(CurateConfig, ["--config", str(tmp_path / "mine.yaml")])
    assert parsed.sources == [source]
    table = report.table(curate(parsed))
    assert [line.split()[-2:] for line in table.splitlines()[:3]] == [["2", "100.0%"], ["1", "50.0%"], ["1", "50.0%"]]


def test_the_language_of_a_caption_is_that_of_its_column():
    sentences = {
        "ko": "두 아이가 잔디밭에서 공놀이를 하고 있다",
        "en": "two children play with a ball on the grass",
        "fr": "deux enfants jouent au ballon sur la pelouse",
        "de": "zwei Kinder spielen auf dem Rasen mit einem Ball",
        "ja": "二人の子供が芝生の上でボール遊びをしている",
        "zh": "两个孩子在草地上玩球",
    }
    least = CaptionRules.min_language
    for spoken, text in sentences.items():
        passing = {language for language in sentences if language_probability(text, language) >= least}
        assert passing == {spoken}
    for short in ("a dog", "two dogs", "red car", "개", "A man", "street sign at night"):
        assert language_probability(short, "ko" if short == "개" else "en") >= least, short
    for hangul in ("개", "빨간 자동차", sentences["ko"], "ㅋㅋㅋ", "강아지 3마리!"):  # kept without asking py3langid
        assert hangul_share(hangul) == 1
        assert language_probability(hangul, "ko") >= least, hangul


def test_captions_in_another_language_are_dropped_in_each_column(tmp_path):
    table = {
        "en": ["a boy rides his bike along the beach", "ein Junge fährt mit dem Fahrrad am Strand entlang"] * 2,
        "zh": ["一个男孩骑着自行车", "男の子が自転車に乗っています", "一个男孩骑着自行车", "a boy rides his bike"],
    }
    pq.write_table(pa.table(table), tmp_path / "raw.parquet")
    captions = {"en": "en", "zh-Hans": "zh"}
    source = SourceConfig(path=str(tmp_path / "raw.parquet"), image=None, captions=captions)
    content = curate(settings(source, tmp_path / "clean"))
    assert content["captions"] == {
        "read": {"en": 4, "zh-Hans": 4},
        "kept": {"en": 2, "zh-Hans": 2},
        "dropped": {"other language": 4},
    }
    assert content["rows"]["kept"] == 2
    rules = CaptionRules(min_language=0)
    assert curate(settings(source, tmp_path / "clean", captions=rules))["rows"]["kept"] == 4


def test_a_language_that_cannot_be_checked_is_refused(tmp_path):
    pq.write_table(pa.table({"caption": ["Sanannguaq"]}), tmp_path / "raw.parquet")
    source = SourceConfig(path=str(tmp_path / "raw.parquet"), image=None, captions={"kl": "caption"})
    with pytest.raises(ConfigError, match="min_language"):
        curate(settings(source, tmp_path / "clean"))
    assert not (tmp_path / "clean").exists()


def test_comparisons_that_are_not_asked_for_read_no_table(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("not asked for")

    for name in ("repeated", "overlap", "scores", "balance"):
        monkeypatch.setitem(GLOBAL, name, GLOBAL[name]._replace(collect=refuse, apply=refuse))
    source = write_rows(tmp_path / "raw.parquet", ["노는 강아지"] * 2, [encoded(picture(1))] * 2)
    content = curate(settings(source, tmp_path / "clean", captions=CaptionRules(max_repeats=0)))
    assert content["rows"] == {"read": 2, "kept": 1, "dropped": {"repeated pair": 1}}
