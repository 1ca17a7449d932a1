"""Randomness by name: what is drawn at a visit depends on (seed, epoch, clip) and on nothing else.

So a clip gets the same noise and loses its caption at the same visits whichever process takes it,
in whatever batch, and whether or not the run was stopped before.
"""

from __future__ import annotations

import hashlib

import torch


def keyed(purpose: str, seed: int, epoch: int, clip: str, device: str = "cpu") -> torch.Generator:
    """The generator of one purpose at one visit: the same wherever and whenever it is asked for.
    A GPU's generator gives other numbers than the CPU's."""
    return torch.Generator(device).manual_seed(_key(purpose, seed, epoch, clip) & (2**63 - 1))


def chance(purpose: str, seed: int, epoch: int, clip: str) -> float:
    """One number from 0 to 1, evenly drawn: at a tenth of a generator's cost."""
    return (_key(purpose, seed, epoch, clip) >> 11) / 2**53


def _key(purpose: str, seed: int, epoch: int, clip: str) -> int:
    name = f"{purpose}/{seed}/{epoch}/{clip}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
