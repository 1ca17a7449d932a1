"""Why a file cannot be written: a full disk, most of all, whoever meets it.

Python tells it by an OSError. torch, safetensors and FSDP's checkpoints have errors of their own.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_TORCH = re.compile("iostream error|inline_container|PytorchStreamWriter")
_PROBE_BYTES = 1 << 20


def faults() -> tuple[type[BaseException], ...]:
    """Among which those of the disk are. Whoever writes FSDP's checkpoints has loaded theirs, which
    takes long."""
    loaded = sys.modules.get("torch.distributed.checkpoint.api")
    more = (loaded.CheckpointException,) if loaded else ()
    return (OSError, RuntimeError, SafetensorError, *more)


def full(error: BaseException | None) -> bool:
    """Whether it says that nothing more can be written."""
    return isinstance(error, OSError) and error.errno in _FULL


def fault(error: BaseException, folder: Path) -> OSError | None:
    """What `error`, met while files were written to `folder`, says of the disk; None: nothing."""
    if of_each := getattr(error, "failures", None):  # FSDP's, of each process that met one
        error = next(iter(of_each.values()))[0]
    if isinstance(error, OSError):
        return error
    if told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, as Rust writes it
        return OSError(int(told[1]), os.strerror(int(told[1])))
    if _TORCH.search(str(error)):  # which does not say why
        return _probed(folder) or OSError(errno.EIO, os.strerror(errno.EIO))
    return None


def newest(folder: Path) -> Path:
    """The file in `folder` that was written last, or the folder where there is none."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=folder)


def taken(folder: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def free(folder: Path) -> int:
    """Bytes."""
    return shutil.disk_usage(folder).free


def _probed(folder: Path) -> OSError | None:
    probe = folder / "probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with suppress(OSError):
            probe.unlink()
    return None
