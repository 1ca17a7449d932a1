"""Are latents those of their clip? Decoded again, and compared with its frames.

The way is the one that a training takes: what is stored is scaled by the numbers stored with it,
and what the VAE's own numbers undo is decoded. So a wrong scale shows, as do red and blue that were
exchanged, and the weights of another VAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from manifests.shards import LatentSpec
from stages.base import Failed

if TYPE_CHECKING:
    import torch

    from stages.media.picture import Pixels
    from stages.vae.vae import Vae

# A VAE gives back most of what tells a clip from its mean colour, or is close to it anyway. TAESD,
# which is as lossy as they come, on the real videos that the tests use, at 256x256: at least 7.6 dB
# over the mean colour wherever it stayed below 35 dB. With latents 5.5 times too large or too small
# (0.18215 forgotten) it came to 1 dB, or 5 dB on a test picture of saturated colours.
OVER_FLAT = 4.0
CLOSE = 30.0
# Where red and blue are right, exchanging them never brought a clip closer.
EXCHANGED = 0.5
CAUSES = (
    "the VAE's scaling_factor, shift_factor or latents_mean and latents_std are not its own, its "
    "encoder and its decoder are not of one training, it never learnt such pictures (demo://vae "
    "knows the demo's alone), or encode.dtype is too coarse for it"
)


@dataclass(frozen=True)
class Likeness:
    """PSNR in dB, of bytes, over all frames of a clip."""

    psnr: float
    flat: float  # if the clip's mean colour were all there was
    exchanged: float  # with the red and blue of the decoded frames exchanged

    @property
    def fault(self) -> str | None:
        """What seems to be wrong, with its likely causes; None: nothing does."""
        if self.exchanged > max(self.psnr + EXCHANGED, min(CLOSE, self.flat)):
            return (
                f"with red and blue exchanged it would be {self.exchanged:.1f} dB: frames are read "
                "or encoded in the wrong order of colours"
            )
        if self.psnr >= min(CLOSE, self.flat + OVER_FLAT):
            return None
        return f"its mean colour alone would be {self.flat:.1f} dB. Likely causes: {CAUSES}"


def likeness(source: Pixels, decoded: Pixels) -> Likeness:
    """How alike frames [n, height, width, 3] are."""
    flat = source.mean((0, 1, 2), keepdims=True, dtype=np.float64)
    return Likeness(
        psnr(source, decoded), psnr(source, flat), psnr(source, np.flip(decoded, axis=-1))
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, at most 100: equal to the bit."""
    error = float(np.mean(np.square(a.astype(np.float32) - b.astype(np.float32)), dtype=np.float64))
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def decoded_again(vae: Vae, stored: torch.Tensor, spec: LatentSpec) -> Pixels | Failed:
    """The frames, uint8 [n, height, width, 3], that stored latents stand for."""
    frames = vae.decode(as_trained(stored, spec))
    return frames if isinstance(frames, Failed) else frames.numpy()


def as_trained(stored: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """The mean of stored latents (C or 2C, F, H, W), scaled as a model is trained on it."""
    mean = stored[: spec.channels].float()
    shift, scale = (mean.new_tensor(v).view(-1, 1, 1, 1) for v in (spec.shift, spec.scale))
    return (mean - shift) * scale
