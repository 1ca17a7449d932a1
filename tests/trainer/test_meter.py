"""What the loop tells of itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainer import meter
from trainer.meter import Meter, line, span


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One that stands where its one value says."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    return now


def test_speed_is_that_of_training_and_what_is_left_that_of_all(clock: list[float]) -> None:
    made = Meter(torch.device("cpu"), 2, 10, 30)
    for _ in range(4):
        with made.waiting():
            clock[0] += 0.25
        clock[0] += 0.75
        made.add(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))  # of two processes
    with made.aside():
        clock[0] += 6
    values = made.read(14)
    assert values.pop("memory_gib") > 0.05
    assert values == {
        "loss": 3.0,
        "clips_per_second": 4.0,
        "clips_per_second_each": 2.0,
        "step_seconds": 1.0,
        "data_wait": 0.25,
        "seconds_left": 9 / 3 * 16,
    }
    clock[0] += 2
    made.add(torch.tensor([5.0]))
    again = made.read(15)
    assert (again["loss"], again["step_seconds"], again["data_wait"]) == (5.0, 2.0, 0.0)
    assert math.isclose(again["seconds_left"], 11 / 4 * 15)


def test_a_first_step_that_takes_long_does_not_count_for_those_to_come(clock: list[float]) -> None:
    made = Meter(torch.device("cpu"), 1, 0, 100, passes=2)
    left = []
    for step in range(1, 4):
        for _ in range(2):
            clock[0] += 45 if step == 1 else 0.5
            made.add(torch.tensor([1.0]))
        left.append(made.read(step)["seconds_left"])
    assert left == [90 * 99, 98, 97]


def test_the_line() -> None:
    values: dict[str, Any] = {
        "loss": 0.5,
        "lr": 1e-3,
        "grad_norm": 2.0,
        "clips_per_second": 12.0,
        "clips_per_second_each": 6.0,
        "step_seconds": 0.3333,
        "data_wait": 0.013,
        "memory_gib": 1.25,
        "epoch": 3,
        "seconds_left": 180.0,
    }
    told = line(10, 60, values, 2)
    assert told == (
        "step 10/60  loss 0.5000  lr 1.00e-03  grad 2.000  12.0 clips/s (6.0 each)  0.333 s/step  "
        "data wait 1%  1.2 GiB  epoch 3  3 min left"
    )
    last = line(60, 60, values)
    assert "each" not in last and "left" not in last


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        *((0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min")),
        *((7500, "2 h 05 min"), (200_000, "2 d 7 h")),
    ],
)
def test_spans(seconds: float, told: str) -> None:
    assert span(seconds) == told
