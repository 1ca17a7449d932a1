"""What a command costs before it works: --help, status, and a run that has nothing to do."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.figures import VIDPIPE, report, timed

YAML = """\
workdir: ./work
source: {{kind: folder, path: "{videos}"}}
sampling: {{fps: 16, frames: 64, size: 64, fit: crop}}
filter: {{rules: {{length: "len == 64"}}}}
encode: {{vae: "demo://vae"}}
"""
TIMES = 7


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vidpipe.yaml").write_text(YAML.format(videos=args.videos.resolve()))
        timed([*VIDPIPE, "run", "encode", "--runner", "local"], folder)
        for title, words in (
            ("vidpipe --help", ["--help"]),
            ("vidpipe status", ["status"]),
            ("vidpipe run encode, nothing to do", ["run", "encode"]),
        ):
            taken = [timed([*VIDPIPE, *words], folder) for _ in range(TIMES)]
            wall, cpu = (statistics.median(values) for values in zip(*taken))
            most = max(c for _, c in taken)
            rows.append((title, f"{cpu:.2f} CPU s (at most {most:.2f}), {wall:.2f} s wall"))
    return rows


if __name__ == "__main__":
    report(measure, __doc__ or "")
