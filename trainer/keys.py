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
    name = f"{purpose}/{seed}/{epoch}/{clip}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
    return torch.Generator(device).manual_seed(key & (2**63 - 1))
