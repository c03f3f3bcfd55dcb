"""koclip.text.classes: the built-in class names and templates, and the errors of a user's own files."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

from koclip.config import ConfigError
from koclip.text.classes import fill, load_classes, load_templates

ROOT = Path(__file__).parents[1]
SIZES = {"cifar10": 10, "cifar100": 100, "emoji_kinds": 26, "tiny_imagenet": 200, "stl10": 10}
LANGUAGES = ("ko", "en")
CARD = (ROOT / "data_cards" / "class_names.md").read_text(encoding="utf-8")
# Korean words that mean two things that can be photographed or told.
HOMONYMS = {
    *("배", "말", "새", "벌", "게", "성", "병", "못", "다리", "파리"),
    *("분수", "사마귀", "잠자리", "새집", "양귀비", "사과", "탱크", "곤돌라", "리무진", "키보드"),
}
# Written by hand: a Korean template, a name, and the sentence. Each template stands here.
SENTENCES = """
{label:을/를} 찍은 사진 | 비행기 | 비행기를 찍은 사진
{label:을/를} 찍은 사진 | 사슴 | 사슴을 찍은 사진
{label:을/를} 찍은 사진 | 물 | 물을 찍은 사진
{label:을/를} 찍은 사진 | 크레인(짐을 들어 올리는 기계) | 크레인(짐을 들어 올리는 기계)을 찍은 사진
{label:을/를} 찍은 사진 | 새(날개가 있는 동물) | 새(날개가 있는 동물)를 찍은 사진
{label:을/를} 찍은 사진 | GPU | GPU를 찍은 사진
{label:을/를} 찍은 사진 | 숫자 3 | 숫자 3을 찍은 사진
{label:을/를} 찍은 사진 | iPhone 15 | iPhone 15를 찍은 사진
{label} 사진 | 고양이 | 고양이 사진
{label} 사진 | CD 플레이어 | CD 플레이어 사진
{label:이/가} 나온 사진 | 말 | 말이 나온 사진
{label:이/가} 나온 사진 | 개 | 개가 나온 사진
{label:이/가} 나온 사진 | SUV | SUV가 나온 사진
{label:이/가} 보이는 사진 | 호숫가 | 호숫가가 보이는 사진
{label:이/가} 보이는 사진 | 높은 산 | 높은 산이 보이는 사진
{label:을/를} 가까이에서 찍은 사진 | 거미줄 | 거미줄을 가까이에서 찍은 사진
{label:을/를} 멀리서 찍은 사진 | 성 | 성을 멀리서 찍은 사진
{label:을/를} 멀리서 찍은 사진 | 절벽 주거지 | 절벽 주거지를 멀리서 찍은 사진
{label:을/를} 휴대폰으로 찍은 사진 | 아기 | 아기를 휴대폰으로 찍은 사진
{label:을/를} 찍은 흑백 사진 | 노면 전차 | 노면 전차를 찍은 흑백 사진
{label:을/를} 찍은 컬러 사진 | 튤립 | 튤립을 찍은 컬러 사진
{label:을/를} 흐릿하게 찍은 사진 | 벌 | 벌을 흐릿하게 찍은 사진
{label:을/를} 선명하게 찍은 사진 | 개구리 | 개구리를 선명하게 찍은 사진
{label:을/를} 밝게 찍은 사진 | 숲 | 숲을 밝게 찍은 사진
{label:을/를} 어둡게 찍은 사진 | 램프 | 램프를 어둡게 찍은 사진
{label:을/를} 찍은 저화질 사진 | 텔레비전 | 텔레비전을 찍은 저화질 사진
{label:을/를} 찍은 고화질 사진 | 장미 | 장미를 찍은 고화질 사진
{label:이/가} 작게 나온 사진 | 로켓 | 로켓이 작게 나온 사진
{label:이/가} 크게 나온 사진 | 달팽이 | 달팽이가 크게 나온 사진
{label:이/가} 일부만 나온 사진 | 고층 빌딩 | 고층 빌딩이 일부만 나온 사진
{label:과/와} 그 주변을 찍은 사진 | 등대 | 등대와 그 주변을 찍은 사진
{label:과/와} 그 주변을 찍은 사진 | 분수(물을 뿜는 시설) | 분수(물을 뿜는 시설)와 그 주변을 찍은 사진
{label:과/와} 그 주변을 찍은 사진 | 급수탑 | 급수탑과 그 주변을 찍은 사진
{label:과/와} 그 주변을 찍은 사진 | N서울타워 | N서울타워와 그 주변을 찍은 사진
사진 속의 {label} | 여자아이 | 사진 속의 여자아이
사진 한가운데에 있는 {label} | 버섯 | 사진 한가운데에 있는 버섯
잘 나온 {label} 사진 | 피자 | 잘 나온 피자 사진
이것은 {label:이다/다}. | 게 | 이것은 게다.
이것은 {label:이다/다}. | 나비넥타이 | 이것은 나비넥타이다.
이것은 {label:이다/다}. | 못 | 이것은 못이다.
이 사진에는 {label:이/가} 있습니다. | 으깬 감자 | 이 사진에는 으깬 감자가 있습니다.
이 사진에는 {label:이/가} 있습니다. | 닭새우 | 이 사진에는 닭새우가 있습니다.
이 사진에는 {label:이/가} 있습니다. | 맥주병 | 이 사진에는 맥주병이 있습니다.
이 사진의 주인공은 {label:이에요/예요}. | 수달 | 이 사진의 주인공은 수달이에요.
이 사진의 주인공은 {label:이에요/예요}. | 오랑우탄 | 이 사진의 주인공은 오랑우탄이에요.
이 사진의 주인공은 {label:이에요/예요}. | 페르시아고양이 | 이 사진의 주인공은 페르시아고양이예요.
{label:을/를} 그린 그림 | 자동차 | 자동차를 그린 그림
{label:을/를} 그린 그림 | 평원 | 평원을 그린 그림
{label} 그림 | 해바라기 | 해바라기 그림
{label:을/를} 그린 스케치 | 자전거 | 자전거를 그린 스케치
{label:을/를} 그린 수채화 | 산호초 | 산호초를 그린 수채화
{label:을/를} 그린 유화 | 바닷가 | 바닷가를 그린 유화
{label:을/를} 그린 삽화 | 삼엽충 | 삼엽충을 그린 삽화
{label:을/를} 연필로 그린 그림 | 손 | 손을 연필로 그린 그림
{label:을/를} 연필로 그린 그림 | 참나무 | 참나무를 연필로 그린 그림
{label:을/를} 단순하게 나타낸 아이콘 | USB | USB를 단순하게 나타낸 아이콘
{label:을/를} 단순하게 나타낸 아이콘 | 모래시계 | 모래시계를 단순하게 나타낸 아이콘
{label:을/를} 나타내는 이모지 | 구름 | 구름을 나타내는 이모지
{label:이/가} 그려진 스티커 | 돌고래 | 돌고래가 그려진 스티커
{label:이/가} 그려진 스티커 | 곰 인형 | 곰 인형이 그려진 스티커
{label:은/는} 이 그림의 주제입니다. | 공룡 | 공룡은 이 그림의 주제입니다.
{label:은/는} 이 그림의 주제입니다. | 바다 | 바다는 이 그림의 주제입니다.
만화에 나오는 {label} | 쥐 | 만화에 나오는 쥐
어린아이가 그린 {label} | 기차 | 어린아이가 그린 기차
컴퓨터 그래픽으로 만든 {label} | 탱크 | 컴퓨터 그래픽으로 만든 탱크
"""
CASES = [[cell.strip() for cell in line.split("|")] for line in SENTENCES.strip().splitlines()]


def all_templates(language: str) -> list[str]:
    return [template for templates in load_templates(language).values() for template in templates]


def folded(text: str) -> str:
    return re.sub(r"\W", "", unicodedata.normalize("NFC", text).casefold())


def expected_sentence(template: str, name: str, last: str) -> str:
    """Fill a Korean template by the final consonant of `last` alone, not by koclip's rules."""
    closed = (ord(last) - ord("가")) % 28 > 0
    return re.sub(r"\{label:?([^{}]*)\}", lambda slot: name + slot[1].partition("/")[0 if closed else 2], template)


@pytest.mark.parametrize("data_set", SIZES)
def test_every_class_has_one_name_of_its_own_in_each_language(data_set):
    classes = load_classes(data_set)
    assert len(classes) == SIZES[data_set]
    keys = [entry.key for entry in classes]
    assert keys == sorted(set(keys))  # these data sets number their labels alphabetically
    for language in LANGUAGES:
        names = [entry.names[language] for entry in classes]
        assert len({folded(name) for name in names}) == len(names)
    for entry in classes:
        assert tuple(entry.names) == LANGUAGES
        assert tuple(entry.descriptions) in ((), LANGUAGES)
        assert re.fullmatch("(CD )?[가-힣]+( [가-힣]+)*", entry.names["ko"]), entry
        for text in [*entry.names.values(), *entry.descriptions.values()]:
            assert text == unicodedata.normalize("NFC", text).strip()
        for language, text in entry.descriptions.items():
            assert folded(text) != folded(entry.names[language])
            assert bool(re.search("[가-힣]", text)) == (language == "ko")


@pytest.mark.parametrize("data_set", ["cifar10", "cifar100", "stl10"])
def test_english_names_are_the_labels(data_set):
    for entry in load_classes(data_set):
        assert entry.names["en"] == entry.key.replace("_", " ")


def test_names_of_tiny_imagenet_are_names_of_their_synset():
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet1k")
    for entry in load_classes("tiny_imagenet"):
        lemmas = synsets.label_name_to_description(entry.key).split(",")
        assert folded(entry.names["en"]) in {folded(lemma) for lemma in lemmas}, entry.key


@pytest.mark.parametrize(("data_set", "file"), [("cifar10", "cifar10/test"), ("tiny_imagenet", "tiny_imagenet_ko/val")])
def test_places_are_the_label_numbers_of_the_data(data_set, file, shared_data):
    import pyarrow.parquet as pq

    rows = pq.read_table(shared_data / f"{file}.parquet", columns=["label", "key"]).to_pylist()
    numbers = {row["key"]: row["label"] for row in rows}
    assert len(numbers) in (10, 160)
    keys = [entry.key for entry in load_classes(data_set)]
    assert {key: keys.index(key) for key in numbers} == numbers


def test_homonyms_are_described():
    classes = [entry for data_set in SIZES for entry in load_classes(data_set)]
    assert {entry.names["ko"] for entry in classes} >= HOMONYMS
    for entry in classes:
        if entry.names["ko"] in HOMONYMS or entry.names["en"] in ("crane", "nail", "seal", "mouse", "torch", "plate"):
            assert entry.descriptions, f"{entry.key} has no description"


def test_one_word_means_one_thing_in_all_data_sets():
    english, korean = {}, {}
    for entry in (entry for data_set in SIZES for entry in load_classes(data_set)):
        english.setdefault(entry.names["ko"], set()).add(entry.names["en"])
        korean.setdefault(entry.names["en"], set()).add(entry.names["ko"])
    assert {ko: en for ko, en in english.items() if len(en) > 1} == {
        "자동차": {"automobile", "car"},
        "바닷가재": {"lobster", "American lobster"},
        "파프리카": {"sweet pepper", "bell pepper"},
        "배": {"ship", "pear"},
    }
    assert {en: ko for en, ko in korean.items() if len(ko) > 1} == {"plate": {"접시", "접시에 담긴 요리"}}


def test_text_with_and_without_description():
    crane, beaver = load_classes("tiny_imagenet")[95], load_classes("cifar100")[4]
    assert [crane.text(language) for language in LANGUAGES] == ["크레인", "crane"]
    assert crane.text("ko", described=True) == "크레인(짐을 들어 올리는 기계)"
    assert crane.text("en", described=True) == "crane (machine that lifts loads)"
    assert beaver.text("ko", described=True) == beaver.text("ko") == "비버"
    with pytest.raises(ConfigError, match=r"class beaver: got 'ja', .*\['ko', 'en'\]"):
        beaver.text("ja")


@pytest.mark.parametrize("language", LANGUAGES)
def test_built_in_templates(language):
    groups = load_templates(language)
    assert list(groups) == ["photo", "drawing"]
    assert len(groups["photo"]) >= 20
    assert len(groups["drawing"]) >= 8
    templates = all_templates(language)
    assert len({folded(fill(template, "X1")) for template in templates}) == len(templates)
    for template in templates:
        assert template == unicodedata.normalize("NFC", template)
        assert len(re.findall(r"\{label[^{}]*\}", template)) == template.count("{") == 1
        # A particle that is not in the slot would be right for half of the names only.
        assert not re.search("}[가-힣]", template), template
        assert bool(re.search("[가-힣]", template)) == (language == "ko")


def test_english_templates_fill():
    for template in all_templates("en"):
        assert fill(template, "crane (machine)") == template.replace("{label}", "crane (machine)")


def test_korean_sentences_by_hand():
    assert len(CASES) >= 60
    assert len({(template, name) for template, name, _ in CASES}) == len(CASES)
    wrong = [(sentence, fill(template, name)) for template, name, sentence in CASES if fill(template, name) != sentence]
    assert not wrong, f"(expected, got): {wrong}"
    assert {template for template, _, _ in CASES} == set(all_templates("ko"))


@pytest.mark.parametrize("data_set", SIZES)
def test_every_korean_template_takes_every_class(data_set):
    for entry in load_classes(data_set):
        last = entry.names["ko"][-1]
        for name in {entry.text("ko"), entry.text("ko", described=True)}:
            for template in all_templates("ko"):
                assert fill(template, name) == expected_sentence(template, name, last)


def test_the_card_counts_as_the_files_do():
    rows = dict(re.findall(r"^  (\w+): (\d+)$", CARD, re.MULTILINE))
    assert rows == {data_set: str(size) for data_set, size in SIZES.items()}
    described = sum(bool(entry.descriptions) for data_set in SIZES for entry in load_classes(data_set))
    assert f"The names of {sum(SIZES.values())} classes" in CARD
    assert f"{described} of them with a description" in CARD
    assert f"{len(all_templates('ko'))} Korean and {len(all_templates('en'))} English templates" in CARD


def test_the_card_lists_every_correction(shared_data):
    import pyarrow.parquet as pq

    table = re.findall(r"^\| (n\d+) \| ([^|]+) \| ([^|]+) \|", CARD, re.MULTILINE)
    rows = pq.read_table(shared_data / "tiny_imagenet_ko" / "val.parquet", columns=["key", "name_ko"]).to_pylist()
    before = {row["key"]: row["name_ko"] for row in rows}
    now = {entry.key: entry.names["ko"] for entry in load_classes("tiny_imagenet")}
    assert len(table) > 10
    assert {key: (old, new) for key, old, new in table} == {
        key: (old, now[key]) for key, old in before.items() if old != now[key]
    }


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_own_classes(tmp_path):
    file = write(tmp_path, "- {key: 0, ko: 영, no: no, zh-Hant: 零}\n- {key: on, ko: '1', no: en, zh-Hant: 一}\n")
    first, second = load_classes(file)
    assert (first.key, first.names, first.descriptions) == ("0", {"ko": "영", "no": "no", "zh-Hant": "零"}, {})
    assert (second.key, second.text("ko")) == ("on", "1")
    assert load_classes(str(file)) == [first, second]


def test_own_templates(tmp_path):
    file = write(tmp_path, "\ufeffphoto:\n  - '{}'\n  - '{label:으로/로} 만든 것{이/가}'\n")  # with Notepad's BOM
    assert load_templates(file) == {"photo": ["{}", "{label:으로/로} 만든 것{이/가}"]}


NFD = unicodedata.normalize("NFD", "게")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "got 'None', expected a list of classes"),
        ("[]", r"got '\[\]', expected a list of classes"),
        ("a: {key: a, ko: 가}", "expected a list of classes"),
        ("- a\n", r"class 0: got 'a', expected a list of classes such as \{key: crane"),
        ("- {ko: 가}", "class 0: got .*, expected a list of classes such as {key"),
        ("- {key: a}", r"class 0 \(a\): got \{'key': 'a'\}, "),
        ("- {key: a, ko: 가}\n- {key: '', ko: 나}", r"class 1 \(\), key: got '', expected a text"),
        ("- {key: a, ko: 가, en:}", r"class 0 \(a\), en: got '', expected a text"),
        ("- {key: a, ko: '\u200b '}", r"class 0 \(a\), ko: got '\\u200b ', expected a text"),
        ("- {key: a, ko: [가]}", r"ko: got \['가'\], expected a text"),
        (f"- {{key: a, ko: {NFD}}}", r"class 0 \(a\), ko: got .* NFC"),
        ("- {key: a, ko: '가  나'}", "got '가  나', expected single spaces, .*: '가 나'"),
        ("- {key: a, en: 'a<s>'}", "got 'a<s>', expected .* special tokens: 'a'"),
        ("- {key: a, korean: 가}", r"class 0 \(a\).* got 'korean', .* mean ko\b"),
        ("- {key: a, ko: 가, en: a}\n- {key: b, en: b}", r"class 1 \(b\), name: got \{'en': 'b'\}, add it in \['ko'\]"),
        ("- {key: a, en: a}\n- {key: b, ko: 나, en: b}", r"class 0 \(a\), name: .*, add it in \['ko'\]"),
        ("- {key: a, ko: 가, en: a, description: {ko: 나}}", r"class 0 \(a\), description: .*, add it in \['en'\]"),
        ("- {key: a, ko: 가, description: 나}", r"class 0 \(a\), description: got '나'"),
        ("- {key: a, ko: 가, description: {ko: ''}}", r"class 0 \(a\), ko: got '', expected a text"),
        ("- {key: a, ko: 가}\n- {key: a, ko: 나}", r"key: got 'a', the same as 'a' \(numbers 0 and 1, from 0\)"),
        ("- {key: a, ko: 배}\n- {key: b, ko: 배}", r"ko: got '배', the same as '배' \(numbers 0 and 1, from 0\)"),
        ("- {key: a, ko: 새 집}\n- {key: b, ko: 새집}", "ko: got '새집', the same as '새 집'"),
        (
            "- {key: a, en: Crane}\n- {key: b, en: crane}",
            "en: got 'crane', the same as 'Crane' .*: make them different",
        ),
        ("- {key: a, ko: 가, ko: 나}", "cannot be read as YAML in UTF-8: 'ko' is given twice in .*, line 1"),
        ("- {key: a, ko: 가", "cannot be read as YAML in UTF-8: .* line 1"),
    ],
)
def test_wrong_classes(tmp_path, text, error):
    with pytest.raises(ConfigError, match=f"^{re.escape(str(tmp_path))}/mine.yaml.*{error}") as caught:
        load_classes(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "got 'None', expected lists of templates by kind of picture"),
        ("- '{}'", "got .*, expected lists of templates by kind of picture, such as {photo"),
        ("photo: '{}'", "photo: got '{}', expected lists"),
        ("photo: []", r"photo: got \[\], expected lists"),
        ("photo: [{}]", r"photo, template 0: got \{\}, expected a text"),
        ("photo: ['{}', '']", "photo, template 1: got '', expected a text"),
        ("photo: ['사진']", "photo, template 0: template '사진' has no slot; write {}, {label}"),
        ("photo: ['{label:을/은} 사진']", "slot '{label:을/은}': unknown particle '을/은'; known: 은/는"),
        ("photo: ['{name} {}']", "slot '{name}': unknown particle 'name'"),
        (f"photo: ['{NFD} {{}}']", "photo, template 0: .* NFC"),
        ("photo: ['{}  사진']", "expected single spaces"),
        ("photo: ['{} 사진', '{label} 사진']", "got '{label} 사진', the same as '{} 사진'"),
        ("photo: ['{} 사진']\nfilm: ['{}사진']", "got '{}사진', the same as '{} 사진'"),
        ("photo: ['{}']\nphoto: ['{label}']", "'photo' is given twice"),
    ],
)
def test_wrong_templates(tmp_path, text, error):
    with pytest.raises(ConfigError, match=f"^{re.escape(str(tmp_path))}/mine.yaml.*{error}") as caught:
        load_templates(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"classes: got 'cifar', .*\['cifar10', 'cifar100', 'emoji_kinds', 'stl10', "):
        load_classes("cifar")
    with pytest.raises(ConfigError, match=r"templates: got '.*', .*\['en', 'ko'\]"):
        load_templates(tmp_path)
    file = tmp_path / "cp949.yaml"
    file.write_bytes("- {key: a, ko: 가}".encode("cp949"))
    with pytest.raises(ConfigError, match=r"cp949\.yaml: .*UTF-8"):
        load_classes(file)


def test_the_wheel_packs_every_asset():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.search(r"^\[tool.setuptools.package-data\]\nkoclip = (\[.*\])$", project, re.MULTILINE)
    assert patterns is not None
    packed = {file for pattern in json.loads(patterns[1]) for file in (ROOT / "koclip").glob(pattern)}
    assets = {file for file in (ROOT / "koclip" / "assets").rglob("*.*") if file.is_file()}
    assert len(assets) >= 7
    assert assets <= packed
