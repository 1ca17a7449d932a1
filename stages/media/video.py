"""One video opened with PyAV: its stream, its clock, its packets, its faults in words.

The clock: seconds since the start of the container (`ffmpeg -ss` counts so), from presentation
timestamps. Packets that an edit list hides are not shown, so they are not counted.
"""

from __future__ import annotations

import os
import struct
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field

from stages.base import Speed, StageSettings, alive

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
# A day at 60 frames a second. Each takes some 150 bytes while times are worked out.
MOST_PACKETS = 60 * 60 * 60 * 24
# Failures of reading a video that may pass: a disk that gives no answer, a machine under load.
READING_MAY_PASS = ("unreadable_file", "decode_timeout")
SIGN_OF_LIFE = 1.0  # seconds between two of them within a clip


class VideoError(Exception):
    """A video that cannot be used. `error` is its class in words with underscores, the text a
    sentence for a person."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


class DecodingSettings(StageSettings):
    """What one clip may cost, in every stage that opens videos."""

    decode_seconds: Speed[float] = Field(
        120.0, gt=0, description="a clip that takes longer to read is a failure"
    )
    max_pixels: Speed[int] = Field(
        40_000_000, ge=1, description="a clip of larger frames is a failure; 8K has 35 million"
    )


class Budget:
    """What one clip may take, however often it is opened: seconds from now on, pixels a frame.

    With the packets that are counted (MOST_PACKETS) and a single decoding thread that bounds the
    memory: a frame of P pixels takes 1.5 P bytes (8-bit 4:2:0) to 6 P (16-bit 4:4:4), and a
    decoder holds up to 17 of them where the codec asks for it, mostly two or three.
    """

    def __init__(self, settings: DecodingSettings | None = None, stage: str = "") -> None:
        settings = settings or DecodingSettings()
        self.seconds, self.pixels = settings.decode_seconds, settings.max_pixels
        self._prefix = f"{stage}." if stage else ""
        self._heard = self._start = time.monotonic()

    def check(self) -> None:
        """Between packets: a sign of life. Raises VideoError once the time is up."""
        now = time.monotonic()
        if now - self._heard > SIGN_OF_LIFE:
            self._heard = now
            alive()
        if now - self._start > self.seconds:
            raise VideoError(
                "decode_timeout",
                f"reading it took more than {self.seconds:g} s ({self._prefix}decode_seconds)",
            )

    def left(self) -> float:
        """Seconds, at least a few: what has begun gets the chance to be told apart."""
        return max(0.1, self.seconds - (time.monotonic() - self._start))

    def fits(self, width: int, height: int) -> None:
        """Raises VideoError for a frame that is too large."""
        if width * height > self.pixels:
            raise VideoError(
                "frame_too_large",
                f"a frame has {width} x {height} pixels, more than {self._prefix}max_pixels = "
                f"{self.pixels}",
            )


@dataclass
class Video:
    """An open video: PyAV's container and the stream that FFmpeg holds for the best one."""

    container: Any
    stream: Any
    budget: Budget
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
def opened(path: str, threads: int = 1, budget: Budget | None = None) -> Iterator[Video]:
    """The video at a local path or an fsspec URL. Raises VideoError, within the block too."""
    import av
    import fsspec
    from av.stream import Disposition

    budget = budget or Budget()
    with ExitStack() as stack:
        try:
            remote = "://" in path
            source = stack.enter_context(fsspec.open(path, "rb")) if remote else _checked(path)
            # FFmpeg would decode some 20 frames to guess a rate that timestamps tell.
            options = {
                "fpsprobesize": "0",
                "max_pixels": str(budget.pixels),
                "format_whitelist": FORMATS,
                "protocol_whitelist": "file",  # nothing that it opens by itself is remote
            }
            container = av.open(
                source, options=options, metadata_errors="replace", timeout=budget.left()
            )
            stack.enter_context(container)
        except (OSError, av.error.FFmpegError) as error:
            budget.check()
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
        budget.fits(codec.width, codec.height)
        # A damaged frame is an error, not a grey picture. A size may also change within a stream.
        codec.options = {"err_detect": "explode", "max_pixels": str(budget.pixels)}
        raw = container.format.name in ("avi", "h264", "hevc", "m4v", "mpegvideo")
        try:
            yield Video(
                container,
                stream,
                budget,
                stamped=not raw,
                tick=float(stream.time_base),
                origin=(container.start_time or 0) / 1_000_000,
            )
        except (OSError, av.error.FFmpegError) as error:
            budget.check()
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
    line, tick, origin = Timeline(), video.tick, video.origin
    shown, final = array("q"), (0, 0)  # eight bytes a frame, as files may claim many
    last: int | None = None
    for packet in packets(video, video.stream):
        if not packet.size:  # the flush at the end, and AVI's "nothing new here"
            continue
        line.packets += 1
        if line.packets > MOST_PACKETS:
            raise VideoError("too_many_frames", f"the video has more than {MOST_PACKETS} frames")
        last = stamp(video, packet, last)
        if packet.is_keyframe:
            refuse_encrypted(packet)
            line.first_key = line.first_key or packet
        if not packet.is_discard:
            one = (last, packet.duration or 0)
            final = max(final, one) if shown else one
            shown.append(last)
        # No frame is decoded after it is shown: past `end`, none from before it can follow.
        if end is not None and packet.dts is not None and packet.dts * tick - origin > end + 0.5:
            break
    line.times = [pts * tick - origin for pts in sorted(shown)]
    if shown:
        line.end = line.times[-1] + lasting(final[1] * tick, line.times, video)
    return line


def packets(video: Video, *streams: Any) -> Iterator[Any]:
    """Packets as the file has them, of these streams (none: of all), and the flush at the end.
    Raises VideoError: decode_timeout."""
    while True:
        try:
            for packet in video.container.demux(*streams):
                video.budget.check()
                yield packet
            return
        except IndexError:  # PyAV on a packet of a stream that began later (MPEG-TS): not ours
            video.budget.check()


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
            return VideoError("permission", "the file may not be read: check its rights")
        if not opening:
            # FFmpeg says so of a place that it can't seek to.
            return VideoError("truncated", "the file breaks off: parts of it can't be reached")
        return VideoError(*_verdict(opening))
    if isinstance(error, IsADirectoryError):
        return VideoError("not_a_video", "this is a folder, not a file")
    if isinstance(error, MemoryError):
        return VideoError("bad_header", "a frame or a header asks for more memory than there is")
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
