"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real videos and weights, kept beside the checkout; tests that need them skip without."""
    if not (SHARED / "SOURCES.csv").exists():
        pytest.skip("the real files (../shared/data) are not on this machine")
    return SHARED
