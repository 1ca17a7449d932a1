"""The bucket that a clip goes to: nearest in shape, of those that it fills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.media.sampling import Bucket


@dataclass(frozen=True)
class Filling:
    """What a clip has for a bucket: frames at the sampling asked for, and the size of its picture
    as shown, in square pixels."""

    bucket: Bucket
    frames: int
    height: float
    width: float

    @property
    def lack(self) -> float:
        """How many times over what there is would be needed; 1 and less: it is filled."""
        b = self.bucket
        sides = max(b.height / max(1, round(self.height)), b.width / max(1, round(self.width)))
        return max(sides, b.frames / self.frames if self.frames else math.inf)

    @property
    def skew(self) -> float:
        """By how much the proportions differ."""
        shown, asked = self.width / self.height, self.bucket.width / self.bucket.height
        return round(abs(math.log(shown / asked)), 6)

    @property
    def kept(self) -> int:
        """Pixels of all frames."""
        return self.bucket.frames * self.bucket.height * self.bucket.width


def chosen(fillings: Sequence[Filling]) -> Bucket | None:
    """Of the buckets that are filled without being enlarged the nearest in proportions, then the
    one that keeps most; None where none is filled."""
    filled = [one for one in fillings if one.lack <= 1]
    return min(filled, key=lambda one: (one.skew, -one.kept)).bucket if filled else None


def lacking(fillings: Sequence[Filling]) -> str:
    """A sentence on what the clip lacks for the bucket that it comes closest to."""
    one = min(fillings, key=lambda one: (one.lack, one.skew))
    shown = f"{one.frames} frames of {round(one.height)} x {round(one.width)} pixels"
    return f"the clip has {shown}, and the closest bucket takes {one.bucket}, not enlarged"
