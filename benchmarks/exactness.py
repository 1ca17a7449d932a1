"""Frame-exactness of every backend over every combination of codec, container, frame rate, groups
of pictures, rotation, edit list and start that is valid (`tests/stages/matrix.py`): of the videos,
how many give exactly the frames asked for, and in how many PyAV had to step in."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.figures import report
from stages.media import backends
from stages.media.backends.base import OtherFrames
from stages.media.backends.others import Unable
from stages.media.video import VideoError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "stages"))
from matrix import Case, asked, full, shown


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    cases = [case for number, case in enumerate(full()) if number % args.every == 0]
    names = [name for name in args.backends if not backends.missing(name)]
    modules = {name: importlib.import_module(f"stages.media.backends.{name}") for name in names}
    verdicts: dict[str, Counter[str]] = {name: Counter() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            path = case.make(Path(folder))
            for name, module in modules.items():
                verdict = judged(module, str(path), case)
                verdicts[name][verdict] += 1
                if verdict == "wrong":
                    print(f"{name}: {case}", file=sys.stderr)
            path.unlink()
    rows = [("videos", str(len(cases)))]
    for name, verdict in verdicts.items():
        exact = verdict["alone"] + verdict["with PyAV"]
        rows.append((f"{name}, exact", f"{exact} ({100 * exact / len(cases):.1f}%)"))
        if name != "pyav":
            rows.append((f"{name}, of these PyAV stepped in", str(verdict["with PyAV"])))
    return rows


def judged(module: Any, path: str, case: Case) -> str:
    """alone, with PyAV, or wrong."""
    try:
        if not hasattr(module, "alone"):
            return "alone" if shown(module.decode, path, case) == asked(case) else "wrong"
        try:
            return "alone" if shown(module.alone, path, case) == asked(case) else "wrong"
        except Unable:
            return "with PyAV" if shown(module.decode, path, case) == asked(case) else "wrong"
    except (VideoError, OtherFrames, AssertionError):
        return "wrong"


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--backends": {"nargs": "+", "default": ["pyav", "decord", "torchcodec"]},
            "--every": {"type": int, "default": 1, "help": "of so many videos, one"},
        },
    )
