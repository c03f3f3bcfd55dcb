"""Choose the Korean particle that fits the word before it.

Most particles have one form after a final consonant and another after a vowel (사과를, 책을). -(으)로 also takes
the vowel form after a final ㄹ (연필로). Rule: National Institute of Korean Language, Standard Korean Grammar.
"""

import unicodedata

# after a final consonant / after a vowel
_PAIRS = ("은/는", "이/가", "을/를", "과/와", "이랑/랑", "아/야", "이나/나", "이다/다", "이에요/예요", "으로/로")
_FORMS = {pair: tuple(pair.split("/")) for pair in _PAIRS}
_FINAL_RIEUL = 8
# Final consonant of the Sino-Korean reading of a digit (영 일 이 삼 사 오 육 칠 팔 구); 0 is none.
_DIGIT_FINALS = {"0": 21, "1": 8, "2": 0, "3": 16, "4": 0, "5": 0, "6": 1, "7": 8, "8": 8, "9": 0}


def final_consonant(word: str) -> int | None:
    """Return the index of the last syllable's final consonant (0: none, 8: ㄹ), or None if it cannot be told.

    Hangul syllables and digits are read; brackets, quotes and spaces after them are skipped.
    """
    for character in reversed(unicodedata.normalize("NFC", word)):
        if "가" <= character <= "힣":
            return (ord(character) - ord("가")) % 28
        if character in _DIGIT_FINALS:
            return _DIGIT_FINALS[character]
        if character.isalpha():
            return None
    return None


def particle(word: str, pair: str) -> str:
    """Return the form of `pair` (such as "을/를", in either order) that follows `word`.

    A word whose last sound is unknown takes the written convention: "을(를)", "(으)로".

    Raises:
        ValueError: `pair` is not a known particle pair.
    """
    reverse = "/".join(reversed(pair.split("/")))
    forms = _FORMS.get(pair) or _FORMS.get(reverse)
    if forms is None:
        raise ValueError(f"unknown particle {pair!r}; known: {', '.join(_PAIRS)}")
    after_consonant, after_vowel = forms
    final = final_consonant(word)
    if final is None:
        shared = after_consonant.removesuffix(after_vowel)
        return f"({shared}){after_vowel}" if shared != after_consonant else f"{after_consonant}({after_vowel})"
    if forms == ("으로", "로") and final == _FINAL_RIEUL:
        return after_vowel
    return after_consonant if final else after_vowel


def attach(word: str, pair: str) -> str:
    """Return `word` followed by the fitting form of `pair`: attach("원", "은/는") is "원은"."""
    return word + particle(word, pair)
