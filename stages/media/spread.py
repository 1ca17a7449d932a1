"""A few frames spread over a clip, whole and small: what a model that sees is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from stages.media.backends import pyav
from stages.media.backends.base import OtherFrames
from stages.media.frames import Part, planned
from stages.media.look import Look, first_picture
from stages.media.picks import Clock, enough, windows
from stages.media.picture import Fit, Pixels, longest_side
from stages.media.sampling import Sampling
from stages.media.timeline import Timeline, section, timeline
from stages.media.video import Budget, opened

LEAST = 4  # frames of a short clip, where it has them: of fewer nothing can be told of motion
FASTEST = 1000.0  # frames a second


class FramesSettings(BaseModel):
    """Which frames of a clip a model is shown, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: Annotated[int, Field(ge=1, le=512)] = Field(
        8, description="frames at most, one in the middle of each of as many equal parts"
    )
    fps: float = Field(
        2.0, gt=0, le=60, description="at most so many a second: fewer of a short clip, but 4"
    )
    side: Annotated[int, Field(ge=16, le=4096)] = Field(
        448, description="pixels of a frame's longer side at most; the whole picture, not enlarged"
    )
    form: Literal["images", "video"] = Field(
        "images",
        description="pictures, which every model takes, or a video, for models that take one: "
        "Qwen-VL reads its frames in pairs, for half the tokens, and knows their times",
    )
    span: Literal["sampled", "clip"] = Field(
        "sampled",
        description="what they stand for: the part of the clip that `sampling` takes to train on "
        "(with `windows` other than 1: all of the clip), or all of it",
    )

    def identity(self, sampling: Sampling) -> dict[str, Any]:
        """What of `sampling` decides which frames these are, JSON-able."""
        if not self.within(sampling):
            return {}
        shapes = [str(bucket) for bucket in sampling.buckets]
        return {**sampling.times(), "start": sampling.start, "buckets": shapes}

    def within(self, sampling: Sampling) -> bool:
        """Whether they are of a part of the clip."""
        return self.span == "sampled" and not sampling.splits


@dataclass(frozen=True)
class Spread:
    """`frames` uint8 RGB [n, height, width, 3]; `times` when the video shows them, seconds;
    `fps` how many of them there are a second."""

    frames: Pixels
    times: list[float]
    fps: float


def spread(
    path: str,
    settings: FramesSettings,
    sampling: Sampling,
    start: float | None = None,
    end: float | None = None,
    *,
    clip: str = "",
    budget: Budget | None = None,
) -> Spread:
    """The frames of the clip `start`..`end` (seconds; None: the video's); `clip` is its id. Raises
    Unsuited and VideoError."""
    budget, part = budget or Budget(), Part(path, start, end, clip)
    within = sampling if settings.within(sampling) else None
    look: Look | None = None
    with opened(path, budget=budget) as video:
        rate = video.stream.average_rate
        clock = Clock(float(rate) if rate else None, video.slack)
        known = enough(within, clock) if within else None
        line = timeline(video, start, end, known)
        if within and within.buckets:
            look = first_picture(video, line.first_key)
    try:
        return _spread(line, part, settings, within, clock, look, budget)
    except OtherFrames:
        line = pyav.decoded_timeline(path, start, end, known, budget)
        return _spread(line, part, settings, within, clock, look, budget)


def _spread(
    line: Timeline,
    part: Part,
    settings: FramesSettings,
    within: Sampling | None,
    clock: Clock,
    look: Look | None,
    budget: Budget,
) -> Spread:
    start, end = part.start, part.end
    if within:
        (window,) = planned(line, part, within, clock, look).windows
        start, end = window.start, window.end
    cut = section(line, start, end)
    times = line.times[cut.first : cut.last]
    # Each frame stands for 1/fps seconds in the middle of its part.
    pace = min(max(settings.fps, LEAST / (cut.t1 - cut.t0)), FASTEST)
    even = Sampling(frames=1, fps=pace, windows=settings.count, start="center")
    found = windows(times, cut.t0, cut.t1, even, clock)
    moments = sorted({time for one in found for time in one.times}) or times[:1]
    pictures = _shown(pyav.decode(part.path, moments, budget), settings.side)
    fps = len(moments) / max(cut.t1 - cut.t0, 1e-3)
    return Spread(np.stack(list(pictures)), moments, fps)


def _shown(decoded: Iterator[tuple[Any, float]], side: int) -> Iterator[Pixels]:
    """Of one size, though the size may change within a video."""
    upright = longest_side(side)
    fit: Fit | None = None
    for frame, pixel in decoded:
        picture = upright(frame, pixel)
        height, width, _ = picture.shape
        fit = fit or Fit(height, width, "pad")
        same = (height, width) == (fit.height, fit.width)
        yield picture if same else fit(frame, pixel)
