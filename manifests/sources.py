"""Where clips come from: a folder of videos, or a table that people already have.

`read` gives one `SourceRow` a clip, whatever the format; `signature` says cheaply whether reading
again could give other rows. `listing` finds the files, `tables` and `json_tables` read their
formats, `columns` says which column is what. Published tables need only `kind` and `path`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests import listing
from manifests.columns import Columns, Keep, Layout, SourceRow, lay_out
from manifests.json_tables import JsonTable
from manifests.schema import SOURCE, digest
from manifests.tables import CsvTable, ParquetTable, SourceError, Table, records_of

__all__ = [
    "Columns",
    "SourceError",
    "SourceRow",
    "SourceSettings",
    "extras_schema",
    "read",
    "read_tables",
    "resolve_root",
    "signature",
]

_VERSION = 1  # bump when the same files give other rows
_PART = 8192  # rows of a table made of rows
_TABLES = frozenset({"csv", "jsonl", "parquet", "openvid"})

_ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


class SourceSettings(BaseModel):
    """The section `source` of vidpipe.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["folder", "csv", "jsonl", "parquet", "openvid", "prompts"]
    path: str = Field(description="file, glob of files or folder; any fsspec URL", min_length=1)
    root: str | None = Field(
        None, description="what relative URIs are relative to; default: the folder of the table"
    )
    columns: Columns = Columns()
    keep: Keep = Field(
        None, description="further columns to keep, with types if given; default: all scalar ones"
    )
    encoding: str = Field("utf-8", description="of text files")
    delimiter: str | None = Field(
        None, description="of CSV cells; default: a comma, in .tsv files a tab"
    )
    videos: str | None = Field(
        None, description="prompts: the file of video paths; default: videos.txt beside them"
    )
    patterns: tuple[str, ...] = Field(
        (), description="folder: names such as '*.mp4'; default: every video extension"
    )
    watch: int = Field(
        100_000, ge=0, description="local files of a table that every run looks at for a change"
    )
    recursive: bool = Field(True, description="folder: look into folders inside as well")

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError as error:
            raise ValueError(
                f"{error}; use utf-8, utf-16, latin-1, cp1252, gb18030, ..."
            ) from error
        return value

    @field_validator("delimiter")
    @classmethod
    def _is_one_character(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 1 or value in '"\r\n\0'):
            raise ValueError("one character, neither a quote nor a line break")
        return value

    @model_validator(mode="after")
    def _belong_to_the_kind(self) -> Self:
        kinds = {
            "columns": _TABLES,
            "keep": _TABLES,
            "encoding": {"csv", "openvid", "jsonl", "prompts", "folder"},
            "delimiter": {"csv", "openvid"},
            "videos": {"prompts"},
            "watch": _TABLES | {"prompts"},
            "patterns": {"folder"},
            "recursive": {"folder"},
        }
        for name in sorted(self.model_fields_set & kinds.keys()):
            if self.kind not in kinds[name]:
                raise ValueError(
                    f"`{name}` means nothing to kind {self.kind}; it is for "
                    f"{', '.join(sorted(kinds[name]))}"
                )
        return self

    @property
    def codec(self) -> str:
        """The encoding; the mark that Windows puts before UTF-8 is no text."""
        return "utf-8-sig" if self.encoding.lower() in ("utf-8", "utf8") else self.encoding


def read(settings: SourceSettings) -> Iterator[SourceRow]:
    """The rows in the source's order. Raises SourceError, also in the middle."""
    if settings.kind == "folder":
        for video in listing.videos(
            settings.path, settings.patterns, settings.recursive, settings.codec
        ):
            yield SourceRow(
                video.uri, video.caption, None, None, video.uri, {}, video.version, video.flaw
            )
    elif settings.kind == "prompts":
        for name, line, caption, uri in listing.pairs(
            settings.path, settings.videos, settings.codec
        ):
            yield SourceRow(uri, caption, None, None, f"{name}:{line}", {})
    else:
        table = _table(settings)
        layout = _layout(settings, table)
        for record in table.records(layout.needed):
            yield layout.row(record)


def read_tables(settings: SourceSettings) -> Iterator[pa.Table]:
    """What `read` gives, as Arrow tables of some thousand rows: the columns of SOURCE but the id,
    `flaw`, and the extras. Raises SourceError, also in the middle."""
    if settings.kind == "parquet":
        table = ParquetTable(listing.files(settings.path))
        layout = _layout(settings, table)
        extras = pa.schema([pa.field(e.name, _ARROW[e.kind]) for e in layout.extras])
        schema = _rows_schema(extras)
        for file, line, batch in table.batches(layout.needed):
            columns = layout.columns(batch)
            if columns is None:  # some value needs a closer look
                yield _as_table(map(layout.row, records_of(file, line, batch)), schema)
                continue
            lines = pa.array(range(line, line + len(batch))).cast(pa.string())
            columns["origin"] = pc.binary_join_element_wise(file.name, lines, ":")
            yield pa.table(
                [columns.get(f.name, pa.nulls(len(batch))).cast(f.type) for f in schema],
                schema=schema,
            )
        return
    schema = _rows_schema(extras_schema(settings))
    rows = read(settings)
    while part := list(islice(rows, _PART)):
        yield _as_table(part, schema)


def _rows_schema(extras: pa.Schema) -> pa.Schema:
    own = [f for f in SOURCE if f.name != "clip_id"]
    return pa.schema([*own, pa.field("flaw", pa.string()), *extras])


def _as_table(rows: Iterable[SourceRow], schema: pa.Schema) -> pa.Table:
    values = [row._asdict() | row.extras for row in rows]
    return pa.Table.from_pylist(values, schema)


def signature(settings: SourceSettings) -> str:
    """Changes when reading may give other rows: by the files' sizes, times and ETags, and by the
    settings. Reads no file. Raises SourceError where there is nothing."""
    if settings.kind == "folder":
        state = listing.folder_state(settings.path, settings.patterns, settings.recursive)
    elif settings.kind == "prompts":
        state = listing.state(listing.pair_files(settings.path, settings.videos))
    else:
        state = listing.state(listing.files(settings.path))
    return digest([_VERSION, settings.model_dump(mode="json"), state])


def resolve_root(settings: SourceSettings) -> str:
    """The absolute path or URL that relative URIs are relative to."""
    if settings.root is not None:
        return listing.absolute(settings.root)
    if settings.kind == "folder":
        return listing.absolute(settings.path)
    return listing.parent(settings.path)


def extras_schema(settings: SourceSettings) -> pa.Schema:
    """The further columns that are kept, as `source_<name>`. Types: as given, else those of the
    first 1000 rows (Parquet: of its schema). Raises SourceError."""
    if settings.kind not in _TABLES:
        return pa.schema([])
    extras = _layout(settings, _table(settings)).extras
    return pa.schema([pa.field(extra.name, _ARROW[extra.kind]) for extra in extras])


def _table(settings: SourceSettings) -> Table:
    files = listing.files(settings.path)
    if settings.kind == "parquet":
        return ParquetTable(files)
    if settings.kind == "jsonl":
        return JsonTable(files, settings.codec)
    tabs = re.search(r"\.tsv(\.\w+)?$", files[0].path.lower())
    return CsvTable(files, settings.delimiter or ("\t" if tabs else ","), settings.codec)


def _layout(settings: SourceSettings, table: Table) -> Layout:
    return lay_out(table, settings.columns, settings.keep, openvid=settings.kind == "openvid")
