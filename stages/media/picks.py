"""Which frames stand for a clip: arithmetic on the times at which they appear. Nothing is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stages.media.sampling import Sampling

# Sampling at "30 fps" of a video of 30.000001 fps must not lose a frame.
RELATIVE = 1e-6


def due(seconds: float, fps: float, slack: float = 0.0) -> int:
    """How many of the moments 0, 1/fps, 2/fps, ... lie before `seconds`; `slack` seconds and
    one millionth are forgiven as rounding."""
    return max(0, math.ceil((seconds - slack) / (1 + RELATIVE) * fps))


def picks(
    times: Sequence[float],
    end: float,
    sampling: Sampling,
    t0: float | None = None,
    slack: float = 0.0,
    rate: float | None = None,
) -> list[int]:
    """The indices of the frames that stand for a clip; fewer than asked where it is short.

    `times`: when its frames appear (ascending, seconds), the last one shown until `end`.
    Policy `time`: the frame shown at t0 + k/fps (t0 None: times[0]). Policy `seed`: `seed_picks`
    at the header's `rate`. `slack`: by how much a timestamp may be rounded.
    """
    if sampling.policy == "seed":
        return seed_picks(len(times), rate or len(times) / (end - times[0]), sampling)
    begin = times[0] if t0 is None else t0
    picked: list[int] = []
    for index, until in enumerate([*times[1:], end - slack]):
        reached = min(due(until - begin, sampling.fps, slack), sampling.frames)
        picked += [index] * (reached - len(picked))
        if reached == sampling.frames:
            break
    return picked


def seed_picks(count: int, rate: float, sampling: Sampling) -> list[int]:
    """vid_gen's rule: of `count` frames at `rate` the first frames/fps seconds, spread evenly
    over the indices; of a shorter clip floor(fps * count / rate) over all."""
    need = needed(sampling, rate)
    if count >= need:
        return [int(i) for i in np.linspace(0, need - 1, sampling.frames, dtype=int)]
    length = min(math.floor(sampling.fps * count / rate), sampling.frames)
    return [int(i) for i in np.linspace(0, count - 1, length, dtype=int)]


def needed(sampling: Sampling, rate: float) -> int:
    """How many frames of a video at `rate` a clip of vid_gen's takes."""
    return math.ceil(sampling.frames / sampling.fps * rate)
