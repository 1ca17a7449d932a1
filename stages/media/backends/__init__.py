"""Decoders behind one interface (`base.Backend`): chosen frames of a video, by their times.

Each is right for every video of the exactness matrix (tests/stages/matrix.py); what one can't read
right, PyAV reads in its place (`others.or_pyav`). A reader is never shared by threads: decord and
torchcodec would end the process.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from stages.media.backends.base import Backend

Name = Literal["pyav", "decord", "torchcodec"]


def named(name: Name) -> Backend:
    """The backend of this name. Raises what the import of its package raises."""
    if name != "pyav":
        importlib.import_module(name)
    backend: Backend = importlib.import_module(f"{__name__}.{name}").decode
    return backend


def missing(name: Name) -> str:
    """Why this machine lacks a backend, and what to do; empty: it does not."""
    try:
        named(name)
    except ImportError:
        extra = "decord==0.6.0" if name == "decord" else "'vidpipe[torchcodec]'"
        return f"{name} is not installed: pip install {extra}, or set it to pyav"
    except (OSError, RuntimeError):
        return f"{name} does not load; it needs FFmpeg 4 to 8 on this machine: install ffmpeg"
    return ""
