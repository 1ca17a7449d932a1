"""Where a run is told to beside the console: TensorBoard, Weights & Biases, Trackio.

accelerate begins and ends them; here is what it does not do: settings and samples in a form that
each shows, that a run which goes on is the same run there as well, and that it goes on where one of
them fails.
"""

from __future__ import annotations

import importlib
import json
import secrets
import sys
from collections.abc import Callable, Sequence
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


def begin(
    accelerator: Accelerator, settings: TrainSettings, step: int, say: Callable[[str], None]
) -> Trackers:
    """Begins them, or goes on behind `step`, and tells them the settings. Raises SettingsError
    where one cannot be used. `say` hears of one that fails later."""
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
    return Trackers(accelerator, say)


class Trackers:
    """Those of a run that has begun. One that fails, its server gone or its disk full, is said to
    fail and asked again the next time: it ends no training."""

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self._accelerator, self._say = accelerator, say
        self._failing: set[str] = set()

    def log(self, values: dict[str, float], step: int) -> None:
        """Tells the numbers of a step."""
        self._each(f"step {step}", lambda tracker: tracker.log(values, step=step))

    def show(
        self,
        name: str,
        file: Path,
        frames: NDArray[np.uint8],
        fps: float,
        prompts: Sequence[str],
        step: int,
    ) -> None:
        """Shows a video, `frames` (F, H, W, 3), that stands in `file`. The first process calls
        it."""

        def show(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                _to_tensorboard(tracker.tracker, name, frames, fps, step)
                return
            module = importlib.import_module(tracker.name)
            picture, caption = file.suffix == ".png", "; ".join(prompts)
            shown = (
                module.Image(str(file), caption=caption)
                if picture
                else module.Video(str(file), caption=caption, format=file.suffix[1:])
            )
            tracker.log({name: shown}, step=step)

        self._each(f"step {step}", show)

    def end(self) -> None:
        def end(tracker: Any) -> None:
            if tracker.name == "trackio" and self._accelerator.is_main_process:
                importlib.import_module("trackio").finish()  # else at exit again, on stdout
            tracker.finish()

        with redirect_stdout(sys.stderr):
            self._each("the end", end)
            self._accelerator.trackers = []
            self._accelerator.end_training()

    def _each(self, when: str, do: Callable[[Any], None]) -> None:
        for tracker in self._accelerator.trackers:
            name = tracker.name
            try:
                do(tracker)
            except Exception as error:  # noqa: BLE001  each has its own
                if name not in self._failing:
                    self._failing.add(name)
                    reason = first_line(error)
                    self._say(f"{when}: {name} cannot be told, which ends no training: {reason}")
            else:
                if name in self._failing:
                    self._failing.remove(name)
                    self._say(f"{when}: {name} can be told again")


def first_line(error: Exception) -> str:
    """Its type, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


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
