"""Steps for captions: rules that drop them, personal data that is removed from them, captions that repeat too often."""

import functools
import re
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from xxhash import xxh3_64_intdigest

from koclip.config import check
from koclip.config.curation import CaptionRules, CurateConfig
from koclip.curation.batch import Batch, captions_at, edit_captions, kept_places

REPEATED = "repeated caption"
_TAGS = (
    "a|abbr|article|b|blockquote|body|br|button|center|code|div|em|figcaption|figure|font|footer|form|h[1-6]|head|"
    "header|hr|html|i|iframe|img|input|label|li|link|meta|nav|ol|p|pre|script|section|small|span|strong|style|sub|sup|"
    "table|tbody|td|th|thead|tr|u|ul|video"
)
_HTML = re.compile(rf"<!--|</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_DOMAINS = "com|net|org|info|io|kr|jp|cn|de|uk|eu"
_URL = re.compile(
    rf"https?://|www\.\w|(?<![\w@.-])(?:[a-z0-9-]+\.)+(?:{_DOMAINS})(?![A-Za-z0-9])", re.IGNORECASE | re.ASCII
)
_SUFFIXES = "jpe?g|png|gif|bmp|webp|tiff?|heic|avif|svg|psd|pdf|mp4|mov"
# Names that cameras, phones and programs give, with a number or a date.
_PROGRAMS = "img|image|dsc[nf]?|pict?|photo|pxl|screenshot|kakaotalk|snapshot|스크린샷|사진|제목 ?없음"
_FILE_NAME = re.compile(rf".*\w\.(?:{_SUFFIXES})|(?:{_PROGRAMS})[-_ (]*\d[-\d_ ().:]*", re.IGNORECASE)
_DAY = r"\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_GAP = r"[-. \u2010-\u2015]"
# A number in a longer number is not personal data.
PERSONAL = {
    "resident-registration number": re.compile(rf"(?<![\d-]){_DAY} ?[-\u2010-\u2015] ?[0-9][\d*]{{6}}(?![\d-])"),
    "phone number": re.compile(
        rf"(?<![\d-])(?:\+82{_GAP}?(?:\(0\))?|0)(?:1[016789]{_GAP}?\d{{3,4}}{_GAP}?\d{{4}}"
        rf"|(?:2|[3-6]\d|70)\)?{_GAP}\d{{3,4}}{_GAP}\d{{4}})(?![\d-])"
    ),
    "e-mail address": re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"),
}

Rule = Callable[[str, str, CaptionRules], bool]


def _is_foreign(caption: str, language: str, rules: CaptionRules) -> bool:
    primary = language.split("-")[0]
    if primary == "ko":
        share = hangul_share(caption)
        if share < rules.min_hangul:
            return True
        if share == 1:
            return False  # py3langid knows no other language that is written in Hangul
    return rules.min_language > 0 and language_probability(caption, primary) < rules.min_language


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_probability(text: str, language: str) -> float:
    """Return the probability that a text is in a language, among the languages that py3langid knows.

    Lui and Baldwin 2012, "langid.py: An Off-the-shelf Language Identification Tool": https://aclanthology.org/P12-3005
    """
    return float(dict(_identifier().rank(text))[language])


def check_known_languages(config: CurateConfig) -> None:
    """Check that py3langid knows the languages of all captions, if their language is to be checked.

    Raises:
        ConfigError: it does not know a language.
    """
    if not config.captions.min_language:
        return
    languages = {language.split("-")[0] for source in config.sources for language in source.captions}
    unknown = sorted(languages - set(_identifier().labels))
    expected = "py3langid does not know this language: set captions.min_language to 0"
    check(not unknown, "sources[].captions", unknown, expected)


def hangul_share(text: str) -> float:
    """Return the share of Hangul among the letters of a text; 0 without letters."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum("가" <= letter <= "힣" or "ㄱ" <= letter <= "ㅣ" for letter in letters) / max(1, len(letters))


# In this order; the first rule that a caption breaks is its reason. To add a rule, add a line.
RULES: dict[str, Rule] = {
    "HTML": lambda caption, language, rules: rules.html and _HTML.search(caption) is not None,
    "URL": lambda caption, language, rules: rules.urls and _URL.search(caption) is not None,
    "file name": lambda caption, language, rules: rules.file_names and _FILE_NAME.fullmatch(caption) is not None,
    "too short": lambda caption, language, rules: len(caption) < rules.min_length,
    "too long": lambda caption, language, rules: len(caption) > rules.max_length,
    "other language": _is_foreign,
}


def filter_captions(batch: Batch, config: CurateConfig) -> Batch:
    """Remove personal data from captions, and drop the captions that break a rule."""
    return edit_captions(batch, partial(_edit, rules=config.captions))


def _edit(caption: str, language: str, rules: CaptionRules) -> tuple[str, list[str]]:
    notes: list[str] = []
    if rules.personal_data:
        caption, notes = without_personal_data(caption)
    for reason, breaks in RULES.items():
        if breaks(caption, language, rules):
            return "", [*notes, reason]
    return caption, notes


def text_hash(text: str) -> int:
    """Return a hash of 64 bits."""
    return int(xxh3_64_intdigest(text.encode()))


def without_personal_data(caption: str) -> tuple[str, list[str]]:
    """Return a caption without personal data, and the kind of each number or address that was removed."""
    removed = []
    for kind, pattern in PERSONAL.items():
        caption, count = pattern.subn(" ", caption)
        removed += [kind] * count
    return (" ".join(caption.split()) if removed else caption), removed


Hashes = npt.NDArray[np.uint64]


def collect_captions(batch: Batch, config: CurateConfig) -> Hashes:
    """Return a hash of each caption of the kept rows; captions that a row repeats count once."""
    hashes = [
        caption_hash
        for place in kept_places(batch)
        for caption_hash in {text_hash(caption) for _, _, caption in captions_at(batch, place)}
    ]
    return np.array(hashes, np.uint64)


def decide_repeated(facts: Iterable[Hashes], config: CurateConfig) -> frozenset[int]:
    """Return the hashes of captions that more than `captions.max_repeats` rows have."""
    hashes, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *facts]), return_counts=True)
    return frozenset(hashes[counts > config.captions.max_repeats].tolist())


def drop_repeated(batch: Batch, repeated: frozenset[int], config: CurateConfig) -> Batch:
    """Drop the captions with these hashes."""

    def edit(caption: str, language: str) -> tuple[str, list[str]]:
        return ("", [REPEATED]) if text_hash(caption) in repeated else (caption, [])

    return edit_captions(batch, edit) if repeated else batch
