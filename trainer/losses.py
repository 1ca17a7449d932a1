"""The loss of a batch: what each clip is noised with, what the model is told and should say.

All that is drawn is keyed on the visit (seed, epoch, clip).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer import objectives
from trainer.config import FamilySettings, TrainSettings
from trainer.data import Batch
from trainer.families import Family
from trainer.keys import keyed
from trainer.models import Text, VideoDiT, tokenise

MIN_SNR_GAMMA = 5.0  # Hang 2023's own choice


@dataclass(frozen=True)
class Traits:
    """What the loss must know of a model, which may stand inside others by then."""

    cells: int  # of latents, that make one token
    clean_frame: bool  # a first frame that is told has no noise, and no loss

    @classmethod
    def of(cls, model: VideoDiT | Family) -> Traits:
        return cls(math.prod(model.patch), isinstance(model, Family) and model.clean_frame)

    def tokens(self, shape: Sequence[int]) -> int:
        """Of latents (C, F, H, W)."""
        return math.prod(shape[1:]) // self.cells


def clip_losses(
    model: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    device: torch.device,
    traits: Traits,
) -> Tensor:
    """The loss of each clip (B,), its time and noise keyed on the visit."""
    visits = list(zip(batch.epochs, batch.clip_ids))
    x0 = batch.latents(device)
    time = draw_times(settings, visits, traits.tokens(x0.shape[1:])).to(device)
    noise = torch.empty_like(x0)
    for row, (epoch, clip) in zip(noise, visits):
        row.normal_(generator=keyed("noise", settings.seed, epoch, clip, str(device)))
    text = text_of(batch, settings, device)
    picture = first_frames(batch, settings, device)
    return _losses(model, settings, traits, x0, noise, time, text, picture, settings.loss_weight)


def losses_at(
    model: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    device: torch.device,
    traits: Traits,
    times: Tensor,
) -> Tensor:
    """The losses (T,) of a batch of one clip at all of `times`, unweighted, each with noise of its
    own that is the same whenever it is asked for."""
    (clip,), many = batch.clip_ids, len(times)
    if settings.objective != "flow":
        times = objectives.on_schedule(times)
    x0 = batch.latents(device).repeat(many, 1, 1, 1, 1)
    noise = torch.empty_like(x0)
    for number, row in enumerate(noise):
        row.normal_(generator=keyed("validation", settings.seed, number, clip, str(device)))
    text = _repeated(text_of(batch, settings, device), many)
    first = batch.first_frames(device)
    picture: tuple[Tensor, Tensor] | tuple[()] = ()
    if first is not None and isinstance(settings.model, FamilySettings):
        told = torch.full((many,), settings.model.first_frame > 0, device=device)
        picture = first.repeat(many, 1, 1, 1, 1), told
    return _losses(model, settings, traits, x0, noise, times.to(device), text, picture, "none")


def _losses(
    model: nn.Module,
    settings: TrainSettings,
    traits: Traits,
    x0: Tensor,
    noise: Tensor,
    time: Tensor,
    text: Text,
    picture: tuple[Tensor, Tensor] | tuple[()],
    weighting: objectives.Weighting,
) -> Tensor:
    """Of latents, noise and times, one a row: (B,)."""
    kind = settings.objective
    a, s = objectives.path(
        kind, settings.schedule, time, settings.zero_terminal_snr, settings.snr_shift
    )
    output = model(objectives.add_noise(x0, noise, a, s), time, text, *picture)
    wanted = objectives.target(kind, x0, noise, a, s)
    gamma = settings.min_snr_gamma or MIN_SNR_GAMMA
    weights = objectives.weight(kind, a, s, weighting, gamma)
    counted = None
    if picture and traits.clean_frame:
        counted = torch.ones_like(x0[:, :1])
        counted[picture[1], :, 0] = 0
    return objectives.losses(output, wanted, weights, counted)


def first_frames(
    batch: Batch, settings: TrainSettings, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[()]:
    """The first frames of the batch and which clips are told theirs; () where the run has none."""
    first = batch.first_frames(device)
    if first is None or not isinstance(settings.model, FamilySettings):
        return ()
    chances = [
        torch.rand((), generator=keyed("told", settings.seed, epoch, clip))
        for epoch, clip in zip(batch.epochs, batch.clip_ids)
    ]
    return first, (torch.stack(chances) < settings.model.first_frame).to(device)


def draw_times(settings: TrainSettings, visits: Sequence[tuple[int, str]], tokens: int) -> Tensor:
    """The time of each visit (B,): of clips of so many tokens."""
    mean, std = settings.timestep_mean, settings.timestep_std
    times = [
        objectives.draw_time(settings.density, keyed("time", settings.seed, epoch, clip), mean, std)
        for epoch, clip in visits
    ]
    time = objectives.shifted(torch.stack(times), shift_of(settings, tokens))
    return time if settings.objective == "flow" else objectives.on_schedule(time)


def shift_of(settings: TrainSettings, tokens: int) -> float:
    """How far the times of clips of so many tokens are moved towards noise."""
    if settings.shift_tokens is None:
        return settings.shift
    return objectives.token_shift(tokens, *settings.shift_tokens)


def _repeated(text: Text, many: int) -> Text:
    """Of one clip, for so many rows."""
    if isinstance(text, Tensor):
        return text.repeat(many, 1)
    values, mask = text
    return values.repeat(many, 1, 1), mask.repeat(many, 1)


def text_of(batch: Batch, settings: TrainSettings, device: torch.device) -> Text:
    """What the model is told of the batch's captions."""
    if batch.embeddings is None:
        return tokenise(batch.captions, settings.text).to(device)
    values, mask = batch.embeddings
    return values.to(device, non_blocking=True), mask.to(device)
