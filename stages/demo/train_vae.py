"""Trains the demo's VAE: `python -m stages.demo.train_vae --out DIR --steps N --seed S`.

The defaults made the weights in `stages/demo/vae/`: about 20 CPU minutes.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import AutoencoderKL

from stages.demo.shapes import LONGEST, Frame, frame, scene

SIDE = 64  # pixels of a training frame, and of the demo's clips
UNSEEN = 2**40  # seeds of training scenes start here; the demo's and the tests' lie far below
BATCH = 16
PEAK = 3e-3  # learning rate
# Against losses that are means over pixels in [-1, 1]. At 1e-6 two of the four channels collapse to
# the prior: noise that the decoder ignores, and that a diffusion model would have to learn.
KL = 1e-7
RESAMPLERS = ("AREA", "BILINEAR", "BICUBIC")


def new_vae() -> Any:
    """8x down, 4 channels, 0.47 M parameters. Narrow where the picture is large: at 64x64 pixels
    those layers take nearly all of the time."""
    channels = (16, 24, 32, 48)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def training_frame(seed: int) -> Frame:
    """One moment of one scene, uint8 (SIDE, SIDE, 3): half of them as drawn, half as a decoder
    gives them, larger, with the colour at half resolution, and resized."""
    draw = np.random.default_rng([seed, 30])
    moment = draw.uniform(0, LONGEST)
    if draw.random() < 0.5:
        return frame(scene(seed), moment, (SIDE, SIDE))
    picture = av.VideoFrame.from_ndarray(frame(scene(seed), moment, (96, 96)), format="rgb24")
    resized = picture.reformat(format="yuv420p").reformat(
        SIDE, SIDE, "rgb24", interpolation=RESAMPLERS[draw.integers(len(RESAMPLERS))]
    )
    return np.asarray(resized.to_ndarray(), dtype=np.uint8)


def batch(first: int, count: int) -> torch.Tensor:
    """Frames of scenes `first`... as float32 in [-1, 1], (count, 3, SIDE, SIDE)."""
    frames = np.stack([training_frame(seed) for seed in range(first, first + count)])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def psnr(given: torch.Tensor, made: torch.Tensor) -> float:
    """dB over all pixels of pictures in [-1, 1]."""
    error = (given - made.clamp(-1, 1)).square().mean().item()
    return float(10 * np.log10(4 / error))


def train(steps: int, seed: int) -> Any:
    """Returns the averaged weights (EMA), which reconstruct better than the last ones."""
    torch.manual_seed(seed)
    vae = new_vae()
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, steps, pct_start=0.05)
    checked = batch(UNSEEN - 64, 64)
    start = time.monotonic()
    for step in range(steps):
        pictures = batch(UNSEEN + (seed * 100_000 + step) * BATCH, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            made = vae.decode(posterior.sample()).sample
        error = made.float() - pictures
        loss = error.square().mean() + 0.2 * error.abs().mean() + KL * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), vae.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        if (step + 1) % 200 == 0:
            with torch.no_grad():
                quality = psnr(checked, average(checked).sample)
            seconds = time.monotonic() - start
            print(f"step {step + 1}  loss {loss.item():.4f}  {quality:.2f} dB  {seconds:.0f} s")
    return average.eval()


@torch.no_grad()
def measure_scale(vae: Any) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of sampled latents: what brings them to the
    scale of the noise."""
    torch.manual_seed(0)
    latents = vae.encode(batch(UNSEEN - 512, 512)).latent_dist.sample()
    means, stds = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return {
        "latents_mean": [round(value, 4) for value in means.tolist()],
        "latents_std": [round(value, 4) for value in stds.tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's VAE on moving shapes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vae")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = train(args.steps, args.seed)
    vae.register_to_config(scaling_factor=1.0, **measure_scale(vae))
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
