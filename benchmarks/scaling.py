"""One worker of the encode stage, then more, on Ray: clips/s apart from what starting takes, told
by how much longer a run takes over more clips."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks import films
from benchmarks.encode import prepared
from benchmarks.figures import VIDPIPE, report, timed


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    few, many = args.clips // 4, args.clips
    rates: dict[int, float] = {}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for workers in args.workers:
            walls = {}
            for clips in (few, many):
                folder = Path(name) / f"{workers}-{clips}"
                films_of(Path(name), clips)
                prepared(folder, Path(name) / f"videos-{clips}", args.size, args)
                options = ["--runner", "ray", "--set", f"encode.workers={workers}"]
                walls[clips], _ = timed([*VIDPIPE, "run", "encode", *options], folder)
            rates[workers] = (many - few) / (walls[many] - walls[few])
            over = rates[workers] / rates[args.workers[0]]
            rows.append((f"{workers} workers", f"{rates[workers]:.2f} clips/s, {over:.2f} times"))
    return rows


def films_of(folder: Path, clips: int) -> None:
    """The same films, in folders of as many."""
    whole = folder / "films"
    if not whole.exists():
        films.write(whole, 6)
    own = folder / f"videos-{clips}"
    if not own.exists():
        own.mkdir()
        for number in range(clips):
            os.link(whole / f"{number % 6:04d}.mp4", own / f"{number:04d}.mp4")


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--workers": {"type": int, "nargs": "+", "default": [1, 2]},
            "--clips": {"type": int, "default": 96},
            "--batch": {"type": int, "default": 1},
            "--size": {"type": int, "default": 128},
            "--vae": {"default": "demo://vae", "help": "as encode.vae"},
        },
    )
