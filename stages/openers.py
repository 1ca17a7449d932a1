"""Files opened at a byte: over HTTP, on any fsspec filesystem, inside a zip file.

Each gives an `Open` for `stages.transfer.store` and turns the faults of its library into
TransferError. Our own disk's faults pass through: they are no fault of the file's.
"""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from stages.backoff import retry_after
from stages.transfer import CHUNK, Open, Stream, TransferError

_URL = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")


def from_http(fs: Any, url: str, timeout: float, redirects: int) -> Open:
    """Opens `url` through fsspec's HTTP filesystem `fs`, with a range where part of it is here."""
    import aiohttp
    import yarl
    from fsspec.asyn import sync

    patience = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)

    async def get(start: int) -> tuple[Any, bytes]:
        session = await fs.set_session()
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # A URL that is one is asked for as it stands: escaped anew, its signature may not hold.
        address = yarl.URL(url, encoded=_URL.fullmatch(url) is not None)
        response = await session.get(
            address, headers=headers, timeout=patience, max_redirects=redirects + 1
        )
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


@contextmanager
def _http_faults() -> Iterator[None]:
    import aiohttp

    try:
        yield
    except TransferError:
        raise
    except TimeoutError as error:
        raise TransferError("timeout", "no byte came for too long", retry=True) from error
    except (ValueError, aiohttp.InvalidURL) as error:
        raise TransferError("bad_url", f"no URL that can be asked for: {error}") from error
    except aiohttp.TooManyRedirects as error:
        raise TransferError("bad_redirect", "too many redirects") from error
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
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise TransferError("not_a_file", f"{member!r} is a link, not a file")
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
        if isinstance(error.__cause__, TransferError):  # fsspec's word for any fault of a server
            raise error.__cause__ from error
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
