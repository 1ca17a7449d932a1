"""Files that are there whole, or not at all: temporary names, fsync, links that must be new."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from manifests.faults import StoreError


@contextlib.contextmanager
def part_of(path: Path, data: bytes) -> Iterator[Path]:
    """`data`, durable, under a name beside `path` that is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            sync(file)
        yield part
    finally:
        part.unlink(missing_ok=True)


def link(part: Path, path: Path) -> None:
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
    names = os.fsencode(part), os.fsencode(path)
    if rename is not None and not rename(here, names[0], here, names[1], no_replace):
        return
    number = errno.ENOSYS if rename is None else ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        raise StoreError(
            f"{path.parent} lies on a file system without hard links or an exclusive rename, so "
            "two drivers could overwrite each other's commits: name a workdir on another one "
            "(ext4, xfs, NFS) or on S3"
        )
    raise OSError(number, os.strerror(number), str(path))


class HashingFile:
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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[HashingFile]:
    """A new local file, whole and durable afterwards, or gone where anything went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            yield HashingFile(file)
            sync(file)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def uploading(fs: Any, path: str) -> Iterator[HashingFile]:
    """A new object of any fsspec store that nobody else writes, whole afterwards; where anything
    went wrong, nothing is uploaded that looks whole."""
    file = fs.open(path, "wb")
    hashed = HashingFile(file)
    written = False
    try:
        yield hashed
        written = True
        file.close()
    except BaseException:
        if written and _is_whole(fs, path, hashed.length):
            return  # only the answer was lost
        with contextlib.suppress(Exception):
            # To close it would complete the upload of a part.
            file.discard()
            file.closed = True
        raise


def _is_whole(fs: Any, path: str, length: int) -> bool:
    with contextlib.suppress(Exception):
        return bool(fs.info(path)["size"] == length)
    return False


def sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
