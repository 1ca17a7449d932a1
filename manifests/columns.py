"""Which column of a table is what: the video, its caption, the clip's times, what else is kept."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from manifests.listing import is_video
from manifests.schema import SOURCE_PREFIX
from manifests.tables import Kind, Record, SourceError, Table, as_json, convert

# Arrow types whose values are taken as they are for each kind of column.
_EXACT: dict[Kind, Callable[[pa.DataType], bool]] = {
    "str": pa.types.is_string,
    "int": lambda kind: pa.types.is_integer(kind) and kind != pa.uint64(),
    "float": pa.types.is_floating,
    "bool": pa.types.is_boolean,
}

Keep = list[str] | dict[str, Kind] | None

# What published tables call their columns, the likelier first; case does not matter.
_URI = ("uri", "path", "video", "video_path", "file", "file_path", "url", "videos", "filename")
_CANDIDATES: dict[str, Sequence[str]] = {
    "uri": _URI,
    "caption": ("caption", "text", "cap", "caps", "prompt"),
    "start": ("start",),
    "end": ("end",),
}
_OPENVID = {**_CANDIDATES, "uri": ("video", "path"), "caption": ("caption", "text")}

_FIELD = re.compile(r"\{([^{}]+)\}")
_SECONDS = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_CLOCK = re.compile(r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2}(?:\.\d*)?)", re.ASCII)


class Columns(BaseModel):
    """Which column of the table is what. Unset: known names are tried; empty: there is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str | None = Field(
        None,
        description="the video's path or URL, or a pattern of columns in braces: "
        "'{YoutubeID}_{Start_timestamp}_{End_timestamp}.mp4'",
    )
    caption: str | None = Field(None, description="text, or a list of texts: the first is taken")
    start: str | None = Field(None, description="seconds or HH:MM:SS.mmm into the video")
    end: str | None = Field(None, description="seconds or HH:MM:SS.mmm into the video")


class SourceRow(NamedTuple):
    """One clip as its source gives it. `uri` None: the row names no video."""

    uri: str | None
    caption: str | None
    start: float | None  # seconds
    end: float | None  # seconds
    origin: str  # "clips.csv:17"
    extras: dict[str, Any]  # by the names of `extras_schema`
    version: str | None = None  # of the file behind it, where the source lists files
    flaw: str | None = None  # why this row can't be taken in, where it can't


class Extra(NamedTuple):
    column: str
    name: str
    kind: Kind


@dataclass(frozen=True)
class Layout:
    """Which columns of a table become what of a row."""

    uri: Callable[[Record], str | None]
    uri_column: str | None  # None: several make up the uri
    caption: str | None
    start: str | None
    end: str | None
    extras: list[Extra]
    needed: set[str]
    keeps_all: bool

    def row(self, record: Record) -> SourceRow:
        values = record.values
        extras = {}
        for column, name, kind in self.extras:
            try:
                extras[name] = convert(values.get(column), kind)
            except ValueError as error:
                raise _misfit(
                    record,
                    column,
                    f"is no {kind}, which the column is by its first rows or as set. Correct it, "
                    f"or set `keep: {{{column}: str}}`, with the other columns that you need",
                ) from error
        return SourceRow(
            self.uri(record),
            self._caption(record),
            _seconds(record, self.start),
            _seconds(record, self.end),
            f"{record.file.name}:{record.line}",
            extras,
        )

    def columns(self, batch: pa.RecordBatch) -> dict[str, pa.Array] | None:
        """What `row` gives of every row, as columns without origin; None where some value needs a
        closer look, which `row` takes."""
        wanted: dict[str, tuple[str | None, Kind]] = {
            "uri": (self.uri_column, "str"),
            "caption": (self.caption, "str"),
            "start": (self.start, "float"),
            "end": (self.end, "float"),
        }
        wanted |= {extra.name: (extra.column, extra.kind) for extra in self.extras}
        found: dict[str, pa.Array] = {}
        for name, (column, kind) in wanted.items():
            if column is None and name == "uri":
                return None
            if column is not None:
                values = batch.column(column)
                if not _EXACT[kind](values.type):
                    return None
                found[name] = values
        blank = pc.equal(pc.utf8_trim_whitespace(found["uri"]), "")
        found["uri"] = pc.if_else(blank, pa.scalar(None, found["uri"].type), found["uri"])
        for name in {"start", "end"} & found.keys():
            known = found[name].cast(pa.float64())
            known = pc.if_else(pc.is_nan(known), pa.scalar(None, pa.float64()), known)
            if pc.any(pc.greater_equal(pc.abs(known), 1e12)).as_py():
                return None
            found[name] = known
        return found

    def _caption(self, record: Record) -> str | None:
        if self.caption is None:
            return None
        value = record.values.get(self.caption)
        if not isinstance(value, list):
            return _text(record, self.caption, value)
        if self.keeps_all and all(extra.column != self.caption for extra in self.extras):
            raise _misfit(
                record,
                self.caption,
                "is a list, where the first rows have one caption each. To take the first of "
                f"every list and keep all, set `keep: {{{self.caption}: str}}`",
            )
        return _text(record, self.caption, value[0]) if value else None


def lay_out(table: Table, columns: Columns, keep: Keep, *, openvid: bool = False) -> Layout:
    """Finds the columns. Raises SourceError where one that is named or needed is not there."""
    kinds = table.kinds()
    place = table.files[0].shown
    candidates = _OPENVID if openvid else _CANDIDATES
    roles = {
        role: _find(role, getattr(columns, role), candidates[role], kinds, place)
        for role in candidates
    }
    pattern = roles["uri"]
    if pattern is None or (openvid and roles["caption"] is None):
        raise _no_column(pattern is not None, candidates, kinds, place)
    parts = [] if pattern in kinds else _FIELD.findall(pattern)
    extras = _extras(keep, kinds, roles, place)
    direct = {name for name in roles.values() if name in kinds}
    return Layout(
        uri=_filled(pattern, parts) if parts else _single(pattern),
        uri_column=None if parts else pattern,
        caption=roles["caption"],
        start=roles["start"],
        end=roles["end"],
        extras=extras,
        needed={name for name in direct if name} | set(parts) | {e.column for e in extras},
        keeps_all=keep is None,
    )


def _find(
    role: str,
    given: str | None,
    candidates: Sequence[str],
    kinds: dict[str, Kind | None],
    place: str,
) -> str | None:
    if given == "":
        return None
    if given is not None:
        for name in _FIELD.findall(given) if role == "uri" and given not in kinds else ():
            _known(name, f"columns.{role}", kinds, place)
        if role != "uri" or given in kinds or not _FIELD.search(given):
            _known(given, f"columns.{role}", kinds, place)
        return given
    folded: dict[str, str] = {}
    for name in kinds:
        folded.setdefault(name.strip().lower(), name)
    return next((folded[name] for name in candidates if name in folded), None)


def _known(name: str, setting: str, kinds: dict[str, Kind | None], place: str) -> None:
    if name in kinds:
        return
    near = difflib.get_close_matches(name, kinds, n=3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise SourceError(
        f"{place} has no column {name!r}, which `{setting}` names. {hint}"
        f"Its columns: {', '.join(map(repr, kinds))}."
    )


def _no_column(
    has_uri: bool, candidates: dict[str, Sequence[str]], kinds: dict[str, Kind | None], place: str
) -> SourceError:
    role = "caption" if has_uri else "uri"
    what = "a caption" if has_uri else "a video"
    message = (
        f"{place}: no column is known to hold {what} ({', '.join(candidates[role])}). Its "
        f"columns: {', '.join(map(repr, kinds))}. Name one: `columns: {{{role}: ...}}`."
    )
    header = list(kinds)
    if len(header) == 1 and (found := re.search(r"[;\t|]", header[0])):
        sign = as_json(found[0])  # as YAML has it too
        message += f" If {sign} separates the cells, set `delimiter: {sign}`."
    elif any(is_video(name) for name in header):
        message += " Line 1 looks like data: put a line with the columns' names before it."
    return SourceError(message)


def _extras(
    keep: Keep,
    kinds: dict[str, Kind | None],
    roles: dict[str, str | None],
    place: str,
) -> list[Extra]:
    chosen: dict[str, Kind]
    if keep is None:
        chosen = {
            name: kind
            for name, kind in kinds.items()
            if kind is not None and name not in roles.values() and _normalised(name)
        }
        caption = roles["caption"]
        if caption is not None and kinds[caption] is None:
            chosen[caption] = "str"  # a list of captions: all of them
    else:
        for name in keep:
            _known(name, "keep", kinds, place)
        chosen = keep if isinstance(keep, dict) else {name: kinds[name] or "str" for name in keep}
    taken: dict[str, str] = {}
    for column in chosen:
        name = _normalised(column)
        if not name:
            raise SourceError(f"{place}: `keep` names {column!r}, which has no letter: rename it.")
        if name in taken:
            raise SourceError(
                f"{place}: the columns {taken[name]!r} and {column!r} would both be named "
                f"{SOURCE_PREFIX}{name}. Rename one, or list in `keep` those that you need."
            )
        taken[name] = column
    return [Extra(c, SOURCE_PREFIX + name, chosen[c]) for name, c in taken.items()]


def _normalised(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def _misfit(record: Record, column: str, what: str) -> SourceError:
    value = repr(record.values.get(column))
    shown = value if len(value) <= 60 else value[:57] + "..."
    return SourceError(f"{record.file.shown}:{record.line}: column {column!r}: {shown} {what}.")


def _is_missing(value: Any) -> bool:
    """pandas writes a missing value of any column as NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(record: Record, column: str, value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if _is_missing(value):
        return None
    raise _misfit(record, column, "is no text. Name the right column under `columns`")


def _single(column: str) -> Callable[[Record], str | None]:
    def uri(record: Record) -> str | None:
        value = _text(record, column, record.values.get(column))
        return value if value and not value.isspace() else None

    return uri


def _filled(pattern: str, columns: list[str]) -> Callable[[Record], str | None]:
    def uri(record: Record) -> str | None:
        values = {name: record.values.get(name) for name in columns}
        if any(value is None or value == "" for value in values.values()):
            return None
        texts = {k: v if isinstance(v, str) else as_json(v) for k, v in values.items()}
        return _FIELD.sub(lambda found: texts[found[1]], pattern)

    return uri


def _seconds(record: Record, column: str | None) -> float | None:
    """Raises SourceError where the value is neither a number nor a clock time."""
    value = record.values.get(column) if column is not None else None
    if column is None or _is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        if _SECONDS.fullmatch(value.strip()):
            value = float(value)
        elif clock := _CLOCK.fullmatch(value.strip()):
            value = int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12:
        return float(value)
    raise _misfit(
        record,
        column,
        "is no time: seconds (12.5) or HH:MM:SS.mmm are read. Correct it, or name the right "
        "column under `columns` (empty for none)",
    )
