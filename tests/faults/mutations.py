"""Real videos damaged in the ways that files are: bits, ranges, ends, and the boxes of containers.

Everything is drawn from one `random.Random`, so that a seed and a number name a file for ever.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

# Numbers at which sizes, counts and times in headers go wrong.
EDGES = (0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
EBML = b"\x1a\x45\xdf\xa3"
MP4_MASTERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex"}
EBML_MASTERS = {
    *(0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xE0, 0x1C53BB6B, 0xBB, 0xB7),
    *(0x114D9B74, 0x4DBB, 0x1549A966, 0xA0),
}


@dataclass(frozen=True)
class Part:
    """A box of an MP4 file or an element of a Matroska one, its header included."""

    start: int
    end: int
    size_at: int  # where its size is written, in how many bytes
    size_bytes: int
    name: str


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Part]:
    """Boxes (ISO/IEC 14496-12, 4.2), those within others too."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, start)
        if size < 8 or start + size > end:
            return
        yield Part(start, start + size, start, 4, name.decode("latin-1"))
        if name in MP4_MASTERS:
            yield from boxes(data, start + 8, start + size)
        start += size


def elements(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Part]:
    """Elements of EBML (RFC 8794, 4 to 6), those within others too; blocks are not opened."""
    end = len(data) if end is None else end
    while start + 2 <= end:
        wide = 9 - data[start].bit_length()
        at = start + wide
        if wide > 4 or at >= end:
            return
        name = int.from_bytes(data[start:at], "big")
        long = 9 - data[at].bit_length()
        if long > 8 or at + long > end:
            return
        size = int.from_bytes(data[at : at + long], "big") & ((1 << 7 * long) - 1)
        inside = at + long
        stop = end if size == (1 << 7 * long) - 1 else min(end, inside + size)
        yield Part(start, stop, at, long, f"{name:X}")
        if name in EBML_MASTERS:
            yield from elements(data, inside, stop)
        start = stop


def parts(data: bytes) -> list[Part]:
    found = elements(data) if data.startswith(EBML) else boxes(data)
    listed = list(found)
    # Of thousands of blocks a few: what describes the file is what is to be damaged.
    return [p for i, p in enumerate(listed) if i < 200 or i % 50 == 0]


def flip_bits(data: bytearray, rng: Random, other: bytes) -> None:
    near = rng.choice((len(data), len(data), 2000, 200))
    for _ in range(rng.choice((1, 3, 10, 50, 300))):
        data[_at(data, rng, near)] ^= 1 << rng.randrange(8)


def overwrite_run(data: bytearray, rng: Random, other: bytes) -> None:
    at, length = _at(data, rng), rng.choice((1, 4, 64, 1000, 20_000))
    fill = rng.choice((b"\xff" * length, rng.randbytes(length), other[:length]))
    data[at : at + length] = fill[: len(data) - at]


def zero_range(data: bytearray, rng: Random, other: bytes) -> None:
    at, length = _at(data, rng), rng.choice((16, 512, 4096, 100_000))
    data[at : at + length] = bytes(len(data[at : at + length]))


def cut_out(data: bytearray, rng: Random, other: bytes) -> None:
    at = _at(data, rng)
    del data[at : at + rng.choice((1, 188, 4096, 50_000))]


def put_in(data: bytearray, rng: Random, other: bytes) -> None:
    at, begin = _at(data, rng), _at(other, rng)
    data[at:at] = other[begin : begin + rng.choice((1, 188, 4096, 50_000))]


def truncate(data: bytearray, rng: Random, other: bytes) -> None:
    del data[int(len(data) * rng.random()) :]


def join(data: bytearray, rng: Random, other: bytes) -> None:
    data += other


def change_body(data: bytearray, rng: Random, other: bytes) -> None:
    """The head of one file with the body of another."""
    at = int(len(data) * rng.choice((0.01, 0.1, 0.5)))
    data[at:] = other[int(len(other) * rng.choice((0.01, 0.1, 0.5))) :]


def resize_part(data: bytearray, rng: Random, other: bytes) -> None:
    part = _part(data, rng)
    size = rng.choice((*EDGES, part.end - part.start + rng.randrange(-64, 64)))
    n = part.size_bytes
    if data.startswith(EBML):  # as many bytes as before, so that what follows stays where it was
        size = size % (1 << 7 * n) | 1 << 7 * n
    data[part.size_at : part.size_at + n] = (size % (1 << 8 * n)).to_bytes(n, "big")


def swap_sizes(data: bytearray, rng: Random, other: bytes) -> None:
    a, b = _part(data, rng), _part(data, rng)
    if a.size_bytes == b.size_bytes:
        n = a.size_bytes
        one, two = data[a.size_at : a.size_at + n], data[b.size_at : b.size_at + n]
        data[a.size_at : a.size_at + n], data[b.size_at : b.size_at + n] = two, one


def drop_part(data: bytearray, rng: Random, other: bytes) -> None:
    part = _part(data, rng)
    del data[part.start : part.end]


def double_part(data: bytearray, rng: Random, other: bytes) -> None:
    part, place = _part(data, rng), _part(data, rng)
    data[place.start : place.start] = data[part.start : part.end]


def splice_part(data: bytearray, rng: Random, other: bytes) -> None:
    mine, theirs = _part(data, rng), _part(other, rng)
    same = [p for p in parts(other) if p.name == mine.name]
    theirs = rng.choice(same) if same else theirs
    data[mine.start : mine.end] = other[theirs.start : theirs.end]


def edit_fields(data: bytearray, rng: Random, other: bytes) -> None:
    """Numbers within a small part of the header: counts, times, sizes, offsets."""
    small = [p for p in parts(bytes(data)) if 12 <= p.end - p.start <= 4096]
    if not small:
        return flip_bits(data, rng, other)
    part = rng.choice(small)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(part.start + 8, part.end)
        width = rng.choice((1, 2, 4, 8))
        data[at : at + width] = (rng.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "big")
    return None


KINDS: dict[str, Callable[[bytearray, Random, bytes], None]] = {
    f.__name__: f
    for f in (
        *(flip_bits, overwrite_run, zero_range, cut_out, put_in, truncate, join, change_body),
        *(resize_part, swap_sizes, drop_part, double_part, splice_part, edit_fields),
    )
}


def mutated(videos: list[Path], seed: int, number: int) -> tuple[str, bytes]:
    """The `number`th file of a seed: its name, which says what was done, and its bytes."""
    rng = Random(f"{seed}:{number}")
    source, other = rng.choice(videos), rng.choice(videos)
    data, stranger = bytearray(source.read_bytes()), other.read_bytes()
    done = [rng.choice(list(KINDS)) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for kind in done:
        if data and stranger:
            KINDS[kind](data, rng, stranger)
    return f"{number:06d}-{'-'.join(done)}-{source.name}", bytes(data)


def _at(data: bytes | bytearray, rng: Random, near: int = 1 << 62) -> int:
    return rng.randrange(max(1, min(len(data), near)))


def _part(data: bytes | bytearray, rng: Random) -> Part:
    found = parts(bytes(data))
    return rng.choice(found) if found else Part(0, len(data), 0, 4, "all")
