"""What other decoders need PyAV for: to know which frames they are asked for, and to read what
they can't read right."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stages.media.backends import pyav
from stages.media.backends.base import SAME, Backend, Picture
from stages.media.picture import display_matrix, quarter_turned
from stages.media.timeline import SNAP, timeline
from stages.media.video import Budget, Video, opened, packets


class Unable(Exception):
    """This decoder fails at the video, or would read it wrongly."""


def or_pyav(alone: Backend) -> Backend:
    """A decoder, and PyAV from the frame on for which it raises Unable. So damage, too, is told as
    PyAV tells it."""

    def decode(
        path: str, times: Sequence[float], budget: Budget, threads: int = 1
    ) -> Iterator[Picture]:
        given = 0
        try:
            for picture in alone(path, times, budget, threads):
                yield picture
                given += 1
        except Unable:
            yield from pyav.decode(path, times[given:], budget, threads)

    return decode


@dataclass(frozen=True)
class Look:
    """A video before another decoder reads it."""

    numbers: list[int]  # of the frames asked for, counted from the first one that is shown
    frame: Any  # the first
    pixel: float  # width over height of the pixels, once the picture is turned
    stream: int
    tick: float
    origin: float


def look(path: str, times: Sequence[float], budget: Budget, refused: Sequence[str]) -> Look:
    """Raises VideoError, and Unable for a container `refused` and for a picture that is to be
    mirrored, as decoders that turn pictures do so by quarters alone."""
    with opened(path, budget=budget) as video:
        if video.container.format.name in refused:
            raise Unable(f"it gives wrong frames of {video.container.format.long_name}")
        numbers = _numbers(video, times)
    with opened(path, budget=budget) as video:
        frame = _first(video)
        pixel = float(video.stream.sample_aspect_ratio or 1) or 1.0
        stream, tick, origin = video.stream.index, video.tick, video.origin
    matrix = display_matrix(frame)
    if matrix and matrix[0] * matrix[4] - matrix[1] * matrix[3] < 0:
        raise Unable("it does not mirror pictures")
    pixel = 1 / pixel if quarter_turned(matrix) else pixel
    return Look(numbers, frame, pixel, stream, tick, origin)


def _first(video: Video) -> Any:
    """The first frame that decodes: before it there may be some whose references are hidden."""
    import av

    for packet in packets(video, video.stream):
        try:
            for frame in packet.decode():
                return frame
        except av.error.FFmpegError:
            continue
    raise Unable("no frame decodes")


def _numbers(video: Video, times: Sequence[float]) -> list[int]:
    shown = timeline(video, end=times[-1] + SNAP).times
    numbers = [bisect_left(shown, time - SAME) for time in times]
    if any(n == len(shown) or shown[n] > t + SAME for n, t in zip(numbers, times, strict=True)):
        raise Unable("its packets do not tell the frames' numbers")
    return numbers


@contextmanager
def source(path: str) -> Iterator[Any]:
    """A path as it is; an fsspec URL as an open file."""
    if "://" not in path:
        yield path
        return
    import fsspec

    with fsspec.open(path, "rb") as file:
        yield file
