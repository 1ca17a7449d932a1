"""One video opened with PyAV: its stream, its clock, its packets, its faults in words.

The clock: seconds since the start of the container (`ffmpeg -ss` counts so), from presentation
timestamps. Packets that an edit list hides are not shown, so they are not counted.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

# Tables write times in milliseconds: a cut less than this before a frame means that frame.
SNAP = 0.001
# Ticks up to this are roundings (Matroska 1 ms, QuickTime 1/600 s); longer ones count frames.
ROUNDED_TICK = 0.002
# Frames by whose gaps the length of the last one is told where nothing states it.
LAST = 64
# Containers that hold what they are about. Others (HLS, DASH, concat, SDP) name further files and
# addresses, which FFmpeg opens: a downloaded "video" could read any file here.
FORMATS = ",".join(
    (
        *("mov", "matroska", "webm", "avi", "flv", "live_flv", "mpegts", "mpegtsraw", "mpeg"),
        *("asf", "asf_o", "ogg", "mxf", "gxf", "rm", "nut", "wtv", "dv", "dhav", "nsv", "swf"),
        *("h261", "h263", "h264", "hevc", "vvc", "m4v", "mpegvideo", "av1", "obu", "ivf", "vc1"),
        *("vc1test", "avs2", "avs3", "cavsvideo", "dirac", "dnxhd", "mjpeg", "yuv4mpegpipe"),
        *("gif", "apng", "mp3", "aac", "wav", "w64", "flac", "ac3", "eac3", "aiff", "au", "caf"),
    )
)
NO_DECODER = "FFmpeg has no decoder for this video's codec"


class VideoError(Exception):
    """A video that cannot be used. `error` is its class in words with underscores, the text a
    sentence for a person."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


@dataclass
class Video:
    """An open video: PyAV's container and the stream that FFmpeg holds for the best one."""

    container: Any
    stream: Any
    stamped: bool  # whether packets bear presentation times; AVI and raw streams have none
    tick: float  # seconds: the unit of the stream's timestamps
    origin: float  # seconds: where the container's own clock starts

    @property
    def slack(self) -> float:
        """Seconds by which a timestamp may be rounded."""
        return self.tick / 2 if self.tick <= ROUNDED_TICK else 0.0

    @property
    def frame_seconds(self) -> float:
        """How long the header says that a frame lasts; 1/25 s where it does not say."""
        return 1 / float(self.stream.average_rate or 25)


@dataclass
class Timeline:
    """When each shown frame of (a part of) a video appears, by its packets. Nothing decoded."""

    times: list[float] = field(default_factory=list)  # ascending
    end: float = 0.0  # until when the last one is shown
    packets: int = 0  # hidden ones too
    first_key: Any = None  # the first key frame's packet


@contextmanager
def opened(path: str, threads: int = 1) -> Iterator[Video]:
    """The video at a local path or an fsspec URL. Raises VideoError, within the block too."""
    import av
    import fsspec
    from av.stream import Disposition

    with ExitStack() as stack:
        try:
            remote = "://" in path
            source = stack.enter_context(fsspec.open(path, "rb")) if remote else _checked(path)
            # FFmpeg would decode some 20 frames to guess a rate that timestamps tell.
            options = {"fpsprobesize": "0", "format_whitelist": FORMATS}
            options["protocol_whitelist"] = "file"  # nothing that it opens by itself is remote
            container = av.open(source, options=options, metadata_errors="replace")
            stack.enter_context(container)
        except (OSError, av.error.FFmpegError) as error:
            raise translated(error, opening=path) from error
        if not container.streams:
            raise VideoError(*_verdict(path))
        pictures = [s for s in container.streams.video if s.disposition & Disposition.attached_pic]
        stream = container.streams.best("video")
        if stream in pictures:
            stream = next((s for s in container.streams.video if s not in pictures), None)
        if stream is None:
            raise VideoError("no_video_stream", "the file holds no video, only sound or other data")
        codec = stream.codec_context
        if codec is None:
            raise VideoError("unknown_codec", NO_DECODER)
        codec.thread_count = threads
        codec.thread_type = "AUTO"  # by frames where the codec can: PyAV's own choice is slices
        # A damaged frame is an error, not a grey picture.
        codec.options = {"err_detect": "explode"}
        raw = container.format.name in ("avi", "h264", "hevc", "m4v", "mpegvideo")
        try:
            yield Video(
                container,
                stream,
                stamped=not raw,
                tick=float(stream.time_base),
                origin=(container.start_time or 0) / 1_000_000,
            )
        except (OSError, av.error.FFmpegError) as error:
            raise translated(error) from error


def stamp(video: Video, packet: Any, after: int | None) -> int:
    """The presentation time of a packet in ticks; by decoding order in a stream without them."""
    if video.stamped and packet.pts is not None:
        return int(packet.pts)
    if packet.dts is not None:
        return int(packet.dts)
    return 0 if after is None else after + (packet.duration or 1)


def timeline(video: Video, start: float | None = None, end: float | None = None) -> Timeline:
    """Reads the packets from `start` to `end` (seconds; None: all) and a little around them.

    Raises VideoError: encrypted, decode_error for a container that breaks off.
    """
    if start is not None and seek(video, start - 0.5):
        found = _timeline(video, end)
        if found.times and found.times[0] <= start + SNAP:
            return found
        video.container.seek(-(1 << 62), stream=video.stream)  # it landed late: all of it then
    return _timeline(video, end)


def _timeline(video: Video, end: float | None) -> Timeline:
    line, shown, tick, origin = Timeline(), [], video.tick, video.origin
    last: int | None = None
    for packet in packets(video.container, video.stream):
        if not packet.size:  # the flush at the end, and AVI's "nothing new here"
            continue
        line.packets += 1
        last = stamp(video, packet, last)
        if packet.is_keyframe:
            refuse_encrypted(packet)
            line.first_key = line.first_key or packet
        if not packet.is_discard:
            shown.append((last, packet.duration or 0))
        # No frame is decoded after it is shown: past `end`, none from before it can follow.
        if end is not None and packet.dts is not None and packet.dts * tick - origin > end + 0.5:
            break
    shown.sort()
    line.times = [pts * tick - origin for pts, _ in shown]
    if shown:
        line.end = line.times[-1] + lasting(shown[-1][1] * tick, line.times, video)
    return line


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Packets as the file has them, of these streams (none: of all), and the flush at the end."""
    while True:
        try:
            yield from container.demux(*streams)
            return
        except IndexError:  # PyAV on a packet of a stream that began later (MPEG-TS): not ours
            continue


def refuse_encrypted(packet: Any) -> None:
    if packet.has_sidedata("encryption_info"):
        raise VideoError("encrypted", "the video is encrypted (DRM): it can't be decoded")


def lasting(seconds: float, times: Iterable[float], video: Video) -> float:
    """How long the last frame is shown: as its packet says, else as long as those before it."""
    if seconds > 0:
        return seconds
    gaps = [b - a for a, b in pairwise(deque(times, LAST))]
    return median(gaps) if gaps else video.frame_seconds


def seek(video: Video, seconds: float) -> bool:
    """To the key frame before `seconds`. False where that is the beginning, or can't be done."""
    import av

    if not video.stamped or seconds < 0.5:
        return False
    try:
        video.container.seek(int((seconds + video.origin) / video.tick), stream=video.stream)
    except (av.error.FFmpegError, OSError):
        return False
    return True


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


def translated(error: Exception, opening: str = "") -> VideoError:
    """PyAV's, FFmpeg's and the system's errors as one of ours. `opening`: the path, while the
    file is being opened."""
    import av

    if isinstance(error, FileNotFoundError):
        return VideoError("missing_file", "the file is not there")
    if isinstance(error, PermissionError):
        if opening and "://" not in opening and not os.access(opening, os.R_OK):
            return VideoError("unreadable_file", "the file may not be read: check its permissions")
        if not opening:
            # FFmpeg says so of a place that it can't seek to.
            return VideoError("truncated", "the file breaks off: parts of it can't be reached")
        return VideoError(*_verdict(opening))
    if isinstance(error, IsADirectoryError):
        return VideoError("not_a_video", "this is a folder, not a file")
    if isinstance(error, MemoryError):
        return VideoError("out_of_memory", "a frame or a header asks for more memory than there is")
    if isinstance(error, (av.error.DecoderNotFoundError, av.error.BSFNotFoundError)):
        return VideoError("unknown_codec", NO_DECODER)
    if isinstance(error, (av.error.PatchWelcomeError, NotImplementedError)):
        return VideoError("unsupported", "the video uses a feature that FFmpeg doesn't decode")
    if not isinstance(error, (ValueError, EOFError, av.error.UnknownError, av.error.BugError)):
        reason = getattr(error, "strerror", None) or type(error).__name__
        return VideoError("unreadable_file", f"the file can't be read: {reason}")
    if opening:
        return VideoError(*_verdict(opening))
    return VideoError("decode_error", "the video's data is damaged: a frame can't be decoded")


def _checked(path: str) -> str:
    if Path(path).is_dir():
        raise IsADirectoryError(path)
    return str(Path(path).absolute())  # so that FFmpeg takes no `name:with:colons` for a protocol


def _verdict(path: str) -> tuple[str, str]:
    """What a file is that FFmpeg does not open: an error's class and a sentence."""
    import fsspec

    with fsspec.open(path, "rb") as file:
        head = file.read(4096)
        boxes = _boxes(file) if head[4:8] == b"ftyp" else []
    text = head.lstrip().lower()
    if not head:
        return "empty_file", "the file is empty (0 bytes)"
    if text.startswith(b"version https://git-lfs"):
        return "not_a_video", "this is a Git LFS pointer, not the video: fetch it with git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"{", b"[")):
        return "not_a_video", "this is a web page or an error message, not a video"
    if boxes and "moov" not in boxes:
        return "truncated", "the index (moov) is missing: the file was cut short"
    if boxes or head.startswith((b"\x1a\x45\xdf\xa3", b"RIFF", b"OggS")):
        return "bad_header", "the header is damaged or contradicts itself"
    if head.isascii() and b"\0" not in head:
        return "not_a_video", "this is text, not a video"
    return "not_a_video", "this is no video that FFmpeg knows"


def _boxes(file: Any) -> list[str]:
    """The names of the top-level boxes of an MP4 file that lie wholly in it."""
    names, position, size = [], 0, file.seek(0, 2)
    while position + 8 <= size:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8))
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))
        position += length if length >= 8 else size
        if position <= size:
            names.append(name.decode("latin-1"))
    return names
