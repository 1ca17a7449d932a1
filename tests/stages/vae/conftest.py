"""Fixtures for tests that run VAEs."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small get nothing from more threads, and lose much on a busy machine."""
    torch.set_num_threads(1)
