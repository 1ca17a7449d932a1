"""`vidpipe demo`, installed: wall seconds, and the peak memory of all its processes together."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks.figures import VIDPIPE, report

EVERY = 0.25  # seconds between looks


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [*VIDPIPE, "demo", str(Path(folder) / "demo")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        peak = Peak(process.pid)
        peak.start()
        _, told = process.communicate()
        peak.stop.set()
        peak.join()
        if process.returncode:
            raise SystemExit(told)
        wall = time.perf_counter() - began
    return [
        ("vidpipe demo", f"{wall:.0f} s"),
        ("peak memory (PSS) of its processes together", f"{peak.highest / 2**30:.2f} GiB"),
        ("processes at that moment", str(peak.processes)),
    ]


class Peak(threading.Thread):
    """Adds up the proportional set sizes of a process and everything below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.stop = threading.Event()
        self.highest = 0
        self.processes = 0

    def run(self) -> None:
        while not self.stop.wait(EVERY):
            sizes = []
            try:
                root = psutil.Process(self.pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    sizes.append(process.memory_full_info().pss)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            if sum(sizes) > self.highest:
                self.highest, self.processes = sum(sizes), len(sizes)


if __name__ == "__main__":
    report(measure, __doc__ or "")
