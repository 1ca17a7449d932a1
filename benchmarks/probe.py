"""Probe against ffprobe, on the same files in the same run: CPU milliseconds a file."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import av

from benchmarks.figures import report, timed
from stages.base import Context, Row
from stages.probe import Probe, ProbeSettings

ROUNDS = 5
FFPROBE = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_streams", "-of", "json"]


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    files = sorted(p for p in args.videos.iterdir() if p.is_file())
    good = [p for p in files if not p.name.startswith(("broken", "novideo"))]
    stage = Probe(ProbeSettings(), Context("."))
    for path in good:
        bare(path)  # files into the page cache, codecs loaded
    rows = [
        ("files", str(len(good))),
        ("vidpipe probe", per_file(lambda p: probe(stage, p), good)),
        ("PyAV: open, count packets", per_file(bare, good)),
    ]
    if shutil.which("ffprobe"):
        for title, more in (("ffprobe", []), ("ffprobe -count_packets", ["-count_packets"])):
            cpu = sum(timed([*FFPROBE, *more, str(p)], Path.cwd())[1] for p in good)
            rows.append((title, f"{1000 * cpu / len(good):.1f} CPU ms a file"))
    else:
        rows.append(("ffprobe", "not installed"))
    return rows


def probe(stage: Probe, path: Path) -> None:
    row: Row = {"clip_id": "x", "content": "", "path": str(path), "start": None, "end": None}
    (outcome,) = stage.process([row], None)
    if not isinstance(outcome, dict):
        raise SystemExit(f"{path.name}: {outcome}")


def bare(path: Path) -> None:
    with av.open(str(path), metadata_errors="ignore") as container:
        sum(1 for _ in container.demux(container.streams.video[0]))


def per_file(work: Callable[[Path], None], files: list[Path]) -> str:
    """The quickest of several rounds: the noise of a shared machine only adds."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for path in files:
            work(path)
        best = min(best, time.process_time() - began)
    return f"{1000 * best / len(files):.1f} CPU ms a file"


if __name__ == "__main__":
    report(measure, __doc__ or "")
