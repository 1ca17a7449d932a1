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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from manifests.faults import size as bytes_of
from trainer import disk, models, sharding
from trainer.config import ModelConfig
from trainer.ema import Ema
from trainer.lora import is_adapter
from trainer.order import Position

STATE = "trainer.json"
LAST = "last.json"
FORMAT = 1  # of trainer.json; those that say none are of before, and are understood, too
RANDOM = "random_states_"  # begins the names of accelerate's files of generators, of each process
PART = ".part"  # ends the name of what is being written or deleted


class CheckpointError(Exception):
    """A checkpoint cannot be used or written: the message says which, why and what to do."""


class OtherVersion(CheckpointError):
    """It is whole, but written by another version, and not understood."""


class Unwritten(CheckpointError):
    """There is no room for one: what of it is in `part` is of no use, and may be deleted when the
    other processes know."""

    def __init__(self, message: str, part: Path) -> None:
        super().__init__(message)
        self.part = part


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
    with _written(part):
        if accelerator.is_main_process:
            for left in output.glob(f"checkpoint-*{PART}"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
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
            told = config.model_dump_json(indent=2) + "\n"
            (part / models.CONFIG).write_text(told, encoding="utf-8")
            files = (file for file in part.rglob("*") if file.is_file())
            state = {
                "format": FORMAT,
                "step": step,
                "position": position.to_json(),
                "sharding": sharding.kind(accelerator),
                "processes": accelerator.num_processes,
                "files": {str(file.relative_to(part)): file.stat().st_size for file in files},
            }
            _write(part / STATE, state)
            _remove(folder)  # an incomplete one of the same step
            part.rename(folder)
            _write(output / LAST, {"checkpoint": folder.name, "step": step})
            for old in _steps(output)[:-keep]:
                _remove(output / f"checkpoint-{old}")
    accelerator.wait_for_everyone()
    return folder


@contextmanager
def _written(part: Path) -> Iterator[None]:
    """Raises Unwritten where what is to be in `part` cannot be written. Only the process that meets
    it knows; the others wait for it, and are ended (`trainer.ending`)."""
    try:
        yield
    except disk.faults() as error:
        why = disk.fault(error, part)
        if why is None:
            raise
        if isinstance(why.filename, str):
            file = Path(why.filename)
        else:  # which of several processes wrote last, nobody knows
            file = part if dist.is_initialized() else disk.newest(part)
        raise Unwritten(unwritten(file, why, part.parent, part), part) from error


def unwritten(file: Path, why: OSError, output: Path, part: Path | None = None) -> str:
    """The sentence for a file of a run that could not be written, one of `part` perhaps, which is
    deleted."""
    room, last = "", "There is no checkpoint yet"
    with suppress(OSError):
        room = f" ({bytes_of(disk.free(output) + (disk.taken(part) if part else 0))} free for it)"
    with suppress(CheckpointError):
        if found := latest(output):
            takes = bytes_of(disk.taken(found.folder))
            last = f"The last good checkpoint is {found.folder}, which takes {takes}"
    return (
        f"can't write {file}: {why.strerror}{room}. {last}. Make room, or lower train.keep (how "
        "many checkpoints are kept; there is one more while it is written), or move "
        f"{output} to a larger disk and set train.output; the same command then goes on"
    )


def latest(output: Path) -> Checkpoint | None:
    """The newest complete checkpoint; None where there is none at all.

    Raises CheckpointError where there are some and none can be used: to begin from nothing is then
    for a person to decide; and where the newest is whole, but of another version.
    """
    faults = []
    for step in reversed(_steps(output)):
        try:
            return read(output / f"checkpoint-{step}")
        except OtherVersion:
            raise
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        advice = (
            f"Set train.output to a new folder, or delete them, to train {output} from the start"
        )
        raise CheckpointError("\n".join([*faults, advice]))
    return None


def read(folder: Path) -> Checkpoint:
    """Raises CheckpointError where the checkpoint is not complete, OtherVersion where it is, but
    not understood."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise CheckpointError(f"{folder} is damaged: {name} has {found} of {size} bytes")
        config = (folder / models.CONFIG).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is incomplete: {error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: {STATE} cannot be read: {error}") from error
    try:
        if (made := state.get("format", FORMAT)) > FORMAT:
            raise ValueError(f"its format is {made}, and this one knows those up to {FORMAT}")
        return Checkpoint(
            folder,
            state["step"],
            Position.from_json(state["position"]),
            ModelConfig.model_validate_json(config),
            state.get("sharding", sharding.WHOLE),  # once there was no other
            state.get("processes") or sum(name.startswith(RANDOM) for name in state["files"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        told = (
            f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        )
        raise OtherVersion(
            f"{folder} is whole, but of another version of vidpipe ({told}): go on with the one "
            "that wrote it, or set train.output to a new folder to train from the start"
        ) from error


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
        with _written(part):
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
