"""What decodes chosen frames of a video. Which ones is decided before, on its packets' times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from stages.media.video import Budget

# Seconds by which two roundings of one timestamp may differ.
SAME = 1e-6


class Picture(NamedTuple):
    """A decoded frame, as `stages.media.picture` takes it: an av.VideoFrame with the width over
    the height of its pixels, or upright RGB uint8 [height, width, 3] of square pixels."""

    frame: Any
    pixel: float = 1.0


class OtherFrames(Exception):
    """The decoder gives no frame for a time at which the packets promise one: they are fields, or
    lack what they are made from. The frames are then chosen among those that it does give."""


class Backend(Protocol):
    def __call__(
        self, path: str, times: Sequence[float], budget: Budget, threads: int = 1
    ) -> Iterator[Picture]:
        """For each of `times` the frame that is shown from then on, in that order.

        `path`: a file or an fsspec URL. `times`: when frames appear, seconds, as
        `stages.media.timeline` tells them: ascending, distinct, at least one. Frames come
        one by one, as they are decoded, so that no more than one has to be held.

        Raises VideoError: damage in what the frames are made from, with PyAV and as far as the
        other decoders tell; damage elsewhere is not looked at. Raises OtherFrames.
        """
        ...
