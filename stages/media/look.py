"""How a video shows, by its first key frame: PyAV tells its rotation of frames only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stages.media.picture import display_matrix, quarter_turned
from stages.media.video import Video, translated


@dataclass(frozen=True)
class Look:
    """How a video shows: its size upright, and what was turned for it."""

    width: int
    height: int
    rotation: int
    pix_fmt: str
    square: tuple[float, float]  # height and width upright, in square pixels


def first_picture(video: Video, packet: Any) -> Look:
    """Decodes one key frame, alone: that tells the rotation, which PyAV says of frames only, and
    that the codec works. Raises VideoError: decode_error."""
    import av

    codec = video.stream.codec_context
    pixel = float(video.stream.sample_aspect_ratio or 1) or 1.0
    frames: list[Any] = []
    if packet is not None:
        # A bare copy: on the packet itself an edit list may say that its frame is not shown.
        try:
            frames = codec.decode(av.Packet(bytes(packet))) or codec.decode(None)
        except av.error.FFmpegError as error:
            raise translated(error) from error
    if not frames:
        square = (codec.height, codec.width * pixel)
        return Look(codec.width, codec.height, 0, codec.pix_fmt or "", square)
    frame = frames[0]
    width, height, square = frame.width, frame.height, (frame.height, frame.width * pixel)
    if quarter_turned(display_matrix(frame)):
        width, height, square = height, width, square[::-1]
    return Look(width, height, frame.rotation, frame.format.name, square)
