"""A caption as words: what the other checks count."""

from __future__ import annotations

import functools
import re
import unicodedata
from itertools import pairwise

# Scripts that put no blanks between words: a character is taken for a word.
UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})

_WORD = re.compile(r"[^\W_]+(?:['’.,-][^\W_]+)*")
_QUOTED = re.compile(
    r"\"[^\"]*\"|“[^“”]*”|«[^«»]*»|„[^„“”]*[“”]|「[^「」]*」|(?<!\w)['‘](?:[^'’]|(?<=\w)['’](?=\w))*['’](?!\w)"
)
# English, whose content words are compared; other languages lose a little sharpness.
_COMMON = (
    "a an the and or but nor so yet if then than that this these those there here of to in into "
    "on onto at by for from with without within over under up down out off as is are was were be "
    "been being am has have had do does did will would can could may might must shall should not "
    "no it its he him his she her hers they them their we us our you your i me my who whom whose "
    "which what when where while during after before about above below between through across "
    "along around behind beside near toward towards against very more most some any each every "
    "both all one other another such also just only too video clip footage scene shot camera "
    "caption shows showing shown i'm i've can't cannot don't won't it's that's there's isn't "
    "aren't doesn't didn't couldn't wasn't"
)
_FUNCTION = frozenset(_COMMON.split())


@functools.lru_cache(maxsize=1 << 14)
def script(letter: str) -> str:
    """The script of a letter as Unicode names it (`LATIN`, `CYRILLIC`, `CJK`); "" of others."""
    if not letter.isalpha():
        return ""
    return unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]


def words(text: str) -> list[str]:
    """The words of `text` as they stand; where the script has no blanks, its characters."""
    found: list[str] = []
    for match in _WORD.finditer(text):
        word, start = match.group(), 0
        if word.isascii():
            found.append(word)
            continue
        for i, letter in enumerate(word):
            if script(letter) in UNSPACED:
                found += [word[start:i], letter] if i > start else [letter]
                start = i + 1
        if start < len(word):
            found.append(word[start:])
    return found


def unquoted(text: str) -> str:
    """`text` without what stands in quotation marks: those words are somebody else's."""
    return _QUOTED.sub(" ", text)


def stem(word: str) -> str:
    """The part of an English word that its plural, its tenses and its adverb share: roughly."""
    word = word.lower().replace("’", "'").removesuffix("'s")
    for ending in ("ing", "ies", "ied", "ed", "es", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    word = word.rstrip("ey") if len(word) > 3 else word
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def content(text: str) -> set[str]:
    """The stems of the words that carry the meaning: nouns, names, numbers, verbs, adjectives."""
    return {
        stem(w)
        for w in words(text)
        if w.lower().replace("’", "'") not in _FUNCTION
        and (len(w) > 2 or w.isdigit() or w.isupper() or not w.isascii())
    }


def overlap(source: str, text: str, least: int = 4) -> float | None:
    """The share of content words that two captions have in common, of the fewer of the two: a
    short source has to come back, and a long one may be cut short but not left. None where one of
    them has too few to tell (`least`)."""
    one, two = content(source), content(text)
    fewer = min(len(one), len(two))
    return None if fewer < least else len(one & two) / fewer


def repetition(text: str) -> float:
    """The share of words that only say again what was just said: that end a sequence of six words
    that stood before, belong to one word four times in a row, or to two or three words three times
    in a row. 1.0 where a whole sentence of five words or more stands twice."""
    every = [w.lower() for w in words(text)]
    if len({*pairwise(every)}) >= len(every) - 1:
        return 0.0  # no two words stand twice in a row, let alone more
    if _twice(text):
        return 1.0
    again = [False] * len(every)
    seen: set[tuple[str, ...]] = set()
    for end in range(6, len(every) + 1):
        phrase = tuple(every[end - 6 : end])
        if phrase in seen:
            again[end - 6 : end] = [True] * 6
        seen.add(phrase)
    for size, times in ((1, 4), (2, 3), (3, 3)):
        for i in range(len(every) - size * times + 1):
            run = every[i : i + size * times]
            if run == run[:size] * times:
                again[i + size : i + size * times] = [True] * (size * (times - 1))
    return sum(again) / len(every)


def _twice(text: str) -> bool:
    """Whether a sentence of five words or more stands twice."""
    said = [tuple(w.lower() for w in words(part)) for part in re.split(r"[.!?。！？]+", text)]
    long = [sentence for sentence in said if len(sentence) >= 5]
    return len(set(long)) < len(long)
