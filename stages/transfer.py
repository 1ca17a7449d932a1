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
import random
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20
LONGEST_WAIT = 120.0  # seconds between two tries, whatever a server asks for

_SENSITIVE = r"[\w.-]*(?:sig|signature|token|key|credential|secret|passw|auth|policy)[\w.-]*"
_QUERY = re.compile(rf"([?&;]{_SENSITIVE}=)[^&;#\s'\"]*", re.IGNORECASE)
_USERINFO = re.compile(r"(\w://)[^/\s@'\"]+@")


def redact(text: str) -> str:
    """`text` with the passwords, tokens and signatures of the URLs in it masked."""
    return _QUERY.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


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
        stored = Stored(f"media/{content[:2]}/{place.name}", content, size)
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
        if (media.parent / stored.path).stat().st_size == stored.bytes:
            return stored
    return None


def _with_retries(receive: Callable[[], tuple[str, int]], limits: Limits) -> tuple[str, int]:
    for attempt in range(limits.retries + 1):
        try:
            return receive()
        except TransferError as error:
            if not error.retry or attempt == limits.retries:
                raise
            wait = limits.backoff * 2**attempt * random.uniform(0.5, 1.5)
            time.sleep(min(LONGEST_WAIT, max(wait, error.wait or 0.0)))
    raise AssertionError("the last try returns or raises")


def _receive(part: Path, open_at: Open, limits: Limits) -> tuple[str, int]:
    """One try: what is missing of `part` is appended. Returns the sha256 and size of the whole."""
    tag_file = part.with_suffix(".tag")
    tag = tag_file.read_text() if tag_file.exists() and part.exists() else ""
    with ExitStack() as stack:
        stream = stack.enter_context(open_at(part.stat().st_size if tag else 0))
        if stream.start and stream.tag != tag:
            # The file has changed since: what has come of the old one is worth nothing.
            stack.close()
            stream = stack.enter_context(open_at(0))
        if stream.size is not None and stream.size > limits.max_bytes:
            raise _too_large(part, limits)
        tag_file.write_text(stream.tag)
        digest = hashlib.sha256()
        file = stack.enter_context(part.open("r+b" if stream.start else "wb"))
        total = stream.start
        for left in range(stream.start, 0, -CHUNK):
            digest.update(file.read(min(CHUNK, left)))
        for chunk in stream.chunks:
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


def _too_large(part: Path, limits: Limits) -> TransferError:
    part.unlink(missing_ok=True)
    return TransferError("too_large", f"more than max_bytes = {limits.max_bytes}")


def from_http(fs: Any, url: str, timeout: float) -> Open:
    """Opens `url` through fsspec's HTTP filesystem `fs`, with a range where part of it is here."""
    import aiohttp
    from fsspec.asyn import sync

    patience = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)

    async def get(start: int) -> tuple[Any, bytes]:
        session = await fs.set_session()
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        response = await session.get(fs.encode_url(url), headers=headers, timeout=patience)
        first = b""
        with suppress(aiohttp.ClientError, OSError):  # the next read raises it again
            first = await read(response)
        return response, first

    async def read(response: Any) -> bytes:
        """About a CHUNK. aiohttp drops what it holds once the connection breaks, so it is taken
        as it comes, and given before the fault is raised."""
        parts: list[bytes] = []
        size = 0
        try:
            while size < CHUNK and (part := await response.content.readany()):
                parts.append(part)
                size += len(part)
        except (aiohttp.ClientError, OSError):
            if not parts:
                raise
        return b"".join(parts)

    async def close(response: Any) -> None:
        response.close()

    def chunks(response: Any, first: bytes) -> Iterator[bytes]:
        with _http_faults():
            if first:
                yield first
            while chunk := sync(fs.loop, read, response):
                yield chunk

    @contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        with _http_faults():
            response, first = sync(fs.loop, get, start)
            if start and response.status == 416:
                # We have more than there is: begin again.
                sync(fs.loop, close, response)
                start = 0
                response, first = sync(fs.loop, get, 0)
        try:
            yield _http_stream(response, start, chunks(response, first))
        finally:
            sync(fs.loop, close, response)

    return open_at


def _http_stream(response: Any, asked: int, chunks: Iterator[bytes]) -> Stream:
    if response.status not in (200, 206):
        raise TransferError(
            f"http_{response.status}",
            f"the server says {response.status} {response.reason or ''}".rstrip(),
            retry=response.status in (408, 425, 429) or response.status >= 500,
            wait=retry_after(response.headers.get("Retry-After")),
        )
    headers = response.headers
    start, length = 0, headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else None
    if headers.get("Content-Encoding", "identity") != "identity":
        size = None  # the length is of the packed bytes; aiohttp unpacks
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if found is None or int(found[1]) != asked:
            raise TransferError("http_error", "the server sent another range than asked for")
        start, size = asked, int(found[2]) if found[2] != "*" else None
    mark = headers.get("ETag") or headers.get("Last-Modified")
    return Stream(start, size, f"{mark}|{size}" if mark else "", chunks)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3: seconds or a date); None: not given."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())


@contextmanager
def _http_faults() -> Iterator[None]:
    import aiohttp

    try:
        yield
    except TransferError:
        raise
    except TimeoutError as error:
        raise TransferError("timeout", "no byte came for too long", retry=True) from error
    except ValueError as error:
        raise TransferError("bad_url", f"no URL that can be asked for: {error}") from error
    except aiohttp.TooManyRedirects as error:
        raise TransferError("http_error", "too many redirects") from error
    except (aiohttp.ClientError, ConnectionError) as error:
        message = f"{type(error).__name__}: {error}"
        raise TransferError("network", message, retry=True) from error


def from_fs(fs: Any, path: str) -> Open:
    """Opens `path` on any fsspec filesystem that can seek."""

    @contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        with ExitStack() as stack:
            with driver_faults():
                info = fs.info(path)
                if info["type"] == "directory":
                    raise TransferError("not_a_file", f"{path} is a folder")
                file = stack.enter_context(fs.open(path, "rb"))
                start = min(start, info["size"] or 0)
                file.seek(start)
                tag = str(fs.ukey(path))
            yield Stream(start, info["size"], tag, _chunks(file))

    return open_at


def from_zip(archive: zipfile.ZipFile, member: str) -> Open:
    """Opens a member of an open zip file. Its name is only looked up, never used as a path."""

    @contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        with ExitStack() as stack:
            with driver_faults():
                try:
                    info = archive.getinfo(member)
                except KeyError as error:
                    raise TransferError("missing_file", f"the archive has no {member!r}") from error
                if info.is_dir():
                    raise TransferError("not_a_file", f"{member!r} is a folder of the archive")
                if info.flag_bits & 1:
                    raise TransferError("encrypted", f"{member!r} needs a password")
                file = stack.enter_context(archive.open(info))
            yield Stream(0, info.file_size, "", _chunks(file))

    return open_at


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    # Only reading is guarded: a full disk on our side is no fault of the file's.
    with driver_faults():
        while chunk := file.read(CHUNK):
            yield chunk


@contextmanager
def driver_faults() -> Iterator[None]:
    """Faults of filesystems and archives as TransferError."""
    try:
        yield
    except TransferError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise TransferError("bad_archive", f"the zip file is damaged: {error}") from error
    except FileNotFoundError as error:
        raise TransferError("missing_file", f"there is no such file: {error}") from error
    except IsADirectoryError as error:
        raise TransferError("not_a_file", f"it is a folder: {error}") from error
    except PermissionError as error:
        raise TransferError("permission", f"it may not be read: {error}") from error
    except TimeoutError as error:
        raise TransferError("timeout", "no byte came for too long", retry=True) from error
    except OSError as error:
        raise TransferError("network", f"{type(error).__name__}: {error}", retry=True) from error
    except Exception as error:  # drivers of object stores raise classes of their own
        raise TransferError("remote_error", f"{type(error).__name__}: {error}") from error
