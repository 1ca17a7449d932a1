"""The transformer of LTX-Video: it takes latents as a sequence of tokens."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from trainer.families.base import TIMESTEPS, Family

FPS = 25.0  # where the shards do not say: LTX's own


class LTX(Family):
    """From a picture: the first latent frame is the picture's, at time 0."""

    kind = "ltx"
    network = "LTXVideoTransformer3DModel"
    blocks = ("LTXVideoTransformerBlock",)
    pipeline = "LTXPipeline"
    from_picture = True
    clean_frame = True

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.arch.patch_size_t, self.arch.patch_size, self.arch.patch_size

    @property
    def text_width(self) -> int:
        return int(self.arch.caption_channels)

    def check_channels(self, channels: int) -> None:
        values = math.prod(self.patch)
        takes, gives = self.arch.in_channels / values, self.arch.out_channels / values
        self.refuse_channels(channels, takes, gives)

    def check_text(self, spec: dict[str, Any]) -> None:
        self.refuse_padding(spec, "none", None)  # it does not attend to padding

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: tuple[Tensor, Tensor],
        first: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        values, mask = text
        times = time if told is None else self.frame_times(x, time, told)
        x = self.with_first(x, first, told)
        grid = [size // p for size, p in zip(x.shape[2:], self.patch)]
        out = self.net(
            pack(x, self.patch),
            values.to(self.net.dtype),  # type: ignore[arg-type]
            times * TIMESTEPS,
            mask.to(x.dtype),
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            rope_interpolation_scale=self.rope_scale,
            return_dict=False,
        )[0]
        return unpack(out, grid, self.patch)

    @property
    def rope_scale(self) -> tuple[float, float, float]:
        """Seconds and pixels that a latent frame, row and column stand for."""
        made = self.latents
        fps = (made.get("sampling") or {}).get("fps") or FPS
        return made["temporal"] / fps, made["spatial"], made["spatial"]


def pack(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, F, H, W) to tokens (B, N, values of a patch), channels first in each."""
    (t, h, w), (batch, channels, frames, rows, columns) = patch, x.shape
    x = x.reshape(batch, channels, frames // t, t, rows // h, h, columns // w, w)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpack(x: Tensor, grid: list[int], patch: tuple[int, int, int]) -> Tensor:
    (f, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], f, h, w, -1, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(x.shape[0], -1, f * pt, h * ph, w * pw)
