from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from trainer import checkpoint as checkpoints
from trainer import sharding
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.config import DiTSettings, ModelConfig, TextSettings
from trainer.order import Position

LATENTS = {"vae_sha256": "aa", "channels": 4, "shift": [0.0] * 4, "scale": [0.2] * 4}


def config(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "model": DiTSettings(),
            "text": TextSettings(),
            "objective": "flow",
            "schedule": "cosine",
            "shape": (4, 4, 4, 4),
            "latents": LATENTS,
            **values,
        }
    )


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 3)


@pytest.fixture
def accelerator(model: torch.nn.Module) -> Accelerator:
    made = Accelerator(cpu=True)
    made.prepare(model, torch.optim.AdamW(model.parameters()))
    return made


def save(accelerator: Accelerator, output: Path, step: int, keep: int = 9) -> Path:
    position = Position(1, (step, 7), 0, "order")
    return checkpoints.save(accelerator, output, step, position, config(), keep)


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


def test_a_checkpoint_is_found_again(accelerator: Accelerator, tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "none") is None
    save(accelerator, tmp_path, 9)
    folder = save(accelerator, tmp_path, 10)  # newer than 9, though not by name
    assert checkpoints.latest(tmp_path) == Checkpoint(
        folder, 10, Position(1, (10, 7), 0, "order"), config(), sharding.WHOLE, 1
    )
    assert names(tmp_path) == {"checkpoint-9", "checkpoint-10", "last.json"}


def test_weights_and_optimiser_come_back(
    accelerator: Accelerator, model: torch.nn.Module, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = checkpoints.read(save(accelerator, tmp_path, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.step = 3
    checkpoints.restore(accelerator, found, config())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert accelerator.step == 0


def test_weights_that_were_spread_otherwise_are_refused(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    folder = save(accelerator, tmp_path, 5)
    found = replace(checkpoints.read(folder), sharding="DeepSpeed's ZeRO-3 spreads them")
    told = f"ZeRO-3 spreads them, but here {sharding.WHOLE}: start it with the same --accelerate"
    with pytest.raises(CheckpointError, match=told):
        checkpoints.restore(accelerator, found, config())


def test_only_the_newest_are_kept(accelerator: Accelerator, tmp_path: Path) -> None:
    for step in (5, 50, 100):
        save(accelerator, tmp_path, step, keep=2)
    assert names(tmp_path) == {"checkpoint-50", "checkpoint-100", "last.json"}
    last = json.loads((tmp_path / "last.json").read_text())
    assert last == {"checkpoint": "checkpoint-100", "step": 100}


def test_a_save_that_is_cut_short_leaves_the_last_one(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = save(accelerator, tmp_path, 5)

    def killed(folder: str) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerator, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        save(accelerator, tmp_path, 10)
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-10.part", "last.json"}
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.folder == kept
    monkeypatch.undo()
    save(accelerator, tmp_path, 10)
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-10", "last.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "trainer.json"])
def test_an_incomplete_checkpoint_is_passed_over(
    name: str, accelerator: Accelerator, tmp_path: Path
) -> None:
    kept, damaged = save(accelerator, tmp_path, 5), save(accelerator, tmp_path, 10)
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:-20])
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.folder == kept
    (kept / name).unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoints.latest(tmp_path)
    assert "checkpoint-10 is damaged" in str(error.value)
    assert "checkpoint-5 is incomplete" in str(error.value)
    assert "Set train.output to a new folder, or delete them" in str(error.value)
    assert save(accelerator, tmp_path, 10) == damaged  # in place of the damaged one
    assert checkpoints.read(damaged).step == 10


def change(folder: Path, **values: Any) -> None:
    """Sets keys of its trainer.json; None takes them out."""
    file = folder / "trainer.json"
    state = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in state.items() if v is not None}))


def test_a_checkpoint_of_before_weights_could_be_spread_is_gone_on_with(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    folder = save(accelerator, tmp_path, 5)
    now = checkpoints.read(folder)
    change(folder, format=None, sharding=None, processes=None)
    assert checkpoints.read(folder) == now
    checkpoints.restore(accelerator, checkpoints.read(folder), config())
    # And of before each shape had an order of its own: the next epoch begins.
    change(folder, position={"epoch": 2, "consumed": 7, "seed": 3, "order": "ab"})
    found = checkpoints.read(folder)
    assert (found.position.epoch, found.position.seed, found.position.order) == (2, 3, "")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"format": 2}, "its format is 2, and this one knows those up to 1"),
        ({"position": {"epoch": 1, "seed": 0}}, "'given' is missing"),
        ({"position": None}, "'position' is missing"),
    ],
)
def test_one_of_another_version_is_no_damaged_one(
    values: dict[str, Any], told: str, accelerator: Accelerator, tmp_path: Path
) -> None:
    save(accelerator, tmp_path, 5)
    newest = save(accelerator, tmp_path, 10)
    change(newest, **values)
    with pytest.raises(CheckpointError) as error:
        checkpoints.latest(tmp_path)  # does not go back to the one before
    said = str(error.value)
    assert said.startswith(f"{newest} is whole, but of another version of vidpipe ({told})")
    assert "set train.output to a new folder" in said and "elete" not in said


def test_a_model_described_by_another_version_is_no_damaged_one(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    folder = save(accelerator, tmp_path, 5)
    told = json.dumps(json.loads((folder / "config.json").read_text()) | {"flavour": "new"})
    (folder / "config.json").write_text(told)
    state = json.loads((folder / "trainer.json").read_text())
    change(folder, files=state["files"] | {"config.json": len(told)})
    with pytest.raises(CheckpointError, match=r"is whole, but of another version .*flavour"):
        checkpoints.latest(tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model": DiTSettings(depth=2)}, "model.depth is 2, not 4"),
        ({"text": TextSettings(kind="bytes")}, "text.kind is bytes, not words"),
        ({"objective": "epsilon"}, "objective is epsilon, not flow"),
        ({"latents": {**LATENTS, "vae_sha256": "bb"}}, "latents.vae_sha256 is bb, not aa"),
    ],
)
def test_another_model_is_refused(
    values: dict[str, Any], told: str, accelerator: Accelerator, tmp_path: Path
) -> None:
    found = checkpoints.read(save(accelerator, tmp_path, 5))
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(accelerator, found, config(**values))
    assert told in str(error.value) and str(found.folder) in str(error.value)


def test_what_does_not_touch_the_weights_may_change() -> None:
    other = config(schedule="scaled_linear", shape=(4, 8, 8, 8))  # flow has no schedule
    assert config().differences(other) == []


def test_an_export_replaces_the_one_before(
    accelerator: Accelerator, model: torch.nn.Module, tmp_path: Path
) -> None:
    for _ in range(2):
        checkpoints.export(accelerator, model, config(), tmp_path / "model")
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {"model.safetensors", "config.json"}
