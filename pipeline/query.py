"""`vidpipe show` and `vidpipe manifest`: the joined view as rows, for people and for files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from manifests.faults import unusable
from manifests.schema import did_you_mean
from manifests.view import SOURCE_LAYER, UnitView, ends
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.plan import views
from stages.filter import LOCKED

_FIRST = ("clip_id", "uri", "caption", "outcome", "reason", "message", "stage")


def tables(pipeline: Pipeline, stage: str | None) -> Iterator[pa.Table]:
    """The joined view, a table a unit: every row of the source, with the columns of all stages and
    its outcome after `stage` (None: after the last that it reached)."""
    names = (
        list(pipeline.dag.layers)
        if stage is None
        else [SOURCE_LAYER, *(pipeline.upstream([stage]) if stage != SOURCE_LAYER else [])]
    )
    columns = pipeline.columns()
    for view in views(pipeline):
        yield _joined(view, names, list(pipeline.dag.layers), columns)


def _joined(
    view: UnitView, names: Sequence[str], every: Sequence[str], columns: pa.Schema
) -> pa.Table:
    for name in every:
        view.settled(name)
    ended = ends(view, names)
    table = view.table
    table = table.select([n for n in table.column_names if not n.startswith("_")])
    for name in ended.column_names:
        table = table.append_column(name, ended.column(name))
    schema = _schema(columns)
    present = [f if f.name in table.column_names else None for f in schema]
    filled = {
        f.name: table.column(f.name).cast(f.type)
        if known is not None
        else pa.nulls(table.num_rows, f.type)
        for f, known in zip(schema, present)
    }
    return pa.table({name: filled[name] for name in schema.names})


def _schema(columns: pa.Schema) -> pa.Schema:
    """Of the joined view: what one looks for first comes first."""
    text = [pa.field(n, pa.string()) for n in ("clip_id", "outcome", "reason", "message", "stage")]
    every = {field.name: field for field in [*text, *columns]}
    return pa.schema([every[n] for n in (*_FIRST, *(n for n in every if n not in _FIRST))])


def select(
    pipeline: Pipeline,
    stage: str | None,
    where: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
) -> pa.Table:
    """Rows of the joined view for which `where`, an SQL condition over its columns, holds.

    Raises ConfigError for a condition or column that does not fit.
    """
    import duckdb

    schema = _schema(pipeline.columns())
    for column in columns:
        if column not in schema.names:
            raise ConfigError(
                f"there is no column {column!r}.{did_you_mean(column, schema.names)} "
                f"Columns: {', '.join(schema.names)}."
            )
    faults: list[Exception] = []  # what DuckDB would wrap in an error of its own

    def rows() -> Iterator[pa.RecordBatch]:
        try:
            for table in tables(pipeline, stage):
                yield from table.cast(schema).to_batches()
        except Exception as error:
            faults.append(error)
            raise

    wanted = ", ".join(f'"{column}"' for column in columns) or "*"
    query = f"SELECT {wanted} FROM manifest"  # noqa: S608  columns are checked, files out of reach
    if where:
        query += f" WHERE ({where}\n)"
    if limit is not None:
        query += f" LIMIT {limit:d}"
    with duckdb.connect(config={**LOCKED, "memory_limit": "4GB"}) as connection:
        # As DuckDB asks for them: unit by unit, and no more than the limit needs.
        connection.register("manifest", pa.RecordBatchReader.from_batches(schema, rows()))
        try:
            if len(connection.extract_statements(query)) != 1:
                raise ConfigError(f"--where {where!r}: a single condition is expected")
            return connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            if faults:
                raise faults[0] from None
            raise ConfigError(f"--where {where!r}: {str(error).splitlines()[0]}") from error


def write(pipeline: Pipeline, out: str) -> int:
    """Writes the whole joined view to a .parquet or .jsonl file; returns its rows.

    Unit by unit: memory does not grow with the manifest. Raises ConfigError for another ending,
    StoreUnusable where it can't be written.
    """
    suffix = Path(out).suffix
    if suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {out}: the name must end in .parquet or .jsonl")
    part = Path(out).with_name(Path(out).name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        rows = _write(pipeline, part, suffix)
        part.replace(out)
    except OSError as error:
        raise unusable(error, "write", out) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return rows


def _write(pipeline: Pipeline, part: Path, suffix: str) -> int:
    rows = 0
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        writer = None
        for table in tables(pipeline, None):
            writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)
            rows += table.num_rows
        if writer is None:
            raise ConfigError("there are no rows yet: `vidpipe run` first")
        writer.close()
    else:
        from pipeline.output import json_line

        with part.open("w", encoding="utf-8") as file:
            for table in tables(pipeline, None):
                for row in table.to_pylist():
                    file.write(json_line(row))
                rows += table.num_rows
    return rows
