"""Stores to write to, and tables to read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.sources import SourceSettings
from manifests.store import Store

KINDS = {"csv": "csv", "tsv": "csv", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and an fsspec store with a conditional put."""
    url = str(tmp_path / "work") if request.param == "local" else f"memory://{tmp_path.name}"
    return Store(url)


@pytest.fixture
def table(tmp_path):
    """Writes a file and returns the settings that read it."""

    def make(name: str, content, **settings) -> SourceSettings:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8", newline="")
        kind = settings.pop("kind", None) or KINDS[name.split(".")[1]]
        return SourceSettings(kind=kind, path=str(path), **settings)

    return make
