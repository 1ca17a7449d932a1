"""The checks of one caption: numbers, and flags where they pass a threshold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stages.captions.language import LANGUAGES, foreign
from stages.captions.phrases import refuses, speaks_of_task
from stages.captions.words import overlap, repetition, unquoted, words

# What can be wrong with a caption, the worst first: a rejected one is counted by its first.
Flag = Literal[
    "empty",
    "bad_json",
    "refusal",
    "truncated",
    "repetition",
    "language",
    "meta",
    "unrelated",
    "too_short",
    "too_long",
]
FLAGS: tuple[Flag, ...] = get_args(Flag)


class QualitySettings(BaseModel):
    """What a caption must be to be taken, and what becomes of a clip that gets none such."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ignore: tuple[Flag, ...] = Field(
        (), description="flags that are written down and refuse nothing"
    )
    trim: bool = Field(
        True,
        description="cut off openers (`The video shows`, `Sure! Here is ...:`) before checking",
    )
    min_words: int = Field(2, ge=0, description="fewer: `too_short`")
    max_words: int | None = Field(
        None, ge=1, description="more: `too_long`; default: half over what the preset asks for"
    )
    max_repetition: float = Field(
        0.3, ge=0, le=1, description="share of words that say again what was said: `repetition`"
    )
    language: str = Field("en", description="of captions, by ISO 639-1; any: not looked at")
    max_foreign: float = Field(
        0.2, ge=0, le=1, description="share of words in another language or script: `language`"
    )
    min_overlap: float = Field(
        0.1, ge=0, le=1, description="of content words with the original: less is `unrelated`"
    )
    original: str | None = Field(
        None,
        description="column to compare with and to fall back to; default: caption, or description "
        "where the prompt is about that",
    )
    retries: int = Field(
        2, ge=0, le=20, description="further answers to ask for, seeds of their own"
    )
    retry_temperature: float = Field(
        0.7, gt=0, le=2, description="of further answers at least: greedy ones would be the same"
    )
    fallback: Literal["original", "reject", "keep"] = Field(
        "original",
        description="where none passes: the original caption, or no clip, or the last answer",
    )

    @field_validator("language")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "any" and value not in LANGUAGES:
            raise ValueError(f"{value} is not known: any, {', '.join(LANGUAGES)}")
        return value

    @property
    def compares(self) -> bool:
        """Whether the original caption is read at all."""
        return self.fallback == "original" or self.min_overlap > 0


@dataclass(frozen=True)
class Checked:
    """A caption's numbers, and what is wrong with it."""

    words: int
    repetition: float
    foreign: float
    overlap: float | None
    flags: tuple[str, ...]


def examine(
    text: str,
    settings: QualitySettings,
    original: str | None = None,
    truncated: bool = False,
    max_words: int | None = None,
    sees: bool = False,
) -> Checked:
    """Checks the caption `text`. `truncated`: the engine stopped it at max_tokens; `sees`: the
    model was shown frames."""
    count = len(words(text))
    again = repetition(text)
    strange = 0.0 if settings.language == "any" else foreign(text, settings.language)
    kept = overlap(original, text) if original else None
    if kept is not None and kept < settings.min_overlap and settings.language != "any":
        # Words of two languages are not compared: a translation keeps none.
        apart = max(strange, foreign(original or "", settings.language)) > settings.max_foreign
        kept = None if apart else kept
    most = settings.max_words or max_words
    wrong = {
        "empty": not text.strip(),
        "refusal": refuses(text, sees),
        "truncated": truncated or cut_off(text),
        "repetition": again > settings.max_repetition,
        "language": strange > settings.max_foreign,
        "meta": speaks_of_task(text, sees),
        "unrelated": kept is not None and kept < settings.min_overlap,
        "too_short": count < settings.min_words,
        "too_long": most is not None and count > most,
    }
    return Checked(count, again, strange, kept, tuple(f for f in FLAGS if wrong.get(f)))


# Words that nothing ends with but what was cut off.
_GOES_ON = (
    "a an the and or of with their his its her your my our as while because that which who whose "
    "into from to is are was were than but if onto"
)
_LEADING = frozenset(_GOES_ON.split())
_ABBREVIATIONS = "mr mrs ms dr st prof no vs etc jr sr lt col gen capt fig inc co ft mt"
_SHORT = frozenset(_ABBREVIATIONS.split())
_SENTENCE = re.compile(r"\b(\w+)[.!?]+[\"”’')\]]*\s+(?=[A-Z\"“‘'(])")
_CLOSED = (".", "!", "?", "…", "。", "！", "？", '"', "”", "’", "'", ")", "]", "»", "*", "」")


def cut_off(text: str) -> bool:
    """Whether the text itself shows that it goes on: it ends amid a clause, or its other sentences
    end with a stop and the last one does not, or a quotation is never closed."""
    text = text.strip()
    if not text:
        return False
    if text.count('"') % 2 and not re.search(r"\d\"", text):  # 5" is inches
        return True
    if text.count("“") > text.count("”") or text.count("(") > text.count(")"):
        return True
    if text.endswith(_CLOSED):
        return False
    if text[-1] in ",:;-–—、，":
        return True
    found = words(unquoted(text))
    if found and len(found) > 2 and found[-1].lower() in _LEADING and found[-1].islower():
        return True
    ends = [m.group(1).lower() for m in _SENTENCE.finditer(text)]
    return any(len(word) > 2 and word not in _SHORT for word in ends)
