"""Networks of diffusers so small that they train in milliseconds, a folder each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from trainer.config import ModelConfig

CHANNELS, WORDS = 4, 6  # of latents, and values of a text token
SHAPE = (CHANNELS, 4, 4, 4)

CONFIGS: dict[str, dict[str, Any]] = {
    "unet3d": {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WORDS,
        "attention_head_dim": 8,
    },
    "cogvideox": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 8,
        "text_embed_dim": WORDS,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 13,
        "max_text_seq_length": 5,
        "use_rotary_positional_embeddings": True,
    },
    "wan": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": WORDS,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
    "ltx": {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "num_layers": 2,
        "caption_channels": WORDS,
    },
}
CLASSES = {
    "unet3d": "UNet3DConditionModel",
    "cogvideox": "CogVideoXTransformer3DModel",
    "wan": "WanTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
}
PADDING = {"unet3d": "max_length", "cogvideox": "max_length", "wan": "none", "ltx": "none"}
OBJECTIVE = {"unet3d": "epsilon", "cogvideox": "v_prediction", "wan": "flow", "ltx": "flow"}


def make(kind: str, folder: Path, **values: Any) -> Path:
    """A network of random weights, none of them 0, as `from_pretrained` reads it."""
    torch.manual_seed(3)
    net = getattr(diffusers, CLASSES[kind])(**{**CONFIGS[kind], **values})
    return shaken(net, folder)


def make_flat(folder: Path, **values: Any) -> Path:
    """A UNet of pictures as Stable Diffusion 2.1's."""
    torch.manual_seed(4)
    sizes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WORDS,
        "attention_head_dim": [2, 4],  # heads of 8 values, as Stable Diffusion names them
        "use_linear_projection": True,
    }
    return shaken(diffusers.UNet2DConditionModel(**{**sizes, **values}), folder)


def shaken(net: Any, folder: Path) -> Path:
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    net.save_pretrained(folder)
    return folder


def config(kind: str, *, padding: str | None = None, **values: Any) -> ModelConfig:
    model = {"kind": kind, **values.pop("model", {})}
    if "path" not in model:
        model["config"] = {**CONFIGS[kind], **model.get("config", {})}
    text = {"encoder": "t5", "width": WORDS, "max_length": 5, "padding": padding or PADDING[kind]}
    return ModelConfig.model_validate(
        {
            "model": model,
            "text": {"kind": "stored"},
            "objective": OBJECTIVE[kind],
            "schedule": "scaled_linear",
            "shape": SHAPE,
            "latents": {
                "vae": "vae",
                "channels": CHANNELS,
                "temporal": 4,
                "spatial": 8,
                "sampling": {"fps": 16.0},
            },
            "embeddings": text,
            **values,
        }
    )


def words(batch: int = 2, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(batch, length, WORDS, generator=torch.Generator().manual_seed(5))
    return values, torch.ones(batch, length, dtype=torch.bool)


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(2, *(shape or SHAPE), generator=torch.Generator().manual_seed(6))
