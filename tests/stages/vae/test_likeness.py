"""Encode looks at a few of its clips: a right VAE passes, what is wrong with others is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered import make
from tiny import tiny

from stages.base import Context, telling
from stages.encode import Encode, EncodeSettings
from stages.media.picture import Pixels
from stages.media.sampling import Sampling
from stages.vae.likeness import likeness, psnr
from stages.vae.vae import Vae


def test_psnr_is_the_usual_one() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black) == 100.0
    assert psnr(black, black + 255) == 0.0
    assert psnr(black, black + 16) == pytest.approx(24.05, abs=0.01)


def test_faults() -> None:
    draw = np.random.default_rng(0)
    flat = np.full((1, 32, 32, 3), (200, 40, 90), np.uint8)
    coloured = flat.copy()
    coloured[:, :16] = (30, 60, 220)
    noise = draw.normal(0, 6, coloured.shape)
    near = np.clip(coloured + noise, 0, 255).astype(np.uint8)
    assert likeness(coloured, near).fault is None
    assert likeness(flat, np.clip(flat + noise, 0, 255).astype(np.uint8)).fault is None, "close"
    swapped = likeness(coloured, near[..., ::-1])
    assert swapped.fault and "red and blue exchanged it would be 3" in swapped.fault
    grey = np.full_like(coloured, 127)
    lost = likeness(coloured, grey)
    assert lost.fault and "Likely causes: the VAE's scaling_factor" in lost.fault


class Painted(Vae):
    """Frames reach the VAE with red and blue exchanged."""

    def batch(self, clips: Any) -> torch.Tensor:
        return super().batch([np.ascontiguousarray(clip[..., ::-1]) for clip in clips])


def swapped(stage: Encode) -> Vae:
    return Painted(stage.folder())


def right(stage: Encode) -> Vae:
    return stage.setup()


def another_decoder(stage: Encode) -> Vae:
    """Encoder and decoder are not of one training."""
    model = stage.setup()
    torch.manual_seed(0)
    for weight in model.module.decoder.parameters():
        weight.data = torch.randn_like(weight) * 0.05
    return model


def wrong_scale(stage: Encode) -> Vae:
    """The numbers stored with the latents are not those of the VAE."""
    model = stage.setup()
    made = stage.metadata(model)
    made["spec"]["scale"] = [5 * value for value in made["spec"]["scale"]]
    stage.metadata = lambda model: made  # type: ignore[method-assign]
    return model


def scene(i: int) -> Pixels:
    """A red square that moves over a grey ground, such as the demo's VAE knows."""
    picture = np.full((64, 64, 3), (112, 114, 110), np.uint8)
    picture[20:44, 8 + i : 32 + i] = (220, 38, 42)
    return picture


def film(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "10"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(scene(i), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("setup", "warning"),
    [
        (right, None),
        (swapped, "red and blue exchanged"),
        (another_decoder, "encoder and its decoder are not of one training"),
        (wrong_scale, "scaling_factor, shift_factor or latents_mean"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, setup: Callable[[Encode], Vae], warning: str | None
) -> None:
    sampling = Sampling(fps=16, frames=4, size=64)
    settings = EncodeSettings(device="cpu")
    stage = Encode(settings, Context(str(tmp_path), sampling=sampling))
    path = film(tmp_path / "film.mp4")
    rows = [{"clip_id": f"c{n}", "path": str(path), "start": None, "end": None} for n in range(3)]
    told: list[str] = []
    model = setup(stage)
    stage.check_rows(1, 3, model)
    with telling(told.append):
        stage.process(rows, model)
    assert re.fullmatch(r"encode: clip c0, decoded again, has a PSNR of [\d.]+ dB", told[0])
    if warning is None:
        assert len(told) == 1 and float(told[0].split()[-2]) > 22
    else:
        assert len(told) == 2
        assert told[1].startswith("warning: latents of clip c0 do not look like it: ")
        assert warning in told[1] and told[1].endswith("`vidpipe decode c0`")


def test_so_many_clips_as_were_asked_for_and_no_result_changes(tmp_path: Path) -> None:
    tiny("wan").save_pretrained(tmp_path / "vae")
    path = make(tmp_path / "film.mp4", 12, 25)
    rows = [{"clip_id": f"c{n}", "path": str(path), "start": None, "end": None} for n in range(40)]
    made: list[Any] = []
    for number in (0, 1, 3):
        settings = EncodeSettings(vae=str(tmp_path / "vae"), device="cpu", check_clips=number)
        sampling = Sampling(fps=25, frames=5, size=32)
        stage = Encode(settings, Context(str(tmp_path), sampling=sampling))
        assert stage.checks == number
        model = stage.setup()
        stage.check_rows(number, len(rows), model)
        told: list[str] = []
        with telling(told.append):
            made.append((stage.fingerprint, stage.process(rows[:20], model)))
            stage.process(rows[20:], model)
        assert sum("has a PSNR" in line for line in told) == number
        assert sum("warning" in line for line in told) == number, "random weights"
    assert made[0] == made[1] == made[2]
