"""The frames that stand for a clip: first which ones, on its packets' times, then decoded.

Which: `stages.media.picks`, `buckets`. Decoded: `stages.media.backends`. What is done to each:
`stages.media.picture`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stages.media.backends import pyav
from stages.media.backends.base import Backend, OtherFrames, Picture
from stages.media.buckets import Filling, chosen, lacking
from stages.media.look import Look, first_picture
from stages.media.picks import Clock, Window, enough, picks, windows
from stages.media.picture import Fit, Pixels
from stages.media.sampling import Sampling
from stages.media.timeline import Section, Timeline, section, timeline
from stages.media.video import Budget, VideoError, opened


class Unsuited(Exception):
    """A sound clip that the sampling does not take; `reason` in a word."""

    reason: str


class TooShort(Unsuited):
    """Fewer frames than asked, under `short: reject`."""

    reason = "too_short"

    def __init__(self, have: int, want: int) -> None:
        super().__init__(f"{have} of {want} frames: the clip is too short")
        self.have, self.want = have, want


class NoBucket(Unsuited):
    """It fills none of the buckets."""

    reason = "no_bucket"


@dataclass(frozen=True)
class Clip:
    """Frames of a clip: `frames` uint8 RGB [n, height, width, 3]; `times` when the video shows
    them, seconds, one for each frame that is the video's own (fewer than n only where a short
    clip was filled up: pad black, repeat the last); `fps` the rate that the frames stand for;
    `start` and `end` the part of the video that they stand for, seconds."""

    frames: Pixels
    times: list[float]
    fps: float
    start: float
    end: float

    @property
    def length(self) -> int:
        """Frames that were decoded, without any filling."""
        return len(self.times)


@dataclass(frozen=True)
class Part:
    """Of a video: `start`..`end`, seconds; None: its own."""

    path: str
    start: float | None
    end: float | None
    clip: str


def read_clips(
    path: str,
    sampling: Sampling,
    start: float | None = None,
    end: float | None = None,
    *,
    clip: str = "",
    backend: Backend = pyav.decode,
    threads: int = 1,
    budget: Budget | None = None,
) -> Iterator[Clip]:
    """Decodes the frames that stand for the clip `start`..`end` (seconds; None: the video's): one
    Clip, or as many as `sampling.windows` makes of it, in order, each as soon as its last frame is
    decoded. `clip`: its id, by which `start: random` draws.

    Damage within the frames needed fails the clip; damage elsewhere is not looked at. Raises
    Unsuited and VideoError.
    """
    budget, part = budget or Budget(), Part(path, start, end, clip)
    with opened(path, budget=budget) as video:
        rate = video.stream.average_rate
        clock = Clock(float(rate) if rate else None, video.slack)
        known = enough(sampling, clock)
        line = timeline(video, start, end, known)
        look = first_picture(video, line.first_key) if sampling.buckets else None
    plan = planned(line, part, sampling, clock, look)
    given = 0
    try:
        for made in _clips(part, plan, backend, threads, budget):
            yield made
            given += 1
    except OtherFrames as error:
        if given:  # what was given may not be what stands now
            raise VideoError("decode_error", str(error)) from error
        line = pyav.decoded_timeline(path, start, end, known, budget)
        plan = planned(line, part, sampling, clock, look)
        yield from _clips(part, plan, pyav.decode, 1, budget)


def read_clip(
    path: str,
    sampling: Sampling,
    start: float | None = None,
    end: float | None = None,
    threads: int = 1,
    budget: Budget | None = None,
    backend: Backend = pyav.decode,
) -> Clip:
    """The one clip, or the first window, of `start`..`end`: `read_clips`."""
    clips = read_clips(path, sampling, start, end, backend=backend, threads=threads, budget=budget)
    return next(clips)


@dataclass(frozen=True)
class Plan:
    """Which frames are to be decoded, and for what."""

    sampling: Sampling  # of the bucket, where there are some
    windows: list[Window]
    last: float  # when the clip's last frame appears


def planned(
    line: Timeline, part: Part, sampling: Sampling, clock: Clock, look: Look | None
) -> Plan:
    """Which frames stand for a clip, by its timeline. Raises Unsuited and VideoError."""
    try:
        cut = section(line, part.start, part.end)
    except VideoError as error:
        raise line.fault or error from error
    times = line.times[cut.first : cut.last]
    if look:
        sampling = _bucketed(times, cut, sampling, clock, look)
    found = windows(times, cut.t0, cut.t1, sampling, clock, part.clip)
    have = len(found[-1].times)
    if have < sampling.frames and line.fault and (part.end is None or part.end > line.end):
        raise line.fault
    if have == 0 and sampling.short == "reject":
        raise TooShort(have, sampling.frames)
    if have == 0:
        raise VideoError("no_frames", "the clip has no frames")
    return Plan(sampling, found, times[-1])


def _bucketed(
    times: Sequence[float], cut: Section, sampling: Sampling, clock: Clock, look: Look
) -> Sampling:
    """The sampling of the bucket that the clip goes to. Raises NoBucket."""
    fillings = [
        Filling(bucket, len(picks(times, cut.t1, sampling.of(bucket), cut.t0, clock)), *look.square)
        for bucket in sampling.buckets
    ]
    bucket = chosen(fillings)
    if bucket is None:
        raise NoBucket(lacking(fillings))
    return sampling.of(bucket)


def _clips(
    part: Part, plan: Plan, backend: Backend, threads: int, budget: Budget
) -> Iterator[Clip]:
    sampling = plan.sampling
    wanted = sorted({time for window in plan.windows for time in window.times})
    have = len(plan.windows[-1].times)
    short = have < sampling.frames and sampling.short == "reject"
    if short and plan.last > wanted[-1]:
        wanted.append(plan.last)  # only a clip that is sound to its end is merely too short
    pictures = zip(wanted, _decoded(part.path, wanted, backend, threads, budget), strict=True)
    if short:
        for _ in pictures:
            pass
        raise TooShort(have, sampling.frames)
    fit = Fit(sampling.height, sampling.width, sampling.fit)
    shape = (sampling.frames, sampling.height, sampling.width, 3)
    last: tuple[float, Pixels] | None = None
    for window in plan.windows:
        frames = np.zeros(shape, np.uint8)
        for place, time in enumerate(window.times):
            if last is None or last[0] != time:  # two windows may share one frame
                time, picture = next(pictures)
                last = time, fit(*picture)
            frames[place] = last[1]
        if sampling.short == "repeat":
            frames[len(window.times) :] = frames[len(window.times) - 1]
        yield Clip(frames, window.times, window.fps, window.start, window.end)


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
