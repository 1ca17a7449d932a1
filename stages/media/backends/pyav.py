"""PyAV: FFmpeg's decoders. The default: right for every codec, container and place to start."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from stages.media.backends import sparing
from stages.media.backends.base import SAME, OtherFrames, Picture
from stages.media.timeline import LAST, Enough, Reach, Timeline, lasting, stamp
from stages.media.video import (
    Budget,
    Video,
    VideoError,
    opened,
    packets,
    refuse_encrypted,
    seek,
    translated,
)

# Seconds before the first frame where decoding begins: first try, second try.
SEEK_BACK = (0.5, 10.0)
# Seconds between two wanted frames from which on the second is sought, not decoded up to.
APART = 5.0
LOST = "the video's data is damaged: a part of the stream is missing"


def decode(
    path: str, times: Sequence[float], budget: Budget, threads: int = 1
) -> Iterator[Picture]:
    """The frames at `times`: a `base.Backend`."""
    for together in runs(times):
        given = 0
        try:
            for picture in sparing.decode(path, together, budget, threads):
                yield picture
                given += 1
        except sparing.Unsure as unsure:
            yield from _chosen(path, together[given:], threads, budget, not unsure.keyless)


def runs(times: Sequence[float]) -> list[list[float]]:
    """Times that are decoded in one go: parted where that would pass over much for nothing."""
    parts = [[times[0]]]
    for time in times[1:]:
        if time - parts[-1][-1] > APART:
            parts.append([])
        parts[-1].append(time)
    return parts


@dataclass
class Shown:
    """A decoded frame, and from when on the video shows it."""

    frame: Any
    since: float
    damaged: bool
    pixel: float  # width over height of a pixel
    fault: VideoError | None = None  # in place of a frame: from here on they are lost

    def sound(self) -> Any:
        """The frame. Raises VideoError where it or one that it is made from was damaged."""
        if self.damaged:
            raise VideoError("decode_error", f"the frame at {self.since:.3f} s is damaged")
        return self.frame


def _chosen(
    path: str, times: Sequence[float], threads: int, budget: Budget, seeking: bool
) -> Iterator[Picture]:
    """The frames at `times`, decoded in one go."""
    wanted = deque(times)
    with closing(_from(path, times[0], threads, budget, seeking)) as decoded:
        for _, shown in decoded:
            if shown.fault:
                raise shown.fault
            if shown.since > wanted[0] + SAME:
                break
            if shown.since >= wanted[0] - SAME:
                yield Picture(shown.sound(), shown.pixel)
                wanted.popleft()
                if not wanted:
                    return
    raise OtherFrames(f"no frame decodes for {wanted[0]:.3f} s")


def decoded_timeline(
    path: str, start: float | None, end: float | None, enough: Enough | None, budget: Budget
) -> Timeline:
    """As `stages.media.timeline`, by the frames that really come, for where the packets
    promise others. Raises VideoError."""
    line, reach = Timeline(), Reach(start, end, enough)
    with closing(_from(path, -math.inf if start is None else start, 1, budget)) as decoded:
        for video, shown in decoded:
            if shown.fault:
                line.fault, line.end = shown.fault, shown.since
                return line
            if line.times and shown.since <= line.times[-1]:
                continue  # never shown
            line.times.append(shown.since)
            reach.add(shown.since)
            seconds = float(shown.frame.duration or 0) * video.tick
            line.end = shown.since + lasting(seconds, deque(line.times, LAST), video)
            if reach.past(shown.since):
                return line
    if not line.times:
        raise VideoError("no_frames", "no frame of the video decodes")
    return line


def _from(
    path: str, start: float, threads: int, budget: Budget, seeking: bool = True
) -> Generator[tuple[Video, Shown]]:
    """The frames from the one on show at `start` on, or some before it, in order."""
    # A seek may land late (an index by decoding time, a stream without one): then from further
    # back, at last from the beginning. Early frames are decoded, and dropped by their time.
    for back in SEEK_BACK if seeking else ():
        with opened(path, threads, budget) as video:
            if not seek(video, start - back):
                break
            found = _decoded(video, start)
            first = next(found, None)
            if first is not None and first.since <= start + SAME:
                yield video, first
                for shown in found:
                    yield video, shown
                return
    with opened(path, threads, budget) as video:
        for shown in _decoded(video, start):
            yield video, shown


def _decoded(video: Video, start: float) -> Iterator[Shown]:
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
            if last is None or last * tick - origin >= start:
                told = translated(fault) if fault else VideoError("decode_error", LOST)
                lost = _lost_from(video, packet) if fault else None
                if lost is None:
                    raise told from fault
                # What the decoder still held comes before.
                frames = [f for f in _held(stream) if f.pts is not None and f.pts < lost]
                ending = Shown(None, lost * tick - origin, True, pixel, told)
            else:
                damaged = True
        for frame in frames:
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            queued = stamps.popleft() if stamps else 0
            pts = frame.pts if video.stamped and frame.pts is not None else queued
            yield Shown(frame, pts * tick - origin, damaged, pixel)
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
