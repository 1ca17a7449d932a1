"""Training on two processes (gloo), against one."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import make
from PIL import Image
from safetensors.torch import load_file

from pipeline.launching import Fleet
from trainer.config import TrainSettings
from trainer.train import train

ROOT = Path(__file__).parents[2]
SHAPES = ((4, 4, 2, 2), (4, 4, 2, 4), (4, 2, 4, 2))


Run = Callable[[TrainSettings, int], dict[int, float]]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    precision_anew: None,
) -> Run:
    """Trains on so many processes, on one in this one; the losses by step."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    file = tmp_path / "settings.json"

    def trained(settings: TrainSettings, processes: int) -> dict[int, float]:
        capfd.readouterr()
        if processes == 1:
            train(settings)
        else:
            file.write_text(settings.model_dump_json())
            command = Fleet(processes).command("trainer.train", "--config", str(file))
            subprocess.run(command, cwd=ROOT, timeout=250, check=True)
        said = capfd.readouterr().err
        assert f"{processes} x cpu" in said
        lines = [line.split() for line in said.splitlines() if "  loss " in line]
        return {int(words[1].split("/")[0]): float(words[3]) for words in lines}

    return trained


def test_one_process_goes_on_where_two_stopped(
    make_index: Any, settings_of: Any, vae: Path, tmp_path: Path, run: Run
) -> None:
    """Shapes, order, noise, losses and samples are those of one process all the way."""
    made = make_index(
        sizes=(20, 10), shape=lambda n: SHAPES[0 if n % 10 < 6 else 1 + n % 2], vae=vae
    )
    prompts = ["a red square", "a blue square", "a green square"]  # one process has one of them
    samples = {"prompts": prompts, "every": 3, "steps": 2, "format": "png", "guidance": 60}
    common = {
        "learning_rate": 1e-2,
        "caption_dropout": 0.5,
        "samples": samples,
        "mixed_precision": "auto",
    }
    alone = run(settings_of(made, output=str(tmp_path / "alone"), **common), 1)
    losses = run(settings_of(made, steps=3, batch_size=2, **common), 2)
    losses |= run(settings_of(made, steps=6, **common), 1)
    assert list(losses) == [1, 2, 3, 4, 5, 6] == list(alone)
    assert len(set(alone.values())) == 6
    assert losses == pytest.approx(alone, rel=2e-3)
    one, two = (
        np.asarray(Image.open(tmp_path / name / "samples" / "step_000003.png"), int)
        for name in ("alone", "out")
    )
    assert one.shape == two.shape == (3 * (23 + 128), 4 * (128 + 2), 3)
    pictures = [one[n + 23 : n + 151] for n in range(0, 453, 151)]
    assert np.abs(one - two).max() <= 3 and all(picture.std() > 10 for picture in pictures)
    assert all(np.abs(a - b).max() > 6 for a, b in itertools.combinations(pictures, 2))


def test_adapters_and_their_average_go_on_where_two_processes_stopped(
    make_index: Any, settings_of: Any, tmp_path: Path, run: Run
) -> None:
    made = make_index(embedded=True, first_frame=True)
    net = str(make("wan", tmp_path / "net"))
    common = {
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "text": {"kind": "stored"},
        "model": {"kind": "wan", "path": net, "lora": {"rank": 2}, "first_frame": 0.5},
    }
    alone = run(settings_of(made, output=str(tmp_path / "alone"), **common), 1)
    losses = run(settings_of(made, steps=3, batch_size=2, **common), 2)
    losses |= run(settings_of(made, steps=6, **common), 1)
    assert losses == pytest.approx(alone, rel=2e-3)
    one, two = (
        load_file(tmp_path / name / "checkpoint-6" / "ema.safetensors") for name in ("alone", "out")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-4)
