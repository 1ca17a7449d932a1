"""How latents are made by script, after vid_gen: the first 4 s decoded whole at native size,
squashed to a square, through the VAE in chunks of 16 frames, one file a clip, named by a counter.
A bad video ends it."""

from __future__ import annotations

import math
from pathlib import Path

import decord
import numpy as np
import torch
from diffusers import AutoencoderKL

FPS, FRAMES, CHUNK = 16, 64, 16


def encode(videos: Path, out: Path, vae: AutoencoderKL, size: int) -> int:
    """One device's share of the clips; returns how many."""
    count = 0
    for path in sorted(videos.iterdir()):
        reader = decord.VideoReader(str(path))
        need = math.ceil(FRAMES / FPS * reader.get_avg_fps())
        frames = torch.from_numpy(reader.get_batch(range(need)).asnumpy())
        frames = frames[np.linspace(0, need - 1, FRAMES, dtype=int)]
        x = frames.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear")
        with torch.no_grad():
            latent = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(CHUNK)])
        torch.save({"latent": latent, "caption": "", "length": FRAMES}, out / f"{count}.pt")
        count += 1
    return count
