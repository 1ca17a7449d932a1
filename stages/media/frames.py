"""The frames that stand for a clip: first which ones, on its packets' times, then decoded.

Which: `stages.media.picks`. Decoded: `stages.media.backends`. What is done to each:
`stages.media.picture`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stages.media.backends import pyav
from stages.media.backends.base import Backend, OtherFrames, Picture
from stages.media.picks import needed, picks
from stages.media.picture import Fit, Pixels
from stages.media.sampling import Sampling
from stages.media.timeline import Enough, Timeline, section, timeline
from stages.media.video import Budget, Video, VideoError, opened


class TooShort(Exception):
    """A sound clip with fewer frames than asked, under `short: reject`."""

    def __init__(self, have: int, want: int) -> None:
        super().__init__(f"{have} of {want} frames: the clip is too short")
        self.have, self.want = have, want


@dataclass(frozen=True)
class Clip:
    """Frames of a clip: `frames` uint8 RGB [n, height, width, 3]; `times` when the video shows
    them, seconds, one for each frame that is the video's own (fewer than n only where a short
    clip was filled up: pad black, repeat the last); `fps` the rate that the frames stand for."""

    frames: Pixels
    times: list[float]
    fps: float

    @property
    def length(self) -> int:
        """Frames that were decoded, without any filling."""
        return len(self.times)


def read_clip(
    path: str,
    sampling: Sampling,
    start: float | None = None,
    end: float | None = None,
    threads: int = 1,
    budget: Budget | None = None,
    backend: Backend = pyav.decode,
) -> Clip:
    """Decodes the frames that stand for the clip `start`..`end` (seconds; None: the video's).

    Damage within the frames needed fails the clip; damage elsewhere is not looked at. Raises
    TooShort (by `sampling.short`) and VideoError.
    """
    budget = budget or Budget()
    enough = None if sampling.policy == "seed" else Enough(sampling.frames / sampling.fps)
    with opened(path, budget=budget) as video:
        clock = Clock.of(video)
        if clock.rate and sampling.policy == "seed":
            enough = Enough(frames=needed(sampling, clock.rate))
        line = timeline(video, start, end, enough)
    try:
        times, last = _picked(line, clock, sampling, start, end)
        return _clip(path, times, last, sampling, backend, threads, budget)
    except OtherFrames:
        line = pyav.decoded_timeline(path, start, end, enough, budget)
        times, last = _picked(line, clock, sampling, start, end)
        return _clip(path, times, last, sampling, pyav.decode, 1, budget)


@dataclass(frozen=True)
class Clock:
    """What a video's header says of its times."""

    rate: float | None  # frames a second
    slack: float  # seconds by which a timestamp may be rounded

    @classmethod
    def of(cls, video: Video) -> Clock:
        rate = video.stream.average_rate
        return cls(float(rate) if rate else None, video.slack)


def _picked(
    line: Timeline, clock: Clock, sampling: Sampling, start: float | None, end: float | None
) -> tuple[list[float], float]:
    """When the frames that stand for the clip appear, and its last one. Raises TooShort and
    VideoError."""
    try:
        part = section(line, start, end)
    except VideoError as error:
        raise line.fault or error from error
    times = line.times[part.first : part.last]
    picked = picks(times, part.t1, sampling, part.t0, clock.slack, clock.rate)
    if len(picked) < sampling.frames and line.fault and (end is None or end > line.end):
        raise line.fault
    if not picked and sampling.short == "reject":
        raise TooShort(0, sampling.frames)
    if not picked:
        raise VideoError("no_frames", "the clip has no frames")
    return [times[i] for i in picked], times[-1]


def _clip(
    path: str,
    times: Sequence[float],
    last: float,
    sampling: Sampling,
    backend: Backend,
    threads: int,
    budget: Budget,
) -> Clip:
    places = defaultdict(list)
    for place, time in enumerate(times):
        places[time].append(place)
    if len(times) < sampling.frames and sampling.short == "reject":
        whole = sorted({*times, last})  # only a sound clip is merely too short
        deque(_decoded(path, whole, backend, threads, budget), maxlen=0)
        raise TooShort(len(times), sampling.frames)
    pictures = _decoded(path, list(places), backend, threads, budget)
    frames = np.zeros((sampling.frames, sampling.height, sampling.width, 3), np.uint8)
    fit = Fit(sampling.height, sampling.width, sampling.fit)
    for own, picture in zip(places.values(), pictures, strict=True):
        frames[own] = fit(*picture)
    if sampling.short == "repeat":
        frames[len(times) :] = frames[len(times) - 1]
    fps = sampling.fps
    if sampling.policy == "seed" and times[-1] > times[0]:
        fps = (len(times) - 1) / (times[-1] - times[0])
    return Clip(frames, list(times), fps)


def _decoded(
    path: str, times: Sequence[float], backend: Backend, threads: int, budget: Budget
) -> Iterator[Picture]:
    given = 0
    try:
        for picture in backend(path, times, budget, threads):
            yield picture
            given += 1
    except VideoError as error:
        # Threads look further ahead, so only a single one decides on damage: same result always.
        if threads == 1 or error.error != "decode_error":
            raise
        yield from backend(path, times[given:], budget, 1)
