"""What frames cost before a model looks at them: CPU time and bytes of a clip, read, made small
and packed as the describe stage does it."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.figures import report
from benchmarks.films import write
from stages.engines.base import Pictures
from stages.engines.data_urls import data_urls
from stages.media.sampling import Sampling
from stages.media.spread import FramesSettings, spread


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    settings = FramesSettings(count=args.count, side=args.side)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.clips)
        files = sorted(Path(folder).glob("*.mp4"))
        made: list[Pictures] = []
        began = time.process_time()
        for file in files:
            found = spread(str(file), settings, Sampling())
            made.append(Pictures(found.frames, found.fps))
        read = (time.process_time() - began) / len(files)
        began = time.process_time()
        packed = [data_urls(pictures) for pictures in made]
        pack = (time.process_time() - began) / len(files)
    shape = " x ".join(map(str, made[0].frames.shape[:3]))
    return [
        (f"{shape} frames of a 720p clip, read and made small", f"{1000 * read:.0f} ms of CPU"),
        ("packed for a server", f"{1000 * pack:.0f} ms of CPU more"),
        ("clips a second and core", f"{1 / read:.1f}; {1 / (read + pack):.1f} packed"),
        ("bytes of a clip", f"{made[0].nbytes:,}; {packed[0].nbytes:,} packed"),
    ]


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--clips": {"type": int, "default": 24},
            "--count": {"type": int, "default": 8},
            "--side": {"type": int, "default": 448},
        },
    )
