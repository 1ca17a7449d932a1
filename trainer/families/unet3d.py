"""The video UNet of diffusers (ModelScope's text-to-video), also grown from Stable Diffusion 2.1.

It is a UNet of pictures with a temporal convolution and a temporal attention after each of its
layers. Grown, the former comes from the pictures' model and the latter begin as identity: a new
model makes of each frame what the old one would have (Blattmann 2023, Wang 2023).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer import lora
from trainer.config import FamilySettings, SettingsError
from trainer.families import base
from trainer.families.base import TIMESTEPS, Family

FLAT = "UNet2DConditionModel"
SAME = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "act_fn"),
    *("norm_num_groups", "norm_eps", "cross_attention_dim", "downsample_padding"),
    *("mid_block_scale_factor", "sample_size"),
)
BLOCKS = {
    "CrossAttnDownBlock2D": "CrossAttnDownBlock3D",
    "DownBlock2D": "DownBlock3D",
    "CrossAttnUpBlock2D": "CrossAttnUpBlock3D",
    "UpBlock2D": "UpBlock3D",
}
TEMPORAL = ("transformer_in.", ".temp_convs.", ".temp_attentions.")


class UNet3D(Family):
    kind = "unet3d"
    network = "UNet3DConditionModel"
    blocks = (
        "CrossAttnDownBlock3D",
        "DownBlock3D",
        "UNetMidBlock3DCrossAttn",
        "UpBlock3D",
        "CrossAttnUpBlock3D",
    )
    pipeline = "TextToVideoSDPipeline"
    part = "unet"
    objectives = frozenset({"epsilon", "v_prediction"})

    @property
    def patch(self) -> tuple[int, int, int]:
        return (1, 1, 1)

    @property
    def text_width(self) -> int:
        return int(self.arch.cross_attention_dim)

    @classmethod
    def pretrained(cls, settings: FamilySettings) -> nn.Module:
        arch, folder = cls.describe(settings)
        if arch.get("_class_name") == FLAT:
            if settings.lora is not None:
                raise SettingsError(
                    f"train.model.path: {settings.path} is a UNet of pictures, whose temporal "
                    "layers are new, and adapters leave them as they are: leave train.model.lora "
                    "out"
                )
            return grow(base.load(FLAT, settings, folder))
        return super().pretrained(settings)

    def check_text(self, spec: dict[str, Any]) -> None:
        self.refuse_padding(spec, "max_length", None)  # it has no mask

    def halve(self, precision: str) -> None:
        """Not at all: the export holds these weights."""

    def checkpoint(self) -> None:
        blocks = [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]  # type: ignore[misc]
        for block in blocks:  # diffusers has none for it
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: tuple[Tensor, Tensor],
        first: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        values = text[0].to(self.net.dtype)  # type: ignore[arg-type]
        out: Tensor = self.net(x, time * TIMESTEPS, values, return_dict=False)[0]
        return out

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """With LoRA the whole network with the adapters merged: diffusers' class has no loader."""
        state = {k.removeprefix("net."): v for k, v in state.items()}
        if (chosen := self.settings.lora) is not None:
            state = lora.merged(state, chosen.scale)
        base.save_network(self.net, state, folder / self.part)

    def restore(self, folder: Path) -> None:
        state = base.load_network(self.network, folder / self.part)
        if self.settings.lora is not None:  # they are merged, and the new adapters add nothing
            names = [name for name in self.net.state_dict() if not lora.is_adapter(name)]
            state = {name: state[lora.original(name)] for name in names}
        self.net.load_state_dict(state, strict=self.settings.lora is None)


def grow(flat: Any) -> nn.Module:
    """A video UNet that makes of each frame what `flat`, a UNet of pictures, does.

    Raises SettingsError where a video UNet has no such layers.
    """
    arch = flat.config
    heads = arch.num_attention_heads or arch.attention_head_dim  # the number, whatever its name
    channels = arch.block_out_channels
    heads = (heads,) * len(channels) if isinstance(heads, int) else tuple(heads)
    sizes = {c // h for c, h in zip(channels, heads)}
    if len(sizes) != 1:
        raise SettingsError(
            f"train.model.path is a UNet with attention heads of {sorted(sizes)} values, and a "
            "video UNet has one size: take Stable Diffusion 2.1, all of whose have 64"
        )
    blocks = [*arch.down_block_types, *arch.up_block_types]
    if unknown := [name for name in blocks if name not in BLOCKS]:
        raise SettingsError(
            f"train.model.path is a UNet with a {unknown[0]}, which a video UNet does not have: "
            "take Stable Diffusion 2.1"
        )
    net: nn.Module = base.diffusers_class(UNet3D.network)(
        **{name: arch[name] for name in SAME},
        down_block_types=tuple(BLOCKS[name] for name in arch.down_block_types),
        up_block_types=tuple(BLOCKS[name] for name in arch.up_block_types),
        attention_head_dim=sizes.pop(),
    )
    state, own = flat.state_dict(), net.state_dict()
    spatial = {name for name in own if not any(part in name for part in TEMPORAL)}
    wrong = sorted(spatial ^ set(state)) or sorted(
        name for name in spatial if own[name].shape != state[name].shape
    )
    if wrong:
        raise SettingsError(
            f"train.model.path is a UNet whose {wrong[0]} is not that of a video UNet: take "
            "Stable Diffusion 2.1"
        )
    net.load_state_dict(state, strict=False)
    for name, module in net.named_modules():
        last = name.endswith((".proj_out", "conv4.3")) and any(p in name for p in TEMPORAL)
        if last:  # what is added to the residual
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return net
