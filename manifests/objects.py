"""Objects of a workdir: created once, written whole, read back, on a disk or on any fsspec store.

Local paths and NFS use a temporary file, fsync and `os.link`; any other fsspec store must have a
conditional put (`mode="create"`: If-None-Match on S3 and GCS). Listings are never cached: what
another process has committed must be seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.faults import StoreError, bare, unusable

# A loader reads whole row groups: large enough for sequential reads, small enough for a few in RAM.
ROW_GROUP_BYTES = 16 << 20


class Store:
    """A workdir: a folder, or a prefix of any fsspec store. Paths are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StoreError(f"workdir {bare(url)} can't be used: {error}") from error
        self.local = "file" in _protocols(self.fs)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def create(self, name: str, data: bytes) -> bool:
        """Creates the object whole and durable; False if another one of that name is there."""
        if not self.local:
            return self._create_remote(name, data)
        path = Path(self.path(name))
        with self._told("write", name), self._part(path, data) as part:
            try:
                _link(part, path)
            except FileExistsError:
                return self._is_ours(name, data)
            _sync_folder(path.parent)
        return True

    def _create_remote(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except (TypeError, NotImplementedError, ValueError) as error:
            raise StoreError(self._no_conditional_put()) from error
        except Exception as error:  # noqa: BLE001  each driver has its own
            # Refused, or the answer was lost, and not every server says which: what stands there
            # now tells. If nothing does, the object may yet appear, and its data must stay.
            try:
                return self._is_ours(name, data)
            except FileNotFoundError:
                raise unusable(error, "write", self._place(name)) from error
        return True

    def _is_ours(self, name: str, data: bytes) -> bool:
        """Whether what stands there is what was just put: a retry after a lost reply meets its own
        object. Commits bear an attempt's id, so equal bytes are the same attempt."""
        return self.read(name) == data

    def prove(self) -> None:
        """Raises StoreError where objects can't be created, or not exclusively: some stores that
        speak S3 ignore the condition of a put, and then two drivers lose each other's work."""
        name = f".probe/{uuid.uuid4().hex}"
        try:
            if not self.create(name, b"first") or self.create(name, b"second"):
                raise StoreError(self._no_conditional_put())
        finally:
            self.delete(name)

    def _no_conditional_put(self) -> str:
        return (
            f"{bare(self.url)} has no conditional put, so commits there could overwrite each "
            "other: use a local or NFS folder, S3, GCS or another store that has one"
        )

    def put(self, name: str, data: bytes) -> None:
        """Writes the object whole, over what was there."""
        with self._told("write", name):
            if not self.local:
                self.fs.pipe_file(self.path(name), data)
                return
            path = Path(self.path(name))
            with self._part(path, data) as part:
                part.replace(path)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._told("read", name, missing=True):
            return cast(bytes, self.fs.cat_file(self.path(name)))

    def find(self, prefix: str) -> list[str]:
        """The names of all objects under `prefix`, sorted; empty where there are none."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        """The length in bytes of every object under `prefix`, by name: one listing."""
        return {name: int(info["size"]) for name, info in self.listing(prefix).items()}

    def listing(self, prefix: str) -> dict[str, dict[str, Any]]:
        """What the driver tells of every object under `prefix`, by name."""
        with self._told("list", prefix):
            try:
                found = self.fs.find(self.path(prefix), detail=True)
            except FileNotFoundError:
                return {}
        cut = len(self.root) + 1
        return {path[cut:]: info for path, info in found.items()}

    def delete(self, name: str) -> None:
        with self._told("delete", name), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    @contextlib.contextmanager
    def _told(self, what: str, name: str, missing: bool = False) -> Iterator[None]:
        """Turns a driver's exceptions into StoreUnusable; with `missing`, not that an object is
        not there."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            # Drivers raise what their libraries do: OSError, botocore's own, aiohttp's own.
            if missing and isinstance(error, FileNotFoundError):
                raise
            raise unusable(error, what, self._place(name)) from error

    def _place(self, name: str) -> str:
        return self.path(name) if self.local else f"{self.url.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _part(self, path: Path, data: bytes) -> Iterator[Path]:
        """`data`, durable, under a name beside `path` that is gone afterwards."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                _sync(file)
            yield part
        finally:
            part.unlink(missing_ok=True)

    def write_parquet(self, name: str, table: pa.Table) -> tuple[str, int]:
        """Writes the rows durably; returns the file's sha256 (hex) and its length in bytes.

        Payload (binary columns) is neither compressed nor dictionary-encoded: latents are noise.
        """
        payload = {f.name for f in table.schema if pa.types.is_binary(f.type)}
        rest = [n for n in table.column_names if n not in payload]
        row_bytes = table.nbytes / max(1, table.num_rows)
        with self._told("write", name), self._writing(name) as hashed:
            pq.write_table(
                table,
                hashed,
                compression={n: "none" if n in payload else "zstd" for n in table.column_names},
                use_dictionary=rest,
                write_statistics=rest,
                row_group_size=max(1, int(ROW_GROUP_BYTES // max(1.0, row_bytes))),
            )
        return hashed.sha256.hexdigest(), hashed.length

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[_HashingFile]:
        """A new object, whole and durable afterwards, or gone where anything went wrong."""
        path = self.path(name)
        if self.local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = self.fs.open(path, "wb")
        hashed = _HashingFile(file)
        written = False
        try:
            yield hashed
            written = True
            if self.local:
                _sync(file)
            file.close()
        except BaseException:
            if written and not self.local and self._is_whole(name, hashed.length):
                return  # only the answer was lost
            with contextlib.suppress(Exception):
                _discard(file, path)
            raise

    def _is_whole(self, name: str, length: int) -> bool:
        """Whether an object that only this attempt writes has come to its full length."""
        with contextlib.suppress(Exception):
            return bool(self.fs.info(self.path(name))["size"] == length)
        return False

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Raises StoreError, naming the file, where it is missing or damaged."""
        try:
            with self._told("read", name, missing=True), self.fs.open(self.path(name)) as file:
                return pq.ParquetFile(file).read(columns=columns)
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise StoreError(
                f"{self._place(name)}, which a commit names, can't be read: {error}. "
                "`vidpipe verify --repair` has what is damaged made again."
            ) from error


class _HashingFile:
    """Passes writes on and hashes them: no second read of what may be gigabytes."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.length = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.sha256.update(view)
        self.length += view.nbytes
        self._file.write(view)
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The owner of the wrapped file closes it."""

    def tell(self) -> int:
        return self.length

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _link(part: Path, path: Path) -> None:
    """Gives `part` a second name. Raises FileExistsError where that is taken, StoreError where the
    file system has no way to say so."""
    try:
        os.link(part, path)
    except OSError as error:
        # FAT, exFAT and some FUSE mounts have no hard links.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _rename_new(part, path)


def _rename_new(part: Path, path: Path) -> None:
    """Linux' renameat2 with RENAME_NOREPLACE, which Python has no name for."""
    here, no_replace = -100, 1  # AT_FDCWD and the flag, of <fcntl.h> and <linux/fs.h>
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and not rename(
        here, os.fsencode(part), here, os.fsencode(path), no_replace
    ):
        return
    number = ctypes.get_errno() if rename is not None else errno.ENOSYS
    if number in (errno.EINVAL, errno.ENOSYS):
        raise StoreError(
            f"{path.parent} lies on a file system without hard links or an exclusive rename, so "
            "two drivers could overwrite each other's commits: name a workdir on another one "
            "(ext4, xfs, NFS) or on S3"
        )
    raise OSError(number, os.strerror(number), str(path))


def _discard(file: Any, path: str) -> None:
    """Drops a file that was not written to its end: closing it would make it look whole."""
    if "file" in _protocols(file.fs):
        Path(path).unlink(missing_ok=True)
        file.close()
    elif not file.closed or hasattr(file, "discard"):
        file.discard()
        file.closed = True


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
