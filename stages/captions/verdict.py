"""What becomes of an answer: a caption, another question, or what the clip falls back to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from manifests.shards import CAPTIONS
from stages.base import Failed, Outcome, Rejected, Row
from stages.captions.phrases import trimmed
from stages.captions.prompt import Prompt
from stages.captions.quality import FLAGS, Checked, QualitySettings, examine
from stages.engines.base import Answer


def columns(caption: str) -> pa.Schema:
    """The column of captions `caption`, and those that say how each came about. The numbers are
    the last answer's."""
    beside = {
        "raw": pa.string(),  # the answer as it came
        "model": pa.string(),
        "prompt": pa.string(),  # of a preset its name, and the hash
        "tokens": pa.int32(),  # of the answer
        "prompt_tokens": pa.int32(),
        "truncated": pa.bool_(),  # cut off at max_tokens
        "source": pa.string(),  # model | original
        "attempts": pa.int32(),  # answers that were asked for
        "flags": pa.list_(pa.string()),  # what is wrong with the last answer
        "words": pa.int32(),
        "repetition": pa.float32(),  # share of words
        "foreign": pa.float32(),  # share of words
        "overlap": pa.float32(),  # share of content words; null: too few to tell
        "captions": CAPTIONS,  # every caption, of prompts that ask for several
    }
    named = [pa.field(f"{caption}_{name}", kind) for name, kind in beside.items()]
    return pa.schema([pa.field(caption, pa.string()), *named])


_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}
_THOUGHTS = re.compile(r"\A\s*<think>.*?(</think>|\Z)", re.DOTALL)


def clean(text: str) -> str:
    """An answer as a caption: one line, without thoughts, blanks and quotes around it."""
    text = " ".join(_THOUGHTS.sub("", text).split())
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        if text[0] in inner or text[-1] in inner:
            break  # "A dog" and "a cat": two quotations, not one around all
        text = inner.strip()
    return text


def seed_of(seed: int, clip_id: str, attempt: int = 1) -> int:
    """The clip's own seed, 31 bits: the order of rows and the batch don't matter."""
    name = f"{seed}:{clip_id}" if attempt == 1 else f"{seed}:{clip_id}:{attempt}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Verdict:
    """One answer, read and checked."""

    caption: str
    captions: list[dict[str, str]] | None  # kind and text, of prompts that ask for several
    checked: Checked

    def refused(self, settings: QualitySettings) -> list[str]:
        """The flags for which it is not taken."""
        return [flag for flag in self.checked.flags if flag not in settings.ignore]


def judge(
    answer: Answer, prompt: Prompt, settings: QualitySettings, original: str | None
) -> Verdict:
    """Reads and checks one answer."""
    if prompt.schema is None:
        text = clean(answer.text)
        text = clean(trimmed(text)) if settings.trim else text
        most = prompt.max_words
        return Verdict(
            text, None, examine(text, settings, original, answer.truncated, most, prompt.sees)
        )
    parts = read_parts(answer.text, prompt)
    if parts is None:
        # Why there is none is told beside it.
        found = examine(clean(answer.text), settings, sees=prompt.sees)
        flags = {"bad_json", *(f for f in found.flags if f in ("empty", "refusal"))}
        flags |= {"truncated"} if answer.truncated else set()
        return Verdict("", None, _with_flags(found, flags))
    if settings.trim:
        parts |= {kind: clean(trimmed(parts[kind])) for kind in prompt.captions}
    each = {
        kind: examine(parts[kind], settings, original, answer.truncated, None, prompt.sees)
        for kind in prompt.captions
    }
    flags = {flag for checked in each.values() for flag in checked.flags}
    captions = [{"kind": kind, "text": parts[kind]} for kind in prompt.captions]
    described = {key: parts[key] for key in prompt.parts}
    captions.append({"kind": "structured", "text": json.dumps(described, ensure_ascii=False)})
    if original and original.strip():
        captions.append({"kind": "original", "text": original.strip()})
    return Verdict(parts[prompt.main], captions, _with_flags(each[prompt.main], flags))


def _with_flags(checked: Checked, flags: set[str]) -> Checked:
    ordered = tuple(flag for flag in FLAGS if flag in flags)
    return Checked(checked.words, checked.repetition, checked.foreign, checked.overlap, ordered)


def read_parts(text: str, prompt: Prompt) -> dict[str, str] | None:
    """The texts of an answer in JSON by their keys; None where it is not as the schema says. A
    fence of Markdown around it is no fault."""
    text = _THOUGHTS.sub("", text).strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found: Any = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None
    wanted = {*prompt.captions, *prompt.parts}
    if not isinstance(found, dict) or set(found) != wanted:
        return None
    if not all(isinstance(value, str) and value.strip() for value in found.values()):
        return None
    return {key: clean(value) for key, value in found.items()}


def settle(
    verdict: Verdict,
    settings: QualitySettings,
    attempt: int,
    original: str | None,
    made: Row,
    column: str,
) -> Outcome | None:
    """The clip's outcome after its `attempt`-th answer (from 1); None: ask again.

    `made` are facts about the answer itself, the raw one among them, by the names in `columns`;
    `column` is the caption's.
    """
    refused = verdict.refused(settings)
    if refused and attempt <= settings.retries:
        return None
    caption, source, captions = verdict.caption, "model", verdict.captions
    if refused and settings.fallback != "keep":
        caption, captions = (original or "").strip(), None
        source = "original"
        if settings.fallback == "reject" or not caption:
            found = f"{', '.join(refused)} in {attempt} answers, the last {made['raw']!r}"
            return Rejected(f"caption_{refused[0]}", found[:500])
    if not caption:
        return Failed("empty_answer", f"the model wrote {made['raw']!r:.80}")
    checked = verdict.checked
    beside = {
        **made,
        "source": source,
        "attempts": attempt,
        "flags": list(checked.flags),
        "words": checked.words,
        "repetition": checked.repetition,
        "foreign": checked.foreign,
        "overlap": checked.overlap,
        "captions": captions,
    }
    return {column: caption, **{f"{column}_{name}": value for name, value in beside.items()}}
