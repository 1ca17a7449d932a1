"""Checkpoints: saved whole or not at all, found again by themselves, refused where they do not fit.

`<output>/checkpoint-<step>` holds what accelerate saves (model, optimiser, scaler, generators; with
FSDP and DeepSpeed each process writes its part), the model's `config.json`, the average of its
weights where one is kept, and `trainer.json`: the step, the loader's position, how weights are
spread, and the size of every file. It is written under another name and renamed when it is
complete; `last.json` names it after that. The learning rate needs no state, as it follows from the
step.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from trainer import models, sharding
from trainer.config import ModelConfig
from trainer.ema import Ema
from trainer.lora import is_adapter
from trainer.order import Position

STATE = "trainer.json"
LAST = "last.json"
PART = ".part"  # ends the name of what is being written or deleted


class CheckpointError(Exception):
    """A checkpoint cannot be used or written: the message says which, why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int  # optimiser steps done
    position: Position
    config: ModelConfig
    sharding: str  # how its weights are spread, as `sharding.kind` has it
    processes: int


def save(
    accelerator: Accelerator,
    output: Path,
    step: int,
    position: Position,
    config: ModelConfig,
    keep: int,
    ema: Ema | None = None,
) -> Path:
    """Saves the state of all processes, deletes all but the `keep` newest, returns the folder.

    All processes call it; the first one writes and renames, on a file system that all see.
    """
    folder = output / f"checkpoint-{step}"
    part = folder.with_name(folder.name + PART)
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    options = {}
    if models.adapted(config) and sharding.zero_stage(accelerator) is not None:
        options["exclude_frozen_parameters"] = True
    accelerator.save_state(str(part), **options)
    if ema is not None:
        ema.save(part)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / models.CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        files = {str(f.relative_to(part)): f.stat().st_size for f in part.rglob("*") if f.is_file()}
        state = {
            "step": step,
            "position": position.to_json(),
            "sharding": sharding.kind(accelerator),
            "processes": accelerator.num_processes,
            "files": files,
        }
        _write(part / STATE, state)
        _remove(folder)  # an incomplete one of the same step
        part.rename(folder)
        _write(output / LAST, {"checkpoint": folder.name, "step": step})
        for old in _steps(output)[:-keep]:
            _remove(output / f"checkpoint-{old}")
    accelerator.wait_for_everyone()
    return folder


def latest(output: Path) -> Checkpoint | None:
    """The newest complete checkpoint; None where there is none at all.

    Raises CheckpointError where there are some and none is complete: to begin from nothing is
    then for a person to decide.
    """
    faults = []
    for step in reversed(_steps(output)):
        try:
            return read(output / f"checkpoint-{step}")
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join([*faults, f"Delete them to train {output} from the start"]))
    return None


def read(folder: Path) -> Checkpoint:
    """Raises CheckpointError where the checkpoint is not complete."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        config = ModelConfig.model_validate_json((folder / models.CONFIG).read_bytes())
        for name, size in state["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise CheckpointError(f"{folder} is damaged: {name} has {found} of {size} bytes")
        position = Position.from_json(state["position"])
        spread = state["sharding"], state["processes"]
        return Checkpoint(folder, state["step"], position, config, *spread)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is incomplete: {error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{folder} is damaged or of another version: {error}") from error


def restore(accelerator: Accelerator, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Loads it into what `accelerator` has prepared. Raises CheckpointError for another model."""
    if wrong := config.differences(checkpoint.config):
        raise CheckpointError(
            f"{checkpoint.folder} holds another model than train describes: {'; '.join(wrong)}. "
            "Set train.output to a new folder, or put the settings back"
        )
    _check_sharding(accelerator, checkpoint)
    strict = "load_module_strict" if sharding.zero_stage(accelerator) is not None else "strict"
    accelerator.load_state(str(checkpoint.folder), **{strict: not models.adapted(config)})
    # It counts forward passes since ever; a checkpoint lies between two steps, and the number of
    # passes to a step may have changed.
    accelerator.step = 0


def _check_sharding(accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where the checkpoint's parts are not those of the processes."""
    here, there = sharding.kind(accelerator), checkpoint.sharding
    if here != there:
        raise CheckpointError(
            f"{checkpoint.folder} was saved where {there}, but here {here}: start it with the same "
            "--accelerate as before, or set train.output to a new folder"
        )
    now, before = accelerator.num_processes, checkpoint.processes
    if sharding.zero_stage(accelerator) is not None and now != before:
        raise CheckpointError(
            f"{checkpoint.folder} was saved by {before} processes, and DeepSpeed cannot go on with "
            f"{now}: start as many as before, or set train.output to a new folder"
        )


def export(
    accelerator: Accelerator,
    model: nn.Module,
    config: ModelConfig,
    folder: Path,
    ema: Ema | None = None,
) -> None:
    """Writes the model alone, safetensors and config.json, to `folder` in place of what is there;
    with the average of its weights, where there is one. All processes call it."""
    state = accelerator.get_state_dict(model) or {}  # ZeRO-3's is of the first process alone
    if ema is not None:
        state = {**state, **ema.state()}
    if accelerator.is_main_process:
        part = folder.with_name(folder.name + PART)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        models.save(accelerator.unwrap_model(model), state, config, part)
        _remove(folder)
        part.rename(folder)
    accelerator.wait_for_everyone()


def adapters_only(weights: list[dict[str, Tensor]]) -> None:
    """Leaves of the states to be saved the adapters alone: the rest is as it came."""
    weights[:] = [{k: v for k, v in state.items() if is_adapter(k)} for state in weights]


def _steps(output: Path) -> list[int]:
    """The steps of all checkpoints there, complete or not, ascending."""
    names = [folder.name.removeprefix("checkpoint-") for folder in output.glob("checkpoint-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _write(path: Path, value: dict[str, object]) -> None:
    part = path.with_name(path.name + PART)
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _remove(folder: Path) -> None:
    """Deletes a folder so that no half of it ever bears its name."""
    part = folder.with_name(folder.name + ".old" + PART)
    shutil.rmtree(part, ignore_errors=True)
    if folder.exists():
        folder.rename(part)
        shutil.rmtree(part)
