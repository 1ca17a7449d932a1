"""Bytes from anywhere into the media folder: resumed, bounded, checked, stored by content.

`<workdir>/media/ab/abcd….mp4` is a file by the sha256 of its bytes. Beside them lie `.part/`, what
has come of files so far, and `.uri/`, which content each address gave, so that a clip of a video
that is already here, or a unit that is run again after a crash, downloads nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from manifests.redact import redact
from stages.backoff import pause
from stages.base import alive

CHUNK = 1 << 20


class TransferError(Exception):
    """A file can't be had. `error` is its class, `retry` whether trying again may help, `wait`
    the seconds that the server asked for. The message is free of secrets."""

    def __init__(
        self, error: str, message: str, retry: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(redact(message))
        self.error, self.retry, self.wait = error, retry, wait


@dataclass(frozen=True)
class Limits:
    max_bytes: int
    timeout: float  # seconds without a byte
    retries: int
    backoff: float  # seconds before the second try; doubles


@dataclass(frozen=True)
class Stored:
    path: str  # relative to the workdir
    content: str  # sha256
    bytes: int
    tag: str = ""  # a hash of what its server says tells it from a later version; empty: unknown


@dataclass(frozen=True)
class Stream:
    """The bytes of a file from `start` on. `tag` changes when the file does; empty: unknown."""

    start: int
    size: int | None  # of the whole file, where known
    tag: str
    chunks: Iterator[bytes]


# Opens a file at a byte; it may answer from the beginning instead.
Open = Callable[[int], AbstractContextManager[Stream]]


def store(media: Path, address: str, suffix: str, open_at: Open, limits: Limits) -> Stored:
    """Brings the file at `address` into `media`, unless it is there. Raises TransferError."""
    name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
    record = media / ".uri" / name[:2] / f"{name}.json"
    part = media / ".part" / name
    with _alone(part):
        known = _recorded(record, media)
        if known is not None:
            return known
        content, size = _with_retries(lambda: _receive(part, open_at, limits), limits)
        place = media / content[:2] / (content + suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)
        tag = part.with_suffix(".tag").read_text()
        stored = Stored(f"media/{content[:2]}/{place.name}", content, size, tag)
        # The record comes last: where it is, the file is whole.
        record.parent.mkdir(parents=True, exist_ok=True)
        draft = part.with_suffix(".record")
        draft.write_text(json.dumps(asdict(stored)))
        draft.replace(record)
        for leftover in (".tag", ".lock"):
            part.with_suffix(leftover).unlink(missing_ok=True)
    return stored


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """One download of an address at a time, over all processes of the machine."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recorded(record: Path, media: Path) -> Stored | None:
    # A record cut off by a power failure is as good as none.
    with suppress(FileNotFoundError, ValueError, TypeError):
        stored = Stored(**json.loads(record.read_text()))
        place = media.parent / stored.path
        if place.stat().st_size == stored.bytes:
            os.utime(place)  # young again: `vidpipe gc` leaves it to the row that will name it
            return stored
    return None


def _with_retries(receive: Callable[[], tuple[str, int]], limits: Limits) -> tuple[str, int]:
    for attempt in range(limits.retries + 1):
        try:
            return receive()
        except TransferError as error:
            if not error.retry or attempt == limits.retries:
                raise
            time.sleep(pause(limits.backoff, attempt + 1, error.wait))
    raise AssertionError("the last try returns or raises")


def _receive(part: Path, open_at: Open, limits: Limits) -> tuple[str, int]:
    """One try: what is missing of `part` is appended. Returns the sha256 and size of the whole."""
    tag_file = part.with_suffix(".tag")
    tag = tag_file.read_text() if tag_file.exists() and part.exists() else ""
    with ExitStack() as stack:
        stream = stack.enter_context(open_at(part.stat().st_size if tag else 0))
        if stream.start and tag_of(stream) != tag:
            # The file has changed since: what has come of the old one is worth nothing.
            stack.close()
            stream = stack.enter_context(open_at(0))
        if stream.size is not None and stream.size > limits.max_bytes:
            raise _too_large(part, limits)
        tag_file.write_text(tag_of(stream))
        digest = hashlib.sha256()
        file = stack.enter_context(part.open("r+b" if stream.start else "wb"))
        total = stream.start
        for left in range(stream.start, 0, -CHUNK):
            digest.update(file.read(min(CHUNK, left)))
        for chunk in stream.chunks:
            alive()
            total += len(chunk)
            if total > limits.max_bytes:
                raise _too_large(part, limits)
            digest.update(chunk)
            file.write(chunk)
        file.truncate()
        if stream.size is not None and total != stream.size:
            raise TransferError(
                "network", f"{total} of {stream.size} bytes came", retry=total < stream.size
            )
        if total == 0:
            raise TransferError("empty_file", "the file has 0 bytes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), total


def tag_of(stream: Stream) -> str:
    """The stream's tag as it may lie on the disk: a server can put anything into it."""
    return hashlib.sha256(stream.tag.encode()).hexdigest()[:32] if stream.tag else ""


def _too_large(part: Path, limits: Limits) -> TransferError:
    part.unlink(missing_ok=True)
    return TransferError("too_large", f"more than max_bytes = {limits.max_bytes}")
