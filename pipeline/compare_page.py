"""The page of `vidpipe captions compare`: one HTML file with its pictures in it, and no script.

Captions are strangers' text: all text goes through `text`, and the page forbids browsers to load or
run anything.
"""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from manifests.redact import redact
from pipeline.compare import Shown, Told, Written
from stages.base import Failed, Rejected, Row
from stages.engines.data_urls import jpeg

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em;
       color: #1b1b1b; background: #fff }
table { border-collapse: collapse } td, th { padding: .2em .9em .2em 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
article { border-top: 1px solid #ccc; padding: 1.2em 0 }
.frames img { margin-right: 4px; vertical-align: top }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2em }
.facts, .id { color: #666; font-size: 13px } .flag { color: #b00020; font-weight: 600 }
.source { color: #444; margin: .6em 0 } p { white-space: pre-wrap; overflow-wrap: anywhere }
h3 { margin: .6em 0 0; font-size: 15px } details { font-size: 13px; color: #444 }
"""


def text(value: Any) -> str:
    """As HTML has it, whatever is in it."""
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return html.escape(shown, quote=True)


def page(sides: Sequence[Told], clips: Sequence[Shown]) -> str:
    """The whole of it. `clips` in the order in which both sides had them."""
    title = f"{' / '.join(side.name for side in sides)}: {len(clips)} clips"
    articles = (
        _article(clip, [(side, side.written[place]) for side in sides])
        for place, clip in enumerate(clips)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>{text(title)}</h1>\n{_totals(sides)}\n{''.join(articles)}</body></html>\n"
    )


def _totals(sides: Sequence[Told]) -> str:
    rows = [(name, [figure(side) for side in sides]) for name, figure in FIGURES.items()]
    head = "".join(f"<th>{text(side.name)}</th>" for side in sides)
    body = "".join(
        f"<tr><th>{text(name)}</th>{''.join(f'<td class=n>{text(v)}</td>' for v in values)}</tr>\n"
        for name, values in rows
    )
    return f'<table class="totals"><tr><th></th>{head}</tr>\n{body}</table>'


def _share(part: int, side: Told) -> str:
    return f"{part} ({part / len(side.written):.0%})" if side.written else "0"


def _lost(side: Told) -> str:
    lost = [each.outcome for each in side.written]
    counts = Counter(
        one.reason if isinstance(one, Rejected) else one.error
        for one in lost
        if isinstance(one, Rejected | Failed)
    )
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "0"


def _mean(name: str) -> Any:
    def figure(side: Told) -> str:
        values = [row[f"{side.column}_{name}"] for row in side.kept()]
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.1f}" if known else ""

    return figure


FIGURES = {
    "model": lambda side: side.model,
    "prompt": lambda side: side.prompt,
    "last answer flagged": lambda side: _share(side.flagged(), side),
    "left with the original": lambda side: _share(
        sum(row[f"{side.column}_source"] == "original" for row in side.kept()), side
    ),
    "rejected, failed": _lost,
    "asked again": lambda side: side.amounts["asked_again"],
    "words a caption": _mean("words"),
    "tokens read": lambda side: side.amounts["prompt_tokens"],
    "tokens written": lambda side: side.amounts["tokens"],
    "seconds": lambda side: f"{side.seconds:.1f}, and {side.starting:.1f} to start",
    "tokens written a second": lambda side: f"{side.amounts['tokens'] / side.seconds:.1f}",
}


def _article(clip: Shown, sides: Sequence[tuple[Told, Written]]) -> str:
    row = clip.row
    part = "" if row["start"] is None else f" {row['start']:g} s to {row['end'] or 'its end'} s"
    source = row["caption"] or "(no caption)"
    return (
        f'<article><div class="frames">{_frames(clip)}</div>'
        f'<div class="id">{text(row["clip_id"])}{text(part)}</div>'
        f'<p class="source">{text(source)}</p>'
        f'<div class="sides">{"".join(_side(*one) for one in sides)}</div></article>\n'
    )


def _frames(clip: Shown) -> str:
    if clip.frames is None:
        return f"<p>{text(clip.fault)}</p>"
    return "".join(
        f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg(frame)).decode()}">'
        for frame in clip.frames
    )


def _side(told: Told, written: Written) -> str:
    outcome = written.outcome
    head = f"<h3>{text(told.name)}</h3>"
    if isinstance(outcome, Rejected | Failed):
        what, why = (
            ("rejected", outcome.reason)
            if isinstance(outcome, Rejected)
            else ("failed", outcome.error)
        )
        message = text(redact(outcome.message))
        lost = f'<p class="flag">{what}: {text(why)}</p><p>{message}</p>'
        return f"<section>{head}{lost}{_facts([_seconds(written)])}</section>"
    assert isinstance(outcome, dict)
    facts = {name: outcome[f"{told.column}_{name}"] for name in FACTS}
    flags = ", ".join(facts["flags"])
    marked = f'<span class="flag">{text(flags)}</span> · ' if flags else ""
    line = [
        *([f"left with the original in {facts['attempts']} tries"] * (facts["source"] != "model")),
        f"{facts['words']} words in the last answer",
        *([f"{facts['tokens']} tokens"] * (facts["tokens"] is not None)),
        *([f"try {facts['attempts']}"] * (facts["attempts"] > 1)),
        _seconds(written),
    ]
    return (
        f"<section>{head}<p>{text(outcome[told.column])}</p>{_facts(line, marked)}"
        f"{_further(outcome, told.column)}</section>"
    )


FACTS = ("flags", "attempts", "source", "words", "tokens")


def _facts(line: Sequence[str], marked: str = "") -> str:
    return f'<div class="facts">{marked}{text(" · ".join(line))}</div>'


def _seconds(written: Written) -> str:
    return f"{written.seconds:.2f} s"


def _further(outcome: Row, column: str) -> str:
    """The raw answer where it is another text, and further captions."""
    more = [(one["kind"], one["text"]) for one in outcome[f"{column}_captions"] or ()]
    raw = outcome[f"{column}_raw"]
    if not more and raw.strip() != outcome[column]:
        more = [("raw answer", raw)]
    return "".join(
        f"<details><summary>{text(kind)}</summary><p>{text(_plain(said))}</p></details>"
        for kind, said in more
    )


def _plain(said: str) -> str:
    """JSON a key a line."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return said
    return "\n".join(f"{k}: {v}" for k, v in found.items()) if isinstance(found, dict) else said
