"""A decoded frame as RGB pixels of the size asked: turned, squared, scaled, fitted.

swscale, bicubic, in one pass, to 8-bit full-range RGB with chroma as fine as luma. By the stream's
own matrix and range; where it states none BT.601, limited, as FFmpeg, decord and torchcodec have it
for every size. Chroma lies where the stream says; H.264 and HEVC that do not say it: left. Not
done: tone mapping of HDR, deinterlacing, conversion of primaries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stages.media.video import VideoError

Pixels = NDArray[np.uint8]
# Sides of a picture that is still one: the longer over the shorter.
LONGEST = 32


class Upright:
    """Decoded frames as RGB pictures, turned as their display matrix says, of the size that
    `size` gives for their own (height, width as shown, of square pixels)."""

    def __init__(self, size: Callable[[float, float], tuple[int, int]]) -> None:
        from av.video.reformatter import VideoReformatter

        self._size = size
        self._scaler = VideoReformatter()  # kept: setting swscale up costs more than a frame

    def __call__(self, frame: Any, pixel: float = 1.0) -> Pixels:
        """`frame`: an av.VideoFrame, or RGB uint8 [height, width, 3], which is upright already.
        `pixel`: width over height of the frame's pixels. Raises VideoError: extreme_shape, for
        a frame that is a mere line, whose scaled picture would take gigabytes."""
        import av
        from av.video.reformatter import ColorRange, Interpolation

        if isinstance(frame, np.ndarray):
            frame = av.VideoFrame.from_ndarray(frame, "rgb24")
        matrix = display_matrix(frame)
        swap = quarter_turned(matrix)
        height, width = frame.height, frame.width * pixel
        if max(height, width) > LONGEST * min(height, width):
            size_shown = f"{frame.width} x {frame.height} pixels"
            raise VideoError("extreme_shape", f"the picture is no picture: it is {size_shown}")
        size = self._size(width, height)[::-1] if swap else self._size(height, width)
        rgb = self._scaler.reformat(
            frame,
            height=size[0],
            width=size[1],
            format="gbrp",  # planes: the same pixels as rgb24, in half the time
            interpolation=Interpolation.BICUBIC
            | Interpolation.ACCURATE_RND
            | Interpolation.FULL_CHR_H_INT,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        pixels: Pixels = rgb.to_ndarray().astype(np.uint8, copy=False)
        return turned(pixels, matrix)


def short_side(pixels: int) -> Upright:
    """Whole pictures whose shorter side has this many pixels."""

    def size(height: float, width: float) -> tuple[int, int]:
        ratio = pixels / min(height, width)
        return max(1, round(height * ratio)), max(1, round(width * ratio))

    return Upright(size)


def longest_side(pixels: int) -> Upright:
    """Whole pictures whose longer side has at most this many pixels: none is enlarged."""

    def size(height: float, width: float) -> tuple[int, int]:
        ratio = min(1.0, pixels / max(height, width))
        return max(1, round(height * ratio)), max(1, round(width * ratio))

    return Upright(size)


class Fit:
    """Decoded frames as RGB pictures of one size: `crop` fills it and cuts the rest off, centred;
    `pad` shows all of the frame on black; `squash` ignores its proportions."""

    def __init__(self, height: int, width: int, how: Literal["crop", "pad", "squash"]) -> None:
        self.height, self.width, self.how = height, width, how
        self._upright = Upright(self._size)

    def __call__(self, frame: Any, pixel: float = 1.0) -> Pixels:
        picture = self._upright(frame, pixel)
        height, width = picture.shape[:2]
        top, left = (height - self.height) // 2, (width - self.width) // 2
        inner = picture[max(top, 0) :, max(left, 0) :][: self.height, : self.width]
        out = np.zeros((self.height, self.width, 3), np.uint8)
        y, x = max(-top, 0), max(-left, 0)
        out[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
        return out

    def _size(self, height: float, width: float) -> tuple[int, int]:
        if self.how == "squash":
            return self.height, self.width
        choose = max if self.how == "crop" else min
        ratio = choose(self.height / height, self.width / width)
        return max(1, round(height * ratio)), max(1, round(width * ratio))


def turned(picture: Pixels, matrix: tuple[int, ...] | None) -> Pixels:
    """A picture as its display matrix wants it shown: quarter turns and mirrorings, exactly
    (ISO/IEC 14496-12, 6.2.2: x' = a x + c y, y' = b x + d y, of the matrix a b u c d v x y w)."""
    if matrix is None:
        return picture
    a, b, _, c, d = matrix[:5]
    if quarter_turned(matrix):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def display_matrix(frame: Any) -> tuple[int, ...] | None:
    """The nine numbers that say how a decoded frame is to be turned; None: as it is."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if data is None else struct.unpack("=9i", bytes(data))


def quarter_turned(matrix: tuple[int, ...] | None) -> bool:
    """Whether width and height change places."""
    return matrix is not None and abs(matrix[1]) + abs(matrix[3]) > abs(matrix[0]) + abs(matrix[4])
