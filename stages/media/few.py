"""A few frames of a clip, found by seeking: what scoring looks at."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from stages.media.backends import pyav
from stages.media.backends.base import OtherFrames
from stages.media.picture import Fit, Pixels, short_side
from stages.media.timeline import SNAP, Timeline, section, timeline
from stages.media.video import Budget, opened


@dataclass(frozen=True)
class Few:
    """Frames for scoring, uint8 RGB [count, height, width, 3], and for each the frame shown
    `gap` seconds later."""

    frames: Pixels
    later: Pixels


def sample_few(
    path: str,
    count: int,
    size: int,
    start: float | None = None,
    end: float | None = None,
    gap: float = 0.125,
    budget: Budget | None = None,
) -> Few:
    """Frames at 10% to 90% of the clip, short side `size`, whole picture, found by seeking.
    Raises VideoError."""
    budget = budget or Budget()
    with opened(path, budget=budget) as video:
        line = timeline(video, start, end)
    try:
        return _few(path, line, count, size, start, end, gap, budget)
    except OtherFrames:
        line = pyav.decoded_timeline(path, start, end, None, budget)
        return _few(path, line, count, size, start, end, gap, budget)


def _few(
    path: str,
    line: Timeline,
    count: int,
    size: int,
    start: float | None,
    end: float | None,
    gap: float,
    budget: Budget,
) -> Few:
    part = section(line, start, end)
    times = line.times[part.first : part.last]
    upright = short_side(size)
    frames: list[Pixels] = []
    later: list[Pixels] = []
    for k in range(count):
        share = 0.5 if count == 1 else 0.1 + 0.8 * k / (count - 1)
        moment = max(part.t0, min(part.t0 + share * (part.t1 - part.t0), part.t1 - gap))
        now = max(0, bisect_right(times, moment + SNAP) - 1)
        then = max(now, bisect_right(times, moment + gap) - 1)
        pair = list(pyav.decode(path, sorted({times[now], times[then]}), budget))
        for (frame, pixel), pictures in ((pair[0], frames), (pair[-1], later)):
            picture = upright(frame, pixel)
            if frames and picture.shape != frames[0].shape:  # the size changes within the video
                height, width, _ = frames[0].shape
                picture = Fit(height, width, "pad")(frame, pixel)
            pictures.append(picture)
    return Few(np.stack(frames), np.stack(later))
