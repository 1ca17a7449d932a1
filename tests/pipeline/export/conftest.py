"""Fixtures of real small pipelines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "stages"))
sys.path.insert(0, str(Path(__file__).parents[2] / "stages" / "vae"))
sys.path.insert(0, str(Path(__file__).parent))

from projects import Made
from projects import make as make_project


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """`projects.make` in a folder of its own."""

    def made(*words: Any, **more: Any) -> Made:
        return make_project(tmp_path / "project", *words, **more)

    return made
