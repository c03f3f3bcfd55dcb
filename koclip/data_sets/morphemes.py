"""Sentences from tagged morphemes: `놀/vv ㄴ다/ef ./sf` is "논다.".

The tags are those of the Sejong corpus. They have no word boundaries: particles, endings, suffixes and marks belong to
the morpheme before them, everything else begins a word. Stems and endings contract and change by the rules of the
standard language (한글 맞춤법, sections 18, 34 to 40), with lists of the verbs that the rules alone do not tell.
"""

from koclip.text.korean.hangul import coda, compose, is_syllable, letters, with_coda

_JOINED = ("j", "e", "xs", "vcp", "sf", "sp")  # beginnings of tags
_BRIGHT = "ㅏㅑㅗ"  # vowels that take 아, all others 어
_CONTRACTED = {"ㅏ": "ㅏ", "ㅓ": "ㅓ", "ㅐ": "ㅐ", "ㅔ": "ㅔ", "ㅕ": "ㅕ", "ㅣ": "ㅕ", "ㅜ": "ㅝ"}
_REGULAR_B = ("입", "잡", "뽑", "씹", "집", "접", "좁", "꼽", "업", "붙잡")
_CHANGING_D = ("걷", "듣", "싣", "깨닫", "일컫")  # ㄷ becomes ㄹ before a vowel
_CHANGING_S = ("짓", "잇", "낫", "붓", "긋", "젓")  # ㅅ falls before a vowel
_REGULAR_REU = ("따르", "들르", "치르")  # 따라, not 딸라
_UNCONTRACTED_U = "ㅊㄷ"  # 맞추어, 두어: both forms are correct; this is the one of written captions


def join(tagged: str) -> str:
    """Return the sentence that morphemes such as `개/nng 가/jks` were tagged in."""
    words: list[str] = []
    stem, tag_before = "", ""  # the morpheme before
    for token in tagged.split():
        form, _, tag = token.rpartition("/")
        form, stem_of_number = ("네", True) if (form, tag) == ("너", "np") else (form, False)
        if not words or not _joins(form, tag, stem, tag_before):
            words.append(form)
        elif stem == "네" and tag_before == "number" and form == "의":
            continue  # the source reads the number 네 as 너의
        elif tag.startswith("e"):
            words[-1] = _inflected(words[-1], stem, form, adjective=tag_before in ("va", "xsa"))
        else:
            words[-1] += form
        stem, tag_before = form, "number" if stem_of_number else tag
    return " ".join(words)


def _joins(form: str, tag: str, before: str, tag_before: str) -> bool:
    """Tell whether a morpheme belongs to the word of the morpheme before it."""
    if tag_before == "xpn" or (tag_before == "sn" and tag == "nnb"):  # 비포장, 20대
        return True
    if tag == "vx" and form == "지":  # 던져지다
        return before in ("아", "어")
    return tag.startswith(_JOINED) and form != "있"  # the source tags some 있다 as an ending


def _inflected(word: str, stem: str, ending: str, adjective: bool) -> str:
    """Return a word that ends in a stem, with an ending."""
    if not is_syllable(word[-1]) or not stem:
        return word + ending
    if not is_syllable(ending[0]):  # ㄴ, ㄹ, ㅂ, ㅁ
        return _with_letter(word, stem, ending[0], adjective) + ending[1:]
    onset, vowel, final = letters(ending[0])
    if onset == "ㅇ" and vowel in "ㅏㅓ" and final in ("", "ㅆ"):
        return _with_vowel(word, stem, final, adjective) + ending[1:]
    if ending[0] in ("은", "을", "으"):
        return _with_eu(word, stem, ending, adjective)
    if coda(word) == "ㄹ" and onset in "ㄴㅅ":  # 놀는 is 노는
        word = with_coda(word, "")
    return word + ending


def _is_changing_b(word: str, stem: str) -> bool:
    return coda(word) == "ㅂ" and not stem.endswith(_REGULAR_B)


def _with_letter(word: str, stem: str, letter: str, adjective: bool) -> str:
    """Add an ending's first letter as the final consonant: 하 and ㄴ are 한."""
    last = coda(word)
    if last in ("", "ㄹ") or (last == "ㅎ" and adjective and stem not in ("좋", "많", "싫")):  # 길 and ㄴ are 긴
        return with_coda(word, letter)
    if _is_changing_b(word, stem):
        return with_coda(word, "") + compose("ㅇ", "ㅜ", letter)  # 어두운
    return _before_vowel(word, stem) + compose("ㅇ", "ㅡ", letter)  # 지은


def _with_eu(word: str, stem: str, ending: str, adjective: bool) -> str:
    """Add an ending that begins with 으, which falls after a vowel and ㄹ."""
    rest = letters(ending[0])[2]
    if coda(word) in ("", "ㄹ"):
        return with_coda(word, rest or coda(word)) + ending[1:]
    if _is_changing_b(word, stem):
        return with_coda(word, "") + compose("ㅇ", "ㅜ", rest) + ending[1:]
    return _before_vowel(word, stem) + ending


def _before_vowel(word: str, stem: str) -> str:
    """Return a word with a final ㄷ or ㅅ as it is before a vowel: 걷 is 걸, 짓 is 지."""
    if stem.endswith(_CHANGING_D):
        return with_coda(word, "ㄹ")
    if stem.endswith(_CHANGING_S):
        return with_coda(word, "")
    return word


def _with_vowel(word: str, stem: str, final: str, adjective: bool) -> str:
    """Add an ending that begins with 아 or 어, or 았 or 었, whichever of them the source has."""
    onset, vowel, last = letters(word[-1])
    if word[-1] == "하":
        return word[:-1] + compose("ㅎ", "ㅐ", final)
    if last == "" and vowel == "ㅡ":
        return _after_eu(word, stem, final)
    if last == "" and (vowel in _CONTRACTED or word[-1] == "오") and not (vowel == "ㅜ" and onset in _UNCONTRACTED_U):
        return word[:-1] + compose(onset, _CONTRACTED.get(vowel, "ㅘ"), final)
    if last == "ㅎ" and adjective and stem not in ("좋", "많", "싫"):  # 빨개, 하얘
        return word[:-1] + compose(onset, "ㅒ" if vowel in "ㅑㅕ" else "ㅐ", final)
    if _is_changing_b(word, stem):
        return with_coda(word, "") + compose("ㅇ", "ㅘ" if stem in ("돕", "곱") else "ㅝ", final)
    return _before_vowel(word, stem) + compose("ㅇ", "ㅏ" if vowel in _BRIGHT else "ㅓ", final)


def _after_eu(word: str, stem: str, final: str) -> str:
    """Add 아 or 어 to a stem that ends in ㅡ: 쓰 is 써, 모으 is 모아, 부르 is 불러."""
    onset = letters(word[-1])[0]
    before = word[-2:-1]
    bright = bool(stem[:-1]) and bool(before) and is_syllable(before) and letters(before)[1] in _BRIGHT
    vowel = "ㅏ" if bright else "ㅓ"
    if word[-1] == "르" and not stem.endswith(_REGULAR_REU) and before and coda(before) == "":
        return with_coda(word[:-1], "ㄹ") + compose("ㄹ", vowel, final)
    return word[:-1] + compose(onset, vowel, final)
