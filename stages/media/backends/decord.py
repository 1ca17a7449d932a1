"""decord 0.6: what many trainers of video models read with; it brings FFmpeg 4.1.6.

Frames are read one by one from the beginning on: by number it is silently wrong at the edges of
open groups of pictures. So a late window costs the decoding of all before it. PyAV reads in its
place: AV1, which it does not know; MPEG-TS and MPEG-PS, whose first frames it loses; mirrored
pictures, which it does not turn. Damage it conceals without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stages.media.backends.base import Picture
from stages.media.backends.others import Unable, look, or_pyav, source
from stages.media.video import Budget

REFUSED = ("mpegts", "mpeg")


def alone(path: str, times: Sequence[float], budget: Budget, threads: int = 1) -> Iterator[Picture]:
    """The frames at `times`, a `base.Backend`. Raises Unable."""
    seen = look(path, times, budget, REFUSED)
    wanted = set(seen.numbers)
    with source(path) as file:
        reader = _reader(file, threads)
        for number in range(seen.numbers[-1] + 1):
            budget.check()
            frame = _next(reader)
            if number in wanted:
                yield Picture(frame.asnumpy(), seen.pixel)


decode = or_pyav(alone)


def _reader(file: Any, threads: int) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        # The share of frames that it may repeat in place of those that it can't decode: none.
        return decord.VideoReader(file, num_threads=threads, fault_tol=1e-9)
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise Unable(str(error)) from error


def _next(reader: Any) -> Any:
    import decord

    try:
        return reader.next()
    except (decord.DECORDError, StopIteration) as error:
        raise Unable(str(error)) from error
