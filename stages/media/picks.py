"""Which frames stand for a clip: arithmetic on the times at which they appear. Nothing is read."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stages.media.sampling import Sampling
from stages.media.timeline import SNAP, Enough

# Sampling at "30 fps" of a video of 30.000001 fps must not lose a frame.
RELATIVE = 1e-6


@dataclass(frozen=True)
class Clock:
    """What a video's header says of its times."""

    rate: float | None = None  # frames a second, on average
    slack: float = 0.0  # seconds by which a timestamp may be rounded


@dataclass(frozen=True)
class Window:
    """A part of a video and the frames that stand for it: `times`, when each appears, ascending;
    one may stand several times in a row. `fps`: the rate that they stand for."""

    start: float
    end: float
    times: list[float]
    fps: float


def due(seconds: float, fps: float, slack: float = 0.0) -> int:
    """How many of the moments 0, 1/fps, 2/fps, ... lie before `seconds`; `slack` seconds and
    one millionth are forgiven as rounding."""
    return max(0, math.ceil((seconds - slack) / (1 + RELATIVE) * fps))


def picks(
    times: Sequence[float],
    end: float,
    sampling: Sampling,
    t0: float | None = None,
    clock: Clock = Clock(),
) -> list[int]:
    """The indices of the frames that stand for a clip; fewer than asked where it is short.

    `times`: when its frames appear (ascending, seconds), the last one shown until `end`.
    Policy `time`: the frame shown at t0 + k/fps (t0 None: times[0]). Policy `seed`: `seed_picks`
    at the header's rate. Policy `interval`: every `interval`-th.
    """
    if sampling.policy == "seed":
        return seed_picks(len(times), _rate(times, end, clock), sampling)
    if sampling.policy == "interval":
        return list(range(0, len(times), sampling.interval))[: sampling.frames]
    begin = times[0] if t0 is None else t0
    picked: list[int] = []
    for index, until in enumerate([*times[1:], end - clock.slack]):
        reached = min(due(until - begin, sampling.fps, clock.slack), sampling.frames)
        picked += [index] * (reached - len(picked))
        if reached == sampling.frames:
            break
    return picked


def seed_picks(count: int, rate: float, sampling: Sampling) -> list[int]:
    """vid_gen's rule: of `count` frames at `rate` the first frames/fps seconds, spread evenly
    over the indices; of a shorter clip floor(fps * count / rate) over all."""
    need = seed_needs(rate, sampling)
    if count >= need:
        return [int(i) for i in np.linspace(0, need - 1, sampling.frames, dtype=int)]
    length = min(math.floor(sampling.fps * count / rate), sampling.frames)
    return [int(i) for i in np.linspace(0, count - 1, length, dtype=int)]


def seed_needs(rate: float, sampling: Sampling) -> int:
    """How many frames of a video at `rate` a clip of vid_gen's takes."""
    return math.ceil(sampling.frames / sampling.fps * rate)


def windows(
    times: Sequence[float],
    t0: float,
    t1: float,
    sampling: Sampling,
    clock: Clock = Clock(),
    clip: str = "",
) -> list[Window]:
    """The parts of a clip that become clips, by `sampling.windows` and `start`, in order; they
    don't overlap, and each read as a clip of its own gives the same frames. A clip that is too
    short for one is its only window.

    `times`: when its frames appear; it is shown from `t0` to `t1` (a first frame may have appeared
    before). `clip`: its id, by which `start: random` draws. Each of several windows is placed by
    `start` within its share of the clip, as Temporal Segment Networks sample (Wang et al., ECCV
    2016); with `windows: all` they lie side by side, and `start` says where what is left goes.
    """
    if sampling.policy == "time":
        return _by_time(times, t0, t1, sampling, clock, clip)
    return _by_number(times, t0, t1, sampling, clock, clip)


def _by_time(
    times: Sequence[float], t0: float, t1: float, sampling: Sampling, clock: Clock, clip: str
) -> list[Window]:
    span = sampling.frames / sampling.fps
    fitting = due(t1 - clock.slack - t0, sampling.fps, clock.slack) // sampling.frames
    count = _count(fitting, sampling)
    found = []
    if sampling.windows == "all":
        left = _place(t1 - t0 - count * span, sampling, clip, 0)
        begins = [t0 + left + i * span for i in range(count)]
    else:
        share = max(span, (t1 - t0) / count)
        begins = [
            t0 + i * share + _place((t1 - t0) / count - span, sampling, clip, i)
            for i in range(count)
        ]
    for begin in begins:
        # As `section` cuts: a frame that appears just after the beginning is the first.
        first = max(0, bisect_right(times, begin + SNAP) - 1) if begin > t0 else 0
        start = max(begin, times[first])
        own = times[first : bisect_right(times, begin + span) + 1]
        picked = picks(own, t1, sampling, start, clock)
        end = min(begin + span, t1)
        found.append(Window(start, end, [own[i] for i in picked], sampling.fps))
    return found


def _by_number(
    times: Sequence[float], t0: float, t1: float, sampling: Sampling, clock: Clock, clip: str
) -> list[Window]:
    n = len(times)
    rate = _rate(times, t1, clock)
    if sampling.policy == "seed":
        need = step = seed_needs(rate, sampling)
    else:
        need, step = interval_needs(sampling), sampling.frames * sampling.interval
    count = _count(1 + (n - need) // step if n >= need else 0, sampling)
    if sampling.windows == "all":
        left = _place_frame(n - (count - 1) * step - need, sampling, clip, 0)
        firsts = [left + i * step for i in range(count)]
    else:
        shares = [n * i // count for i in range(count + 1)]
        firsts = [
            share + _place_frame(after - share - need, sampling, clip, i)
            for i, (share, after) in enumerate(pairwise(shares))
        ]
    found = []
    for first in firsts:
        last = min(first + need, n)
        start = times[first] if first else t0
        end = times[last] if last < n else t1
        own = times[first:last]
        picked = [own[i] for i in picks(own, end, sampling, clock=Clock(rate))]
        span = picked[-1] - picked[0] if picked else 0.0
        fps = (len(picked) - 1) / span if span > 0 else rate
        found.append(Window(start, end, picked, fps))
    return found


def interval_needs(sampling: Sampling) -> int:
    """How many frames a clip of the policy `interval` takes: 221 for 56 at 4."""
    return (sampling.frames - 1) * sampling.interval + 1


def _rate(times: Sequence[float], end: float, clock: Clock) -> float:
    # Rounded, as 30.000000000000004 asks for one frame more than 30 does.
    return clock.rate or round(len(times) / (end - times[0]), 6)


def _count(fitting: int, sampling: Sampling) -> int:
    wanted = fitting if sampling.windows == "all" else min(fitting, sampling.windows)
    return max(1, wanted)


def _place(free: float, sampling: Sampling, clip: str, window: int) -> float:
    """Where in what is left over a window begins: at most `free`, at least 0."""
    if sampling.start == "first" or free <= 0:
        return 0.0
    if sampling.start == "center":
        return free / 2
    drawn = hashlib.sha256(f"{clip} {window}".encode()).digest()[:8]
    return free * int.from_bytes(drawn, "big") / 2**64


def _place_frame(free: int, sampling: Sampling, clip: str, window: int) -> int:
    """The same in frames, of which `free` are left over."""
    if sampling.start == "random" and free > 0:
        free += 1  # as many places as frames left over, and one
    return math.floor(_place(free, sampling, clip, window))


def enough(sampling: Sampling, clock: Clock) -> Enough | None:
    """How much of a clip has to be known to pick its frames; None: where it ends."""
    if sampling.start != "first" or sampling.windows != 1:
        return None
    longest = sampling.model_copy(update={"frames": sampling.most})
    if sampling.policy == "time":
        return Enough(seconds=longest.frames / longest.fps)
    if sampling.policy == "interval":
        return Enough(frames=interval_needs(longest))
    return Enough(frames=seed_needs(clock.rate, longest)) if clock.rate else None
