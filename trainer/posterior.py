"""Stored latents as a model wants them: a fresh sample of the posterior, normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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


def stacked(rows: Sequence[Latent], names: Sequence[str], pin: bool = False) -> Tensor:
    """The values of clips of one shape as stored: (B, C or 2C, F, H, W)."""
    dtypes = [dtype_of(row, name) for row, name in zip(rows, names, strict=True)]
    # Clips encoded at another time may be of another type: then float32 holds them all.
    dtype = dtypes[0] if len(set(dtypes)) == 1 else torch.float32
    values = torch.empty((len(rows), *rows[0].shape), dtype=dtype, pin_memory=pin)
    if len(set(dtypes)) > 1:
        for one, row, name in zip(values, rows, names):
            one.copy_(stored(row, name))
        return values
    # One thread's plain copy: torch would split it among all, which the model is using.
    target = values.view(-1).view(torch.uint8).numpy().data
    size = rows[0].data.nbytes
    for number, row in enumerate(rows):
        target[number * size : (number + 1) * size] = row.data.cast("B")
    return values


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
