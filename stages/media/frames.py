"""The frames that stand for a clip, picked by presentation time, decoded with PyAV.

Which frames: `picks` on timestamps; `read_clip` follows the same arithmetic while it decodes.
What is done to each frame: `stages.media.picture`.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.media.picture import Fit, Pixels, short_side
from stages.media.sampling import Sampling
from stages.media.video import (
    LAST,
    SNAP,
    Budget,
    Video,
    VideoError,
    lasting,
    opened,
    outside,
    packets,
    refuse_encrypted,
    section,
    seek,
    stamp,
    timeline,
    translated,
)

__all__ = [
    "Clip",
    "Few",
    "TooShort",
    "VideoError",
    "picks",
    "read_clip",
    "sample_few",
]

# Sampling at "30 fps" of a video of 30.000001 fps must not lose a frame.
RELATIVE = 1e-6
# Seconds before a clip's start where decoding begins: first try, second try.
SEEK_BACK = (0.5, 10.0)
LOST = "the video's data is damaged: a part of the stream is missing"


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
    need = math.ceil(sampling.frames / sampling.fps * rate)
    if count >= need:
        return [int(i) for i in np.linspace(0, need - 1, sampling.frames, dtype=int)]
    length = min(math.floor(sampling.fps * count / rate), sampling.frames)
    return [int(i) for i in np.linspace(0, count - 1, length, dtype=int)]


def read_clip(
    path: str,
    sampling: Sampling,
    start: float | None = None,
    end: float | None = None,
    threads: int = 1,
    budget: Budget | None = None,
) -> Clip:
    """Decodes the frames that stand for the clip `start`..`end` (seconds; None: the video's).

    Damage within the frames needed fails the clip; damage elsewhere is not looked at. Raises
    TooShort (by `sampling.short`) and VideoError.
    """
    budget = budget or Budget()
    try:
        return _read_clip(path, sampling, start, end, threads, budget)
    except VideoError as error:
        # Threads look further ahead, so only a single one decides on damage: same result always.
        if threads == 1 or error.error != "decode_error":
            raise
        return _read_clip(path, sampling, start, end, 1, budget)


def _read_clip(
    path: str,
    sampling: Sampling,
    start: float | None,
    end: float | None,
    threads: int,
    budget: Budget,
) -> Clip:
    seed = sampling.policy == "seed"
    wanted = _seed_wanted(path, sampling, start, end, budget) if seed else None
    total = sampling.frames if wanted is None else wanted.total()
    frames = np.zeros((sampling.frames, sampling.height, sampling.width, 3), np.uint8)
    times: list[float] = []
    t0 = None
    for index, shown in enumerate(_shown(path, start, end, threads, budget) if total else ()):
        if t0 is None:
            t0 = shown.since if start is None else max(start, shown.since)
            fit = Fit(sampling.height, sampling.width, sampling.fit)
        if wanted is not None:
            reached = len(times) + wanted[index]
        else:
            reached = min(due(shown.until - t0, sampling.fps, shown.slack), total)
        if reached > len(times):
            frames[len(times) : reached] = fit(shown.sound(), shown.pixel)
            times += [shown.since] * (reached - len(times))
        if reached == total:
            break
    have, want = len(times), sampling.frames
    if have < want and sampling.short == "reject":
        raise TooShort(have, want)
    if have == 0:
        raise VideoError("no_frames", "the clip has no frames")
    if sampling.short == "repeat":
        frames[have:] = frames[have - 1]
    fps = sampling.fps
    if wanted is not None and times[-1] > times[0]:
        fps = (have - 1) / (times[-1] - times[0])
    return Clip(frames, times, fps)


def _seed_wanted(
    path: str, sampling: Sampling, start: float | None, end: float | None, budget: Budget
) -> Counter[int]:
    """How often each frame of the clip is asked for, under the policy `seed`."""
    with opened(path, budget=budget) as video:
        line = timeline(video, start, end)
        part = section(line, start, end)
        rate = video.stream.average_rate
        times = line.times[part.first : part.last]
        return Counter(picks(times, part.t1, sampling, rate=float(rate) if rate else None))


@dataclass
class Shown:
    """A decoded frame, and from when until when the video shows it."""

    frame: Any
    since: float
    until: float
    damaged: bool
    slack: float
    pixel: float  # width over height of a pixel
    fault: VideoError | None = None  # in place of a frame: from here on they are lost

    def sound(self) -> Any:
        """The frame. Raises VideoError where it or one that it is made from was damaged."""
        if self.damaged:
            raise VideoError("decode_error", f"the frame at {self.since:.3f} s is damaged")
        return self.frame


def _shown(
    path: str, start: float | None, end: float | None, threads: int, budget: Budget
) -> Iterator[Shown]:
    """The frames shown from `start` to `end`, in order: the one on show at `start` is first."""
    # A seek may land late (an index by decoding time, a stream without one): then from further
    # back, at last from the beginning. Early frames are decoded, and dropped by their time.
    for back in SEEK_BACK if start is not None else ():
        with opened(path, threads, budget) as video:
            since = start or 0.0
            if not seek(video, since - back):
                break
            found = _decoded(video, start)
            first = next(found, None)
            if first is not None and first.since <= since + SNAP:
                yield from _between(video, first, found, start, end)
                return
    with opened(path, threads, budget) as video:
        found = _decoded(video, start)
        yield from _between(video, next(found, None), found, start, end)


def _between(
    video: Video,
    current: Shown | None,
    following: Iterator[Shown],
    start: float | None,
    end: float | None,
) -> Iterator[Shown]:
    """Frames with `until` set from the one that follows, those before `start` dropped."""
    times: deque[float] = deque(maxlen=LAST)
    shown = False
    while current is not None and (end is None or current.since < end - SNAP):
        if current.fault:
            raise current.fault
        after = next(following, None)
        times.append(current.since)
        current.until = after.since if after else current.since + _span(video, current, times)
        if end is not None:
            current.until = min(current.until, end)
        if after is None or (end is not None and after.since >= end - SNAP):
            current.until -= video.slack  # the clip's end is rounded as well: as in `picks`
        early = start is not None and (
            current.until <= start or (after is not None and after.since <= start + SNAP)
        )
        if not early:
            shown = True
            yield current
        current = after
    if not shown and not times:
        raise VideoError("no_frames", "no frame of the video decodes")
    if not shown:
        raise VideoError("empty_section", outside(start, end, times[-1]))


def _span(video: Video, last: Shown, times: deque[float]) -> float:
    return lasting(float(last.frame.duration or 0) * video.tick, times, video)


def _decoded(video: Video, start: float | None) -> Iterator[Shown]:
    """Every frame from where the video stands, in the order shown, up to one that can't be
    decoded at or after `start`: its fault stands in its place, or is raised as VideoError where
    that place isn't known. Before `start`, frames are marked until the next key frame."""
    import av

    stream, tick, origin = video.stream, video.tick, video.origin
    pixel = float(stream.sample_aspect_ratio or 1) or 1.0
    stamps: deque[int] = deque()  # for streams without presentation times: in decoding order
    last: int | None = None
    damaged = False
    ending: Shown | None = None
    for packet in packets(video, stream):
        if packet.size:
            refuse_encrypted(packet)
            last = stamp(video, packet, last)
            stamps.append(last)
        frames, fault = [], None
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            fault = error
        if fault or packet.is_corrupt:
            if start is None or last is None or last * tick - origin >= start:
                told = translated(fault) if fault else VideoError("decode_error", LOST)
                lost = _lost_from(video, packet) if fault else None
                if lost is None:
                    raise told from fault
                # What the decoder still held comes before.
                frames = [f for f in _held(stream) if f.pts is not None and f.pts < lost]
                ending = Shown(None, lost * tick - origin, math.inf, True, 0.0, pixel, told)
            else:
                damaged = True
        for frame in frames:
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            queued = stamps.popleft() if stamps else 0
            pts = frame.pts if video.stamped and frame.pts is not None else queued
            since = pts * tick - origin
            yield Shown(frame, since, since, damaged, video.slack, pixel)
        if ending:
            yield ending
            return


def _lost_from(video: Video, packet: Any) -> int | None:
    """When the first frame is shown, in ticks, of those that are lost with `packet`: that one and
    all after it in the file. None: it can't be told, as threads look ahead or there is no clock."""
    import av

    if not video.stamped or video.stream.codec_context.thread_count != 1 or packet.pts is None:
        return None
    first = None if packet.is_discard else int(packet.pts)
    try:
        for later in packets(video, video.stream):
            if first is not None and later.dts is not None and later.dts >= first:
                break
            if later.size and later.pts is not None and not later.is_discard:
                first = int(later.pts) if first is None else min(first, int(later.pts))
    except (av.error.FFmpegError, OSError):
        return None
    return first


def _held(stream: Any) -> list[Any]:
    """The frames that the decoder has and did not give yet, as later ones may come before."""
    import av

    try:
        return list(stream.codec_context.decode(None))
    except av.error.FFmpegError:
        return []


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
        part = section(timeline(video, start, end), start, end)
    span = part.t1 - part.t0
    upright = short_side(size)
    frames: list[Pixels] = []
    later: list[Pixels] = []
    for k in range(count):
        share = 0.5 if count == 1 else 0.1 + 0.8 * k / (count - 1)
        moment = max(part.t0, min(part.t0 + share * span, part.t1 - gap))
        pair: list[Shown] = []
        for shown in _shown(path, moment, part.t1, 1, budget):
            pair = [*pair[:1], shown]
            if shown.until > moment + gap:
                break
        for shown, pictures in ((pair[0], frames), (pair[-1], later)):
            picture = upright(shown.sound(), shown.pixel)
            if frames and picture.shape != frames[0].shape:  # the size changes within the video
                height, width, _ = frames[0].shape
                picture = Fit(height, width, "pad")(shown.sound(), shown.pixel)
            pictures.append(picture)
    return Few(np.stack(frames), np.stack(later))
