"""Training on two processes (gloo), against one."""

from __future__ import annotations

import itertools
import os
import subprocess
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

ROOT = Path(__file__).parents[2]
SHAPES = ((4, 4, 2, 2), (4, 4, 2, 4), (4, 2, 4, 2))


def run(settings: TrainSettings, file: Path, processes: int) -> dict[int, float]:
    """The losses by step."""
    file.write_text(settings.model_dump_json())
    done = subprocess.run(
        Fleet(processes).command("trainer.train", "--config", str(file)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert f"{processes} x cpu" in done.stderr
    lines = [line.split() for line in done.stderr.splitlines() if "  loss " in line]
    return {int(words[1].split("/")[0]): float(words[3]) for words in lines}


def test_one_process_goes_on_where_two_stopped(
    make_index: Any, settings_of: Any, vae: Path, tmp_path: Path
) -> None:
    """Shapes, order, noise, losses and samples are those of one process all the way."""
    made = make_index(
        sizes=(20, 10), shape=lambda n: SHAPES[0 if n % 10 < 6 else 1 + n % 2], vae=vae
    )
    file = tmp_path / "settings.json"
    prompts = ["a red square", "a blue square", "a green square"]  # one process has one of them
    samples = {"prompts": prompts, "every": 3, "steps": 2, "format": "png", "guidance": 60}
    common = {
        "learning_rate": 1e-2,
        "caption_dropout": 0.5,
        "samples": samples,
        "mixed_precision": "auto",
    }
    alone = run(settings_of(made, output=str(tmp_path / "alone"), **common), file, 1)
    losses = run(settings_of(made, steps=3, batch_size=2, **common), file, 2)
    losses |= run(settings_of(made, steps=6, **common), file, 1)
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
    make_index: Any, settings_of: Any, tmp_path: Path
) -> None:
    made = make_index(embedded=True, first_frame=True)
    file, net = tmp_path / "settings.json", str(make("wan", tmp_path / "net"))
    common = {
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "text": {"kind": "stored"},
        "model": {"kind": "wan", "path": net, "lora": {"rank": 2}, "first_frame": 0.5},
    }
    alone = run(settings_of(made, output=str(tmp_path / "alone"), **common), file, 1)
    losses = run(settings_of(made, steps=3, batch_size=2, **common), file, 2)
    losses |= run(settings_of(made, steps=6, **common), file, 1)
    assert losses == pytest.approx(alone, rel=2e-3)
    one, two = (
        load_file(tmp_path / name / "checkpoint-6" / "ema.safetensors") for name in ("alone", "out")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-4)
