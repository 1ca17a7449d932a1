"""Names, ids and keys that every manifest shares.

A *clip* is a row. Its id says where it comes from and is stable for ever; its *row key* says
what a stage saw of it, so that a result is reused exactly as long as its inputs are the same.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

KEPT = "kept"
REJECTED = "rejected"
FAILED = "failed"
PENDING = "pending"  # never stored: the absence of an outcome
ABSENT = "absent"  # only in the source: the row has left the table

# What every source row has. Any other column of the user's table follows as `source_<name>`:
# the prefix keeps it apart from what stages measure (`source_fps` is a claim, `fps` a fact).
SOURCE = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("start", pa.float64()),  # seconds into the video; null: from its beginning
        pa.field("end", pa.float64()),  # seconds; null: to its end
        pa.field("version", pa.string()),  # of the file, where the source lists files; else null
        pa.field("origin", pa.string()),  # "clips.csv:17", for messages; in no key
    ]
)
SOURCE_PREFIX = "source_"

# What the commit log adds to the columns of any stage.
OUTCOME = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("parent_id", pa.string()),  # set where a stage splits a clip
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string()),  # few distinct words: a rule's name, a failure's class
        pa.field("message", pa.string()),  # a sentence for a person
        pa.field("attempts", pa.int32(), nullable=False),
    ]
)

RESERVED = frozenset(OUTCOME.names) | frozenset(SOURCE.names) | {"stage"}


def digest(value: Any, length: int = 16) -> str:
    """Hex sha256 of the canonical JSON of `value` (sorted keys, no spaces), cut to `length`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """` Did you mean NAME?`, to follow a sentence; empty where no name is close."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def clip_id(uri: str, start: float | None = None, end: float | None = None) -> str:
    """The id of the clip `start`..`end` (seconds) of the video at `uri`: 24 hex digits."""
    return digest(["clip", uri, start, end], 24)


def clip_ids(uri: pa.StringArray, start: pa.DoubleArray, end: pa.DoubleArray) -> pa.StringArray:
    """`clip_id` of every row; `uri` has no nulls."""
    if start.null_count == end.null_count == len(uri):
        # The text that is hashed, without its detour through JSON where nothing needs an escape.
        plain = pc.invert(pc.match_substring_regex(uri, r'["\\\x00-\x1f]'))
        if pc.all(plain).as_py():
            texts = pc.binary_join_element_wise('["clip","', uri, '",null,null]', "")
            hashed = hashlib.sha256
            data = texts.cast(pa.binary()).to_pylist()
            return pa.array([hashed(text).hexdigest()[:24] for text in data], pa.string())
    rows = zip(uri.to_pylist(), start.to_pylist(), end.to_pylist())
    return pa.array([clip_id(*row) for row in rows], pa.string())


def child_id(parent: str, start: float | None, end: float | None) -> str:
    """The id of a part of a clip, for stages that split: scenes, windows."""
    return digest(["child", parent, start, end], 24)


def _encode(value: Any) -> bytes:
    """One value as bytes that no other value of any type shares."""
    if value is None:
        return b"n"
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return b"s%d:" % len(data) + data
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, int):
        return b"i%d;" % value
    if isinstance(value, float):
        return b"d" + struct.pack("<d", value)
    if isinstance(value, bytes):
        return b"b%d:" % len(value) + value
    if isinstance(value, list | tuple):
        return b"l%d:" % len(value) + b"".join(map(_encode, value))
    if isinstance(value, dict):
        items = sorted(value.items())
        return b"m%d:" % len(items) + b"".join(_encode(k) + _encode(v) for k, v in items)
    raise TypeError(f"a {type(value).__name__} has no place in a row key")


def row_key(values: Iterable[Any]) -> str:
    """The key of a row = a hash of the values of the columns that a stage reads: 16 hex digits.

    Keys are only ever compared for one clip under one stage, so 64 bits are ample.
    """
    return _hashed(b"".join(map(_encode, values)))


_BLAKE = hashlib.blake2b(digest_size=8)  # a copy is made in a third of the time of another


def _hashed(data: bytes) -> str:
    own = _BLAKE.copy()
    own.update(data)
    return own.hexdigest()


def row_keys(table: pa.Table, columns: Sequence[str]) -> pa.StringArray:
    """The row key of every row of `table` over `columns`, in their given order: what `row_key`
    gives of their values, for a whole table at once."""
    if not columns:
        return pa.array([row_key(())] * table.num_rows, pa.string())
    encoded = [_encoded(table.column(name).combine_chunks()) for name in columns]
    joined = encoded[0] if len(encoded) == 1 else _joined(*encoded)
    return pa.array(list(map(_hashed, joined.to_pylist())), pa.string())


def _joined(*parts: Any) -> pa.BinaryArray:
    return pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.binary()))


def _encoded(column: pa.Array) -> pa.BinaryArray:
    """`_encode` of every value of a column."""
    kind, types = column.type, pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        data = column.cast(pa.string()).cast(pa.binary())
        length = pc.binary_length(data).cast(pa.string()).cast(pa.binary())
        encoded = _joined(b"s", length, b":", data)
    elif types.is_boolean(kind):
        encoded = pc.if_else(column, pa.scalar(b"t", pa.binary()), pa.scalar(b"f", pa.binary()))
    elif types.is_integer(kind):
        encoded = _joined(b"i", column.cast(pa.string()).cast(pa.binary()), b";")
    elif types.is_floating(kind):
        raw = pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        data = pa.Array.from_buffers(
            pa.binary(8), len(raw), [None, pa.py_buffer(raw.astype("<f8"))]
        )
        known = pc.is_valid(column)
        encoded = pc.if_else(known, _joined(b"d", data.cast(pa.binary())), None)
    else:
        return pa.array([_encode(value) for value in column.to_pylist()], pa.binary())
    return pc.fill_null(encoded, pa.scalar(b"n", pa.binary()))
