"""The rules on pixels that judge samples, on scenes as they are drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.learn import crossing
from benchmarks.seen import Seen, look
from stages.demo.shapes import COLOURS, DIRECTIONS, Frame, Scene, frame

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def frames(scene: Scene) -> Frame:
    return np.stack([frame(scene, number / 4, (64, 64)) for number in range(16)])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_colour_and_way_of_a_crossing_are_seen(direction: str) -> None:
    told = [each for each in map(crossing, range(400)) if each.direction == direction]
    assert {each.colour for each in told} == set(COLOURS)
    for each in told[:40]:
        assert look(frames(each)) == Seen(each.colour, direction, OPPOSITE[direction])


def test_backwards_it_is_the_other_way() -> None:
    for each in map(crossing, range(12)):
        seen = look(frames(each)[::-1])
        assert seen == Seen(each.colour, OPPOSITE[each.direction], each.direction)


def test_what_stands_has_no_way() -> None:
    still = replace(crossing(0), speed=0.0)
    assert look(np.broadcast_to(frames(still)[:1], (16, 64, 64, 3))).direction is None


def test_noise_is_no_motion() -> None:
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8) for _ in range(20)]
    assert {look(each).direction for each in noise} == {None}
