"""Tables on stdout, in the format asked for. Data only: talk goes to stderr."""

from __future__ import annotations

import csv
import json
import math
import re
from typing import Any, TextIO

import pyarrow as pa

from manifests.redact import shown

# Cells of a table on a terminal are cut to this; the other formats never cut.
CELL = 40
_CONTROLS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def emit(table: pa.Table, form: str, out: TextIO) -> None:
    rows = table.to_pylist()
    if form == "jsonl":
        for row in rows:
            out.write(json_line(row))
    elif form == "json":
        out.write(json_text([_plain(row) for row in rows], indent=1) + "\n")
    elif form == "csv":
        writer = csv.writer(out)
        writer.writerow(table.column_names)
        for row in rows:
            writer.writerow([_csv_cell(value, out.isatty()) for value in row.values()])
    else:
        out.write(text_table(table.column_names, [list(row.values()) for row in rows], CELL))


def json_line(row: dict[str, Any]) -> str:
    """One JSON object and a line break. NaN and infinity, which JSON lacks, become null."""
    return json_text(_plain(row)) + "\n"


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that is safe on a terminal too: the controls that JSON lets stand are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _csv_cell(value: Any, terminal: bool) -> Any:
    cell = json.dumps(_plain(value)) if isinstance(value, list | dict) else value
    return shown(cell) if terminal and isinstance(cell, str) else cell


def text_table(names: list[str], rows: list[list[Any]], cut: int | None = None) -> str:
    """Columns side by side, numbers to the right, cells cut to `cut` characters; an empty string
    for no columns."""
    if not names:
        return ""
    cells = [[_cell(value, cut) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells)]
    right = [
        all(isinstance(r[i], int | float | type(None)) for r in rows) for i in range(len(names))
    ]

    def line(values: list[str]) -> str:
        padded = (
            v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(names), *(line(row) for row in cells)]) + "\n"


def _cell(value: Any, cut: int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(_plain(value)) if isinstance(value, list | dict) else str(value)
    text = shown(" ".join(text.split()))
    return text if cut is None or len(text) <= cut else text[: cut - 1] + "…"
