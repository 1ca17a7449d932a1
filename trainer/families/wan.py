"""The transformer of Wan 2.1 and 2.2 (text to video; 2.2's TI2V also from a picture)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trainer.config import SettingsError
from trainer.families.base import TIMESTEPS, Family

TOKENS = 512  # of text: zeros stand where there are none, and are attended to


class Wan(Family):
    """From a picture as Wan 2.2's TI2V: the first latent frame is the picture's, at time 0."""

    kind = "wan"
    network = "WanTransformer3DModel"
    pipeline = "WanPipeline"
    from_picture = True
    clean_frame = True

    @property
    def patch(self) -> tuple[int, int, int]:
        frames, rows, columns = self.arch.patch_size
        return frames, rows, columns

    @property
    def text_width(self) -> int:
        return int(self.arch.text_dim)

    def check_channels(self, channels: int) -> None:
        takes, gives = self.arch.in_channels, self.arch.out_channels
        if self.arch.image_dim is not None or takes > gives == channels:
            raise SettingsError(
                "train.model.path is a Wan that takes an encoding of its picture followed by grey "
                "frames, which shards do not hold: take Wan2.2-TI2V-5B, or a text-to-video model "
                "with train.model.first_frame"
            )
        self.refuse_channels(channels, takes, gives)

    def check_text(self, spec: dict[str, Any]) -> None:
        self.refuse_padding(spec, "none", None)
        if spec["max_length"] > TOKENS:
            raise SettingsError(
                f"captions were embedded to {spec['max_length']} tokens, but Wan takes {TOKENS}: "
                f"set embed.max_length to {TOKENS} and `vidpipe run`"
            )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: tuple[Tensor, Tensor],
        first: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        values, mask = text
        values = (values * mask.unsqueeze(-1)).to(self.net.dtype)  # type: ignore[arg-type]
        values = F.pad(values, (0, 0, 0, TOKENS - values.shape[1]))
        times = time if told is None else self.frame_times(x, time, told)
        x = self.with_first(x, first, told)
        out: Tensor = self.net(x, times * TIMESTEPS, values, return_dict=False)[0]
        return out
