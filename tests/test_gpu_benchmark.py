"""`benchmarks/gpu.sh --smoke`: the script for GPUs runs through on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import FULL, flops

ROOT = Path(__file__).parents[1]


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    ran = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--smoke", "--dtypes", "float32", "--out", out],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    made = json.loads(out.read_text())
    assert made["machine"]["device"] == "cpu"
    found = {(case["vae"], case["batch"], case["channels_last"]) for case in made["cases"]}
    assert found == {(v, b, last) for v in ("sd", "wan") for b, last in
                     ((1, v == "sd"), (2, v == "sd"), (1, v != "sd"))}  # fmt: skip
    for case in made["cases"]:
        assert case["clips_per_second"] > 0 and case["tflop"] > 0 and not case["compile"]
        assert case["busy"] is None and case["peak_gib"] is None
    assert ran.stdout.splitlines()[-len(made["cases"]) - 1].split()[:4] == [
        *("vae", "clip", "dtype", "batch")
    ]


def test_operations_are_those_counted_elsewhere() -> None:
    """0.273 TFLOP for a picture of 256x256 through the encoder of Stable Diffusion."""
    name, config, _ = FULL["sd"]
    assert flops(name, config, (64, 256, 256)) / 64 / 1e12 == pytest.approx(0.273, rel=0.01)
