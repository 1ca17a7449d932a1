"""What the loop tells of itself: loss, speed, waiting, memory, and how long it will take yet."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

GIB = 2**30


class Meter:
    """Of the steps since it was last read, of `passes` forward passes each: `world` processes go on
    behind `step`, to `steps`."""

    def __init__(
        self, device: torch.device, world: int, step: int, steps: int, passes: int = 1
    ) -> None:
        self._device, self._world, self._passes = device, world, passes
        self._steps = steps
        # The first step compiles, and sets the device up: it says nothing of those to come.
        self._first, self._warm = step + 1, 0.0
        self._reset(step)

    def _reset(self, step: int) -> None:
        self._step, self._began, self._waited = step, time.perf_counter(), 0.0
        self._losses: list[Tensor] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is no training does not count as such: looks at it, and checkpoints."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def add(self, losses: Tensor) -> None:
        """Those of a forward pass, of all processes."""
        self._losses.append(losses.flatten())
        if not self._warm and len(self._losses) == self._passes:
            self._warm = time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """The values by their names, after `step` steps. What is left is by all that has passed
        since the first of them, looks and checkpoints as well."""
        losses = torch.cat(self._losses)
        mean = losses.mean().item()  # only then has a GPU done what it was told
        now = time.perf_counter()
        elapsed = now - self._began
        speed = len(losses) / elapsed
        own = elapsed / (step - self._step)
        since = step - self._first
        pace = (now - self._warm) / since if since else own
        values = {
            "loss": mean,
            "clips_per_second": speed,
            "clips_per_second_each": speed / self._world,
            "step_seconds": own,
            "data_wait": self._waited / elapsed,
            "memory_gib": peak_memory(self._device) / GIB,
            "seconds_left": pace * (self._steps - step),
        }
        self._reset(step)
        return values


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of its GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def line(step: int, steps: int, values: dict[str, Any], world: int = 1) -> str:
    """For the console."""
    each = f" ({values['clips_per_second_each']:.1f} each)" * (world > 1)
    left = f"  {span(values['seconds_left'])} left" * (step < steps)
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        f"grad {values['grad_norm']:.3f}  {values['clips_per_second']:.1f} clips/s{each}  "
        f"{values['step_seconds']:.3g} s/step  data wait {values['data_wait']:.0%}  "
        f"{values['memory_gib']:.1f} GiB  epoch {values['epoch']}{left}"
    )


def span(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 05 min`, `2 d 4 h`"""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"
