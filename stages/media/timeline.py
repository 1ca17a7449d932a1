"""When each frame of a video is shown, by its packets: nothing is decoded.

Times are on the container's clock (`stages.media.video`). Packets that an edit list hides are not
shown, so they are not counted.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from stages.media.video import Video, VideoError, packets, refuse_encrypted, seek, translated

# Tables write times in milliseconds: a cut less than this before a frame means that frame.
SNAP = 0.001
# Frames by whose gaps the length of the last one is told where nothing states it.
LAST = 64
# A day at 60 frames a second. Each takes some 150 bytes while times are worked out.
MOST_PACKETS = 60 * 60 * 60 * 24


@dataclass
class Timeline:
    """When each shown frame of (a part of) a video appears, by its packets. Nothing decoded."""

    times: list[float] = field(default_factory=list)  # ascending
    end: float = 0.0  # until when the last one is shown
    packets: int = 0  # hidden ones too
    first_key: Any = None  # the first key frame's packet
    fault: VideoError | None = None  # what hides all from `end` on, where enough came before


class Enough(NamedTuple):
    """What of a clip is needed, from its beginning."""

    seconds: float = math.inf
    frames: float = math.inf


class Reach:
    """How far the times from `start` to `end` (None: all) have to be known."""

    def __init__(self, start: float | None, end: float | None, enough: Enough | None) -> None:
        self._start = -math.inf if start is None else start
        self._until = math.inf if end is None else end
        self._seconds, self._frames = enough or Enough()
        self._first, self._last, self._count = math.inf, -math.inf, 0

    def add(self, time: float) -> None:
        """One more frame, shown from `time` on; they may come out of order."""
        self._first, self._last = min(self._first, time), max(self._last, time)
        self._count += time >= self._start
        if self._count > self._frames:  # those still to come may belong between these
            self._until, self._frames = min(self._until, self._last), math.inf

    def past(self, moment: float) -> bool:
        """Whether no frame is needed that is shown from `moment` on or later."""
        return moment > min(self._until, max(self._start, self._first) + self._seconds)


def stamp(video: Video, packet: Any, after: int | None) -> int:
    """The presentation time of a packet in ticks; by decoding order in a stream without them."""
    if video.stamped and packet.pts is not None:
        return int(packet.pts)
    if packet.dts is not None:
        return int(packet.dts)
    return 0 if after is None else after + (packet.duration or 1)


def timeline(
    video: Video,
    start: float | None = None,
    end: float | None = None,
    enough: Enough | None = None,
) -> Timeline:
    """Reads the packets from `start` to `end` (seconds; None: all) and a little around them, or
    only as far as is `enough`.

    Raises VideoError: encrypted; for a container that breaks off, unless something is `enough`:
    then what is known until there, with the `fault`.
    """
    if start is not None and seek(video, start - 0.5):
        found = _timeline(video, start, end, enough)
        if found.times and found.times[0] <= start + SNAP:
            return found
        video.container.seek(-(1 << 62), stream=video.stream)  # it landed late: all of it then
    return _timeline(video, start, end, enough)


def _timeline(
    video: Video, start: float | None, end: float | None, enough: Enough | None
) -> Timeline:
    import av

    line, tick, origin = Timeline(), video.tick, video.origin
    reach = Reach(start, end, enough)
    shown, final = array("q"), (0, 0)  # eight bytes a frame, as files may claim many
    last: int | None = None
    reached = -math.inf
    try:
        for packet in packets(video, video.stream):
            if not packet.size:  # the flush at the end, and AVI's "nothing new here"
                continue
            line.packets += 1
            if line.packets > MOST_PACKETS:
                raise VideoError(
                    "too_many_frames", f"the video has more than {MOST_PACKETS} frames"
                )
            last = stamp(video, packet, last)
            if packet.is_keyframe:
                refuse_encrypted(packet)
                line.first_key = line.first_key or packet
            if not packet.is_discard:
                one = (last, packet.duration or 0)
                final = max(final, one) if shown else one
                shown.append(last)
                reach.add(last * tick - origin)
            # No frame is decoded after it is shown: from before this moment, none can follow.
            if packet.dts is not None:
                reached = packet.dts * tick - origin
                if reach.past(reached - 0.5):
                    break
    except (OSError, av.error.FFmpegError) as error:
        video.budget.check()
        line.fault = translated(error)
        line.times = [t for t in (pts * tick - origin for pts in sorted(shown)) if t < reached]
        line.end = reached
        if enough is None or not line.times:
            raise line.fault from error
        return line
    line.times = [pts * tick - origin for pts in sorted(shown)]
    if shown:
        line.end = line.times[-1] + lasting(final[1] * tick, line.times, video)
    return line


def lasting(seconds: float, times: Iterable[float], video: Video) -> float:
    """How long the last frame is shown: as its packet says, else as long as those before it."""
    if seconds > 0:
        return seconds
    gaps = [b - a for a, b in pairwise(deque(times, LAST))]
    return median(gaps) if gaps else video.frame_seconds


@dataclass(frozen=True)
class Section:
    """The frames first..last-1 that are shown between t0 and t1."""

    first: int
    last: int
    t0: float
    t1: float


def section(line: Timeline, start: float | None, end: float | None) -> Section:
    """The part of a timeline from `start` to `end`. Raises VideoError where it is empty."""
    times = line.times
    if not times:
        raise VideoError("no_frames", "the video has no frames")
    first = 0 if start is None else max(0, bisect_right(times, start + SNAP) - 1)
    last = len(times) if end is None else bisect_left(times, end - SNAP)
    t0 = times[first] if start is None else max(start, times[first])
    t1 = times[last] if last < len(times) else line.end
    t1 = t1 if end is None else min(t1, end)
    if last <= first or t1 <= t0:
        raise VideoError("empty_section", outside(start, end, line.end))
    return Section(first, last, t0, t1)


def outside(start: float | None, end: float | None, stop: float) -> str:
    if start is not None and start >= stop - SNAP:
        return f"the clip starts at {start:.3f} s, where the video has ended: it has {stop:.3f} s"
    return f"no frame is shown between {start or 0:.3f} s and {end or stop:.3f} s"
