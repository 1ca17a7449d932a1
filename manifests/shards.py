"""Latent shards and the index over them: what `vidpipe train` opens.

A shard is a Parquet file that the encode stage committed: one row a clip, with the latents as raw
little-endian bytes beside their shape and dtype, and a `LatentSpec` in the file's metadata.
Latents are stored as the VAE gave them: the posterior's mean and log-variance (*moments*),
unscaled, so that every trainer's format can be derived without encoding again.

The index is one Parquet file: one row per clip that is ready to train on, with its caption and the
place of its latents. It is a join by key, made by the pipeline; positions inside a shard are only
ever used together with the clip id that must stand there.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from manifests.facts import file_facts, with_facts
from manifests.faults import StoreError, unusable
from manifests.pages import Into, PagedFile, fresh

# Columns that the encode stage adds.
LATENTS = pa.schema(
    [
        pa.field("latents", pa.binary()),
        pa.field("latents_shape", pa.list_(pa.int32())),  # (C or 2C, F, H, W)
        pa.field("latents_dtype", pa.string()),  # float32 | float16 | bfloat16
        pa.field("frame_times", pa.list_(pa.float64())),  # seconds, of the frames picked
        pa.field("latents_fps", pa.float64()),  # the rate that the frames stand for
        pa.field("window_start", pa.float64()),  # of the part of the video that they stand for,
        pa.field("window_end", pa.float64()),  # seconds
    ]
)

# Columns that the embed stage adds. An embedding stands once in a file: in `embedding_row`.
EMBEDDINGS = pa.schema(
    [
        pa.field("embedding", pa.binary()),
        pa.field("embedding_pooled", pa.binary()),  # CLIP's one vector for the whole caption
        pa.field("embedding_empty", pa.binary()),  # the empty caption's: in one row of a file
        pa.field("embedding_shape", pa.list_(pa.int32())),  # (tokens, width)
        pa.field("embedding_dtype", pa.string()),  # float32 | float16 | bfloat16
        pa.field("embedding_key", pa.string()),  # hash of caption, encoder, max length, padding
        pa.field("embedding_row", pa.int32()),  # row of the same file that holds it
        pa.field("embedding_tokens", pa.int32()),  # the caption's own, at most max_length
        pa.field("embedding_truncated", pa.bool_()),  # it was longer
    ]
)

# And with `first_frame`, for models that go on from a picture: the first frame alone, encoded like
# a clip of one frame, of the same type.
FIRST_FRAME = pa.schema(
    [
        pa.field("first_frame_latents", pa.binary()),
        pa.field("first_frame_latents_shape", pa.list_(pa.int32())),  # (C or 2C, 1, H, W)
    ]
)

# Captions of one clip by kind: short, medium, long, ...
CAPTIONS = pa.list_(pa.struct([pa.field("kind", pa.string()), pa.field("text", pa.string())]))

INDEX = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("shard", pa.string(), nullable=False),  # relative to the workdir
        pa.field("row", pa.int32(), nullable=False),  # row of the shard
        pa.field("shape", pa.list_(pa.int32()), nullable=False),
        # Of the caption's embedding, all three null where there is no embed stage.
        pa.field("text_key", pa.string()),
        pa.field("text_shard", pa.string()),
        pa.field("text_row", pa.int32()),
        pa.field("captions", CAPTIONS),  # all of the clip, where it has several
        pa.field("source_id", pa.string()),  # of the clip that it is a part of, or its own
    ]
)


class ShardError(Exception):
    """A shard or an index is missing, damaged or not what was expected; the message says which."""


@dataclass(frozen=True)
class LatentSpec:
    """What holds for all latents of a shard, and so of an index.

    A model trains on `(x - shift) * scale`, per channel, whatever the VAE's family
    (`scaling_factor` of AutoencoderKL, `latents_mean/std` of Wan and LTX: one rule).
    """

    vae: str  # as configured: a folder, a hub id, demo://vae
    vae_class: str  # the diffusers class
    vae_sha256: str  # of the weights
    fingerprint: str  # of the encode stage
    moments: bool  # True: 2C channels, mean then log-variance; False: C channels
    channels: int  # C
    temporal: int  # frames per latent frame (after the first): 1, 4, 8
    spatial: int  # pixels per latent pixel
    shift: list[float]  # C values
    scale: list[float]  # C values
    sampling: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)  # the VAE's own, for exports

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatentSpec:
        """Raises ShardError when a field is missing or unknown."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ShardError(f"the latents' metadata is of another version: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TextSpec:
    """What holds for all text embeddings of a shard, and so of an index."""

    encoder: str  # as configured: a folder, a hub id
    encoder_class: str  # the class of transformers
    encoder_sha256: str  # of the weights and the configuration
    fingerprint: str  # of the embed stage
    column: str  # of the captions
    max_length: int  # tokens
    padding: str  # none: a caption's own tokens; max_length: padded to it, and not masked
    dtype: str
    width: int  # values of a token
    empty_tokens: int  # of the empty caption

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TextSpec:
        """Raises ShardError when a field is missing or unknown."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ShardError(f"the embeddings' metadata is of another version: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Latent:
    """One clip's latents as stored: `shape` values of `dtype`, little-endian, in C order."""

    clip_id: str
    data: memoryview
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Embedding:
    """One caption's text embedding as stored: `shape` (tokens, width) values of `dtype`,
    little-endian, row by row. The first `tokens` rows are the caption's own."""

    key: str
    data: memoryview
    pooled: memoryview | None
    shape: tuple[int, ...]
    dtype: str
    tokens: int


@dataclass(frozen=True)
class Index:
    """An opened index: `table` has the columns of INDEX, `spec` describes all latents."""

    workdir: str
    table: pa.Table
    spec: LatentSpec
    facts: dict[str, Any]  # which columns and stages it was made of

    @property
    def text(self) -> TextSpec | None:
        """Describes all text embeddings; None where there are none."""
        known = self.facts.get("text")
        return None if known is None else TextSpec.from_json(known)

    def empty_caption(self) -> Embedding | None:
        """The embedding of the empty caption, which guidance dropout trains on; None where there
        are no embeddings. Raises ShardError where it is missing."""
        shards = self.table.column("text_shard").drop_null()
        spec = self.text
        return None if spec is None or not len(shards) else _empty(self, shards[0].as_py(), spec)

    @classmethod
    def open(cls, url: str) -> Index:
        """Raises ShardError where there is none, or it is none of ours."""
        fs, path = fsspec.core.url_to_fs(url)
        try:
            with fs.open(path, "rb") as file:
                table = pq.read_table(file)
        except FileNotFoundError as error:
            raise ShardError(f"no index at {url}: run `vidpipe run` first") from error
        except Exception as error:  # each driver has exceptions of its own
            if _unreadable(error):
                raise ShardError(f"{url} is no index: {error}") from error
            raise ShardError(str(unusable(error, "read", url))) from error
        facts = file_facts(table.schema)
        lacking = [f"fact {name}" for name in ("spec", "workdir") if name not in facts]
        lacking += [f"column {name}" for name in INDEX.names if name not in table.column_names]
        if lacking:
            raise ShardError(
                f"{url} is a Parquet file but no index of this version of vidpipe (it has no "
                f"{lacking[0]}): `vidpipe run` writes one, index/train.parquet in its workdir"
            )
        try:
            table = table.select(INDEX.names).cast(INDEX).replace_schema_metadata(None)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise ShardError(f"{url} is no index: {error}") from error
        return cls(facts.pop("workdir"), table, LatentSpec.from_json(facts.pop("spec")), facts)


def write_index(
    url: str, workdir: str, tables: Iterable[pa.Table], spec: LatentSpec, facts: dict[str, Any]
) -> int:
    """Writes an index of `tables`, each with the columns of INDEX; returns its rows.

    Written whole under another name first: an index is there or it is not. Raises StoreUnusable.
    """
    fs, path = fsspec.core.url_to_fs(url)
    known = {**facts, "workdir": workdir, "spec": spec.to_json()}
    schema = with_facts(INDEX.empty_table(), known).schema
    part = f"{path}.{uuid.uuid4().hex}.part"  # two runs may end at the same moment
    rows = 0
    try:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with (
            fs.open(part, "wb") as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table.cast(INDEX).replace_schema_metadata(schema.metadata))
                rows += len(table)
        fs.mv(part, path)
    except Exception as error:
        with contextlib.suppress(Exception):
            fs.rm_file(part)
        if isinstance(error, StoreError | pa.ArrowException):
            raise
        raise unusable(error, "write", url) from error  # each driver has exceptions of its own
    return rows


class ShardFile:
    """An open shard, read a row group at a time, by any thread. A context manager. `proved`: what
    is read is held against the checksums of its pages.

    Raises ShardError, naming the shard, where it is missing or damaged.
    """

    def __init__(self, workdir: str, name: str, proved: bool = False) -> None:
        self.workdir, self.name = workdir, name
        self._lock = threading.Lock()  # a reader of Parquet is for one thread at a time
        fs, root = fsspec.core.url_to_fs(workdir)
        with self._told():
            # Row groups are read whole: a store's own read-ahead would fetch what nobody asked for.
            file = fs.open(f"{root}/{name}", "rb", cache_type="none")
            try:
                self._paged = PagedFile(file, not isinstance(fs, LocalFileSystem), proved)
            except BaseException:
                file.close()
                raise
        self.facts = file_facts(self._paged.footer.schema.to_arrow_schema())
        self.starts = self._paged.starts  # the row that each row group begins with

    def group(self, row: int) -> int:
        """The number of the row group that holds `row`."""
        if row >= self.starts[-1]:
            raise ShardError(
                f"shard {self.name} has {self.starts[-1]} rows, row {row} was asked for"
            )
        return bisect.bisect_right(self.starts, row) - 1

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        with self._told(), self._lock:
            return self._paged.read(group, columns)

    def rows(
        self, rows: Sequence[int], columns: Sequence[str], payload: Mapping[str, Into]
    ) -> Iterator[tuple[Any, ...]]:
        """Of `rows` (best ascending) the values of `columns`, then those of `payload`, columns of
        bytes: in the memory that its function gives for each."""
        for group, some in itertools.groupby(rows, self.group):
            with self._told(), self._lock:
                into = list(payload.values())
                found = list(self._paged.rows(group, list(some), columns, list(payload), into))
            yield from found

    def latents(
        self, rows: Sequence[int], first_frame: bool = False, into: Into = fresh
    ) -> Iterator[Latent]:
        """The latents at `rows` (ascending), in the memory that `into` gives for each; with
        `first_frame`, those of that one alone."""
        name = "first_frame_latents" if first_frame else "latents"
        facts = ["clip_id", f"{name}_shape", "latents_dtype"]
        for clip, shape, dtype, data in self.rows(rows, facts, {name: into}):
            if data is None or shape is None:
                raise ShardError(f"clip {clip} has no {name} in its shard: the index is stale")
            yield Latent(clip, data, tuple(shape), dtype)

    def embeddings(self, rows: Sequence[int]) -> Iterator[Embedding]:
        """The text embeddings at `rows` (ascending)."""
        facts = [f"embedding_{name}" for name in ("key", "shape", "dtype", "tokens")]
        payload = {"embedding": fresh, "embedding_pooled": fresh}
        for key, shape, dtype, tokens, data, pooled in self.rows(rows, facts, payload):
            if data is None or shape is None or tokens is None:
                raise ShardError(
                    f"shard {self.name} has no embedding {key} in its row: the index is stale"
                )
            yield Embedding(key, data, pooled, tuple(shape), dtype, tokens)

    def close(self) -> None:
        with self._lock:
            self._paged.file.close()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        advice = "`vidpipe verify` tells what else is, `vidpipe verify --repair` has it made again"
        try:
            yield
        except FileNotFoundError as error:
            raise ShardError(
                f"shard {self.name} is missing from {self.workdir}: {advice}"
            ) from error
        except Exception as error:  # each driver has exceptions of its own
            if _unreadable(error):
                what = str(error).strip("'. ")
                told = f"shard {self.name} in {self.workdir} is damaged: {what}; {advice}"
                raise ShardError(told) from error
            where = f"{self.workdir}/{self.name}"
            raise ShardError(str(unusable(error, "read", where))) from error


def _unreadable(error: Exception) -> bool:
    """Whether Arrow can't parse the file, or misses a column in it: it says so by an OSError of no
    number and by a KeyError, too."""
    parsed = type(error) is OSError and not error.errno
    return parsed or isinstance(error, pa.ArrowException | KeyError)


def read_latents(
    workdir: str, shard: str, rows: Sequence[int], first_frame: bool = False
) -> Iterator[Latent]:
    """The latents at `rows` (ascending) of one shard, read row group by row group; with
    `first_frame`, those of the first frame alone.

    Raises ShardError, naming the shard, where it is missing or damaged.
    """
    with ShardFile(workdir, shard) as file:
        yield from file.latents(rows, first_frame)


def read_embeddings(workdir: str, shard: str, rows: Sequence[int]) -> Iterator[Embedding]:
    """The text embeddings at `rows` (ascending) of one shard. The key that must stand there is the
    index' `text_key`: who reads compares them.

    Raises ShardError, naming the shard, where it is missing or damaged.
    """
    with ShardFile(workdir, shard) as file:
        yield from file.embeddings(rows)


def _empty(index: Index, shard: str, spec: TextSpec) -> Embedding:
    with ShardFile(index.workdir, shard) as file:
        for group in range(len(file.starts) - 1):
            for value in file.read(group, ["embedding_empty"]).column(0).drop_null():
                data = memoryview(value.as_buffer())
                size = {"float32": 4}.get(spec.dtype, 2) * spec.width
                shape = (len(data) // size, spec.width)
                return Embedding("", data, None, shape, spec.dtype, spec.empty_tokens)
    raise ShardError(f"shard {shard} has no embedding of the empty caption")
