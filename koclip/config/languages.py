"""Codes of languages as BCP 47 has them: `ko`, `en`, `zh-Hant`, `pt-BR` (RFC 5646; primary codes of ISO 639-1)."""

import re
from collections.abc import Iterable

from koclip.config.errors import check

# ISO 639-1 with the codes of ISO 639-2/T and, behind a slash, /B: BCP 47 takes the shortest of a language.
_SHORTEST = """
aa aar, ab abk, ae ave, af afr, ak aka, am amh, an arg, ar ara, as asm, av ava, ay aym, az aze, ba bak, be bel, bg bul,
bh bih, bi bis, bm bam, bn ben, bo bod/tib, br bre, bs bos, ca cat, ce che, ch cha, co cos, cr cre, cs ces/cze, cu chu,
cv chv, cy cym/wel, da dan, de deu/ger, dv div, dz dzo, ee ewe, el ell/gre, en eng, eo epo, es spa, et est, eu eus/baq,
fa fas/per, ff ful, fi fin, fj fij, fo fao, fr fra/fre, fy fry, ga gle, gd gla, gl glg, gn grn, gu guj, gv glv, ha hau,
he heb, hi hin, ho hmo, hr hrv, ht hat, hu hun, hy hye/arm, hz her, ia ina, id ind, ie ile, ig ibo, ii iii, ik ipk,
io ido, is isl/ice, it ita, iu iku, ja jpn, jv jav, ka kat/geo, kg kon, ki kik, kj kua, kk kaz, kl kal, km khm, kn kan,
ko kor, ks kas, ku kur, kv kom, kw cor, ky kir, la lat, lb ltz, lg lug, li lim, ln lin, lo lao, lt lit, lu lub, lv lav,
mg mlg, mh mah, mi mri/mao, mk mkd/mac, ml mal, mn mon, mr mar, ms msa/may, mt mlt, my mya/bur, na nau, nb nob, nd nde,
ne nep, ng ndo, nl nld/dut, nn nno, no nor, nr nbl, nv nav, ny nya, oc oci, oj oji, om orm, or ori, os oss, pa pan,
pi pli, pl pol, ps pus, pt por, qu que, rm roh, rn run, ro ron/rum, ru rus, rw kin, sa san, sc srd, sd snd, se sme,
sg sag, sh hbs, si sin, sk slk/slo, sl slv, sm smo, sn sna, so som, sq sqi/alb, sr srp, ss ssw, st sot, su sun, sv swe,
sw swa, ta tam, te tel, tg tgk, th tha, ti tir, tk tuk, tl tgl, tn tsn, to ton, tr tur, ts tso, tt tat, ty tah, ug uig,
uk ukr, ur urd, uz uzb, ve ven, vi vie, vo vol, wa wln, wo wol, xh xho, yi yid, yo yor, za zha, zh zho/chi, zu zul
"""
_SHORT = {longer: short for short, more in map(str.split, _SHORTEST.split(",")) for longer in more.split("/")}
# Countries and names written for languages, and codes that are out of use. `kr` and `tw` are codes of languages, too
# (Kanuri and Twi), which are written for Korean and for Taiwan's Chinese far more often: those two have three letters.
_MEANT = {
    **dict(kr="ko", kp="ko", jp="ja", cn="zh", tw="zh-Hant", hk="zh-Hant", gr="el", ua="uk", cz="cs", dk="da", vn="vi"),
    **dict(us="en", gb="en", sp="es", mx="es", pk="ur", ir="fa", kz="kk", ge="ka", al="sq", rs="sr", at="de"),
    **{"in": "id", "iw": "he", "ji": "yi", "jw": "jv", "mo": "ro"},
    **dict(korean="ko", hangul="ko", english="en", japanese="ja", chinese="zh", german="de", french="fr", spanish="es"),
    **dict(italian="it", russian="ru", vietnamese="vi", thai="th", indonesian="id", arabic="ar", portuguese="pt"),
    **{"한국어": "ko", "영어": "en", "일본어": "ja", "중국어": "zh"},
}
_MEANT |= _SHORT
_TAKEN = {"kr": "kau for Kanuri", "tw": "twi for Twi"}
_TAG = re.compile(
    r"([a-z]{2,3})(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?(-([a-z0-9]{5,8}|\d[a-z0-9]{3}))*(-x(-[a-z0-9]{1,8})+)?"
)


def check_languages(key: str, languages: Iterable[str]) -> None:
    """Refuse what is no BCP 47 code of a language, in the standard's letter case; name the code that is likely meant.

    Of codes of three letters only those are known whose language has one of two letters.

    Raises:
        ConfigError: a code is refused.
    """
    for language in languages:
        check(isinstance(language, str), key, language, 'expected text; YAML takes a bare `no` for false: write "no"')
        meant = _likely(language)
        fix = "expected a language code of BCP 47, such as ko, en, zh-Hant or pt-BR"
        if meant:
            fix += f"; likely {meant} is meant" + (f" (write {_TAKEN[language]})" if language in _TAKEN else "")
        check(_is_code(language), key, language, fix)


def _is_code(language: str) -> bool:
    tag = _TAG.fullmatch(language)
    if tag is None or tag[1] in _TAKEN:
        return False
    return tag[1] in _SHORT.values() if len(tag[1]) == 2 else tag[1] not in _SHORT


def _likely(language: str) -> str:
    """Return the code that stands behind a country's, a name, a longer code or another letter case; "" if none does."""
    primary, *others = [part.strip() for part in re.split(r"[-_]", language.casefold())]
    meant = _MEANT.get(primary, primary)
    shaped = [part.upper() if len(part) == 2 else part.title() if len(part) == 4 else part for part in others]
    tag = "-".join([meant, *shaped])
    return tag if _is_code(tag) else meant if _is_code(meant) else ""
