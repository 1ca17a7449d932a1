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
Weighting = Literal["none", "snr", "min_snr"]

TIMESTEPS = 1000  # of the schedules; a model is told t x TIMESTEPS whatever the objective


def draw_time(
    density: Density, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """One time in [0, 1), a float32 scalar.

    logit_normal is the sigmoid of a normal of `mean` and `std` (Esser 2024, SD3): more of the
    middle, where flow matching is hard.
    """
    if density == "uniform":
        return torch.rand((), generator=generator)
    normal = torch.randn((), generator=generator)
    return torch.sigmoid(mean + std * normal).clamp(max=1 - 2**-24)


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times moved towards noise: shift t / (1 + (shift - 1) t) (Esser 2024, SD3, eq. 23).

    More tokens say more of the picture at the same noise, so larger ones want more of it. It adds
    log(shift) to the logit of t: Flux' e^mu / (e^mu + 1/t - 1) is shift = e^mu.
    """
    return shift * time / (1 + (shift - 1) * time)


def token_shift(tokens: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """e^mu, mu on the line through two (tokens, mu), as Flux and LTX have it; flat beyond them, as
    it was fitted to nothing there."""
    share = (tokens - low[0]) / (high[0] - low[0])
    return math.exp(low[1] + min(1.0, max(0.0, share)) * (high[1] - low[1]))


def on_schedule(time: Tensor) -> Tensor:
    """Times of a schedule: the step k / TIMESTEPS that each lies in."""
    return torch.floor(time * TIMESTEPS).clamp(max=TIMESTEPS - 1) / TIMESTEPS


@lru_cache
def alphas_cumprod(
    schedule: Schedule, zero_terminal_snr: bool = False, snr_shift: float = 1.0
) -> Tensor:
    """The signal's share of the variance, a^2, at each of the TIMESTEPS steps: float64.

    scaled_linear: betas of Stable Diffusion, sqrt-linear from 0.00085 to 0.012.
    cosine: Nichol & Dhariwal 2021, with their cut of beta at 0.999.
    SNR is divided by `snr_shift` (CogVideoX), then the end is put to zero.
    """
    steps = torch.arange(TIMESTEPS + 1, dtype=torch.float64)
    if schedule == "scaled_linear":
        ends = math.sqrt(0.00085), math.sqrt(0.012)
        betas = torch.linspace(*ends, TIMESTEPS, dtype=torch.float64) ** 2
    else:
        level = torch.cos((steps / TIMESTEPS + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    level = torch.cumprod(1 - betas, 0)
    level = level / (snr_shift + (1 - snr_shift) * level)
    return rescaled(level) if zero_terminal_snr else level


def rescaled(level: Tensor) -> Tensor:
    """The signal's shares of the variance, of which the last is 0: algorithm 1 of Lin 2023
    (arXiv 2305.08891), before it goes back to betas.

    The signal a is moved down and stretched: the last becomes 0, the first stays.
    """
    signal = level.sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    return ((signal - last) * first / (first - last)) ** 2


def path(
    kind: Kind,
    schedule: Schedule,
    time: Tensor,
    zero_terminal_snr: bool = False,
    snr_shift: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The shares (a, s) of signal and noise at `time`, in its dtype and on its device."""
    if kind == "flow":
        return 1 - time, time
    steps = (time * TIMESTEPS).round().long().clamp(0, TIMESTEPS - 1)
    level = alphas_cumprod(schedule, zero_terminal_snr, snr_shift).to(time.device)[steps]
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


def weight(
    kind: Kind, a: Tensor, s: Tensor, weighting: Weighting = "none", gamma: float = 5.0
) -> Tensor:
    """The factor (B,) of each clip's loss, whose error is that of the target.

    In terms of x0's error, `snr` is SNR = a^2 / s^2, and `min_snr` min(SNR, gamma) (Hang 2023).
    The error of epsilon is SNR times that of x0, v's SNR + 1 times: so they are divided by it.
    With zero terminal SNR both are 0 at the last step of v, where x0 alone is asked for.
    """
    if weighting == "none" or kind == "flow":
        return torch.ones_like(a)
    snr = (a / s) ** 2
    if kind == "epsilon":
        return torch.ones_like(a) if weighting == "snr" else (gamma / snr).clamp(max=1)
    return (snr if weighting == "snr" else snr.clamp(max=gamma)) / (snr + 1)


def losses(
    output: Tensor, wanted: Tensor, weights: Tensor, counted: Tensor | None = None
) -> Tensor:
    """The weighted mean squared error of each clip: (B,) float32. Where `counted`, broadcast over
    channels, is 0, the error does not count."""
    errors = (output.float() - wanted).square()
    if counted is None:
        return weights * errors.flatten(1).mean(1)
    share = counted.expand_as(errors).flatten(1)
    return weights * (errors.flatten(1) * share).sum(1) / share.sum(1).clamp(min=1)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to multiply (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
