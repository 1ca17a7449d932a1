"""What can be wrong with a workdir, as sentences: no room, no right to write, no server.

Every storage driver has exceptions of its own. Here they become one error that says what could not
be done, why, and what to do, without a driver's stack trace and without its secrets.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from manifests.redact import redact

_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
_GOES_ON = "What is committed stays; `vidpipe run` goes on from there."


class StoreError(Exception):
    """The workdir can't be used as it is; the message says what, why and what to do."""


class StoreUnusable(StoreError):
    """Nothing more can be written, or nothing be reached: to go on with other units is no use."""


def unusable(error: Exception, what: str, place: str) -> StoreUnusable:
    """The error for a driver's `error` when `what` ("write", "read", ...) was tried at `place`, a
    local path or a URL."""
    return StoreUnusable(f"can't {what} {redact(place)}: {_why(error, place)}")


def halts(error: OSError, place: str) -> StoreUnusable | None:
    """The error for a full or read-only disk that anything beside the store ran into, at the file
    that `error` names or else at `place`; None for any other fault."""
    if error.errno in _NO_ROOM or error.errno == errno.EROFS:
        return unusable(error, "write", str(error.filename or place))
    return None


def _why(error: Exception, place: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if "://" in place:
        return _why_remote(error, number)
    if number in _NO_ROOM:
        return (
            f"{_NO_ROOM[number]} ({_free(place)}). Make room (`vidpipe gc` shows what may go) or "
            f"name a workdir elsewhere. {_GOES_ON}"
        )
    if number == errno.EROFS:
        return f"its file system is read-only. Remount it writable. {_GOES_ON}"
    if isinstance(error, PermissionError):
        return f"permission denied. Give this user the right to write there. {_GOES_ON}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{redact(reason)}. {_GOES_ON}"


def _why_remote(error: Exception, number: int | None) -> str:
    kind = type(error).__name__
    if isinstance(error, PermissionError) or "Credentials" in kind:
        return (
            "access is refused. Check the credentials (for S3 AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE) and what they may do in that bucket."
        )
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket. Make it, or correct `workdir`."
    if number == errno.ENOSPC or number == errno.EDQUOT:
        return f"the store has no room left. {_GOES_ON}"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (
        f"the store failed at every try ({kind}: {redact(' '.join(said.split()))[:200]}). Is it "
        f"reachable (for S3-compatible ones AWS_ENDPOINT_URL names it)? {_GOES_ON}"
    )


def _free(place: str) -> str:
    """`3.1 MiB free`, where the nearest folder there is lies."""
    for folder in (Path(place), *Path(place).parents):
        try:
            return f"{size(shutil.disk_usage(folder).free)} free"
        except OSError:
            continue
    return "free space unknown"


def size(n: float) -> str:
    """`3.1 MiB`"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
