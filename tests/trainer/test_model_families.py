from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from networks import CHANNELS, CLASSES, SHAPE, WORDS, config, latents, make, make_flat, words

from trainer import families, models, objectives, sample
from trainer.config import ModelConfig, SettingsError
from trainer.families import Family

KINDS = ("unet3d", "cogvideox", "wan", "ltx")


# ----------------------------------------------------------------------------- what they are told


@torch.no_grad()
def test_unet3d_is_called_as_its_pipeline_does(network: Callable[[str], Path]) -> None:
    model = families.build(config("unet3d", model={"path": str(network("unet3d"))})).eval()
    x, text, time = latents(), words(), torch.tensor([0.25, 0.999])
    net = diffusers.UNet3DConditionModel.from_pretrained(network("unet3d")).eval()
    wanted = net(x, torch.tensor([250, 999]), text[0]).sample
    torch.testing.assert_close(model(x, time, text), wanted)


@torch.no_grad()
def test_wan_is_called_as_its_pipeline_does(network: Callable[[str], Path]) -> None:
    model = families.build(config("wan", model={"path": str(network("wan"))})).eval()
    x, (values, mask), time = latents(), words(), torch.tensor([0.25, 0.75])
    mask[1, 2:] = False
    net = diffusers.WanTransformer3DModel.from_pretrained(network("wan")).eval()
    padded = torch.zeros(2, 512, WORDS)
    padded[0, :5], padded[1, :2] = values[0], values[1, :2]
    wanted = net(x, torch.tensor([250.0, 750.0]), padded).sample
    torch.testing.assert_close(model(x, time, (values, mask)), wanted)


@torch.no_grad()
def test_ltx_is_called_as_its_pipeline_does(network: Callable[[str], Path]) -> None:
    model = families.build(config("ltx", model={"path": str(network("ltx"))})).eval()
    x, (values, mask), time = latents(CHANNELS, 3, 2, 4), words(), torch.tensor([0.25, 0.75])
    mask[1, 2:] = False
    net = diffusers.LTXVideoTransformer3DModel.from_pretrained(network("ltx")).eval()
    pipeline = diffusers.LTXPipeline
    out = net(
        pipeline._pack_latents(x),
        values,
        torch.tensor([250.0, 750.0]),
        mask.long(),
        num_frames=3,
        height=2,
        width=4,
        rope_interpolation_scale=(4 / 16.0, 8, 8),
    ).sample
    wanted = pipeline._unpack_latents(out, 3, 2, 4)
    torch.testing.assert_close(model(x, time, (values, mask)), wanted)
    values[1, 2:] = 7  # what the mask hides does not matter
    torch.testing.assert_close(model(x, time, (values, mask)), wanted)


@pytest.mark.parametrize(
    "variant", [{}, {"patch_size_t": 2}, {"use_rotary_positional_embeddings": False}]
)
@torch.no_grad()
def test_cogvideox_is_called_as_its_pipeline_does(variant: dict[str, Any], tmp_path: Path) -> None:
    folder = make("cogvideox", tmp_path / "transformer", **variant)
    model = families.build(config("cogvideox", model={"path": str(tmp_path)})).eval()
    x, text, time = latents(), words(), torch.tensor([0.25, 0.999])
    net = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder).eval()
    pipeline = diffusers.CogVideoXPipeline(
        None, None, None, net, diffusers.CogVideoXDDIMScheduler()
    )
    rotary = None
    if net.config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(32, 32, 4, torch.device("cpu"))
    wanted = net(
        x.transpose(1, 2), text[0], torch.tensor([250, 999]), image_rotary_emb=rotary
    ).sample
    torch.testing.assert_close(model(x, time, text), wanted.transpose(1, 2))


# ----------------------------------------------------------------------------- grown


@torch.no_grad()
def test_a_grown_unet_does_with_each_frame_what_the_one_of_pictures_did(tmp_path: Path) -> None:
    flat = diffusers.UNet2DConditionModel.from_pretrained(make_flat(tmp_path / "unet")).eval()
    model = families.build(config("unet3d", model={"path": str(tmp_path)})).eval()
    x, text, time = latents(), words(), torch.tensor([0.25, 0.999])
    found = model(x, time, text)
    for frame in range(x.shape[2]):
        wanted = flat(x[:, :, frame], torch.tensor([250, 999]), text[0]).sample
        torch.testing.assert_close(found[:, :, frame], wanted, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_a_grown_unet_learns_in_time(tmp_path: Path) -> None:
    make_flat(tmp_path / "unet")
    model = families.build(config("unet3d", model={"path": str(tmp_path)}))
    (model(latents(), torch.tensor([0.2, 0.7]), words()) - latents()).square().mean().backward()
    grown = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.endswith(("temp_attentions.0.proj_out.weight", "temp_convs.0.conv4.3.weight"))
    ]
    assert len(grown) > 4
    for name, parameter in grown:
        assert not parameter.any() and parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"attention_head_dim": 2}, "attention heads of [8, 16] values"),
        ({"use_linear_projection": False}, "proj_in.weight is not that of a video UNet"),
        ({"class_embed_type": "timestep"}, "class_embedding"),
        (
            {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]},
            "AttnDownBlock2D, which a video UNet does not have",
        ),
    ],
)
def test_other_unets_cannot_be_grown(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    make_flat(tmp_path / "unet", **values)
    with pytest.raises(SettingsError, match="Stable Diffusion 2") as error:
        families.build(config("unet3d", model={"path": str(tmp_path)}))
    assert told in str(error.value)


# ----------------------------------------------------------------------------- from a picture


@pytest.mark.parametrize("kind", ["wan", "ltx"])
@torch.no_grad()
def test_a_frame_that_is_told_is_clean_and_at_time_0(
    kind: str, network: Callable[[str], Path]
) -> None:
    model = families.build(
        config(kind, model={"path": str(network(kind)), "first_frame": 0.5})
    ).eval()
    x, text, time = latents(), words(), torch.tensor([0.25, 0.75])
    first, told = torch.randn(2, CHANNELS, 1, 4, 4), torch.tensor([True, False])
    found, plain = model(x, time, text, first, told), model(x, time, text)
    torch.testing.assert_close(found[1], plain[1])
    assert not torch.allclose(found[0, :, 1:], plain[0, :, 1:])
    other = x.clone()
    other[0, :, 0] += 1  # its noise is not looked at
    torch.testing.assert_close(model(other, time, text, first, told), found)
    times = model.frame_times(x, time, told).view(2, 4, -1)
    assert not times[0, 0].any() and (times[0, 1:] == 0.25).all() and (times[1] == 0.75).all()


@torch.no_grad()
def test_cogvideox_sees_a_picture_beside_the_noise(tmp_path: Path) -> None:
    make("cogvideox", tmp_path, in_channels=2 * CHANNELS, ofs_embed_dim=8)
    model = families.build(
        config("cogvideox", model={"path": str(tmp_path), "first_frame": 0.9})
    ).eval()
    x, text, time = latents(), words(), torch.tensor([0.25, 0.75])
    first, told = torch.randn(2, CHANNELS, 1, 4, 4), torch.tensor([True, False])
    picture = torch.zeros_like(x)
    picture[0, :, :1] = first[0]
    wanted = model.net(
        torch.cat([x, picture], 1).transpose(1, 2),
        text[0],
        time * 1000,
        ofs=torch.tensor([2.0]),
        image_rotary_emb=model.rotary(x.transpose(1, 2)),
    ).sample
    torch.testing.assert_close(model(x, time, text, first, told), wanted.transpose(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_sampled(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of each, from noise to the clip that the network sees in it."""
    described = config(kind)
    torch.manual_seed(0)
    model = families.build(described).eval()
    text = words(4)  # of two prompts, with and without
    monkeypatch.setattr(sample, "text_of", lambda *_: text)
    found = sample.sample(model, described, ["a", "b"], steps=1, guidance=1.0, seed=3)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = torch.stack([noise, noise])
    (time, end) = sample.sampling_times(described, 1)
    assert end == 0
    with torch.no_grad():
        output = model(x, time.expand(2), (text[0][:2], text[1][:2]))
    a, s = sample.path(described, time.expand(2))
    wanted, _ = objectives.resolve(described.objective, x, output, a, s)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------- LoRA, saved, loaded


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_read_by_diffusers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    described = config(kind)
    model = families.build(described)
    assert all(parameter.requires_grad for parameter in model.parameters())
    described = described.model_copy(update={"arch": model.config})
    models.save(model, model.state_dict(), described, tmp_path)
    cls = getattr(diffusers, CLASSES[kind])
    read, info = cls.from_pretrained(tmp_path, subfolder=model.part, output_loading_info=True)
    assert not any(info.values())
    for name, value in model.net.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    loaded, found = models.load(tmp_path)
    assert found == described
    x, time, text = latents(), torch.tensor([0.25, 0.75]), words()
    with torch.no_grad():
        assert torch.equal(loaded(x, time, text), model.eval()(x, time, text))


def adapted(kind: str, folder: Path) -> tuple[Family, ModelConfig]:
    """A model whose adapters do something."""
    described = config(kind, model={"path": str(folder), "lora": {"rank": 2, "alpha": 6.0}})
    model = families.build(described).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, described


PIPELINES: dict[str, Callable[[Any], Any]] = {
    "cogvideox": lambda net: diffusers.CogVideoXPipeline(
        None, None, None, net, diffusers.CogVideoXDDIMScheduler()
    ),
    "wan": lambda net: diffusers.WanPipeline(
        None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), net
    ),
    "ltx": lambda net: diffusers.LTXPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, net
    ),
}


@pytest.mark.parametrize("kind", ["cogvideox", "wan", "ltx"])
@torch.no_grad()
def test_adapters_are_read_by_the_pipeline(
    kind: str, network: Callable[[str], Path], tmp_path: Path
) -> None:
    model, described = adapted(kind, network(kind))
    x, time, text = latents(), torch.tensor([0.25, 0.75]), words()
    wanted = model(x, time, text)
    models.save(model, model.state_dict(), described, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "config.json",
        "pytorch_lora_weights.safetensors",
    }
    net = getattr(diffusers, CLASSES[kind]).from_pretrained(network(kind)).eval()
    plain = families.build(config(kind, model={"path": str(network(kind))})).eval()
    assert not torch.allclose(plain(x, time, text), wanted, atol=1e-3)
    PIPELINES[kind](net).load_lora_weights(tmp_path)
    plain.net = net
    torch.testing.assert_close(plain(x, time, text), wanted, rtol=1e-4, atol=1e-5)
    loaded, _ = models.load(tmp_path)
    assert torch.equal(loaded(x, time, text), wanted)


@torch.no_grad()
def test_adapters_of_unet3d_are_merged(network: Callable[[str], Path], tmp_path: Path) -> None:
    model, described = adapted("unet3d", network("unet3d"))
    x, time, text = latents(), torch.tensor([0.25, 0.75]), words()
    wanted = model(x, time, text)
    models.save(model, model.state_dict(), described, tmp_path)
    net = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "unet").eval()
    torch.testing.assert_close(net(x, time * 1000, text[0]).sample, wanted, rtol=1e-4, atol=1e-5)
    before = diffusers.UNet3DConditionModel.from_pretrained(network("unet3d")).eval()
    assert not torch.allclose(before(x, time * 1000, text[0]).sample, wanted, atol=1e-3)
    loaded, _ = models.load(tmp_path)
    torch.testing.assert_close(loaded(x, time, text), wanted, rtol=1e-4, atol=1e-5)


BLOCK = r"(down_|transformer_|)blocks\.0.*norm"


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = families.build(config(kind))
        if again:
            model.checkpoint()
        calls: list[int] = []
        inner = [m for n, m in model.net.named_modules() if re.match(BLOCK, n)]
        inner[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = model.train()(latents(), torch.tensor([0.25, 0.75]), words())
        out.square().mean().backward()
        assert len(calls) == (2 if again else 1)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)
