"""Weights spread over two processes (gloo) by accelerate's configurations, against one process that
has them all."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.launching import Fleet, call, configuration, trainers
from trainer import models
from trainer.config import SettingsError
from trainer.train import start, train

ROOT = Path(__file__).parents[2]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
KINDS = ["fsdp2", *(pytest.param(kind, marks=needs_deepspeed) for kind in ("zero2", "zero3"))]


@pytest.fixture(autouse=True)
def from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(settings: Any, kind: str, processes: int = 2) -> tuple[list[str], dict[str, str]]:
    file = settings.output.with_suffix(".json")
    file.write_text(settings.model_dump_json())
    fleet = Fleet(processes, accelerate=configuration(kind, here=True))
    return fleet.command("trainer.train", "--config", str(file)), fleet.environment


def killed(settings: Any, kind: str, line: str) -> None:
    """Runs it until it says `line`, then kills the processes that train."""
    words, environment = command(settings, kind)
    with subprocess.Popen(
        words, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for told in process.stderr:
            if told.startswith(line):
                break
        for pid in trainers(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.stderr.read()
        assert process.wait(120) != 0


def said(capfd: pytest.CaptureFixture[str]) -> list[float]:
    """The losses of all steps since it was last asked."""
    lines = (line.split() for line in capfd.readouterr().err.splitlines())
    return [float(words[3]) for words in lines if words[:1] == ["step"] and words[2] == "loss"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(next(folder.rglob("*.safetensors")))
    return found


def shown(output: Path) -> np.ndarray:
    """The samples of the end, each with its prompt above."""
    (file,) = (output / "samples").iterdir()
    with Image.open(file) as opened:
        return np.asarray(opened, int).reshape(3, 23 + 128, -1, 3)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_of_one_process_and_goes_on_bit_for_bit(
    kind: str,
    make_index: Any,
    settings_of: Any,
    vae: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With accumulation, clipping, decay, validation, an average of the weights, and samples."""
    made, size = make_index(sizes=(20, 10), vae=vae), 2
    prompts = ["a red square", "a blue square", "a green square"]
    same: dict[str, Any] = {
        "batch_size": size,
        "gradient_accumulation": 2,
        "grad_clip": 5.0,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "validation": {"share": 0.3, "every": 1000, "clips": 2},
        "samples": {"prompts": prompts, "every": 1000, "format": "png", "guidance": 60},
        "save_every": 2,
    }

    def of(name: str, steps: int, **values: Any) -> Any:
        return settings_of(made, output=str(tmp_path / name), steps=steps, **{**same, **values})

    killed(of("parts", 100_000), kind, "step 3/")
    saved = [f for f in (tmp_path / "parts").glob("checkpoint-*") if not f.suffix]
    steps = max(int(f.name.split("-")[1]) for f in saved) + 2
    for name in ("parts", "whole"):
        words, environment = command(of(name, steps), kind)
        assert call(words, environment) == 0
    assert "goes on from" in capfd.readouterr().err
    parts, whole = (weights(tmp_path / name / "model") for name in ("parts", "whole"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name

    alone = train(of("alone", steps, batch_size=2 * size)).parent / "model"
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith(f"step {steps}/{steps}  validation") for line in lines)
    for name, value in weights(alone).items():
        torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-3)
    one, two, three = (shown(tmp_path / name) for name in ("alone", "whole", "parts"))
    assert (two == three).all() and np.abs(one - two).max() <= 8
    assert all(np.abs(a - b).max() > 24 for a, b in itertools.combinations(one, 2))
    # The average is what is exported, and what a checkpoint is sampled with.
    newest = tmp_path / "whole" / f"checkpoint-{steps}"
    loaded, averaged = models.load(newest)[0].state_dict(), load_file(newest / "ema.safetensors")
    assert averaged.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(value, averaged[name]) and torch.equal(value, loaded[name])
    (newest / "ema.safetensors").unlink()
    for name, value in models.load(newest)[0].state_dict().items():
        assert not torch.equal(value, whole[name])
        torch.testing.assert_close(value, loaded[name], rtol=0.5, atol=0.05)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_half_precision_are_those_of_one_process(
    kind: str,
    make_index: Any,
    settings_of: Any,
    network: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    precision_anew: None,
) -> None:
    made = make_index(embedded=True, first_frame=True)
    same: dict[str, Any] = {
        "steps": 2,
        "learning_rate": 1e-2,
        "mixed_precision": "bf16",
        "text": {"kind": "stored"},
        "model": {"kind": "wan", "path": str(network("wan")), "lora": {"rank": 2}},
    }
    words, environment = command(settings_of(made, batch_size=2, **same), kind)
    assert call(words, environment) == 0
    losses = said(capfd)
    alone = train(settings_of(made, output=str(tmp_path / "alone"), **same)).parent / "model"
    one, two = (weights(folder) for folder in (alone, tmp_path / "out" / "model"))
    assert one.keys() == two.keys()
    assert len(losses) == 2 and losses == pytest.approx(said(capfd), rel=1e-3)
    for name, value in one.items():
        # Adam makes steps of one size, in whichever direction rounding leaves a small gradient.
        assert value.any() and (two[name] - value).norm() < 0.5 * value.norm(), name


def test_a_configuration_that_accelerate_cannot_use_is_told(
    make_index: Any, settings_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "PARTS"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=r"configuration .*PARTS.* what --accelerate names"):
        start(settings_of(make_index()))
