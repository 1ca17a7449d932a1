"""Tables as people have them, read as records: CSV, Parquet; JSON stands in `json_tables`.

Nothing here knows what a column means: `manifests.sources` does. A table is a file or a glob on
any fsspec URL, compressed or not (.gz, .bz2, .xz, .zst), read in one pass with the memory of a few
rows. The types of its columns are those of its first `SAMPLE` rows, or of the Parquet schema.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

Kind = Literal["str", "int", "float", "bool"]

SAMPLE = 1000  # rows that decide the types of a text table's columns
MAX_CELL = 16 << 20  # characters; what is longer is a quote that never closes
MAX_LINE = 64 << 20  # characters; a compressed file of a few KB could hold a line that fills memory
_BATCH = 8192  # rows of a Parquet file decoded at once
_INT64 = range(-(1 << 63), 1 << 63)
_DIGITS = re.compile(r"[+-]?\d+", re.ASCII)
_INT = re.compile(r"[+-]?(?:0|[1-9]\d{0,18})", re.ASCII)
_NUMBER = re.compile(
    r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?)", re.ASCII | re.IGNORECASE
)
_BROKEN = re.compile("[\0\ud800-\udfff]")


class SourceError(Exception):
    """A source can't be read as it is: the message names file, line and column, and the remedy."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a table. `name` is short, for origins; `shown` is whole, for messages."""

    fs: Any
    path: str
    name: str
    shown: str

    def open(self) -> Any:
        """The file's bytes, decompressed."""
        if not self.path.endswith(".zst"):
            return self.fs.open(self.path, "rb", compression="infer")
        # pyarrow brings zstd along; fsspec would need another package.
        return pa.CompressedInputStream(self.fs.open(self.path, "rb"), "zstd")


class Record(NamedTuple):
    """One row: `line` is where it begins (in Parquet: its number), from 1."""

    file: File
    line: int
    values: dict[str, Any]


class Table(Protocol):
    files: list[File]

    def kinds(self) -> dict[str, Kind | None]:
        """The columns in their order, with their types; None where values are nested."""

    def records(self, columns: set[str]) -> Iterator[Record]:
        """All rows; values outside of `columns` may be missing."""


def kind_of(value: Any) -> Kind | None:
    """The type of a value that was read with one; None: nested, or of no type that is kept."""
    if isinstance(value, str):
        return "str"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if value in _INT64 else "str"  # a float would lose its digits
    return "float" if isinstance(value, float) else None


def kind_of_text(text: str) -> Kind:
    """The type that a cell looks like."""
    text = text.strip()
    if _DIGITS.fullmatch(text):  # 007 is a name, and a number of more than 64 bits as well
        return "int" if _INT.fullmatch(text) and int(text) in _INT64 else "str"
    if _NUMBER.fullmatch(text):
        return "float"
    return "bool" if text.lower() in ("true", "false") else "str"


def common_kind(kinds: set[Kind | None]) -> Kind | None:
    """The type that holds values of all `kinds`."""
    if None in kinds:
        return None
    if kinds == {"int", "float"}:
        return "float"
    return next(iter(kinds)) if len(kinds) == 1 else "str"


def convert(value: Any, kind: Kind) -> Any:
    """The value as `kind`, None where it is missing. Raises ValueError where it doesn't fit."""
    if value is None:
        return None
    if kind == "str":
        return value if isinstance(value, str) else as_json(value)
    if isinstance(value, str):
        value = _parse(value.strip())
        if value is None:
            return None
    if kind == "bool" and value in (0, 1):
        return bool(value)
    if kind == "bool" or isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    try:
        if kind == "float":
            return float(value)
        if value != value:
            return None  # how pandas writes a missing integer
        number = int(value)
    except OverflowError as error:
        raise ValueError(value) from error
    if number != value or number not in _INT64:
        raise ValueError(value)
    return number


def _parse(text: str) -> bool | int | float | None:
    if not text:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    return int(text) if _DIGITS.fullmatch(text) else float(text)


def as_json(value: Any) -> str:
    """JSON text, for nested values that are kept as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def text_lines(
    file: File, encoding: str, newline: str | None = "", size: int = -1
) -> Iterator[str]:
    """The lines with their ends, cut into pieces of `size` characters where that is given.

    `newline` as of `open`: "" leaves a line break inside of a quoted caption as it is. Raises
    SourceError at the first line that is not clean text.
    """
    number, first = 0, 0  # lines begun; characters of this one before this piece
    try:
        with (
            file.open() as binary,
            io.TextIOWrapper(binary, encoding, "surrogateescape", newline=newline) as text,
        ):
            for piece in iter(lambda: text.readline(MAX_LINE if size < 0 else size), ""):
                number += not first
                if len(piece) == MAX_LINE:
                    raise SourceError(
                        f"{file.shown}:{number}: the line has over {MAX_LINE >> 20} million "
                        "characters, which no row has. Is it the right file, and `kind` what it is?"
                    )
                if ("\0" in piece or not piece.isascii()) and (bad := _BROKEN.search(piece)):
                    raise _not_text(file, number, first + bad.start() + 1, bad[0], encoding)
                yield piece
                first = 0 if piece[-1] in "\r\n" else first + len(piece)
    except UnicodeError as error:
        raise SourceError(
            f"{file.shown}:{number + 1}: this is not {encoding} text ({error}). "
            "Set `encoding` to what the file is in, or convert it to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise unreadable(file, error, number) from error


def _not_text(file: File, line: int, column: int, bad: str, encoding: str) -> SourceError:
    at = f"{file.shown}:{line}:{column}: "
    if bad == "\0":
        return SourceError(
            at + "a NUL character, which no text has: the file is damaged, or it is UTF-16 "
            "(then set `encoding: utf-16`)."
        )
    return SourceError(
        at + f"byte 0x{ord(bad) & 0xFF:02x} is not valid {encoding.removesuffix('-sig')}. "
        "Convert the file to UTF-8, or set `encoding` to what it is in (latin-1, cp1252, ...)."
    )


def unreadable(file: File, error: Exception, line: int = 0) -> SourceError:
    at = f"{file.shown} can't be read" + (f" after line {line}" if line else "")
    what = str(error).strip().rstrip(".")
    return SourceError(f"{at}: {what}. Is it complete, and may this user read it?")


class CsvTable:
    """CSV as in RFC 4180, strictly: a first line of names, quotes doubled inside of quotes."""

    def __init__(self, files: list[File], delimiter: str, encoding: str) -> None:
        self.files, self.delimiter, self.encoding = files, delimiter, encoding

    def kinds(self) -> dict[str, Kind | None]:
        header = next(self._rows(self.files[0]))[1]
        sample = itertools.islice(self.records(set(header)), SAMPLE)
        found: dict[str, set[Kind | None]] = {name: set() for name in header}
        for record in sample:
            for name, cell in record.values.items():
                if cell.strip():
                    found[name].add(kind_of_text(cell))
        return {name: common_kind(kinds) if kinds else "str" for name, kinds in found.items()}

    def records(self, columns: set[str]) -> Iterator[Record]:
        first: list[str] | None = None
        for file in self.files:
            rows = self._rows(file)
            header = next(rows)[1]
            first = first or header
            same_columns(file, header, self.files[0], first)
            for line, cells in rows:
                if len(cells) != len(header):
                    raise SourceError(
                        f"{file.shown}:{line}: cells in the row: {len(cells)}, in the header: "
                        f"{len(header)}. A cell with a {self.delimiter!r}, a quote or a line break "
                        "in it must stand in double quotes."
                    )
                yield Record(file, line, dict(zip(header, cells)))

    def _rows(self, file: File) -> Iterator[tuple[int, list[str]]]:
        """The header, then the rows that are not blank, with the lines where they begin."""
        csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))  # captions exceed 128 KiB
        reader = csv.reader(text_lines(file, self.encoding), delimiter=self.delimiter, strict=True)
        headed = False
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise SourceError(
                    f"{file.shown}:{line}: the row that begins here is not valid CSV, as seen at "
                    f"line {reader.line_num}: {error}. A quote inside of a quoted cell must be "
                    'doubled (""), and every opened one closed.'
                ) from error
            if cells and not headed:
                cells = [name.strip() for name in cells]
                _check_header(file, line, cells)
                headed = True
            if cells:
                yield line, cells
        if not headed:
            raise SourceError(f"{file.shown} is empty: its first line must name the columns.")


def _check_header(file: File, line: int, names: list[str]) -> None:
    seen: dict[str, int] = {}
    for column, name in enumerate(names, 1):
        if name and name in seen:
            raise SourceError(
                f"{file.shown}:{line}: the columns {seen[name]} and {column} are both named "
                f"{name!r}. Rename one."
            )
        seen[name] = column


def same_columns(file: File, names: Iterable[str], other: File, expected: Iterable[str]) -> None:
    """Raises SourceError where two files of one glob have other columns."""
    odd = set(names) ^ set(expected)
    if odd:
        raise SourceError(
            f"{file.shown} and {other.shown} have different columns: only one of the two has "
            f"{', '.join(map(repr, sorted(odd)))}. Read them as two sources, or make them alike."
        )


class ParquetTable:
    """Parquet files, decoded a few rows at a time, and only the columns that are asked for."""

    def __init__(self, files: list[File]) -> None:
        self.files = files

    def kinds(self) -> dict[str, Kind | None]:
        with _parquet(self.files[0]) as parquet:
            return _parquet_kinds(self.files[0], parquet.schema_arrow)

    def records(self, columns: set[str]) -> Iterator[Record]:
        for file, line, batch in self.batches(columns):
            yield from records_of(file, line, batch)

    def batches(self, columns: set[str]) -> Iterator[tuple[File, int, pa.RecordBatch]]:
        """Some rows at a time, with their file and the number of the first."""
        first: list[str] | None = None
        for file in self.files:
            line = 1
            try:
                with _parquet(file) as parquet:
                    schema = parquet.schema_arrow
                    first = first or schema.names
                    same_columns(file, schema.names, self.files[0], first)
                    wanted = [name for name in schema.names if name in columns]
                    for batch in parquet.iter_batches(_BATCH, columns=wanted):
                        batch.validate(full=True)  # text that is no UTF-8, above all
                        yield file, line, _plain(batch)
                        line += len(batch)
            except (OSError, pa.ArrowException) as error:
                raise unreadable(file, error, line - 1) from error


def records_of(file: File, line: int, batch: pa.RecordBatch) -> Iterator[Record]:
    for number, values in enumerate(batch.to_pylist(), line):
        yield Record(file, number, values)


@contextlib.contextmanager
def _parquet(file: File) -> Iterator[pq.ParquetFile]:
    try:
        with file.fs.open(file.path, "rb") as binary:
            try:
                parquet = pq.ParquetFile(binary)
            except (UnicodeDecodeError, OverflowError, MemoryError, IndexError) as error:
                raise pa.ArrowInvalid(f"its metadata is damaged ({error})") from error
            with parquet:
                yield parquet
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{file.shown} is not a whole Parquet file: {str(error).strip().rstrip('.')}. Copy it "
            "again, or set `kind` to what it is."
        ) from error
    except OSError as error:
        raise unreadable(file, error) from error


def _parquet_kinds(file: File, schema: pa.Schema) -> dict[str, Kind | None]:
    kinds: dict[str, Kind | None] = {}
    for field in schema:
        if field.name in kinds:
            raise SourceError(
                f"{file.shown}: two columns are both named {field.name!r}. Rename one."
            )
        if not field.name.startswith("__index_level_"):  # pandas' row labels
            kinds[field.name] = _arrow_kind(field.type)
    return kinds


def _arrow_kind(of: pa.DataType) -> Kind | None:
    types = pa.types
    if types.is_dictionary(of):
        return _arrow_kind(of.value_type)
    if types.is_integer(of):
        return "int"
    if types.is_floating(of):
        return "float"
    if types.is_boolean(of):
        return "bool"
    texts = types.is_string(of) or types.is_large_string(of) or types.is_string_view(of)
    return "str" if texts or types.is_null(of) or _is_exact(of) else None


def _is_exact(of: pa.DataType) -> bool:
    """Dates and decimals: kept as the text that says all of them."""
    dated = pa.types.is_timestamp(of) or pa.types.is_date(of) or pa.types.is_time(of)
    return bool(dated or pa.types.is_decimal(of))


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    for i, field in enumerate(batch.schema):
        if _is_exact(field.type):
            batch = batch.set_column(i, field.name, batch.column(i).cast(pa.string()))
    return batch
