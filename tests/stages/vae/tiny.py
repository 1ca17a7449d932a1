"""VAEs of every family with random weights, as small as their blocks allow."""

from __future__ import annotations

from typing import Any

FOUR = (8, 8, 8, 8)
PICTURES = {
    "block_out_channels": FOUR,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
LTX = {
    "latent_channels": 8,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
}
WAN = {"base_dim": 8, "num_res_blocks": 1, "z_dim": 4, "dim_mult": [1, 1, 1, 1]}
# Name of the kind: class of diffusers and its configuration.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("AutoencoderKL", {**PICTURES, "scaling_factor": 0.18215}),
    "flux": (
        "AutoencoderKL",
        {
            **PICTURES,
            "latent_channels": 16,
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "playground": (
        "AutoencoderKL",
        {
            **PICTURES,
            "scaling_factor": 0.5,
            "latents_mean": [0.1, 0.2, 0.3, 0.4],
            "latents_std": [1.0, 2.0, 4.0, 8.0],
        },
    ),
    "taesd": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": FOUR,
            "decoder_block_out_channels": FOUR,
            "num_encoder_blocks": (1, 1, 1, 1),
            "num_decoder_blocks": (1, 1, 1, 1),
        },
    ),
    "wan": (
        "AutoencoderKLWan",
        {**WAN, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 4.0, 8.0]},
    ),
    "wan22": (
        "AutoencoderKLWan",
        {
            **WAN,
            "decoder_base_dim": 8,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        },
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": FOUR,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.7,
        },
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {**LTX, "block_out_channels": FOUR, "decoder_block_out_channels": FOUR},
    ),
    "ltx095": (
        "AutoencoderKLLTXVideo",
        {
            **LTX,
            "block_out_channels": (8, 8, 8, 8, 8),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "decoder_block_out_channels": (8, 16, 32),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "decoder_spatio_temporal_scaling": (True, True, True),
            "decoder_inject_noise": (False,) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "upsample_residual": (True, True, True),
            "upsample_factor": (2, 2, 2),
            "spatio_temporal_scaling": (True,) * 4,
            "timestep_conditioning": True,
            "patch_size": 4,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": FOUR,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.476986,
        },
    ),
    "hunyuan15": (
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": (8,) * 5, "latent_channels": 4, "layers_per_block": 1},
    ),
}


def tiny(kind: str, seed: int = 0) -> Any:
    import diffusers
    import torch

    torch.manual_seed(seed)
    name, config = KINDS[kind]
    return getattr(diffusers, name)(**config).eval()
