"""What each family does with lengths, sizes and scales, against diffusers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import KINDS, tiny

from stages.base import StageError
from stages.vae.families import FAMILIES, Shape, scaling_of, shape_of

VIDEO = [kind for kind, (name, _) in KINDS.items() if FAMILIES[name].video]


def test_every_family_is_tried() -> None:
    assert {name for name, _ in KINDS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_ratios_from_the_config_are_those_of_the_latents(kind: str, tmp_path: Path) -> None:
    module = tiny(kind)
    module.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    frames = 2 * shape.temporal + 1
    assert shape.takes(frames)
    x = torch.zeros(1, 3, frames, 64, 64)
    with torch.inference_mode():
        if shape.family.video:
            latents = module.encode(x).latent_dist.mean
            assert latents.shape[2] == 3
        else:
            assert shape.temporal == 1
            encoded = module.encode(x[:, :, 0])
            latents = encoded.latent_dist.mean if shape.family.posterior else encoded.latents
    assert latents.shape[-1] * shape.spatial == latents.shape[-2] * shape.spatial == 64


@pytest.mark.parametrize("kind", VIDEO)
def test_lengths_taken_are_those_that_come_back(kind: str, tmp_path: Path) -> None:
    """Of a right length the last frame has its say in the latents, and as many frames come back as
    went in; of every other length one of the two fails, or the class does."""
    module = tiny(kind)
    module.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    extra = {"temb": torch.zeros(1)} if kind == "ltx095" else {}
    draw = torch.Generator().manual_seed(0)
    for frames in (1, 4, 5, 8, 9, 12, 13, 16, 17):
        x = torch.rand(1, 3, frames, 32, 32, generator=draw) * 2 - 1
        other = torch.cat([x[:, :, :-1], -x[:, :, -1:]], 2)
        try:
            with torch.inference_mode():
                latents = module.encode(x).latent_dist.mean
                told = not torch.equal(latents, module.encode(other).latent_dist.mean)
                back = module.decode(latents, **extra).sample.shape[2]
        except RuntimeError:
            told, back = False, 0
        assert (told and back == frames) == shape.takes(frames), frames


def test_constants_per_channel() -> None:
    wanted = {
        "sd": ([0.0] * 4, [0.18215] * 4),
        "flux": ([0.25] * 16, [0.5] * 16),
        "playground": ([0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.0625]),
        "taesd": ([0.0] * 4, [1.0] * 4),
        "wan": ([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 0.25, 0.125]),
        "wan22": ([0.0] * 4, [1.0] * 4),
        "cogvideox": ([0.0] * 4, [0.7] * 4),
        "ltx": ([0.0] * 8, [1.0] * 8),
        "ltx095": ([0.0] * 8, [1.0] * 8),
        "hunyuan": ([0.0] * 4, [0.476986] * 4),
        "hunyuan15": ([0.0] * 4, [1.03682] * 4),
    }
    assert wanted == {kind: scaling_of(tiny(kind)) for kind in KINDS}


def test_constants_saved_with_the_weights() -> None:
    module = tiny("ltx")
    module.latents_mean.copy_(torch.arange(8.0))
    module.latents_std.fill_(4.0)
    assert scaling_of(module) == ([float(i) for i in range(8)], [0.25] * 8)


def test_wrong_lengths_and_sizes_offer_right_ones() -> None:
    wan = Shape("AutoencoderKLWan", 4, 8)
    wan.check(61, 64, 64)
    with pytest.raises(StageError, match=r"takes 4k\+1 frames, .* of 64 .* to 61 or 65$"):
        wan.check(64, 64, 64)
    with pytest.raises(StageError, match=r"a width of 60 .* set sampling.size to 64"):
        wan.check(61, 64, 60)
    with pytest.raises(StageError, match=r"takes 8k\+1 frames, .* of 64 .* to 57 or 65$"):
        Shape("AutoencoderKLLTXVideo", 8, 32).check(64, 64, 64)
    with pytest.raises(StageError, match=r"takes 4k\+1 frames, .* of 4 .* to 1 or 5$"):
        Shape("AutoencoderKLHunyuanVideo", 4, 8).check(4, 64, 64)
    cog = Shape("AutoencoderKLCogVideoX", 4, 8)
    cog.check(64, 64, 64)
    cog.check(49, 64, 64)
    with pytest.raises(StageError, match=r"takes 8k or 8k\+1 frames, .* of 13 .* to 9 or 16$"):
        cog.check(13, 64, 64)
    for frames in range(1, 20):
        Shape("AutoencoderKL", 1, 8).check(frames, 64, 64)


def test_what_is_no_vae_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"config.json can't be read"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(StageError, match="holds a UNet2DModel, which encode does not know"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(StageError, match="of a AutoencoderKL lacks 'block_out_channels'"):
        shape_of(str(tmp_path))
