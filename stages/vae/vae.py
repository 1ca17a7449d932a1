"""VAEs of diffusers behind one interface: uint8 frames in, moments out, and back to frames.

Latents are always channels first, (C or 2C, F, H, W), unscaled. What each class does differently
stands in `stages.vae.families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from stages.base import Failed, StageError
from stages.checks import Checks
from stages.devices import usable
from stages.models import check_weights, folder_sha256
from stages.remember import remembered
from stages.vae.families import channels_of, constants_of, scaling_of, shape_of
from stages.vae.halving import Halving, whole
from stages.vae.trial import BYTES, MOST, best_batch

if TYPE_CHECKING:
    import torch

    from stages.media.picture import Pixels

NOT_FINITE = (
    "the VAE gave numbers that are not finite, as some do in float16: set encode.dtype to bfloat16 "
    "or float32"
)


@dataclass(frozen=True)
class Options:
    """How a VAE is run. All but `tiling` change latents by rounding alone."""

    pictures: int = 64  # frames that go through a picture VAE at once
    channels_last: bool | None = None  # memory format on a GPU; None: for picture VAEs
    compile: bool = False  # the encoder, by torch.compile
    slicing: bool = False  # clips of a batch one by one
    tiling: bool = False  # pictures in overlapping tiles


@dataclass(frozen=True)
class Encoded:
    """Latents that may still be on their way from the device: `Vae.fetch` waits for them."""

    parts: list[torch.Tensor | Failed]  # in order: of each clip, or of each frame of each clip
    frames: int | None  # how many frames make a clip; None: parts are whole clips
    arrived: torch.cuda.Event | None


class Vae:
    """A loaded VAE. `encode` and `fetch` are the only things that run per clip."""

    def __init__(
        self,
        folder: str,
        dtype: str = "float32",
        device: str = "cpu",
        options: Options = Options(),
    ) -> None:
        """Loads `folder` (of `AutoencoderX.save_pretrained`). Raises StageError."""
        import diffusers
        import torch

        diffusers.utils.logging.disable_progress_bar()
        self.folder, self.options = folder, options
        self.shape = shape_of(folder)
        self.family = self.shape.family
        if options.tiling and not self.family.tiles:
            raise StageError(f"{self.shape.class_name} can't be tiled: set encode.tiling to false")
        self.device = usable(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        try:
            cls = getattr(diffusers, self.shape.class_name)
            module, loading = cls.from_pretrained(
                folder, torch_dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
            raise StageError(f"the VAE in {folder} can't be loaded: {error}") from error
        check_weights(module, loading, folder)
        self.channels = channels_of(module)
        self.shift, self.scale = scaling_of(module)  # before those among the weights are rounded
        # PyTorch's own `to`: that of diffusers warns of modules that it would keep in float32, of
        # which none of these classes has any.
        torch.nn.Module.to(module, self.device, self.dtype)
        self.module = module.eval().requires_grad_(False)
        self._format = torch.contiguous_format
        wanted = options.channels_last
        # On a CPU, PyTorch's GroupNorm loses up to two digits of flat pictures in that format.
        if self.device.type != "cpu" and (not self.family.video if wanted is None else wanted):
            self._format = channels_last(module, self.family.video)
        if options.slicing or not self.family.batches:
            self.module.enable_slicing()
        if options.tiling:
            self.module.enable_tiling()
        if options.compile:
            self.module.encoder.compile()
        self._halving = Halving()
        self.checks = Checks()  # of clips whose latents are decoded again
        self._best: dict[tuple[int, ...], int] = {}
        self._copies = None
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            if self.dtype == torch.float32:
                # float32 means it: by default convolutions round their factors to 11 bits (TF32).
                torch.backends.cudnn.allow_tf32 = False
                torch.backends.cuda.matmul.allow_tf32 = False

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

    @property
    def sha256(self) -> str:
        """Of the files that it was loaded from."""
        return folder_sha256(Path(self.folder))

    def constants(self) -> dict[str, Any]:
        """The numbers of the VAE's own config that trainers scale by."""
        return constants_of(self.module)

    # ------------------------------------------------------------------------- frames to latents

    def batch(self, clips: Sequence[Pixels]) -> torch.Tensor:
        """Clips of one shape as a batch (B, F, H, W, 3), where it travels to the device fastest."""
        import torch

        parts = [torch.from_numpy(clip) for clip in clips]
        if len(parts) == 1 and self._copies is None:
            return parts[0][None]
        pinned = self._copies is not None
        into = torch.empty((len(parts), *parts[0].shape), dtype=torch.uint8, pin_memory=pinned)
        return torch.stack(parts, out=into)

    def encode(self, clips: torch.Tensor, moments: bool) -> Encoded:
        """Latents of uint8 clips (B, F, H, W, 3): (2C or C, F', H', W') each, unscaled, in `dtype`.

        `moments` keeps the log-variance beside the mean. On CUDA this returns as soon as all is
        launched, so that the next batch may follow before this one is fetched. Frames cross the
        bus as bytes and become numbers from -1 to 1 on the device.
        """
        import torch

        def latents(part: torch.Tensor) -> torch.Tensor:
            x = self._moved(part).to(torch.float32).div_(127.5).sub_(1.0)
            x = x.permute(0, 4, 1, 2, 3) if self.family.video else x.permute(0, 3, 1, 2)
            x = x.contiguous(memory_format=self._format).to(self.dtype)
            return self._brought(self._half(self.module.encode(x), moments))

        shape = tuple(clips.shape[1:])
        with torch.inference_mode():
            if self.family.video:
                parts, frames = self._halving(latents, clips, shape=shape), None
            else:
                frames = clips.shape[1]
                every, size = clips.flatten(0, 1), self.options.pictures
                parts = self._halving(latents, every, size, shape[1:])
        arrived = None
        if self._copies is not None:
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(self.device))
        return Encoded(parts, frames, arrived)

    def fetch(self, encoded: Encoded) -> list[torch.Tensor | Failed]:
        """The latents of each clip, on the CPU, once they are there. Failed for a clip that the
        device's memory does not hold, alone, and for one whose latents are not finite."""
        import torch

        if encoded.arrived is not None:
            encoded.arrived.synchronize()
        parts = iter(encoded.parts)
        clips: list[torch.Tensor | Failed] = []
        while group := list(islice(parts, encoded.frames or 1)):
            one = whole(
                group, lambda found: torch.stack(found, dim=1) if encoded.frames else found[0]
            )
            if not isinstance(one, Failed) and not torch.isfinite(one).all():
                one = Failed("not_finite", NOT_FINITE)
            clips.append(one)
        return clips

    def best_batch(self, shape: tuple[int, ...]) -> int:
        """How many clips of this shape (F, H, W, 3) to encode at once: 1 on a CPU, where more
        bring nothing; else what a trial shows, once for each kind of device and VAE."""
        if self.device.type == "cpu":
            return 1
        if shape not in self._best:
            self._best[shape] = self.tried_batch(shape)
        return self._best[shape]

    def tried_batch(self, shape: tuple[int, ...]) -> int:
        """The same, tried on whatever device this is, or remembered."""
        import numpy as np
        import torch

        clip = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

        def run(clips: int) -> bool:
            kept, self._halving = self._halving, Halving()
            try:
                found = self.fetch(self.encode(self.batch([clip] * clips), True))
                return not self._halving.most and not any(_no_room(one) for one in found)
            finally:
                self._halving = kept

        on: list[Any] = [self.device.type, torch.__version__]
        if self.device.type == "cuda":
            known = torch.cuda.get_device_properties(self.device)
            # Other processes on the card leave less: what fitted then is no rule for an empty one.
            free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
            on += [known.name, known.total_memory, 8 * free // known.total_memory]
        how = [str(self.dtype), asdict(self.options)]
        key = ["batch", self.sha256, list(shape), *how, *on]
        most = min(MOST, BYTES // clip.nbytes)
        return int(remembered(key, lambda: best_batch(run, most)))

    def _moved(self, part: torch.Tensor) -> torch.Tensor:
        """A batch of bytes on the device. On CUDA it is copied while the device computes."""
        import torch

        if self._copies is None:
            return part.to(self.device)
        now = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            there = part.to(self.device, non_blocking=True)
        now.wait_stream(self._copies)
        there.record_stream(now)
        return there

    def _brought(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents on the CPU, or on their way there."""
        import torch

        if self._copies is None:
            return latents.cpu()
        here = torch.empty(latents.shape, dtype=latents.dtype, pin_memory=True)
        return here.copy_(latents, non_blocking=True)

    def _half(self, encoded: Any, moments: bool) -> torch.Tensor:
        if not self.family.posterior:
            latents: torch.Tensor = encoded.latents
            return latents
        posterior = encoded.latent_dist
        chosen: torch.Tensor = posterior.parameters if moments else posterior.mean
        return chosen

    # ------------------------------------------------------------------------- latents to frames

    def decode(self, latents: torch.Tensor) -> torch.Tensor | Failed:
        """Frames, uint8 (F, H, W, 3) on the CPU, of one clip's latents (C, F', H', W'), scaled as
        a model is trained on them: what this VAE's own constants undo."""
        import torch

        def frames(part: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.module.decode(
                part.to(self.device), **self._temb(len(part))
            ).sample
            return x.float().clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8).cpu()

        shift, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (self.shift, self.scale))
        z = (latents.float() / scale + shift).to(self.dtype)
        shape = ("latents", *z.shape[1:])
        with torch.inference_mode():
            if self.family.video:
                return whole(
                    self._halving(frames, z[None], shape=shape),
                    lambda found: found[0].permute(1, 2, 3, 0).contiguous(),
                )
            every, size = z.transpose(0, 1), self.options.pictures
            return whole(
                self._halving(frames, every, size, shape),
                lambda found: torch.stack(found).permute(0, 2, 3, 1).contiguous(),
            )

    def _temb(self, clips: int) -> dict[str, torch.Tensor]:
        """LTX's later decoders clean latents up by themselves, and ask of which noise: of none."""
        import torch

        if not self.module.config.get("timestep_conditioning"):
            return {}
        return {"temb": torch.zeros(clips, device=self.device, dtype=self.dtype)}


def channels_last(module: torch.nn.Module, video: bool) -> torch.memory_format:
    """Puts the weights into that memory format, and returns the frames' one."""
    import torch

    flat, solid = torch.channels_last, torch.channels_last_3d
    for weight in module.parameters():
        if weight.dim() in (4, 5):
            form = flat if weight.dim() == 4 else solid
            weight.data = weight.data.contiguous(memory_format=form)
    return solid if video else flat


def _no_room(latents: torch.Tensor | Failed) -> bool:
    return isinstance(latents, Failed) and latents.error == "out_of_memory"
