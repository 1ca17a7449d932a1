"""Where a run is told to beside the console: TensorBoard, Weights & Biases, Trackio.

accelerate begins and ends them and hands them the numbers; here is what it does not do: settings
and samples in a form that each shows, and that a run which goes on is the same run there as well.
"""

from __future__ import annotations

import importlib
import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from manifests.redact import redacted
from trainer.config import SettingsError, TrainSettings
from trainer.pictures import gif

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXTRAS = ("wandb", "trackio")  # not installed with vidpipe
FILE = "trackers.json"  # in the output folder: which run it is, where runs have names
LOGS = "logs"  # TensorBoard's, in the output folder


def check(settings: TrainSettings) -> None:
    """Raises SettingsError where the package of a tracker is missing."""
    for name in settings.trackers:
        if name in EXTRAS:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise SettingsError(
                    f"train.trackers names {name}, which cannot be imported ({error}): "
                    f"pip install {name}, or leave it out"
                ) from error


def begin(accelerator: Accelerator, settings: TrainSettings, step: int) -> None:
    """Begins them, or goes on behind `step`, and tells them the settings. Raises SettingsError
    where one cannot be used."""
    label = settings.run_name
    options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
    if accelerator.is_main_process and set(EXTRAS) & set(settings.trackers):
        run = _run(settings.output / FILE, step)
        label = label or f"{settings.output.name}-{run}"
        common = {"name": label, "resume": "allow"}
        options["wandb"] = {**common, "id": run, "dir": str(settings.output)}
        options["trackio"] = {**common, "embed": False}
    told = redacted(settings.model_dump(mode="json"))
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the checkpoint's name
            accelerator.init_trackers(settings.project, init_kwargs=options)
            for tracker in accelerator.trackers:
                if tracker.name != "tensorboard":
                    tracker.store_init_configuration(told)
                elif accelerator.is_main_process:  # as text: its hyperparameters are a run each
                    lines = json.dumps(told, indent=2).splitlines()
                    text = "\n".join("    " + line for line in lines)
                    tracker.tracker.add_text("settings", text, step)
    except Exception as error:  # each has its own, for no key, no network, no room
        what = str(error).strip().split("\n")[0] or type(error).__name__
        raise SettingsError(
            f"train.trackers: one of {', '.join(settings.trackers)} cannot begin: {what} "
            "(WANDB_MODE=offline keeps the run here; `wandb login` once otherwise), or leave it out"
        ) from error


def end(accelerator: Accelerator) -> None:
    with redirect_stdout(sys.stderr):
        accelerator.end_training()


def show(
    accelerator: Accelerator,
    name: str,
    file: Path,
    frames: NDArray[np.uint8],
    fps: float,
    prompts: Sequence[str],
    step: int,
) -> None:
    """Shows a video, `frames` (F, H, W, 3), that stands in `file`. The first process calls it."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            _to_tensorboard(tracker.tracker, name, frames, fps, step)
            continue
        module = importlib.import_module(tracker.name)
        picture, caption = file.suffix == ".png", "; ".join(prompts)
        shown = (
            module.Image(str(file), caption=caption)
            if picture
            else module.Video(str(file), caption=caption, format=file.suffix[1:])
        )
        tracker.log({name: shown}, step=step)


def _to_tensorboard(
    writer: Any, name: str, frames: NDArray[np.uint8], fps: float, step: int
) -> None:
    """As a GIF, which its page of images plays: its own way to videos needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width = frames.shape[1:3]
    image = Summary.Image(
        height=height,
        width=width,
        colorspace=3,
        encoded_image_string=gif([Image.fromarray(frame) for frame in frames], fps),
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
    writer.flush()


def _run(file: Path, step: int) -> str:
    """The run's id: what stands there if it goes on, else a new one."""
    if step:
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["run"])
        except (OSError, ValueError, KeyError):
            pass  # it began without
    run = secrets.token_hex(4)
    file.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
    return run
