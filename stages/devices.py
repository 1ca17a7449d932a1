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
    if device in ("auto", "cpu"):
        return
    import torch

    if not device.startswith("cuda"):
        usable(device)
        return
    # Counted, not tried: what this process once had of a GPU it keeps, and where a GPU is for one
    # process alone, the worker would not get it.
    try:
        number = torch.device(device).index or 0
    except RuntimeError as error:
        raise StageError(f"device {device} can't be used: {str(error).splitlines()[0]}") from error
    if number >= (there := torch.cuda.device_count()):
        raise StageError(f"device {device} can't be used: PyTorch finds {there} GPUs here")
