"""`vidpipe demo`: the main job from videos to a trained model, on clips that it makes."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from pipeline import config, dag, launching, training
from pipeline.account import account
from pipeline.output import text_table
from pipeline.report import console
from pipeline.run import run
from pipeline.unit import Retry

CONFIG = """\
# Written by `vidpipe demo`: the main job, small enough for two cores.
workdir: ./work
source: {kind: openvid, path: ./clips.csv, root: ./videos}
sampling: {fps: 16, frames: 64, size: 64, fit: crop}
filter:
  rules:
    length: "len == 64"
    bright: "luminance >= 16"
recaption: {engine: transformers, model: "demo://captioner"}
encode: {vae: "demo://vae"}
train: {steps: 60, batch_size: 4, warmup: 10, log_every: 10, save_every: 60}
"""
PROMPTS = ["a red circle moves left", "a blue square moves up"]


def demo(folder: str, clips: int) -> int:
    """Makes the clips, runs every stage on Ray, trains, samples; returns an exit code.

    Run again in the same folder it finds everything done and only trains on where it stopped.
    """
    from stages.demo.shapes import make_demo

    began = time.monotonic()
    place = Path(folder)
    file = place / config.DEFAULT_FILE
    if not file.exists():
        _say(f"making {clips} clips in {place}/videos, some too short, dark or broken on purpose")
        make_demo(place, clips)
        file.write_text(CONFIG)
    pipeline = dag.build(config.load(str(file)))
    report = console()
    result = run(pipeline, (), Retry(), report)
    if result.faults:
        _say(f"{result.faults[0].stage} raised {result.faults[0].error}\n{result.faults[0].trace}")
        return 1
    settings = training.prepare(pipeline)
    code = launching.call(launching.Fleet().command(launching.TRAINER, "--config", str(settings)))
    if code:
        return code
    gif = place / "sample.gif"
    code = training.sample(pipeline, PROMPTS, str(gif))
    if code:
        return code
    rows = [
        [s["name"], s["in"], s["kept"], sum(s["rejected"].values()), sum(s["failed"].values())]
        for s in account(pipeline)["stages"]
    ]
    _say("\n" + text_table(["stage", "in", "kept", "rejected", "failed"], rows))
    if shutil.which("vidpipe") is None:
        _say(f"(`vidpipe` is in {Path(sys.prefix).name}: source {_activate()})")
    _say(
        f"done in {time.monotonic() - began:.0f} s. Every clip is accounted for. Look at:\n"
        f"  {gif}   what {pipeline.config.train['steps']} training steps know of: {PROMPTS[0]}\n"
        f"  vidpipe status -c {file}\n"
        f"  vidpipe show encode -c {file} --where \"outcome != 'kept'\"\n"
        f"  vidpipe run -c {file} --set filter.rules.bright='luminance >= 0'   encodes 3 more\n"
        "Your own videos: vidpipe init"
    )
    return 0


def _activate() -> str:
    """The environment's own script, as one would type it from here."""
    script = Path(sys.prefix) / "bin" / "activate"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
