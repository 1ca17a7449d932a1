"""Made shards of text embeddings, as the stage embed writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.facts import with_facts
from manifests.shards import EMBEDDINGS, TextSpec

TEXT = TextSpec(
    encoder="encoders/tiny",
    encoder_class="UMT5EncoderModel",
    encoder_sha256="cd" * 32,
    fingerprint="e" * 16,
    column="recaption",
    max_length=12,
    padding="none",
    dtype="float32",
    width=6,
    empty_tokens=1,
)


def embedding(caption: str | None) -> np.ndarray:
    """Of a caption, (tokens, width): a token a word, and the end."""
    words = [*(caption or "").split(), "</s>"]
    rows = [np.random.default_rng(list(word.encode())).normal(size=TEXT.width) for word in words]
    return np.stack(rows).astype(np.float32)


def write_embeddings(
    path: Path, name: str, rows: list[dict[str, Any]], spec: TextSpec = TEXT
) -> None:
    """A shard of the embeddings of `rows` of an index, which are told where they stand: those of
    equal captions once."""
    stored: list[dict[str, Any]] = []
    first: dict[str | None, int] = {}
    for number, row in enumerate(rows):
        caption = row["caption"]
        values, new = embedding(caption), caption not in first
        place = first.setdefault(caption, number)
        key = f"key of {caption}"
        stored.append(
            {
                "embedding": values.tobytes() if new else None,
                "embedding_empty": None if number else embedding("").tobytes(),
                "embedding_shape": list(values.shape),
                "embedding_dtype": "float32",
                "embedding_key": key,
                "embedding_row": place,
                "embedding_tokens": len(values),
                "embedding_truncated": False,
            }
        )
        row |= {"text_key": key, "text_shard": name, "text_row": place}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = with_facts(pa.Table.from_pylist(stored, EMBEDDINGS), {"spec": spec.to_json()})
    pq.write_table(table, path, row_group_size=3)
