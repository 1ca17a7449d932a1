"""What each class of VAE in diffusers does, read off its config.json alone.

Frames or a clip at once, which lengths it takes, what it divides a picture by, and the numbers by
which latents are scaled: each of them is here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base import StageError


@dataclass(frozen=True)
class Family:
    """One diffusers class of VAE.

    `period` and `over`: it takes clips of n frames where n % period is among `over`. Of other
    lengths it drops frames (Wan, LTX), mixes the last ones up (HunyuanVideo, CogVideoX) or fails.
    A period of 0 is the temporal ratio.
    """

    video: bool  # takes (B, C, F, H, W); else frames are a batch of pictures
    posterior: bool = True  # encodes to a distribution; else to latents straight
    period: int = 0
    over: tuple[int, ...] = (1,)
    tiles: bool = True  # diffusers can cut its pictures into tiles
    batches: bool = True  # it can take several clips at once


FAMILIES = {
    "AutoencoderKL": Family(video=False, over=(0,)),
    # Tiles are of 4 channels and float32, whatever the VAE is: and it needs hardly any memory.
    "AutoencoderTiny": Family(video=False, posterior=False, over=(0,), tiles=False),
    "AutoencoderKLWan": Family(video=True, period=4),  # its loop goes by 4, whatever the ratio
    # Works on 8 frames at a time, the first time on the one or none that are left over. 13 frames
    # become 4 latent frames, which stand for 16.
    "AutoencoderKLCogVideoX": Family(video=True, period=8, over=(0, 1)),
    "AutoencoderKLLTXVideo": Family(video=True),
    # Over 16 frames it works on overlapping stretches of 17 by default, as its authors do.
    "AutoencoderKLHunyuanVideo": Family(video=True),
    # The mask of its attention is of as many dimensions as fit a single clip.
    "AutoencoderKLHunyuanVideo15": Family(video=True, batches=False),
}


@dataclass(frozen=True)
class Shape:
    """What a VAE makes of a clip's shape."""

    class_name: str
    temporal: int  # frames per latent frame after the first; 1: it takes pictures
    spatial: int  # pixels per latent pixel

    @property
    def family(self) -> Family:
        return FAMILIES[self.class_name]

    def takes(self, frames: int) -> bool:
        """Whether latents of that many frames stand for these frames, and for no others."""
        return frames == 1 or frames % self._period in self._over

    def check(self, frames: int, height: int, width: int, bucket: int | None = None) -> None:
        """Raises StageError, with the nearest right values, for a clip that it does not take.
        `bucket`: the number of the one of `sampling.buckets` that says so."""
        key = "sampling" if bucket is None else f"sampling.buckets.{bucket}"
        if not self.takes(frames):
            rule = " or ".join(f"{self._period}k{f'+{n}' * bool(n)}" for n in self._over)
            below = next(n for n in range(frames - 1, 0, -1) if self.takes(n))
            above = next(n for n in range(frames + 1, frames + 99) if self.takes(n))
            raise StageError(
                f"{self.class_name} takes {rule} frames, and latents of {frames} would stand for "
                f"others than those picked: set {key}.frames to {below} or {above}"
            )
        for name, size in (("height", height), ("width", width)):
            if size % self.spatial:
                near = max(self.spatial, round(size / self.spatial) * self.spatial)
                setting = f"{key}.{'size' if bucket is None else name}"
                raise StageError(
                    f"{self.class_name} divides pictures by {self.spatial}, and a {name} of {size} "
                    f"is no multiple of it: set {setting} to {near}"
                )

    @property
    def _period(self) -> int:
        return self.family.period or self.temporal

    @property
    def _over(self) -> Sequence[int]:
        return [n % self._period for n in self.family.over]


def shape_of(folder: str) -> Shape:
    """Raises StageError where `folder` holds no VAE that encode knows."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise StageError(f"{folder} is no diffusers VAE: its config.json can't be read") from error
    name = str(config.get("_class_name"))
    if name not in FAMILIES:
        raise StageError(
            f"{folder} holds a {name}, which encode does not know: use one of {', '.join(FAMILIES)}"
        )
    try:
        return Shape(name, *_ratios(name, config))
    except KeyError as error:
        raise StageError(f"{folder}/config.json of a {name} lacks {error}") from error


def _ratios(name: str, config: dict[str, Any]) -> tuple[int, int]:
    """Temporal and spatial compression, as the diffusers class builds its blocks."""
    if name == "AutoencoderKLWan":
        patch = config.get("patch_size") or 1
        return 2 ** sum(config["temperal_downsample"]), 2 ** (len(config["dim_mult"]) - 1) * patch
    if name == "AutoencoderKLLTXVideo":
        halvings = sum(config["spatio_temporal_scaling"])
        temporal = config.get("temporal_compression_ratio") or config["patch_size_t"] * 2**halvings
        spatial = config.get("spatial_compression_ratio") or config["patch_size"] * 2**halvings
        return temporal, spatial
    if name == "AutoencoderTiny":
        return 1, 2 ** (len(config["encoder_block_out_channels"]) - 1)
    halvings = len(config["block_out_channels"]) - 1
    spatial = config.get("spatial_compression_ratio") or 2**halvings
    return int(config.get("temporal_compression_ratio") or 1), int(spatial)


def channels_of(module: Any) -> int:
    """Channels of the latents, without the log-variance's."""
    names = ("latent_channels", "z_dim")
    return int(next(module.config[name] for name in names if module.config.get(name) is not None))


def scaling_of(module: Any) -> tuple[list[float], list[float]]:
    """Shift and scale per channel, so that a model trains on `(x - shift) * scale`: the one rule
    behind `scaling_factor` and `shift_factor` (SD, Flux), `latents_mean` and `latents_std` (Wan),
    both (LTX)."""
    config, channels = module.config, channels_of(module)
    factor = float(config.get("scaling_factor") or 1.0)
    mean, std = (_per_channel(module, n) for n in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        shift = float(config.get("shift_factor") or 0.0)
        return [shift] * channels, [factor] * channels
    return mean, [factor / s for s in std]


def constants_of(module: Any) -> dict[str, Any]:
    """The numbers of the VAE's own config that trainers scale by."""
    # The last one is CogVideoX 1.5's, and about the first frame's latents.
    names = [*("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    names += ["invert_scale_latents"]
    return {n: module.config[n] for n in names if module.config.get(n) is not None}


def _per_channel(module: Any, name: str) -> list[float] | None:
    # In the config (Wan), or a tensor saved with the weights (LTX).
    value = module.config.get(name)
    if value is None:
        value = dict(module.named_buffers()).get(name)
    if value is None:
        return None
    values = value.tolist() if hasattr(value, "tolist") else value
    return [float(v) for v in values]
