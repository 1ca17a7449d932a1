"""Fixtures for tests of sources."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.sources import SourceSettings

KINDS = {"csv": "csv", "tsv": "csv", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}


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
