"""The device that a model runs on, by the name that a setting gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.base import StageError

if TYPE_CHECKING:
    import torch


def usable(device: str) -> torch.device:
    """The device of that name; `auto` is the GPU, where there is one. Raises StageError."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise StageError(f"device {device} can't be used: {first}") from error
    return found


def check_device(device: str) -> None:
    """Raises StageError where this machine has no such device. What is always there costs no
    import of torch."""
    if device not in ("auto", "cpu"):
        usable(device)
