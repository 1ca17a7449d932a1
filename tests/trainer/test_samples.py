"""Videos of fixed prompts while it trains."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from av.codec.codec import UnknownCodecError
from networks import CONFIGS
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import pictures, sample
from trainer import samples as samples_of
from trainer.config import SettingsError
from trainer.train import main, train

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

from encoders import make as make_encoder

PROMPTS = ["a red square", "a blue square"]


def chance() -> list[Any]:
    """Where all generators stand."""
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, their average, the optimiser."""
    found = {f.name + n: v for f in folder.glob("*.safetensors") for n, v in load_file(f).items()}
    optimizer = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    return found | {f"{n}/{key}": v for n, s in optimizer.items() for key, v in s.items()}


def test_they_change_nothing_of_the_training(
    make_index: Any, settings_of: Any, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(vae=vae)
    common = {"ema_decay": 0.9, "caption_dropout": 0.5, "learning_rate": 1e-2}
    common["shift_tokens"] = [[2, 0.5], [8, 1.0]]
    plain = state(train(settings_of(made, output=str(tmp_path / "plain"), **common)))
    before = chance()
    common["samples"] = {"prompts": PROMPTS, "every": 2, "steps": 3}
    whole = train(settings_of(made, output=str(tmp_path / "whole"), **common))
    assert chance() == before
    train(settings_of(made, steps=3, **common))
    parts = train(settings_of(made, steps=6, **common))
    for folder in (whole, parts):
        found = state(folder)
        assert found.keys() == plain.keys() and len(plain) > 30
        assert all(torch.equal(value, found[name]) for name, value in plain.items())
    one, two = (folder.parent / "samples" for folder in (whole, parts))
    names = [f"step_{step:06}.gif" for step in (2, 4, 6)]
    assert sorted(f.name for f in one.iterdir()) == names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert len({(one / name).read_bytes() for name in names}) == 3, "it learns"
    assert f"step 4/6  samples in {one / names[1]}\n" in capsys.readouterr().err

    # They are of the averaged weights, by the sampler that `vidpipe sample` has.
    out = tmp_path / "a.gif"
    words = ["--checkpoint", str(whole), "--out", str(out), "--steps", "3"]
    assert sample.main([*words, *(w for prompt in PROMPTS for w in ("--prompt", prompt))]) == 0
    with Image.open(out) as asked, Image.open(one / names[2]) as told:
        assert asked.size == told.size == (384, 216) and told.n_frames == 4
        assert np.abs(np.asarray(asked, int) - np.asarray(told, int)).max() <= 2
    (whole / "ema.safetensors").unlink()
    assert sample.main([*words, *(w for prompt in PROMPTS for w in ("--prompt", prompt))]) == 0
    assert out.read_bytes() != (one / names[2]).read_bytes()


def test_captions_of_clips_that_are_held_back(
    make_index: Any, settings_of: Any, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(sizes=(30, 10), vae=vae, captions=lambda i: f"no {i // 2}")
    common = {"validation": {"share": 0.5, "every": 6}}
    samples = {"prompts": 3, "every": 6, "steps": 1, "format": "png"}
    settings = settings_of(made, samples=samples, **common)
    train(settings)
    assert "3 prompts are sampled every 6 steps" in capsys.readouterr().err
    (file,) = (settings.output / "samples").iterdir()
    assert file.name == "step_000006.png" and Image.open(file).size == (4 * 130, 3 * (23 + 128))
    with pytest.raises(SettingsError, match=r"samples\.prompts is 3, .* validation\.share is 0"):
        settings_of(made, samples=samples)


def test_what_trackers_are_shown(make_index: Any, settings_of: Any, vae: Path) -> None:
    made = make_index(vae=vae)
    samples = {"prompts": PROMPTS, "every": 3, "steps": 1}
    settings = settings_of(made, ema_decay=0.9, samples=samples)
    train(settings)
    told = EventAccumulator(str(settings.output / "logs" / "vidpipe"), {"images": 0}).Reload()
    shown = told.Images("samples")
    assert [picture.step for picture in shown] == [3, 6]
    for picture in shown:
        file = settings.output / "samples" / f"step_{picture.step:06}.gif"
        assert picture.encoded_image_string == file.read_bytes()
        assert (picture.width, picture.height) == (384, 216)


def test_they_go_on_from_first_frames(
    make_index: Any,
    settings_of: Any,
    vae: Path,
    network: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the clips whose captions they are; the dropout of adapters draws what it would have."""
    encoder = make_encoder(tmp_path / "encoder", "umt5", width=6)
    made = make_index(
        sizes=(20,), vae=vae, encoder=encoder, embedded=True, first_frame=True, moments=False
    )
    lora = {"rank": 2, "dropout": 0.5}
    values = {
        "steps": 4,
        "text": {"kind": "stored"},
        "validation": {"share": 0.4, "every": 99},
        "model": {"kind": "wan", "path": str(network("wan")), "lora": lora, "first_frame": 0.5},
    }
    decoded: list[torch.Tensor] = []

    def decode(vae: Any, z: torch.Tensor, latents: Any) -> Any:
        decoded.append(z)
        return pictures.decode(vae, z, latents)

    monkeypatch.setattr(samples_of, "decode", decode)
    plain = train(settings_of(made, output=str(tmp_path / "plain"), **values))
    samples = {"prompts": 2, "every": 2, "steps": 1, "first_frame": True}
    settings = settings_of(made, samples=samples, **values)
    seen = train(settings)
    one, two = state(plain), state(seen)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert len(list((settings.output / "samples").iterdir())) == 2 and len(decoded) == 4
    stand = [sum(known_first(z, made)) for z in decoded]
    assert stand == [1, 1, 1, 1]


def known_first(z: torch.Tensor, made: Any) -> list[bool]:
    """Whether latents begin with the first frame of each of the clips, which is half of its own."""
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (made.spec.shift, made.spec.scale))
    firsts = [(torch.from_numpy(mean[:, 0] / 2) - shift) * scale for mean, _ in made.clips.values()]
    return [torch.allclose(z[:, 0], first, atol=1e-5) for first in firsts]


def test_a_picture_that_cannot_be_written_ends_no_training(
    make_index: Any, settings_of: Any, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(vae=vae)
    settings = settings_of(made, samples={"prompts": PROMPTS, "every": 3, "steps": 1})
    settings.output.mkdir()
    (settings.output / "samples").touch()  # where the folder is to be
    train(settings)
    told = capsys.readouterr().err
    assert "step 3: no samples, as they cannot be decoded or written: FileExistsError: " in told
    assert "trained 6 steps" in told


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("decode", RuntimeError("no kernel image is available\nfor this device")),
        ("save", UnknownCodecError("libx264")),  # of a PyAV that was built without
    ],
)
def test_a_vae_or_codec_that_fails_ends_no_training(
    part: str,
    error: Exception,
    make_index: Any,
    settings_of: Any,
    vae: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    works, steps = getattr(samples_of, part), iter((3, 6))

    def once(*values: Any) -> Any:
        if next(steps, 6) == 3:
            raise error
        return works(*values)

    monkeypatch.setattr(samples_of, part, once)
    settings = settings_of(make_index(vae=vae), samples={"prompts": PROMPTS, "every": 3})
    train(settings)
    told = capsys.readouterr().err
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}\n"
    assert f"step 3: no samples, as they cannot be decoded or written: {reason}" in told
    assert [f.name for f in (settings.output / "samples").iterdir()] == ["step_000006.gif"]
    assert "trained 6 steps" in told


# ----------------------------------------------------------------------------- what is refused


def refused(settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    assert main(["--config", str(file)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("vidpipe train: ")
    assert not (settings.output / "logs").exists(), "before anything begins"
    return told


def test_another_vae(
    make_index: Any, settings_of: Any, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffusers

    made = make_index(vae=vae)

    def told(folder: str) -> str:
        samples = {"prompts": PROMPTS, "vae": folder}
        return refused(settings_of(made, samples=samples), tmp_path, capsys)

    missing = told(str(tmp_path / "none"))
    assert f"{tmp_path / 'none'} is no VAE of diffusers" in missing and str(vae) in missing
    other = diffusers.AutoencoderKL.from_pretrained(vae)
    torch.nn.init.zeros_(other.decoder.conv_out.weight)
    other.save_pretrained(tmp_path / "other")
    found = told(str(tmp_path / "other"))
    assert f"{tmp_path / 'other'} holds another AutoencoderKL (sha256 " in found
    assert f"AutoencoderKL, {vae} (sha256 {made.spec.vae_sha256[:12]})" in found
    assert "give its folder as train.samples.vae" in found
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "AutoencoderKLWan"))
    assert "holds a AutoencoderKLWan, but the latents were made" in told(str(config.parent))


def test_another_text_encoder(
    make_index: Any, settings_of: Any, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = make_encoder(tmp_path / "encoder", "umt5", width=6)
    made = make_index(vae=vae, encoder=encoder, embedded=True)

    def told(folder: Path) -> str:
        samples = {"prompts": PROMPTS, "text_encoder": str(folder)}
        values = {"samples": samples, "text": {"kind": "stored"}}
        return refused(settings_of(made, **values), tmp_path, capsys)

    assert f"the text encoder in {tmp_path / 'none'} can't be loaded" in told(tmp_path / "none")
    other = make_encoder(tmp_path / "other", "t5", width=6)
    found = told(other)
    assert f"{other} holds another text encoder (sha256 " in found
    assert f"made with: {encoder} (sha256 " in found and "train.samples.text_encoder" in found


def test_a_model_that_needs_a_picture(
    make_index: Any, settings_of: Any, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsError, match=r"samples: first_frame goes on from clips .* a list"):
        settings_of(make_index(), samples={"prompts": PROMPTS, "first_frame": True})
    encoder = make_encoder(tmp_path / "encoder", "umt5", width=6)
    network = CONFIGS["cogvideox"] | {"in_channels": 8, "max_text_seq_length": 12}
    made = make_index(
        vae=vae, encoder=encoder, embedded=True, first_frame=True, padding="max_length"
    )
    values = {
        "samples": {"prompts": PROMPTS},
        "text": {"kind": "stored"},
        "model": {"kind": "cogvideox", "config": network, "first_frame": 0.5},
    }
    told = refused(settings_of(made, **values), tmp_path, capsys)
    assert "prompts alone, but this cogvideox goes on from a picture" in told
    values = {
        "samples": {"prompts": 2, "first_frame": True},
        "validation": {"share": 0.5},
    }
    told = refused(settings_of(made, **values), tmp_path, capsys)
    assert "train.samples.first_frame is set, but train.model.first_frame is not" in told
