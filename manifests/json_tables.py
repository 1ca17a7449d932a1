"""JSON tables: one object a line (JSON Lines), or one list of objects, of any length."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from manifests.tables import (
    MAX_CELL,
    SAMPLE,
    File,
    Kind,
    Record,
    SourceError,
    as_json,
    common_kind,
    kind_of,
    text_lines,
)

_PIECE = 64 << 10  # characters read at once
_BLANK = re.compile(r"[ \t\r\n]*")


class JsonTable:
    """JSON Lines or a JSON list: what the first character of the file says it is."""

    def __init__(self, files: list[File], encoding: str) -> None:
        self.files, self.encoding = files, encoding

    def kinds(self) -> dict[str, Kind | None]:
        """Of the keys of the first `SAMPLE` objects; a key that comes later is none of them."""
        found: dict[str, set[Kind | None]] = {}
        for record in itertools.islice(self.records(set()), SAMPLE):
            for name, value in record.values.items():
                kinds = found.setdefault(name, set())
                if value is not None:
                    kinds.add(kind_of(value))
        return {name: common_kind(kinds) if kinds else "str" for name, kinds in found.items()}

    def records(self, columns: set[str]) -> Iterator[Record]:
        for file in self.files:
            empty = True
            for line, value, text in self._values(file):
                empty = False
                if not isinstance(value, dict):
                    raise SourceError(
                        f"{file.shown}:{line}: {as_json(value)[:20]} stands where an object "
                        'like {"uri": "a.mp4", "caption": "..."} must.'
                    )
                if "\\ud" in text.lower():
                    _check_surrogates(file, line, value)
                yield Record(file, line, value)
            if empty:
                raise SourceError(f"{file.shown} is empty: it must have one JSON object a line.")

    def _values(self, file: File) -> Iterator[tuple[int, Any, str]]:
        """Every value with the line where it begins and its text."""
        pieces = text_lines(file, self.encoding, newline=None, size=_PIECE)
        for number in itertools.count(1):
            line = next(pieces, "")
            if not line:
                return
            if line.lstrip().startswith("["):
                yield from _JsonList(file, itertools.chain([line], pieces), number)
                return
            line = _to_line_end(line, pieces, file, number)
            if line.isspace():
                continue
            try:
                yield number, json.loads(line), line
            except json.JSONDecodeError as error:
                raise _not_json(f"{file.shown}:{number}:{error.colno}", error) from error
            except (ValueError, RecursionError) as error:  # digits or brackets without end
                raise _not_json(f"{file.shown}:{number}", error) from error


def _to_line_end(line: str, pieces: Iterator[str], file: File, number: int) -> str:
    parts, length = [line], len(line)
    while not parts[-1].endswith("\n") and (piece := next(pieces, "")):
        parts.append(piece)
        length += len(piece)
        if length > MAX_CELL:
            raise SourceError(
                f"{file.shown}:{number}: the line is longer than {MAX_CELL >> 20} Mi characters. "
                "Every line must be one JSON object, or the file one list of them."
            )
    return "".join(parts)


def _not_json(at: str, error: Exception) -> SourceError:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return SourceError(
        f"{at}: not valid JSON: {message}. Every line must be one JSON object, or the file one "
        "list of them."
    )


def _check_surrogates(file: File, line: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
        try:
            as_json(value).encode()
        except UnicodeEncodeError as error:
            raise SourceError(
                f"{file.shown}:{line}: column {name!r} has half of a surrogate pair, "
                f"\\u{ord(error.object[error.start]):04x}, which is no character. Remove it."
            ) from error


class _JsonList:
    """The items of a JSON list with their lines and texts, decoded while it is read."""

    def __init__(self, file: File, pieces: Iterator[str], line: int) -> None:
        self.file, self.pieces = file, pieces
        self.text, self.at = "", 0  # what is read and not yet dropped; what of it is done
        self.line, self.column = line, 1  # of text[at]
        self.decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[tuple[int, Any, str]]:
        self._take("[")
        more = self._peek() != "]"
        while more:
            yield self._item()
            more = self._peek() != "]"
            if more:
                self._take(",")
        self._take("]")
        if self._peek():
            raise SourceError(f"{self._place()}: text follows after the list. Remove it.")

    def _place(self) -> str:
        return f"{self.file.shown}:{self.line}:{self.column}"

    def _skip(self, end: int) -> None:
        if breaks := self.text.count("\n", self.at, end):
            self.line += breaks
            self.column = end - self.text.rindex("\n", self.at, end)
        else:
            self.column += end - self.at
        self.at = end

    def _refill(self) -> bool:
        parts, length = [self.text[self.at :]], 0
        while length < _PIECE and (piece := next(self.pieces, "")):
            parts.append(piece)
            length += len(piece)
        self.text, self.at = "".join(parts), 0
        return length > 0

    def _peek(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self._skip(blank.end() if blank else self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._refill():
                return ""

    def _take(self, expected: str) -> None:
        found = self._peek()
        if found != expected:
            what = f"{found!r} stands where {expected!r} must" if found else "the list never ends"
            raise SourceError(f"{self._place()}: not valid JSON: {what}. Is the file complete?")
        self._skip(self.at + 1)

    def _item(self) -> tuple[int, Any, str]:
        self._peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # What the end of the text cuts off fails there, or as a string left open.
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                done = error.pos - self.at
                if cut and len(self.text) - self.at <= MAX_CELL and self._refill():
                    continue
                self._skip(self.at + done)
                raise _not_json(self._place(), error) from error
            except (ValueError, RecursionError) as error:
                raise _not_json(self._place(), error) from error
            line, text = self.line, self.text[self.at : end]
            self._skip(end)
            return line, value, text
