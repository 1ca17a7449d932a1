from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from trainer import objectives, pictures, sample
from trainer.config import DiTSettings, ModelConfig, SettingsError, TextSettings
from trainer.models import BEGIN, tokenise
from trainer.objectives import Kind
from trainer.train import train

SHAPE = (4, 3, 2, 2)


def config(
    objective: Kind = "flow", vae_class: str = "AutoencoderKL", temporal: int = 1
) -> ModelConfig:
    latents = {
        "vae_class": vae_class,
        "vae": "vaes/tiny",
        "temporal": temporal,
        "shift": [1.0] * 4,
        "scale": [0.5] * 4,
    }
    return ModelConfig(
        model=DiTSettings(),
        text=TextSettings(),
        objective=objective,
        schedule="cosine",
        shape=SHAPE,
        latents=latents,
    )


# ----------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_a_model_that_knows_the_data_leads_to_it(kind: Kind, steps: int) -> None:
    """The best output for data that is one point has a closed form: the sampler must end there."""
    point = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))

    def model(x: torch.Tensor, time: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        a, s = (v.view(-1, 1, 1, 1, 1) for v in objectives.path(kind, "cosine", time))
        eps = (x - a * point) / s
        return objectives.target(kind, point.expand_as(x), eps, a.flatten(), s.flatten())

    found = sample.sample(model, config(kind), ["a", "b"], steps, guidance=3.0)
    torch.testing.assert_close(found, point.expand(2, *SHAPE), rtol=1e-3, atol=1e-3)


def test_guidance_goes_beyond_the_prompt() -> None:
    """Euler's method over a constant velocity moves by it: without + guidance (with - without)."""

    def model(x: torch.Tensor, time: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        prompted = (ids == tokenise(["red"], config().text)[0, 1]).any(1)
        return torch.where(prompted, 2.0, 1.0).view(-1, 1, 1, 1, 1).expand_as(x)

    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for guidance, velocity in ((1.0, 2.0), (3.0, 4.0), (0.0, 1.0)):
        (found,) = sample.sample(model, config(), ["red"], 5, guidance, seed=3)
        torch.testing.assert_close(found, start - velocity)


def test_times_fall_to_zero_and_epsilon_keeps_out_of_pure_noise() -> None:
    for kind in ("flow", "epsilon", "v_prediction"):
        times = sample.sampling_times(config(kind), 10)
        assert len(times) == 11 and times[-1] == 0 and (times.diff() < 0).all()
    a, _ = objectives.path("epsilon", "cosine", sample.sampling_times(config("epsilon"), 10)[:1])
    assert sample.FAINTEST <= a.item() < sample.FAINTEST + 0.01
    assert sample.sampling_times(config("flow"), 10)[0] == 1
    assert BEGIN == 1


def test_times_of_flow_are_moved_as_in_training() -> None:
    """As diffusers' scheduler has them."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 11)[:-1])
    trained = config().model_copy(update={"shift": 3.0})
    torch.testing.assert_close(sample.sampling_times(trained, 10), scheduler.sigmas)
    even = torch.linspace(1, 0, 11)
    torch.testing.assert_close(sample.sampling_times(trained, 10, 1.0), even)
    schedule = config("v_prediction")
    moved = schedule.model_copy(update={"shift": 3.0})
    assert torch.equal(*(sample.sampling_times(each, 10) for each in (schedule, moved)))


# ----------------------------------------------------------------------------- pictures


class Echo:
    """A VAE whose picture is its first three latent channels, and which keeps what it was given."""

    def decode(self, z: torch.Tensor) -> Any:
        self.given = z
        return type("Decoded", (), {"sample": z[:, :3]})()


def test_pictures_undo_the_normalisation() -> None:
    z = torch.zeros(SHAPE)
    z[0] = -1.0  # / 0.5 + 1 = -1, black
    z[1] = 1.0  # 3, beyond white
    z[2] = -0.5  # 0, grey
    frames = sample.decode(Echo(), z, config().latents)
    assert frames.shape == (3, 2, 2, 3)
    assert frames[0, 0, 0].tolist() == [0, 255, 128]


def test_video_vaes_are_given_a_video() -> None:
    echo, z = Echo(), torch.arange(48.0).view(SHAPE)
    sample.decode(echo, z, config(vae_class="AutoencoderKLWan", temporal=4).latents)
    torch.testing.assert_close(echo.given, (z / 0.5 + 1)[None])
    sample.decode(echo, z, config(vae_class="AutoencoderTiny").latents)
    torch.testing.assert_close(echo.given, (z / 0.5 + 1).transpose(0, 1))


def test_many_tiles_make_rows() -> None:
    assert [pictures.across(n) for n in (1, 3, 4, 5, 9, 10)] == [1, 3, 2, 3, 3, 4]
    joined = pictures.tile(clips(3), ["a", "b", "c"], 2)
    above = 15 + 8
    assert joined.shape[1:3] == (2 * (above + 189), 2 * 195)
    assert (joined[:, 2 * above + 189 :, 195:] == 255).all(), "nothing below the second"


def clips(count: int = 2) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (9, 63, 65, 3), dtype=np.uint8) for _ in range(count)]


def test_tiles_stand_side_by_side_under_their_prompts() -> None:
    made = clips()
    joined = pictures.tile(made, ["red", "a long prompt that surely takes more than one line"])
    width = joined.shape[2] // 2
    assert width == 3 * 65 and joined.shape[0] == 9 and joined.shape[1] % 2 == 0
    above = 15 * 2 + 8
    for place, clip in enumerate(made):
        part = joined[:, above : above + 189, place * width : (place + 1) * width]
        assert (part[:, ::3, ::3] == clip).all()
    head = joined[0, :above]
    assert (head[:, :width] < 128).any() and (head[:, width:] < 128).any()


@pytest.mark.parametrize(("length", "chosen"), [(16, [0, 2, 4, 6, 9, 11, 13, 15]), (3, [0, 1, 2])])
def test_a_png_has_a_row_of_frames_under_each_prompt(
    length: int, chosen: list[int], tmp_path: Path
) -> None:
    """Which are enlarged to 130 pixels, with 2 pixels of white behind each."""
    draw = np.random.default_rng(0)
    made = [draw.integers(0, 256, (length, 63, 65, 3), dtype=np.uint8) for _ in range(2)]
    width = 132 * len(chosen)
    prompts = ["red", "word " * (width // 7 // 5 + 1)]  # of one line, and of two
    file = tmp_path / "deep" / "a.png"
    joined = pictures.save(file, made, prompts, 16.0)
    assert (joined == pictures.tile(made, prompts, 2)).all()
    with Image.open(file) as opened:
        found = np.asarray(opened)
    above = 0
    for video, lines in zip(made, (1, 2)):
        head = found[above : above + 15 * lines + 8]
        assert (head < 128).any((1, 2))[-15:].any(), "its last line is there"
        above += len(head)
        row = found[above : above + 126].reshape(126, len(chosen), 132, 3)
        assert (row[::2, :, :130:2] == video[chosen].transpose(1, 0, 2, 3)).all()
        assert (row[:, :, 130:] == 255).all()
        above += 126
    assert found.shape == (above, width, 3)


@pytest.mark.parametrize("name", ["a.gif", "deep/a.mp4"])
def test_files(name: str, tmp_path: Path) -> None:
    frames = np.zeros((16, 32, 64, 3), np.uint8)
    frames[:, :, 32:] = np.linspace(0, 255, 16).astype(np.uint8)[:, None, None, None]
    file = tmp_path / name
    pictures.write(file, frames, 16.0)
    if file.suffix == ".mp4":
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 16
            found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        assert np.abs(found.astype(int) - frames).mean() < 3 and found.shape == frames.shape
    else:
        with Image.open(file) as gif:
            assert (gif.n_frames, gif.size) == (16, (64, 32))
            spans = []
            for number in range(16):
                gif.seek(number)
                spans.append(gif.info["duration"])
        assert sum(spans) == 1000 and set(spans) <= {60, 70}


def test_a_trained_model_to_a_gif(
    make_index: Any, settings_of: Any, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index()
    settings = settings_of(made, steps=2)
    train(settings)
    out = tmp_path / "a.gif"
    common = ["--vae", str(vae), "--prompt", "a red square", "--prompt", "nothing", "--steps", "2"]
    for place in (settings.output, settings.output / "model"):
        assert sample.main(["--checkpoint", str(place), "--out", str(out), *common]) == 0
        with Image.open(out) as gif:
            assert (gif.n_frames, gif.size) == (4, (384, 216))  # two tiles, their height made even
        out.unlink()
    capsys.readouterr()
    file = tmp_path / "prompts.txt"
    file.write_text("a red square\n\n")
    place = ["--checkpoint", str(settings.output), "--out", str(out), "--vae", str(vae)]
    both = [*place, "--steps", "2", "--prompts-file", str(file), "--num", "2", "--at-once", "1"]
    assert sample.main([*both, "--seed", "5"]) == 0
    assert "1 of 2 videos are made\n" in capsys.readouterr().err
    with Image.open(out) as gif:
        assert gif.size == (384, 216)
        left, right = (np.asarray(gif.convert("L"))[23:, n : n + 192] for n in (0, 192))
        assert (left != right).any(), "each of a seed of its own"
    file.write_text("\n")
    for arguments, told in (
        (place, "no prompt: give --prompt TEXT, or --prompts-file FILE"),
        ([*place, "--prompts-file", str(file)], "has no prompts: one a line is expected"),
        ([*place, "--prompts-file", str(tmp_path)], "cannot be read"),
        ([*place, *common, "--num", "0"], "--num is 0: it must be at least 1"),
        ([*place, *common, "--shift", "0"], "--shift is 0.0: it must be above 0"),
        (["--checkpoint", str(tmp_path), "--out", str(out), *common], "no model in"),
        (["--checkpoint", str(settings.output), "--out", "a.avi", *common], "must end in .gif"),
        (["--checkpoint", str(vae), "--out", str(out), *common], "no model in"),
    ):
        assert sample.main(arguments) == 2
        assert told in capsys.readouterr().err


def test_another_vae_is_refused(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds a AutoencoderKL, but.*AutoencoderKLWan"):
        sample.load_vae(str(vae), config(vae_class="AutoencoderKLWan").latents)
    with pytest.raises(SettingsError, match="no VAE of diffusers"):
        sample.load_vae(str(tmp_path), config().latents)
