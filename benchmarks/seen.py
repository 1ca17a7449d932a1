"""What is seen in a video of one moving shape: its colour and which way it moves, by plain rules
on pixels. No model has a say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.demo.shapes import COLOURS

# Of the furthest that any pixel is from the backdrop: beyond it stands the shape.
SHARE = 0.5
PIXELS = 8  # of the shape, at least, in a frame that counts
# Of the frame's side: what moves less, stands.
STILL = 0.08


@dataclass(frozen=True)
class Seen:
    colour: str | None  # a name of COLOURS; None: nothing stands out
    direction: str | None  # None: nothing moves
    begins: str | None  # the half of the frame, along the way it moves, that it begins in


def look(frames: NDArray[np.uint8]) -> Seen:
    """What frames (F, H, W, 3) show. The backdrop is the median of all pixels' medians over time,
    the shape what is far from it, its colour the nearest to the shape's median, and its motion the
    slope of the line through its centres."""
    values = frames.astype(np.float32)
    backdrop = np.median(np.median(values, 0).reshape(-1, 3), 0)
    far = np.linalg.norm(values - backdrop, axis=-1)
    shape = far > SHARE * np.quantile(far, 0.995)
    counts = shape.sum((1, 2))
    there = np.flatnonzero(counts >= PIXELS)
    if len(there) < len(frames) / 2:
        return Seen(None, None, None)
    median = np.median(values[shape], 0)
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(median - COLOURS[name])))

    height, width = shape.shape[1:]
    x = (shape.sum(1)[there] @ np.arange(width)) / counts[there] / width - 0.5
    y = (shape.sum(2)[there] @ np.arange(height)) / counts[there] / height - 0.5
    lines = [np.polyfit(there / len(frames), centres, 1) for centres in (x, y)]
    (dx, x0), (dy, y0) = lines
    if max(abs(dx), abs(dy)) < STILL:
        return Seen(colour, None, None)
    along, start, names = (dx, x0, "left right") if abs(dx) > abs(dy) else (dy, y0, "up down")
    back, forth = names.split()
    return Seen(colour, forth if along > 0 else back, forth if start > 0 else back)
