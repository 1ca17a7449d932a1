"""Stored latents as a model wants them: a fresh sample of the posterior, normalised."""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifests.shards import Embedding, Latent, LatentSpec, ShardError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def stored_channels(spec: LatentSpec) -> int:
    return spec.channels * (2 if spec.moments else 1)


def dtype_of(row: Latent | Embedding, name: str) -> torch.dtype:
    """Of the values as stored; `name` is what an error calls them.

    Raises ShardError where the bytes are not what shape and dtype say.
    """
    if row.dtype not in DTYPES:
        raise ShardError(f"{name} are of type {row.dtype}: {', '.join(DTYPES)} can be read")
    dtype = DTYPES[row.dtype]
    stated = math.prod(row.shape) * dtype.itemsize
    if row.data.nbytes != stated:
        raise ShardError(
            f"{name} are damaged: {row.data.nbytes} bytes stored, while {row.dtype} of shape "
            f"{list(row.shape)} takes {stated}: `vidpipe verify` tells which files are damaged, "
            "`vidpipe verify --repair` has them made again"
        )
    return dtype


def stored(row: Latent | Embedding, name: str) -> Tensor:
    """The values as stored, of `row.shape`."""
    return torch.frombuffer(bytearray(row.data), dtype=dtype_of(row, name)).view(row.shape)


class Pool:
    """Memory of batches, used again when nobody has the batch any more: memory that is new costs as
    much time as reading into it. No more than `most` bytes wait for their use."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: dict[int, deque[NDArray[np.uint8]]] = defaultdict(deque)
        self._waiting = 0

    def take(self, size: int) -> Tensor:
        """`size` bytes of any value."""
        try:
            whole = self._free[size].pop()
            self._waiting -= size
        except IndexError:
            whole = np.empty(size, np.uint8)
        lent = whole[:]  # views of it and tensors keep it, and not `whole`
        weakref.finalize(lent, self._back, whole).atexit = False
        return torch.from_numpy(lent)

    def _back(self, whole: NDArray[np.uint8]) -> None:
        # At any moment, in any thread: so without a lock, and the sum may be a little off.
        if self._waiting + whole.nbytes <= self._most:
            self._waiting += whole.nbytes
            self._free[whole.nbytes].append(whole)


class Stack:
    """Memory for the values of `count` clips of one shape, side by side: a batch. They are read to
    their places in it, by any thread, or copied there where they were read elsewhere."""

    def __init__(self, count: int, pool: Pool) -> None:
        self._count, self._pool = count, pool
        self._lock = threading.Lock()
        self._size = 0  # bytes of a clip, as of the first one that came
        self._memory: Tensor | None = None  # made when it comes
        self._bytes = memoryview(b"")  # the same
        self._filled: set[int] = set()

    def room(self, number: int, size: int) -> memoryview | None:
        """Where `size` bytes of the clip of this number go; None where those before were of
        another size."""
        with self._lock:
            if self._memory is None:
                self._make(size)
            if size != self._size:
                return None
            self._filled.add(number)
            return self._bytes[number * size : (number + 1) * size]

    def values(self, rows: Sequence[Latent], names: Sequence[str]) -> Tensor:
        """The values as stored: (B, C or 2C, F, H, W). `names` are what errors call the clips."""
        dtypes = [dtype_of(row, name) for row, name in zip(rows, names, strict=True)]
        size, dtype = rows[0].data.nbytes, dtypes[0]
        mixed = len(set(dtypes)) > 1
        if mixed:
            # Clips encoded at another time may be of another type: then float32 holds them all.
            rows = [_as_float32(row, name) for row, name in zip(rows, names)]
            size, dtype = rows[0].data.nbytes, torch.float32
        if mixed or size != self._size:
            self._make(size)
        for number, row in enumerate(rows):
            # One thread's plain copy: torch would split it among all, which the model is using.
            if number not in self._filled:
                self._bytes[number * size : (number + 1) * size] = row.data.cast("B")
        assert self._memory is not None
        return self._memory.view(dtype).view(len(rows), *rows[0].shape)

    def _make(self, size: int) -> None:
        self._size, self._filled = size, set()
        self._memory = self._pool.take(self._count * size)
        self._bytes = self._memory.numpy().data


def pinned(values: Tensor) -> Tensor:
    """A copy in page-locked memory, which a GPU reads while it computes.

    torch makes each such block as large as the next power of two, and keeps it for the next one. So
    batches lie there that are ready, and not all that is held ahead of them.
    """
    made = torch.empty_like(values, pin_memory=True)
    # One thread's plain copy, as above.
    made.view(torch.uint8).numpy()[...] = values.view(torch.uint8).numpy()
    return made


def _as_float32(row: Latent, name: str) -> Latent:
    return replace(row, data=stored(row, name).float().numpy().reshape(-1).data, dtype="float32")


def posterior_sample(
    values: Tensor, spec: LatentSpec, generators: Sequence[torch.Generator]
) -> Tensor:
    """Normalised latents (B, C, F, H, W) float32 of stored ones, by each clip's own generator.

    (mean + std x noise - shift) x scale, per channel. Where the spec says that no moments are
    stored, the stored latents take the sample's place. `values` are on the generators' device.
    """
    x = values.float()
    if spec.moments:
        mean, logvar = x.chunk(2, 1)
        noise = torch.empty_like(mean, memory_format=torch.contiguous_format)
        for one, generator in zip(noise, generators, strict=True):
            one.normal_(generator=generator)
        x = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise  # diffusers' bounds
    shift, scale = (x.new_tensor(v).view(-1, 1, 1, 1) for v in (spec.shift, spec.scale))
    return (x - shift) * scale
