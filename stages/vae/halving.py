"""Batches that are halved where they don't fit a device's memory, so that no clip is lost to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from stages.base import Failed, alive

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
T = TypeVar("T")


class Halving:
    """Runs batches for one model, and keeps to the size that fitted for as long as it lives."""

    def __init__(self) -> None:
        # Items of a batch, by their shape; nothing of other shapes has been too large yet.
        self.most: dict[Hashable, int] = {}

    def __call__(
        self,
        run: Callable[[Any], Iterable[R]],
        items: Sequence[Any] | torch.Tensor,
        size: int | None = None,
        shape: Hashable = None,
    ) -> list[R | Failed]:
        """`run` on slices of `items` (a list, or a tensor along its first axis) of at most `size`:
        one result per item, in order. An item that does not fit alone is Failed: out_of_memory.
        `shape`: what the memory that an item takes depends on."""
        results: list[R | Failed] = []
        full = min(size or len(items), self.most.get(shape, len(items)))
        now = full
        while len(results) < len(items):
            part = items[len(results) : len(results) + now]
            error = _short_of_memory(run, part, results)
            alive()
            if error is None:
                if now < full:
                    self.most[shape] = full = now
            elif len(part) > 1:
                now = (len(part) + 1) // 2
            else:
                results.append(Failed("out_of_memory", error))
                now = full  # it may have been this one alone
        return results


def _short_of_memory(
    run: Callable[[Any], Iterable[R]], part: Any, results: list[R | Failed]
) -> str | None:
    """Adds what `run` gives; where memory ran out, nothing, and the message is returned: by then
    the traceback, which would keep the tensors alive, is gone."""
    try:
        results += run(part)
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).strip().splitlines() or ["out of memory"]
    free_memory()
    return f"it does not fit the memory: {message[0]:.200}"


def whole(parts: Sequence[R | Failed], join: Callable[[list[R]], T]) -> T | Failed:
    """The parts of one clip joined; the first Failed where there is one."""
    sound = [part for part in parts if not isinstance(part, Failed)]
    return next((part for part in parts if isinstance(part, Failed)), None) or join(sound)


def is_out_of_memory(error: Exception) -> bool:
    """A device's allocator, its libraries' own, or the CPU's: most have no class for it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    if "DefaultCPUAllocator" in text and "memory" in text:
        return True
    return "STATUS_ALLOC_FAILED" in text or "CUDA error: out of memory" in text


def free_memory() -> None:
    """Gives back what the device's allocator keeps for later."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
