"""One video opened with PyAV: its stream, its clock, its packets, its faults in words.

The clock: seconds since the start of the container (`ffmpeg -ss` counts so), from presentation
timestamps. When each frame is shown: `stages.media.timeline`.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.base import Speed, StageSettings, alive

# Ticks up to this are roundings (Matroska 1 ms, QuickTime 1/600 s); longer ones count frames.
ROUNDED_TICK = 0.002
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

    With the packets that are counted (`timeline.MOST_PACKETS`) and a single decoding thread that
    bounds the memory: a frame of P pixels takes 1.5 P bytes (8-bit 4:2:0) to 6 P (16-bit 4:4:4),
    and a decoder holds up to 17 of them where the codec asks for it, mostly two or three.
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

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time that is spent on something else than reading."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._start += time.monotonic() - began

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


def seek(video: Video, seconds: float) -> bool:
    """To the key frame before `seconds`. False where that is the beginning, or can't be done."""
    import av

    # MPEG-PS tells few times; those between come out otherwise after a seek.
    if not video.stamped or video.container.format.name == "mpeg" or seconds < 0.5:
        return False
    try:
        video.container.seek(int((seconds + video.origin) / video.tick), stream=video.stream)
    except (av.error.FFmpegError, OSError):
        return False
    return True


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
