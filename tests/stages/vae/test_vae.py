"""Every VAE family: latents equal diffusers' own, constants and ratios are read right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.base import StageError
from stages.vae.vae import FAMILIES, Vae, shape_of


def tiny(name: str) -> Any:
    """A VAE of the class with random weights, as small as its blocks allow."""
    import diffusers

    small: dict[str, dict[str, Any]] = {
        "AutoencoderKL": {
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
        },
        "AutoencoderTiny": {
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "num_encoder_blocks": (1, 1, 1, 1),
            "num_decoder_blocks": (1, 1, 1, 1),
        },
        "AutoencoderKLWan": {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "latents_mean": [0.1, 0.2, 0.3, 0.4],
            "latents_std": [1.0, 2.0, 4.0, 8.0],
        },
        "AutoencoderKLCogVideoX": {
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.7,
        },
        "AutoencoderKLLTXVideo": {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
    }
    torch.manual_seed(0)
    return getattr(diffusers, name)(**small[name]).eval()


FRAMES = {name: 9 if family.video else 6 for name, family in FAMILIES.items()}
SIZE = 64


def clips(n: int, frames: int) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (n, frames, SIZE, SIZE, 3), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.fixture(params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Any]:
    """(class name, folder, the module itself)"""
    module = tiny(request.param)
    module.save_pretrained(tmp_path / "vae")
    return request.param, str(tmp_path / "vae"), module


def by_hand(name: str, module: Any, clip: torch.Tensor, moments: bool) -> torch.Tensor:
    """One clip through plain diffusers, as its own documentation does it."""
    x = clip.float() / 127.5 - 1
    with torch.no_grad():
        if FAMILIES[name].video:
            posterior = module.encode(x.permute(3, 0, 1, 2)[None]).latent_dist
            return (posterior.parameters if moments else posterior.mean)[0]
        encoded = module.encode(x.permute(0, 3, 1, 2))
        if not FAMILIES[name].posterior:
            return encoded.latents.transpose(0, 1)
        posterior = encoded.latent_dist
        return (posterior.parameters if moments else posterior.mean).transpose(0, 1)


@pytest.mark.parametrize("moments", [True, False])
def test_latents_equal_diffusers_own(saved: tuple[str, str, Any], moments: bool) -> None:
    name, folder, module = saved
    both = clips(2, FRAMES[name])
    vae = Vae(folder)
    got = torch.stack(vae.encode(both, 64, moments))
    double = 2 if moments and vae.family.posterior else 1
    assert got.shape[1] == double * vae.channels
    for clip, latents in zip(both, got, strict=True):
        torch.testing.assert_close(latents, by_hand(name, module, clip, moments), atol=1e-5, rtol=0)


def test_neither_batch_nor_order_nor_neighbours_matter(saved: tuple[str, str, Any]) -> None:
    name, folder, _ = saved
    three = clips(3, FRAMES[name])
    vae = Vae(folder)
    whole = torch.stack(vae.encode(three, 64, True))
    for i in range(3):
        alone = vae.encode(three[i : i + 1], 2, True)[0]
        torch.testing.assert_close(alone, whole[i], atol=1e-5, rtol=0)
    turned = torch.stack(vae.encode(three.flip(0), 5, True)).flip(0)
    torch.testing.assert_close(turned, whole, atol=1e-5, rtol=0)


def test_ratios_from_the_config_are_those_of_the_latents(saved: tuple[str, str, Any]) -> None:
    name, folder, _ = saved
    shape = shape_of(folder)
    frames = 2 * shape.temporal + 1
    latents = torch.stack(Vae(folder).encode(clips(1, frames), 64, False))
    assert latents.shape[-1] * shape.spatial == SIZE
    assert latents.shape[2] == (frames - 1) // shape.temporal + 1
    assert shape.temporal == {"AutoencoderKL": 1, "AutoencoderTiny": 1}.get(name, shape.temporal)


def test_constants_per_channel(saved: tuple[str, str, Any]) -> None:
    name, folder, _ = saved
    vae = Vae(folder)
    wanted = {
        "AutoencoderKL": ([0.25] * 4, [0.5] * 4),
        "AutoencoderTiny": ([0.0] * 4, [1.0] * 4),
        "AutoencoderKLWan": ([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 0.25, 0.125]),
        "AutoencoderKLCogVideoX": ([0.0] * 4, [0.7] * 4),
        "AutoencoderKLLTXVideo": ([0.0] * 8, [1.0] * 8),
    }[name]
    assert (vae.shift, vae.scale) == wanted


def test_wrong_lengths_and_sizes_offer_right_ones(tmp_path: Path) -> None:
    tiny("AutoencoderKLWan").save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    shape.check(61, 64, 64)
    with pytest.raises(StageError, match=r"would drop the last 3 of 64.* to 61 or 65"):
        shape.check(64, 64, 64)
    with pytest.raises(StageError, match=r"a width of 60 .* set sampling.size to 64"):
        shape.check(61, 64, 60)


def test_what_is_no_vae_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"config.json can't be read"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(StageError, match="holds a UNet2DModel, which encode does not know"):
        shape_of(str(tmp_path))


def test_taesd_with_its_real_weights(shared_data: Path, tmp_path: Path) -> None:
    """The published TAESD encoder, loaded by the class of diffusers from a folder of its own."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    weights = load_file(shared_data / "weights" / "taesd" / "taesd_encoder.safetensors")
    module = AutoencoderTiny()
    own = {f"encoder.layers.{key}": value.float() for key, value in weights.items()}
    missing, unexpected = module.load_state_dict(own, strict=False)
    assert not unexpected and all(key.startswith("decoder.") for key in missing)
    module.save_pretrained(tmp_path)
    vae = Vae(str(tmp_path))
    grey = torch.full((1, 2, 64, 64, 3), 128, dtype=torch.uint8)
    latents = torch.stack(vae.encode(grey, 8, True))
    assert latents.shape == (1, 4, 2, 8, 8)
    torch.testing.assert_close(latents[0], by_hand("AutoencoderTiny", module, grey[0], True))
