"""Columns of bytes, read straight from Parquet's pages: against what Arrow reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.pages import AHEAD, PagedFile, _Page, _present, fresh
from manifests.shards import LATENTS, ShardError, read_latents

ROWS = 300
CHECKED = {"write_page_checksum": True, "write_batch_size": 7, "data_page_size": 9000}


def values(longest: int = 5000, missing: float = 0.2) -> list[bytes | None]:
    draw = np.random.default_rng(0)
    gone = draw.random(ROWS) < missing
    return [
        None if gone[row] else draw.bytes(int(draw.integers(0, longest))) for row in range(ROWS)
    ]


def write(file: Path, data: Sequence[bytes | None], null: bool = True, **how: Any) -> None:
    schema = pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("data", pa.binary(), nullable=null),
            pa.field("shape", pa.list_(pa.int32())),
        ]
    )
    columns = [
        [f"row {row}" for row in range(len(data))],
        data,
        [[row] for row in range(len(data))],
    ]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema)], schema=schema)
    settings = {"compression": "none", "use_dictionary": False, "row_group_size": 130, **how}
    pq.write_table(table, file, **settings)


class Reads(io.FileIO):
    """Which bytes are read: where, and how many."""

    def readinto(self, buffer: Any) -> int:
        at = self.tell()
        count = super().readinto(buffer) or 0
        self.reads.append((at, count))
        return count

    def read(self, size: int | None = -1) -> bytes:
        at, data = self.tell(), super().read(-1 if size is None else size) or b""
        self.reads.append((at, len(data)))
        return data

    reads: list[tuple[int, int]]


def opened(file: Path, far: bool) -> tuple[PagedFile, Reads]:
    raw = Reads(file)
    raw.reads = []
    return PagedFile(raw, far), raw


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    ("how", "plain"),
    [
        ({}, True),
        ({"data_page_version": "2.0"}, True),
        ({"write_batch_size": 7, "data_page_size": 9000}, True),  # many pages
        ({"data_page_version": "2.0", "write_batch_size": 7, "data_page_size": 9000}, True),
        ({"null": False}, True),
        ({"write_page_checksum": True, "write_statistics": ["data"]}, True),
        ({**CHECKED, "data_page_version": "2.0"}, True),
        (CHECKED, True),
        ({"compression": "zstd"}, False),
        ({"use_dictionary": ["data"]}, False),
    ],
)
def test_every_layout_gives_what_was_written(
    how: dict[str, Any], plain: bool, far: bool, tmp_path: Path
) -> None:
    data = values(missing=0.2 if how.get("null", True) else 0)
    write(file := tmp_path / "file.parquet", data, **how)
    paged, _ = opened(file, far)
    assert ("data" in paged._plain) == plain  # else by Arrow: right, and slower
    assert paged.starts == [0, 130, 260, 300]
    given: dict[int, int] = {}

    def into(row: int, size: int) -> memoryview:
        given[row] = size
        return fresh(row, size)

    for group, rows in (
        (0, range(130)),
        (1, [130, 131, 140, 199, 259]),
        (2, [299]),
        (1, []),
        (1, [199, 131, 199]),
    ):
        found = list(paged.rows(group, list(rows), ["shape", "id"], ["data"], [into]))
        assert [(shape, name) for shape, name, _ in found] == [([r], f"row {r}") for r in rows]
        assert [None if v is None else bytes(v) for *_, v in found] == [data[r] for r in rows]
    asked = {*range(130), 130, 131, 140, 199, 259, 299}
    assert given == {row: len(known) for row in asked if (known := data[row]) is not None}


def test_large_values_are_read_to_their_places_and_nothing_twice(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    data = [draw.bytes(3 * AHEAD), draw.bytes(100), draw.bytes(2 * AHEAD)]
    write(file := tmp_path / "file.parquet", data)
    paged, raw = opened(file, far=False)
    raw.reads.clear()
    found = list(paged.rows(0, [0, 1, 2], ["id"], ["data"], [fresh]))
    assert [bytes(value) for _, value in found] == data
    chunk = paged.footer.row_group(0).column(1)
    inside = sorted(r for r in raw.reads if r[1] and r[0] >= chunk.data_page_offset)
    ends = [at + count for at, count in inside]
    assert [at for at, _ in inside[1:]] == ends[:-1], "one after the other"
    assert sum(count for _, count in inside) == chunk.total_compressed_size
    assert len(inside) <= 8


def test_a_store_far_away_is_asked_once_for_a_row_group(tmp_path: Path) -> None:
    data = values(missing=0)
    write(file := tmp_path / "file.parquet", data)
    paged, raw = opened(file, far=True)
    raw.reads.clear()
    list(paged.rows(1, range(130, 260), ["id", "shape"], ["data"], [fresh]))
    (read,) = raw.reads
    assert read[1] == paged.footer.row_group(1).total_byte_size


def test_damage_never_gives_anything_but_an_arrow_error(tmp_path: Path) -> None:
    """Bytes changed at random, in the headers above all, and files cut short."""
    data = values(60)
    write(file := tmp_path / "file.parquet", data, write_batch_size=7, data_page_size=300)
    whole, draw = file.read_bytes(), np.random.default_rng(2)
    footer = pq.read_metadata(file)
    chunk = footer.row_group(0).column(1)
    begin, size = chunk.data_page_offset, chunk.total_compressed_size
    told, right = set(), 0
    for trial in range(600):
        broken = bytearray(whole)
        spread = size if trial % 2 else 40  # the first page's header is most likely hit
        for at in draw.integers(0, spread, 1 + trial % 3):
            broken[begin + int(at)] = int(draw.integers(0, 256))
        paged = PagedFile(io.BytesIO(bytes(broken)), far=False)
        biggest = 0

        def into(row: int, size: int) -> memoryview:
            nonlocal biggest
            biggest = max(biggest, size)
            return fresh(row, size)

        try:
            found = list(paged.rows(0, range(130), ["id"], ["data"], [into]))
            right += len(found) == 130
        except pa.ArrowInvalid as error:
            told.add(str(error).split(" of ")[0])
        assert biggest < size
    assert right > 100, "most bytes are of values, which nothing here can know"
    assert len(told) >= 5, told
    paged = PagedFile(io.BytesIO(whole), far=False)
    paged.file = io.BytesIO(whole[: begin + size // 2])
    with pytest.raises(pa.ArrowInvalid, match="ends within a page"):
        paged._values(paged.file, 0, "data", range(130), fresh)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_changed_values_are_told_by_the_checksum_of_their_page(
    version: str, tmp_path: Path
) -> None:
    data = values()
    write(file := tmp_path / "file.parquet", data, data_page_version=version, **CHECKED)
    whole, draw = file.read_bytes(), np.random.default_rng(3)
    chunk = pq.read_metadata(file).row_group(1).column(1)
    for _ in range(100):
        broken = bytearray(whole)
        at = chunk.data_page_offset + int(draw.integers(0, chunk.total_compressed_size))
        broken[at] ^= 1 << int(draw.integers(0, 8))
        paged = PagedFile(io.BytesIO(bytes(broken)), far=False)
        try:
            found = list(paged.rows(1, range(130, 260), ["id"], ["data"], [fresh]))
        except pa.ArrowInvalid:
            continue
        # What else is in a page's header, as its statistics, tells nothing of the values.
        assert [None if v is None else bytes(v) for _, v in found] == data[130:260]
    broken = bytearray(whole)
    broken[whole.index(data[140] or b"") + 3] ^= 1
    paged = PagedFile(io.BytesIO(bytes(broken)), far=False)
    with pytest.raises(pa.ArrowInvalid, match="holds other bytes than its checksum is of"):
        list(paged.rows(1, range(130, 260), ["id"], ["data"], [fresh]))


def test_levels_of_another_encoding_are_refused(tmp_path: Path) -> None:
    """They have no length before them, and would be read as others."""
    write(file := tmp_path / "file.parquet", values())
    whole = bytearray(file.read_bytes())
    begin = pq.read_metadata(file).row_group(0).column(1).data_page_offset
    told = whole.index(b"\x15\x00\x15\x06\x15\x06", begin)  # plain, and levels in RLE
    assert told < begin + 30
    whole[told + 3] = 8  # BIT_PACKED
    paged = PagedFile(io.BytesIO(whole), far=False)
    with pytest.raises(pa.ArrowInvalid, match="not encoded in RLE"):
        list(paged.rows(0, range(130), ["id"], ["data"], [fresh]))


def test_levels_of_an_impossible_length_are_damage() -> None:
    told = b"\xff" * 9 + b"\x7f"  # a run of 2**69 bytes
    with pytest.raises(pa.ArrowInvalid, match="63 bits"):
        page = _Page(10, len(told), len(told), None)
        _present(io.BufferedReader(io.BytesIO(told)), page, True)


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        ({"latents": None}, "no latents"),
        ({"latents_shape": None}, "no latents"),
        ({}, "is damaged"),
    ],
)
def test_a_shard_that_lacks_a_value_or_a_column(
    lacking: dict[str, None], told: str, tmp_path: Path
) -> None:
    row = {"clip_id": "c", "latents": b"1234", "latents_shape": [1, 1, 1, 1], **lacking}
    types = {"clip_id": pa.string(), **{field.name: field.type for field in LATENTS}}
    columns = {name: pa.array([value], types[name]) for name, value in row.items()}
    if lacking:
        columns["latents_dtype"] = pa.array(["float32"])
    pq.write_table(pa.table(columns), tmp_path / "shard.parquet")
    with pytest.raises(ShardError, match=told):
        list(read_latents(str(tmp_path), "shard.parquet", [0]))
