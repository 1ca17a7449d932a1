"""Where a clip's file lies, and whether it is still the one that download hashed.

A stage that opens videos carries CARRIED beside what it reads, and opens them in `clip_file`: what
is computed of a file that was replaced meanwhile is never filed under the old one's content.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.local_files import state_of
from stages.base import Context, Row
from stages.media.video import VideoError

CARRIED = ("path", "bytes", "state")


def local_path(path: str, context: Context) -> str:
    """Where the bytes of a row's `path` are: absolute, or relative to the workdir (downloads).
    Under a remote workdir it is a URL, which everything here opens as well."""
    if "://" in path or Path(path).is_absolute():
        return path.removeprefix("file://")
    return f"{context.workdir.rstrip('/')}/{path}".removeprefix("file://")


@contextmanager
def clip_file(row: Row, context: Context) -> Iterator[str]:
    """The file of a row that has CARRIED, to be opened within the block.

    Raises VideoError: `missing_file`, or `source_changed` where it is not, or at the end of the
    block no longer, the file that download hashed. Such a change also explains whatever fault was
    met in between.
    """
    path = local_path(row["path"], context)
    if "://" in path:
        yield path
        return
    _check(row, path)
    try:
        yield path
    except VideoError:
        _check(row, path)
        raise
    _check(row, path)


def _check(row: Row, path: str) -> None:
    try:
        info = os.stat(path)  # noqa: PTH116  as many as there are rows: no object for each
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError("missing_file", "the file is not there") from error
    except OSError as error:
        raise VideoError("unreadable_file", f"{path} can't be read: {error.strerror}") from error
    # What was brought into the workdir is named by its hash; a copy of a workdir has other times.
    own = not Path(row["path"]).is_absolute()
    known = row.get("bytes" if own else "state")
    if known in (None, info.st_size if own else state_of(info)):
        return
    remedy = (
        "of other size than what was brought: delete it and the workdir's folder `download`, which "
        "fetches again what is missing; then"
        if own
        else "not the file that download hashed, by its size or time: if that is meant, take it in "
        "as it is now by"
    )
    raise VideoError(
        "source_changed", f"{path} is {remedy} `vidpipe run --retry-failed source_changed`"
    )
