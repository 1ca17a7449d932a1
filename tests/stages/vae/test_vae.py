"""Latents equal diffusers' own, whatever the batch, the chunks and the memory format; and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, tiny

from stages.base import Failed, StageError
from stages.vae.families import FAMILIES
from stages.vae.vae import Options, Vae, channels_last

SIZE = 32
# Beyond rounding nothing may differ. On a CPU, in float32, of latents with a standard deviation of
# 0.1 to 0.7, the largest difference from plain diffusers and between batches of one and of three
# was 1.3e-6, and 1.8e-6 between memory formats.
EXACT = {"atol": 1e-5, "rtol": 0}


def clips(n: int, frames: int) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (n, frames, SIZE, SIZE, 3), dtype=np.uint8)
    return torch.from_numpy(values)


def encode(vae: Vae, batch: torch.Tensor, moments: bool = True) -> torch.Tensor:
    return torch.stack(vae.fetch(vae.encode(batch, moments)))  # type: ignore[arg-type]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    tiny(request.param).save_pretrained(tmp_path / "vae")
    return str(request.param)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> str:
    return str(tmp_path / "vae")


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    tiny("sd").save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights["encoder.conv_in.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        StageError, match=r"lacks 1 weights of its AutoencoderKL \(encoder\.conv_in"
    ):
        Vae(str(tmp_path))


def test_loading_warns_of_no_module_in_float32(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    vae = Vae(folder, "bfloat16")
    assert {p.dtype for p in vae.module.parameters()} == {torch.bfloat16}
    assert not [record for record in caplog.records if "float32" in record.getMessage()]


@pytest.fixture
def three(kind: str) -> torch.Tensor:
    return clips(3, 9 if FAMILIES[KINDS[kind][0]].video else 6)


def by_hand(module: Any, clip: torch.Tensor, moments: bool) -> torch.Tensor:
    """One clip through plain diffusers, as its own documentation does it."""
    family = FAMILIES[type(module).__name__]
    x = (clip if clip.is_floating_point() else clip.float()) / 127.5 - 1
    with torch.no_grad():
        if family.video:
            posterior = module.encode(x.permute(3, 0, 1, 2)[None].to(module.dtype)).latent_dist
            return (posterior.parameters if moments else posterior.mean)[0]
        encoded = module.encode(x.permute(0, 3, 1, 2).to(module.dtype))
        if not family.posterior:
            return encoded.latents.transpose(0, 1)
        posterior = encoded.latent_dist
        return (posterior.parameters if moments else posterior.mean).transpose(0, 1)


def test_latents_equal_diffusers_own(kind: str, folder: str, three: torch.Tensor) -> None:
    vae, module = Vae(folder), tiny(kind)
    for moments in (True, False):
        got = encode(vae, three, moments)
        double = 2 if moments and vae.family.posterior else 1
        assert got.shape[1] == double * vae.channels
        for clip, latents in zip(three, got, strict=True):
            torch.testing.assert_close(latents, by_hand(module, clip, moments), **EXACT)


def test_neither_batch_nor_order_nor_neighbours_matter(folder: str, three: torch.Tensor) -> None:
    whole = encode(Vae(folder), three)
    few = Vae(folder, options=Options(pictures=4))  # ends within a clip, and raggedly
    for i in range(3):
        torch.testing.assert_close(encode(few, three[i : i + 1])[0], whole[i], **EXACT)
    torch.testing.assert_close(encode(few, three.flip(0)).flip(0), whole, **EXACT)
    torch.testing.assert_close(encode(few, three[1:]), whole[1:], **EXACT)


def test_slices_and_memory_formats_only_change_speed(folder: str, three: torch.Tensor) -> None:
    plain = encode(Vae(folder), three[:2])
    sliced = encode(Vae(folder, options=Options(slicing=True)), three[:2])
    torch.testing.assert_close(sliced, plain, **EXACT)
    vae = Vae(folder)
    vae._format = channels_last(vae.module, vae.family.video)
    torch.testing.assert_close(encode(vae, three[:2]), plain, **EXACT)


def test_flat_pictures_keep_their_digits_on_a_cpu(tmp_path: Path) -> None:
    """PyTorch's GroupNorm for the CPU in the format channels_last is off by 2.6e-4 here."""
    module = tiny("sd")
    module.save_pretrained(tmp_path)
    flat = torch.full((1, 1, 128, 128, 3), 200, dtype=torch.uint8)
    flat[:, :, :64] = 20
    exact = by_hand(module.double(), flat[0].double(), True)
    for options in (Options(), Options(channels_last=True)):
        got = encode(Vae(str(tmp_path), options=options), flat)[0]
        torch.testing.assert_close(got.double(), exact, **EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_that_of_diffusers(
    kind: str, folder: str, three: torch.Tensor, dtype: str
) -> None:
    """Frames become numbers in float32, as diffusers does it, and then half of them: in bfloat16
    itself, -1 to 1 would keep 7 of 8 bits."""
    got = encode(Vae(folder, dtype), three[:1])[0]
    assert got.dtype == getattr(torch, dtype)
    module = tiny(kind).to(got.dtype)
    torch.testing.assert_close(got, by_hand(module, three[0], True), atol=0.03, rtol=0.03)
    exact = by_hand(tiny(kind), three[0], True)
    torch.testing.assert_close(got.float(), exact, atol=0.1, rtol=0.1)


def test_constants_among_the_weights_are_not_rounded(tmp_path: Path) -> None:
    module = tiny("ltx")
    module.latents_mean.copy_(torch.linspace(0.1234567, 0.9, 8))
    module.save_pretrained(tmp_path)
    assert Vae(str(tmp_path), "bfloat16").shift == module.latents_mean.tolist()


def test_tiles_are_those_of_diffusers(tmp_path: Path) -> None:
    module = tiny("wan")
    module.save_pretrained(tmp_path)
    one = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (1, 1, 272, 272, 3), dtype=np.uint8)
    )
    tiled = encode(Vae(str(tmp_path), options=Options(tiling=True)), one)
    assert not torch.allclose(tiled, encode(Vae(str(tmp_path)), one), atol=1e-4)
    module.enable_tiling()
    torch.testing.assert_close(tiled[0], by_hand(module, one[0], True), **EXACT)
    tiny("taesd").save_pretrained(tmp_path / "taesd")
    with pytest.raises(StageError, match="AutoencoderTiny can't be tiled"):
        Vae(str(tmp_path / "taesd"), options=Options(tiling=True))


def test_decoding_undoes_the_scale_by_the_vaes_own_constants(
    kind: str, folder: str, three: torch.Tensor
) -> None:
    vae, module = Vae(folder), tiny(kind)
    mean = encode(vae, three[:1], False)[0]
    shift, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.shift, vae.scale))
    frames = vae.decode((mean - shift) * scale)
    assert isinstance(frames, torch.Tensor) and frames.shape == three[0].shape
    extra = {"temb": torch.zeros(1)} if kind == "ltx095" else {}
    with torch.no_grad():
        z = mean[None] if vae.family.video else mean.transpose(0, 1)
        plain = module.decode(z, **extra).sample
    plain = plain[0].permute(1, 2, 3, 0) if vae.family.video else plain.permute(0, 2, 3, 1)
    wanted = (plain.clamp(-1, 1) + 1) * 127.5
    assert (frames - wanted).abs().max() <= 0.51, "rounded"


def test_latents_that_are_not_finite_fail_their_clip_alone(tmp_path: Path) -> None:
    tiny("sd").save_pretrained(tmp_path)
    vae = Vae(str(tmp_path))
    encoded = vae.encode(clips(2, 3), True)
    encoded.parts[4] = torch.full((8, 4, 4), float("inf"))  # frame 1 of clip 1
    first, second = vae.fetch(encoded)
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, Failed) and second.error == "not_finite"
    assert "encode.dtype to bfloat16" in second.message


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    tiny("sd").save_pretrained(tmp_path)
    for device in ("cuda:7", "abacus"):
        with pytest.raises(StageError, match=f"device {device} can't be used: "):
            Vae(str(tmp_path), device=device)


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
    latents = encode(vae, grey)
    assert latents.shape == (1, 4, 2, 8, 8)
    torch.testing.assert_close(latents[0], by_hand(module, grey[0], True), **EXACT)
