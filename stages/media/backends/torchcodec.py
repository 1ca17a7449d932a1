"""torchcodec 0.13: PyTorch's decoder, on the system's FFmpeg 4 to 8 (extra `torchcodec`).

Frames are asked for by number, and told by their times: by time, it finds them by how long packets
last, which is wrong where the rate varies. PyAV reads in its place: MPEG-TS and MPEG-PS, whose
first frames it loses; AVI, whose frames it puts in decoding order; mirrored pictures, which it does
not turn; full-range video but for 8-bit H.264 and HEVC, which it takes for limited; the ends of
open groups of pictures and what is coded with intra refresh, where it gives no frame or another.
Damage it conceals without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stages.media.backends.base import Picture
from stages.media.backends.others import Unable, look, or_pyav, source
from stages.media.video import Budget

REFUSED = ("mpegts", "mpeg", "avi")
FULL = 2  # AVCOL_RANGE_JPEG


def alone(path: str, times: Sequence[float], budget: Budget, threads: int = 1) -> Iterator[Picture]:
    """The frames at `times`, a `base.Backend`. Raises Unable."""
    seen = look(path, times, budget, REFUSED)
    form = seen.frame.format.name
    if seen.frame.color_range == FULL and form.startswith("yuv") and not form.startswith("yuvj"):
        raise Unable("it takes full-range colours for limited ones")
    with source(path) as file:
        decoder = _decoder(file, seen.stream, threads)
        for number, time in zip(seen.numbers, times, strict=True):
            budget.check()
            frame = _frame(decoder, number)
            if abs(frame.pts_seconds - seen.origin - time) > seen.tick / 2:
                raise Unable(f"it gives another frame for {time:.3f} s")
            yield Picture(frame.data.numpy(), seen.pixel)


decode = or_pyav(alone)


def _decoder(file: Any, stream: int, threads: int) -> Any:
    from torchcodec.decoders import VideoDecoder

    try:
        return VideoDecoder(
            file, stream_index=stream, dimension_order="NHWC", num_ffmpeg_threads=threads
        )
    except (RuntimeError, ValueError) as error:
        raise Unable(str(error)) from error


def _frame(decoder: Any, number: int) -> Any:
    try:
        return decoder.get_frame_at(number)
    except (RuntimeError, IndexError) as error:
        raise Unable(str(error)) from error
