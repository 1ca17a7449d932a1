"""The arrows of the design: pipeline → stages → manifests ← trainer, nothing upward."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from parallel import ON_RAY

ROOT = Path(__file__).parents[1]
PACKAGES = ("manifests", "stages", "pipeline", "trainer")
FORBIDDEN = {
    "manifests": {"stages", "pipeline", "trainer", "ray", "torch", "diffusers", "transformers"},
    "stages": {"pipeline", "trainer"},
    "trainer": {"stages", "pipeline", "ray"},
    "pipeline": {"trainer"},
}
RAY_IS_ALLOWED_IN = {"pipeline/ray_cluster.py", "pipeline/ray_data.py", "stages/engines/vllm.py"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
MOST_LINES = 400


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """The top-level names of everything that the file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_imported_against_the_arrows(package: str) -> None:
    wrong = {
        str(file.relative_to(ROOT)): sorted(imported(file) & FORBIDDEN[package])
        for file in modules(package)
        if imported(file) & FORBIDDEN[package]
    }
    assert not wrong


def test_the_tests_on_ray_are_where_they_are_listed() -> None:
    assert [name for name in ON_RAY if not (ROOT / name).is_file()] == []


def test_ray_is_in_its_runner_alone() -> None:
    users = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in modules(package)
        if "ray" in imported(file)
    }
    assert users <= RAY_IS_ALLOWED_IN
    assert "pipeline/ray_data.py" in users, "the check itself must see it"


def test_files_are_short_and_named_for_what_they_hold() -> None:
    files = [file for package in PACKAGES for file in modules(package)]
    long = {f.name: n for f in files if (n := len(f.read_text().splitlines())) > MOST_LINES}
    assert not long
    assert not {file.name for file in files if file.stem in VAGUE}


def test_every_module_says_what_it_is() -> None:
    mute = [
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in modules(package)
        if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not mute


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    """`vidpipe --help` and `status` must not pay seconds for torch, ray or diffusers."""
    code = (
        "import sys, pipeline.cli, pipeline.account, pipeline.config, stages; stages.builtin();"
        "print(sorted({m.split('.')[0] for m in sys.modules} &"
        " {'torch', 'ray', 'diffusers', 'transformers', 'pandas', 'av', 'accelerate'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
