"""Values of a Parquet file's column of bytes, read straight to where they are wanted.

Arrow reads a column chunk into memory of its own, copies each value from there, and its user
copies the values once more; with latents, of which a training reads a gigabyte every second,
that is most of the work. Values that are stored as they are (not compressed, not in a dictionary)
can be read from the file to their places at once.

After https://parquet.apache.org/docs/file-format (pages, PLAIN and RLE encodings) and Thrift's
compact protocol.
"""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Into = Callable[[int, int], memoryview]
"""Memory for the value of a row, of so many bytes."""

AHEAD = 1 << 20  # bytes: shorter values are read together
_HOLE = 8 << 10  # bytes between two columns that are not worth a request
_PLAIN, _RLE, _PAGE, _PAGE_V2 = 0, 3, 0, 3  # of Thrift's enumerations
_CUT = "a column chunk ends within a page"
_HEADER = 1 << 20  # bytes of a text in a page's header, at most


def fresh(row: int, size: int) -> memoryview:
    """Memory of a row's own."""
    return np.empty(size, np.uint8).data  # which asks for huge pages


class PagedFile:
    """A Parquet file, read a row group at a time, by one thread at a time. `far`: what is wanted
    of a row group is asked for in one piece, as of a store that takes its time to answer.
    `proved`: what is read is held against the checksums of its pages, which Arrow does."""

    def __init__(self, file: Any, far: bool, proved: bool = False) -> None:
        self.file, self._far, self._proved = file, far, proved
        self.footer = pq.read_metadata(file)
        groups = range(self.footer.num_row_groups)
        sizes = [self.footer.row_group(group).num_rows for group in groups]
        self.starts = [0, *itertools.accumulate(sizes)]  # the row that each group begins with
        leaves = [self.footer.schema.column(n).path for n in range(self.footer.num_columns)]
        self._leaves = [path.split(".")[0] for path in leaves]
        plain = {name for n, name in enumerate(self._leaves) if _readable(self.footer, n)}
        self._plain = set() if proved else plain

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        return self._read(self.file, group, columns)

    def rows(
        self,
        group: int,
        rows: Sequence[int],
        columns: Sequence[str],
        payload: Sequence[str],
        into: Sequence[Into],
    ) -> Iterator[tuple[Any, ...]]:
        """Of `rows` (in any order, all in the row group) the values of `columns`, then those of
        `payload`, columns of bytes, each in the memory that its own of `into` gives for the row."""
        first = self.starts[group]
        file = self._fetched(group, {*columns, *payload}) if self._far else self.file
        facts = [column.to_pylist() for column in self._read(file, group, columns).columns]
        once = sorted(set(rows))
        data = [
            dict(zip(once, self._values(file, group, name, once, of)))
            for name, of in zip(payload, into)
        ]
        return zip(
            *([column[row - first] for row in rows] for column in facts),
            *([found[row] for row in rows] for found in data),
        )

    def _read(self, file: Any, group: int, columns: Sequence[str]) -> pa.Table:
        # A reader may keep what it has read of the last group as long as it is there.
        parquet = pq.ParquetFile(
            file, metadata=self.footer, page_checksum_verification=self._proved
        )
        table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
        return table.select(list(columns))  # in this order, not the file's

    def _values(
        self, file: Any, group: int, column: str, rows: Sequence[int], into: Into
    ) -> list[memoryview | None]:
        first = self.starts[group]
        if column not in self._plain:
            found = self._read(file, group, [column]).column(0)
            return [_copied(found[row - first], row, into) for row in rows]
        number = self._leaves.index(column)
        chunk = self.footer.row_group(group).column(number)
        size = chunk.total_compressed_size
        part = _Part(file, chunk.data_page_offset, size)
        source = io.BufferedReader(part, max(1, min(size, AHEAD)))
        optional = self.footer.schema.column(number).max_definition_level > 0
        all_rows = range(first, first + chunk.num_values)
        return list(_values(source, size, all_rows, optional, rows, into))

    def _fetched(self, group: int, columns: Set[str]) -> _Fetched:
        """The row group's `columns`, and what is between them, where that is little."""
        pieces: list[tuple[int, int]] = []
        for number, name in enumerate(self._leaves):
            if name not in columns:
                continue
            chunk = self.footer.row_group(group).column(number)
            begin = chunk.dictionary_page_offset or chunk.data_page_offset
            end = begin + chunk.total_compressed_size
            if pieces and 0 <= begin - pieces[-1][1] <= _HOLE:
                begin = pieces.pop()[0]
            pieces.append((begin, end))
        return _Fetched(self.file, pieces)


class _Placed(io.RawIOBase):
    """Bytes at their places, 0 to `end`. How they are read is the subclass' own."""

    def __init__(self, end: int) -> None:
        self._at, self._end = 0, end

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at


class _Part(_Placed):
    """The bytes of `file` from `begin` on, `size` of them."""

    def __init__(self, file: Any, begin: int, size: int) -> None:
        super().__init__(size)
        self._file, self._begin = file, begin

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._end - self._at)]
        self._file.seek(self._begin + self._at)
        count: int = self._file.readinto(wanted)
        self._at += count
        return count


class _Fetched(_Placed):
    """Pieces of `file`, from one byte to another, in memory and in their places."""

    def __init__(self, file: Any, pieces: Sequence[tuple[int, int]]) -> None:
        super().__init__(max(end for _, end in pieces))
        self._pieces = []
        for begin, end in pieces:
            file.seek(begin)
            self._pieces.append((begin, memoryview(file.read(end - begin))))

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        for begin, data in self._pieces:
            if begin <= self._at < begin + len(data):
                found = data[self._at - begin :][: len(target)]
                target[: len(found)] = found
                self._at += len(found)
                return len(found)
        return 0


def _readable(footer: pq.FileMetaData, number: int) -> bool:
    """Whether a column is, in all row groups, of flat bytes that are stored as they are."""
    column = footer.schema.column(number)
    chunks = [footer.row_group(n).column(number) for n in range(footer.num_row_groups)]
    return (
        column.physical_type == "BYTE_ARRAY"
        and column.max_repetition_level == 0
        and column.max_definition_level <= 1
        and all(chunk.compression == "UNCOMPRESSED" for chunk in chunks)
        and all(set(chunk.encodings) <= {"PLAIN", "RLE", "BIT_PACKED"} for chunk in chunks)
    )


def _copied(value: pa.Scalar, row: int, into: Into) -> memoryview | None:
    if not value.is_valid:
        return None
    data = value.as_buffer()
    memory = into(row, data.size)
    memory[:] = memoryview(data).cast("B")
    return memory


def _values(
    source: io.BufferedIOBase,
    size: int,
    all_rows: range,
    optional: bool,
    rows: Sequence[int],
    into: Into,
) -> Iterator[memoryview | None]:
    """The values of `rows`. `source` begins with the column chunk of `size` bytes.

    Raises pa.ArrowInvalid where it is damaged; of bytes that are others than they were, that is
    seen in pages all of whose values are wanted.
    """
    wanted, first = iter(rows), all_rows.start  # of the page
    row = next(wanted, None)
    while row is not None:
        page = _page(source, size, all_rows.stop - first, optional)
        if row < first + page.rows:
            there, total = _present(source, page, optional)
            at, place, whole = first, source.tell(), True
            while row is not None and row < first + page.rows:
                skipped = int(np.count_nonzero(there[at - first : row - first])) if row > at else 0
                for _ in range(skipped):
                    place = source.seek(place + 4 + _length(source, page.end - place))
                whole = whole and not skipped
                if there[row - first]:
                    length = _length(source, page.end - place)
                    place += 4 + length
                    if source.readinto(memory := into(row, length)) != length:
                        raise pa.ArrowInvalid(_CUT)
                    total = zlib.crc32(memory, zlib.crc32(length.to_bytes(4, "little"), total))
                    yield memory
                else:
                    yield None
                at, row = row + 1, next(wanted, None)
            if whole and place == page.end and page.checksum not in (None, total):
                raise pa.ArrowInvalid("a page holds other bytes than its checksum is of")
        source.seek(page.end)
        first += page.rows


class _Page(NamedTuple):
    rows: int  # values, with those that are missing
    end: int  # in the source
    levels: int | None  # bytes of definition levels; None: they tell themselves
    checksum: int | None  # CRC-32 of what follows the header


def _page(source: io.BufferedIOBase, size: int, most: int, optional: bool) -> _Page:
    """The header of the next page, which has at most `most` values."""
    fields = _struct(source)
    kind, end = _int(fields, 1), source.tell() + _int(fields, 3)
    if kind not in (_PAGE, _PAGE_V2) or end > size:
        raise pa.ArrowInvalid(_CUT if end > size else f"a page of kind {kind} is none of values")
    header = fields.get(5 if kind == _PAGE else 8)
    if not isinstance(header, dict):
        raise pa.ArrowInvalid("a page's header lacks what belongs to its kind")
    count = _int(header, 1)
    if not 0 < count <= most:
        raise pa.ArrowInvalid(f"a page has {count} values where {most} are left")
    if _int(header, 2 if kind == _PAGE else 4) != _PLAIN:
        raise pa.ArrowInvalid("a page is not encoded as its column chunk says")
    if optional and kind == _PAGE and _int(header, 3) != _RLE:
        raise pa.ArrowInvalid("a page's levels are not encoded in RLE")
    signed = fields.get(4)
    checksum = signed & 0xFFFFFFFF if isinstance(signed, int) else None
    return _Page(count, end, None if kind == _PAGE else _int(header, 5), checksum)


def _length(source: io.BufferedIOBase, left: int) -> int:
    """Of the value that follows, of which and all others in the page `left` bytes are left."""
    length = int.from_bytes(_exactly(source, 4), "little")
    if 4 + length > left:
        raise pa.ArrowInvalid("a value is longer than its page")
    return length


def _present(
    source: io.BufferedIOBase, page: _Page, optional: bool
) -> tuple[NDArray[np.bool_], int]:
    """Which of a page's values there are, by their definition levels of one bit in RLE; and the
    CRC-32 of what tells it."""
    size, told = page.levels, b""
    if size is None:
        told = _exactly(source, 4) if optional else b""
        size = int.from_bytes(told, "little")
    if source.tell() + size > page.end:
        raise pa.ArrowInvalid("a page's levels are longer than the page")
    told += _exactly(source, size)
    levels, left = io.BytesIO(told[len(told) - size :]), page.rows * optional
    found = [np.ones(page.rows - left, bool)]
    while left:
        head = _varint(levels)
        if head & 1:
            packed = np.frombuffer(_exactly(levels, head >> 1), np.uint8)
            run = np.unpackbits(packed, bitorder="little")[:left].astype(bool)
        else:
            run = np.full(min(head >> 1, left), _exactly(levels, 1) != b"\0")
        if not len(run):
            raise pa.ArrowInvalid("a page has levels of no value")
        found.append(run)
        left -= len(run)
    return np.concatenate(found), zlib.crc32(told)


# ------------------------------------------------------------------- Thrift's compact protocol


def _struct(source: io.BufferedIOBase, depth: int = 0) -> dict[int, Any]:
    """The fields by their numbers: whole numbers and structs; others are None."""
    if depth > 8:
        raise pa.ArrowInvalid("a page's header is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while head := _exactly(source, 1)[0]:
        number = number + (head >> 4) if head >> 4 else _zigzag(source)
        fields[number] = _field(source, head & 15, depth)
    return fields


def _field(source: io.BufferedIOBase, kind: int, depth: int) -> Any:
    if kind in (1, 2):  # true and false, in the kind itself
        return None
    if kind in (4, 5, 6):
        return _zigzag(source)
    if kind == 12:
        return _struct(source, depth + 1)
    if kind in (3, 7):  # a byte, a double
        _exactly(source, 1 if kind == 3 else 8)
    elif kind == 8 and (size := _varint(source)) <= _HEADER:
        _exactly(source, size)
    else:  # a page's header has no lists or maps
        raise pa.ArrowInvalid(f"a page's header has a field of Thrift's type {kind}")
    return None


def _int(fields: dict[int, Any], number: int) -> int:
    value = fields.get(number)
    if not isinstance(value, int) or value < 0:
        raise pa.ArrowInvalid(f"a page's header lacks field {number}")
    return value


def _zigzag(source: io.BufferedIOBase) -> int:
    value = _varint(source)
    return (value >> 1) ^ -(value & 1)


def _varint(source: io.BufferedIOBase) -> int:
    value = shift = 0
    while True:
        byte = _exactly(source, 1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
        if shift >= 63:  # what is longer is no length either
            raise pa.ArrowInvalid("a page has a number of more than 63 bits")


def _exactly(source: io.BufferedIOBase, size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise pa.ArrowInvalid(_CUT)
    return data
