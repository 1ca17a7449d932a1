"""Facts about a data file, JSON-able, in the metadata of its schema."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

_KEY = b"vidpipe"


def with_facts(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    """The table with `facts` (JSON-able) in its schema's metadata."""
    metadata = dict(table.schema.metadata or {})
    metadata[_KEY] = json.dumps(facts, sort_keys=True).encode()
    return table.replace_schema_metadata(metadata)


def file_facts(schema: pa.Schema) -> dict[str, Any]:
    """What `with_facts` stored; empty where nothing was, or nothing that is known here."""
    stored = (schema.metadata or {}).get(_KEY)
    try:
        return dict(json.loads(stored)) if stored else {}
    except (ValueError, TypeError):
        return {}
