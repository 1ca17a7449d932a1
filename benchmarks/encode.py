"""The encode stage on 720p files against a bare loop of the same VAE in the same batches over
frames that lie in memory already: what decoding, batching, keys and commits cost the VAE. In turns,
in one process; the VAE has one core, and decoding what is left."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import films
from benchmarks.figures import VIDPIPE, report, timed
from pipeline import config, dag
from pipeline.streams import Streams
from pipeline.unit import Piece, Retry
from stages.media.frames import read_clip

YAML = """\
workdir: ./work
source: {{kind: folder, path: ./videos}}
sampling: {{fps: 16, frames: 64, size: {size}}}
run: {{runner: local}}
score: {{enabled: false}}
recaption: {{enabled: false}}
encode: {{vae: "{vae}", device: cpu, batch_size: {batch}, threads: 1}}
"""


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        films.write(folder / "videos", args.clips)
        for size in args.sizes:
            made = prepared(folder / str(size), folder / "videos", size, args)
            rows += compared(made, args)
    return rows


def prepared(folder: Path, videos: Path, size: int, args: argparse.Namespace) -> dag.Pipeline:
    """A pipeline in which encode is all that is left to do."""
    folder.mkdir()
    (folder / "videos").symlink_to(videos)
    (folder / "vidpipe.yaml").write_text(YAML.format(size=size, vae=args.vae, batch=args.batch))
    timed([*VIDPIPE, "run", "filter"], folder)
    return dag.build(config.load(str(folder / "vidpipe.yaml")))


def compared(made: dag.Pipeline, args: argparse.Namespace) -> list[tuple[str, str]]:
    stage = made.stages["encode"]
    model = stage.setup()
    clips = [
        read_clip(str(path), made.config.sampling).frames
        for path in sorted(Path(made.config.base, "videos").iterdir())
    ]
    walls: dict[str, list[float]] = {"bare": [], "stage": []}
    cpu: dict[str, list[float]] = {"bare": [], "stage": []}  # of the thread that the VAE runs in
    busy = []
    bare(clips[: args.batch], model, args.batch)  # what is set up at the first call
    for number in range(args.rounds):
        for which in ("bare", "stage") if number % 2 else ("stage", "bare"):
            began, before = time.perf_counter(), time.thread_time()
            if which == "bare":
                bare(clips, model, args.batch)
            else:
                seconds = staged(made, stage, model)
                busy.append(1 - seconds["wait"] / (time.perf_counter() - began))
            walls[which].append(time.perf_counter() - began)
            cpu[which].append(time.thread_time() - before)
    rates = {which: len(clips) / min(each) for which, each in walls.items()}
    size = made.config.sampling.size
    return [
        (f"{size} px, bare loop", f"{rates['bare']:.2f} clips/s"),
        (f"{size} px, encode stage", f"{rates['stage']:.2f} clips/s"),
        (f"{size} px, stage / bare, best rounds", f"{rates['stage'] / rates['bare']:.3f}"),
        (
            f"{size} px, stage / bare, median of rounds",
            f"{statistics.median(b / s for b, s in zip(walls['bare'], walls['stage'])):.3f}",
        ),
        (
            f"{size} px, CPU of the VAE's thread, bare / stage",
            f"{min(cpu['bare']) / min(cpu['stage']):.3f}",
        ),
        (
            f"{size} px, VAE at work",
            f"{100 * max(busy):.1f}% (median {statistics.median(busy):.1%})",
        ),
    ]


def bare(clips: list[np.ndarray], model: Any, batch: int) -> None:
    for start in range(0, len(clips), batch):
        frames = torch.from_numpy(np.stack(clips[start : start + batch]))
        model.fetch(model.encode(frames, True))


def staged(made: dag.Pipeline, stage: Any, model: Any) -> dict[str, float]:
    """Encodes all clips anew; returns the receipts' seconds."""
    shutil.rmtree(Path(made.config.workdir) / "encode", ignore_errors=True)
    seconds: dict[str, float] = {}
    kept = 0
    pieces = map(Piece, made.dag.log(made.store, "source").units())
    coming = partial(next, pieces, None)
    streams = Streams(made.store, made.dag, stage, lambda: model, Retry(), coming)
    for _, receipt in streams.run():
        if receipt.error:
            raise SystemExit(receipt.error)
        kept += receipt.counts.kept
        for phase, spent in receipt.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    if kept != len(list(Path(made.config.base, "videos").iterdir())):
        raise SystemExit(f"only {kept} clips were encoded")
    return seconds


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--clips": {"type": int, "default": 24},
            "--batch": {"type": int, "default": 2},
            "--rounds": {"type": int, "default": 3},
            "--sizes": {"type": int, "nargs": "+", "default": [128, 256]},
            "--vae": {"default": "demo://vae", "help": "as encode.vae"},
        },
    )
