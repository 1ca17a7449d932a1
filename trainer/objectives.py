"""What the model learns: noise schedules, targets, weights and timesteps, as pure functions.

Every objective noises latents x0 with normal noise eps to `x_t = a x0 + s eps`. They differ in the
path (a, s) over the time t in [0, 1], from data at 0 to noise at 1, and in what is predicted:

    flow          a = 1 - t, s = t              eps - x0        Lipman 2023, Liu 2023
    epsilon       a^2 + s^2 = 1, by a schedule  eps             Ho 2020
    v_prediction  a^2 + s^2 = 1, by a schedule  a eps - s x0    Salimans & Ho 2022

Times, a and s have the shape (B,); latents are (B, C, F, H, W) float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["epsilon", "v_prediction", "flow"]
Schedule = Literal["scaled_linear", "cosine"]
Density = Literal["uniform", "logit_normal"]

TIMESTEPS = 1000  # of the schedules; a model is told t x TIMESTEPS whatever the objective


def draw_time(density: Density, kind: Kind, generator: torch.Generator) -> Tensor:
    """One time in (0, 1) as a float32 scalar; for a schedule, one of its steps k / TIMESTEPS.

    logit_normal is the sigmoid of a standard normal (Esser 2024): more of the middle, where
    flow matching is hard.
    """
    if density == "uniform":
        time = torch.rand((), generator=generator)
    else:
        time = torch.sigmoid(torch.randn((), generator=generator))
    return time if kind == "flow" else torch.floor(time * TIMESTEPS) / TIMESTEPS


@lru_cache
def alphas_cumprod(schedule: Schedule) -> Tensor:
    """The signal's share of the variance, a^2, at each of the TIMESTEPS steps: float64.

    scaled_linear: betas of Stable Diffusion, sqrt-linear from 0.00085 to 0.012.
    cosine: Nichol & Dhariwal 2021, with their cut of beta at 0.999.
    """
    steps = torch.arange(TIMESTEPS + 1, dtype=torch.float64)
    if schedule == "scaled_linear":
        ends = math.sqrt(0.00085), math.sqrt(0.012)
        betas = torch.linspace(*ends, TIMESTEPS, dtype=torch.float64) ** 2
    else:
        level = torch.cos((steps / TIMESTEPS + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


def path(kind: Kind, schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """The shares (a, s) of signal and noise at `time`, in its dtype and on its device."""
    if kind == "flow":
        return 1 - time, time
    steps = (time * TIMESTEPS).round().long().clamp(0, TIMESTEPS - 1)
    level = alphas_cumprod(schedule).to(time.device)[steps]
    return level.sqrt().to(time.dtype), (1 - level).sqrt().to(time.dtype)


def add_noise(x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    return _over(a, x0) * x0 + _over(s, x0) * noise


def target(kind: Kind, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What the model should say about `add_noise(x0, noise, a, s)`."""
    if kind == "flow":
        return noise - x0
    if kind == "epsilon":
        return noise
    return _over(a, x0) * noise - _over(s, x0) * x0


def resolve(kind: Kind, x: Tensor, output: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The (x0, noise) that a model's `output` at `x` amounts to: the inverse of `target`."""
    a, s = _over(a, x), _over(s, x)
    if kind == "flow":
        return x - s * output, x + a * output
    if kind == "epsilon":
        return (x - s * output) / a, output
    return a * x - s * output, s * x + a * output


def weight(kind: Kind, a: Tensor, s: Tensor, min_snr_gamma: float | None = None) -> Tensor:
    """The weight of each clip's loss: 1, or min-SNR's (Hang 2023).

    It is min(SNR, gamma) in terms of x0's error, so divided by SNR for epsilon and by SNR + 1 for
    v_prediction.
    """
    if min_snr_gamma is None or kind == "flow":
        return torch.ones_like(a)
    snr = (a / s) ** 2
    return snr.clamp(max=min_snr_gamma) / (snr if kind == "epsilon" else snr + 1)


def losses(output: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean squared error of each clip: (B,) float32."""
    return weights * (output.float() - wanted).square().flatten(1).mean(1)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to multiply (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
