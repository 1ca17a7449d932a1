"""`vidpipe doctor`: what a newcomer's machine lacks, before a run finds out."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import config, dag
from pipeline.advice import advice
from pipeline.config import ConfigError
from pipeline.resources import GIB, check_workdir, cores, free_space, shared_memory

# Those without which no stage or no runner works; decord and the extras are choices.
PACKAGES = ("torch", "ray", "transformers", "diffusers", "accelerate", "av", "pyarrow", "duckdb")
SMALL_SHM = 64 << 20  # Docker's default, too little for Ray's object store


@dataclass(frozen=True)
class Check:
    """One finding; `ok` False where something has to be done."""

    subject: str
    ok: bool
    finding: str


def examine(file: str, overrides: tuple[str, ...]) -> Iterator[Check]:
    """Checks the machine and, where `file` is there, the configuration with its source, models
    and workdir."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)")
    for package in PACKAGES:
        try:
            yield Check(package, True, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, False, f"not installed: pip install {package}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("machine", True, f"{cores()} cores, {memory / GIB:.1f} GiB of memory")
    yield Check("gpus", True, _gpus())
    shm = shared_memory()
    if shm is not None:
        hint = "" if shm > SMALL_SHM else ": start the container with --shm-size=2g"
        yield Check("shared memory", shm > SMALL_SHM, f"{shm / GIB:.2f} GiB{hint}")
    if not Path(file).exists():
        yield Check("configuration", True, f"no {file} here; `vidpipe init` writes one")
        return
    yield from _configuration(file, overrides)


def _configuration(file: str, overrides: tuple[str, ...]) -> Iterator[Check]:
    from manifests.sources import SourceError

    try:
        pipeline = dag.build(config.load(file, overrides))
        yield Check("configuration", True, f"{file}: {' → '.join(pipeline.stages)}")
        workdir = pipeline.config.workdir
        check_workdir(workdir)
        free = free_space(workdir)
        room = "" if free is None else f", {free / GIB:.1f} GiB free"
        yield Check("workdir", True, f"{workdir}{room}")
        pipeline.bind(list(pipeline.stages))
        yield Check("source, models", True, "columns, rules and model files are there")
        for line in advice(pipeline):
            yield Check("settings", True, f"note: {line}")
    except (ConfigError, SourceError) as error:
        yield Check("configuration", False, str(error))


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none: stages run on the CPU"
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    names = [line.strip() for line in found.stdout.splitlines() if line.strip()]
    return "; ".join(names) if found.returncode == 0 and names else "nvidia-smi finds none"
