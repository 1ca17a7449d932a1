"""Small facts that are slow to find and never change, kept between commands.

The sha256 of a weight file, the columns of a rule: each command needs them for its fingerprints,
and `vidpipe status` must not read gigabytes. One file per fact under the user's cache folder
(`XDG_CACHE_HOME`); deleting it costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manifests.schema import digest


def remembered(key: list[Any], find: Callable[[], Any]) -> Any:
    """The JSON-able value of `find()`, from the cache where it was found before.

    `key` must hold everything that the value depends on.
    """
    file = _folder() / f"{digest(key, 32)}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = find()
    # A home that can't be written only means finding it again.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(file)
    return value


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vidpipe"
