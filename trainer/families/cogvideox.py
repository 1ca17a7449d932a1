"""The transformer of CogVideoX 1.0 and 1.5, text to video and from a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.config import SettingsError
from trainer.families.base import TIMESTEPS, Family

OFFSET = 2.0  # what 1.5's model from a picture is told, always


class CogVideoX(Family):
    """From a picture: its latents stand beside the noised ones as further channels, with zeros
    in all frames but the first."""

    kind = "cogvideox"
    network = "CogVideoXTransformer3DModel"
    pipeline = "CogVideoXPipeline"
    objectives = frozenset({"v_prediction"})
    from_picture = True

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.arch.patch_size_t or 1, self.arch.patch_size, self.arch.patch_size

    @property
    def text_width(self) -> int:
        return int(self.arch.text_embed_dim)

    @property
    def needs_picture(self) -> bool:
        return bool(self.arch.in_channels > self.arch.out_channels)

    def check_channels(self, channels: int) -> None:
        takes, gives = self.arch.in_channels, self.arch.out_channels
        if takes == 2 * gives == 2 * channels:
            if self.settings.first_frame:
                return
            raise SettingsError(
                f"this cogvideox takes {takes} channels, half of them of a picture: set "
                "train.model.first_frame to the share of visits that see one, 0.95 say"
            )
        if self.settings.first_frame:
            raise SettingsError(
                f"train.model.first_frame is {self.settings.first_frame}, but this cogvideox takes "
                f"{takes} channels, not the {2 * channels} of latents and a picture: take a model "
                "from a picture (CogVideoX-5b-I2V), or leave first_frame out"
            )
        self.refuse_channels(channels, takes, gives)

    def check_text(self, spec: dict[str, Any]) -> None:
        self.refuse_padding(spec, "max_length", self.arch.max_text_seq_length)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        super().check_shape(shape)
        arch = self.arch
        wanted = [arch.sample_height, arch.sample_width]
        if arch.use_learned_positional_embeddings and list(shape[2:]) != wanted:
            raise SettingsError(
                f"latents of shape {list(shape)}: this cogvideox has learnt positions of "
                f"{wanted[0]} x {wanted[1]} and no others: set sampling.size to "
                f"{[side * self.latents['spatial'] for side in wanted]}"
            )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: tuple[Tensor, Tensor],
        first: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        if self.arch.in_channels > x.shape[1]:
            picture = torch.zeros_like(x)
            picture = self.with_first(picture, first, told)
            x = torch.cat([x, picture], 1)
        x = x.transpose(1, 2)  # frames before channels
        offset = x.new_full((1,), OFFSET) if self.arch.ofs_embed_dim else None
        out: Tensor = self.net(
            x,
            text[0].to(self.net.dtype),  # type: ignore[arg-type]
            time * TIMESTEPS,
            ofs=offset,
            image_rotary_emb=self.rotary(x) if self.arch.use_rotary_positional_embeddings else None,
            return_dict=False,
        )[0]
        return out.transpose(1, 2)

    def rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of latents (B, F, C, H, W), as diffusers' pipeline computes them."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        t, h, w = self.patch
        frames, grid = x.shape[1] // t, (x.shape[3] // h, x.shape[4] // w)
        most = self.arch.sample_height // h, self.arch.sample_width // w
        if self.arch.patch_size_t is None:
            place = {"crops_coords": get_resize_crop_region_for_grid(grid, most[1], most[0])}
        else:  # 1.5
            place = {"crops_coords": None, "grid_type": "slice", "max_size": most}
        cosines, sines = get_3d_rotary_pos_embed(
            embed_dim=self.arch.attention_head_dim,
            grid_size=grid,
            temporal_size=frames,
            device=x.device,
            **place,
        )
        return cosines, sines
