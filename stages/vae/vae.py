"""VAEs of diffusers behind one interface: uint8 frames in, moments out, constants told.

Latents are always channels first, (C or 2C, F, H, W), unscaled. What each family does with frames,
how it scales and which lengths it takes is here and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from stages.base import Failed, StageError
from stages.vae.halving import Halving, whole

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Family:
    """One diffusers class of VAE."""

    video: bool  # takes (B, C, F, H, W); else frames are a batch of pictures
    posterior: bool  # encodes to a distribution; else to latents straight


FAMILIES = {
    "AutoencoderKL": Family(video=False, posterior=True),
    "AutoencoderTiny": Family(video=False, posterior=False),
    "AutoencoderKLWan": Family(video=True, posterior=True),
    "AutoencoderKLCogVideoX": Family(video=True, posterior=True),
    "AutoencoderKLLTXVideo": Family(video=True, posterior=True),
}


@dataclass(frozen=True)
class Shape:
    """What a VAE makes of a clip's shape, read off its config.json alone."""

    class_name: str
    temporal: int  # frames per latent frame after the first
    spatial: int  # pixels per latent pixel

    def check(self, frames: int, height: int, width: int) -> None:
        """Raises StageError, with the nearest right values, where the VAE would silently drop
        frames or can't divide the picture."""
        over = (frames - 1) % self.temporal
        if over:
            raise StageError(
                f"{self.class_name} takes {self.temporal}k+1 frames and would drop the last {over} "
                f"of {frames}: set sampling.frames to {frames - over} or "
                f"{frames - over + self.temporal}"
            )
        for name, size in (("height", height), ("width", width)):
            if size % self.spatial:
                near = max(self.spatial, round(size / self.spatial) * self.spatial)
                raise StageError(
                    f"{self.class_name} divides pictures by {self.spatial}, and a {name} of {size} "
                    f"is no multiple of it: set sampling.size to {near}"
                )


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
    spatial = 2 ** (len(config["block_out_channels"]) - 1)
    return int(config.get("temporal_compression_ratio") or 1), spatial


class Vae:
    """A loaded VAE. `encode` is the only thing that runs per clip."""

    def __init__(self, folder: str, dtype: str = "float32", device: str = "cpu") -> None:
        """Loads `folder` (of `AutoencoderX.save_pretrained`). Raises StageError."""
        import diffusers
        import torch

        diffusers.utils.logging.disable_progress_bar()
        self.shape = shape_of(folder)
        self.family = FAMILIES[self.shape.class_name]
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise StageError(f"device {device} can't be used: {first}") from error
        self.dtype: torch.dtype = getattr(torch, dtype)
        try:
            cls = getattr(diffusers, self.shape.class_name)
            module = cls.from_pretrained(folder, torch_dtype=self.dtype)
        except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
            raise StageError(f"the VAE in {folder} can't be loaded: {error}") from error
        self.module = module.to(self.device).eval().requires_grad_(False)
        self.channels = int(_first(self.module.config, "latent_channels", "z_dim"))
        self.shift, self.scale = _constants(self.module, self.channels)
        self._halving = Halving()

    @property
    def decoding_threads(self) -> int:
        """Threads that decode beside this VAE by default: as many as this process has cores, where
        the VAE takes none of them."""
        import torch

        return 1 if self.device.type == "cpu" else torch.get_num_threads()

    def idle(self) -> bool:
        """Whether all that was launched is done."""
        import torch

        return self.device.type != "cuda" or torch.cuda.current_stream(self.device).query()

    def encode(
        self, clips: torch.Tensor, pictures: int, moments: bool
    ) -> list[torch.Tensor | Failed]:
        """Latents of uint8 clips (B, F, H, W, 3): (2C or C, F', H', W') each, unscaled, in `dtype`,
        on the CPU. Failed for a clip that the device's memory does not hold, alone.

        `moments` keeps the log-variance beside the mean. At most `pictures` frames go through a
        picture VAE at once.
        """
        import torch

        def latents(part: torch.Tensor) -> torch.Tensor:
            x = part.to(self.device).to(self.dtype).div_(127.5).sub_(1.0)
            x = x.permute(0, 4, 1, 2, 3) if self.family.video else x.permute(0, 3, 1, 2)
            return self._half(self.module.encode(x), moments)

        with torch.inference_mode():
            if self.family.video:
                by_clip = [[one] for one in self._halving(latents, clips)]
                return [whole(clip, lambda parts: parts[0].cpu()) for clip in by_clip]
            frames = iter(self._halving(latents, clips.flatten(0, 1), pictures))
            by_clip = [list(islice(frames, clips.shape[1])) for _ in clips]
            return [whole(clip, lambda parts: torch.stack(parts, dim=1).cpu()) for clip in by_clip]

    def _half(self, encoded: Any, moments: bool) -> torch.Tensor:
        if not self.family.posterior:
            latents: torch.Tensor = encoded.latents
            return latents
        posterior = encoded.latent_dist
        chosen: torch.Tensor = posterior.parameters if moments else posterior.mean
        return chosen

    def constants(self) -> dict[str, Any]:
        """The numbers of the VAE's own config that trainers scale by."""
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        config = self.module.config
        return {n: config[n] for n in names if config.get(n) is not None}


def _first(config: Any, *names: str) -> Any:
    return next(config[name] for name in names if config.get(name) is not None)


def _constants(module: Any, channels: int) -> tuple[list[float], list[float]]:
    """Shift and scale per channel, so that a model trains on `(x - shift) * scale`."""
    config = module.config
    factor = float(config.get("scaling_factor") or 1.0)
    mean, std = (_buffer(module, n) for n in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        shift = float(config.get("shift_factor") or 0.0)
        return [shift] * channels, [factor] * channels
    return mean, [factor / s for s in std]


def _buffer(module: Any, name: str) -> list[float] | None:
    # In the config (Wan), or a tensor saved with the weights (LTX).
    value = module.config.get(name)
    if value is None:
        value = dict(module.named_buffers()).get(name)
    if value is None:
        return None
    values = value.tolist() if hasattr(value, "tolist") else value
    return [float(v) for v in values]
