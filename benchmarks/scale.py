"""Millions of rows through five stages that do nothing, against the same in plain pyarrow; then a
status and a run with nothing left to do, and the driver's peak memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figures import VIDPIPE, report

ROOT = Path(__file__).parents[1]
STAGES = [f"copy{number}" for number in range(1, 6)]
YAML = """\
workdir: ./work
source: {kind: parquet, path: ./clips.parquet}
run: {runner: local}
""" + "".join(f"{name}: {{enabled: false}}\n" for name in (
    "download", "probe", "score", "filter", "recaption", "encode"
)) + "stages:\n" + "".join(
    f'  {name}: {{use: "benchmarks.copying:{name.capitalize()}"}}\n' for name in STAGES
)  # fmt: skip
PART = 1 << 17


def write_source(file: Path, rows: int) -> None:
    schema = pa.schema([pa.field("path", pa.string()), pa.field("text", pa.string())])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, rows, PART):
            numbers = range(start, min(rows, start + PART))
            paths = [f"videos/{n // 1000:05d}/{n:08d}.mp4" for n in numbers]
            texts = [
                f"clip {n} shows a thing that moves, number {n * 7919 % rows}" for n in numbers
            ]
            writer.write_table(pa.table([paths, texts], schema=schema))


PLAIN = """
import sys, pyarrow.parquet as pq
source, folder = sys.argv[1:]
for number in range(1, 6):
    table = pq.read_table(source)
    last = table.column_names[-1]
    source = f"{folder}/{number}.parquet"
    table = table.append_column(f"c{number}", table.column(last))
    pq.write_table(table, source, compression="zstd")
"""


def cost(command: list[str], cwd: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds with children, and the peak memory in MiB of the process itself."""
    code = (
        "import resource, subprocess, sys, os\n"
        "pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)\n"
        "_, status, used = os.wait4(pid, 0)\n"
        "print(used.ru_maxrss, used.ru_utime + used.ru_stime, status, file=sys.stderr)\n"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wall = time.perf_counter() - began
    peak, cpu, status = done.stderr.splitlines()[-1].split()
    if status != "0":
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return wall, float(cpu), int(peak) / 1024


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    figures = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows = args.rows
        write_source(folder / "clips.parquet", rows)
        (folder / "vidpipe.yaml").write_text(YAML)
        if args.plain:
            plain = [sys.executable, "-c", PLAIN, "clips.parquet", name]
            wall, plain_cpu, peak = cost(plain, folder)
            figures.append(
                ("plain pyarrow", f"{plain_cpu:.1f} CPU s, {wall:.1f} s, {peak:.0f} MiB")
            )
        for what, command in (
            ("vidpipe plan (takes the table in)", ["plan"]),
            ("vidpipe run", ["run"]),
            ("vidpipe status", ["status"]),
            ("vidpipe run, nothing to do", ["run"]),
        ):
            wall, cpu, peak = cost([*VIDPIPE, *command], folder)
            told = f"{cpu:.1f} CPU s, {wall:.1f} s, {peak:.0f} MiB"
            if args.plain and what == "vidpipe run":
                told += f", {cpu / plain_cpu:.1f} times plain pyarrow"
            figures.append((what, told))
    return [(f"{rows:,} rows: {what}", told) for what, told in figures]


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--rows": {"type": int, "default": 1_000_000},
            "--plain": {"action": "store_true", "help": "measure plain pyarrow as well"},
            "--folder": {"default": None, "help": "where to work; default: the system's"},
        },
    )
