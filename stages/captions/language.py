"""Which language a caption is not in.

By script, and among languages in Latin letters by their commonest words: exact enough to notice an
answer in another language, or one that changes over halfway. A language that stands in no list here
is not noticed where it shares the script, and neither is a foreign phrase of a few words.
"""

from __future__ import annotations

from collections import Counter

from stages.captions.words import script, unquoted, words

# The scripts of a language; "LATIN" with the words that few of the others share.
_KANJI = frozenset({"CJK", "HIRAGANA", "KATAKANA"})
SCRIPTS: dict[str, frozenset[str]] = {
    "ar": frozenset({"ARABIC"}),
    "el": frozenset({"GREEK"}),
    "fa": frozenset({"ARABIC"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "ja": _KANJI,
    "ko": frozenset({"HANGUL", "CJK"}),
    "ru": frozenset({"CYRILLIC"}),
    "th": frozenset({"THAI"}),
    "uk": frozenset({"CYRILLIC"}),
    "zh": frozenset({"CJK"}),
}
COMMON: dict[str, frozenset[str]] = {
    code: frozenset(text.split())
    for code, text in {
        "en": "the a an and of to in on at with is are was by from for as his her their its he she "
        "they it into over while through behind near under then out up down who that this",
        "de": "der die das und ein eine einen einem einer mit auf im ist sind den dem des von zu "
        "nicht sich während durch über neben aus seine ihre sie es vor nach",
        "fr": "le la les et un une des du dans sur avec est sont qui que pendant par pour au aux "
        "sa son ses il elle se ne pas derrière vers en",
        "es": "el la los las y un una unos de del en con por para que se su sus mientras es son "
        "está sobre al hacia como no",
        "it": "il lo la gli le e un una di del della dei che con per su nel nella mentre è sono si "
        "suo sua da al alla sulla sul",
        "pt": "o a os as e um uma de do da dos das em no na nos nas com por para que se seu sua "
        "enquanto é são ao sobre",
        "nl": "de het een en van in op met is zijn door naar terwijl aan voor die dat over bij hij "
        "zij niet uit",
        "sv": "och en ett på i med som är av till för den det han hon sig medan från över",
        "da": "og en et på i med som er af til for den det han hun sig mens fra over",
        "pl": "i w na z się jest do nie o po przez podczas gdy jego jej od za pod oraz",
        "cs": "a v na se s je do po z za pod jeho její který která zatímco od nad při",
        "tr": "bir ve bu ile için da de olan üzerinde doğru iken gibi sonra çok ise",
        "id": "di yang dan dengan ke dari sebuah seorang untuk pada itu ini sedang adalah saat",
        "vi": "một và của trong trên với là đang người các cho đến những khi có không",
        "ro": "un o și de la în pe cu care este sunt din spre lângă sub după când",
    }.items()
}
_BY_WORD: dict[str, list[str]] = {}
for _code, _words in COMMON.items():
    for _word in _words:
        _BY_WORD.setdefault(_word, []).append(_code)
LANGUAGES = tuple(sorted({*SCRIPTS, *COMMON}))


def foreign(text: str, language: str) -> float:
    """The share of `text` that is not in `language`, 0 to 1; quotations aside.

    Of words in another script it is their share. Of words in the same script it is 1 where another
    language's common words are more than twice the wanted one's, and three at least.
    """
    found = words(unquoted(text))
    if not found:
        return 0.0
    wanted = SCRIPTS.get(language, frozenset({"LATIN"}))
    # Latin names and brands stand in captions of every script.
    allowed = wanted if language in COMMON else wanted | {"LATIN"}
    others = sum(_strange(word, allowed) for word in found) / len(found)
    if language not in COMMON:
        latin = sum(script(w[0]) == "LATIN" for w in found)
        return max(others, 1.0 if latin * 2 > len(found) + 2 else 0.0)
    hits = Counter(code for word in found for code in _BY_WORD.get(word.lower(), ()))
    own = hits.pop(language, 0)
    most = max(hits.values(), default=0)
    return max(others, 1.0 if most >= 3 and most > 2 * own else 0.0)


def _strange(word: str, allowed: frozenset[str]) -> bool:
    if word.isascii():
        return "LATIN" not in allowed and any(letter.isalpha() for letter in word)
    letter = next((c for c in word if c.isalpha()), "")
    return bool(letter) and script(letter) not in allowed
