"""What is no index of ours is told in a sentence, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.facts import with_facts
from manifests.shards import INDEX, LATENTS, Index, LatentSpec, ShardError, write_index

SPEC = LatentSpec("v", "AutoencoderKL", "", "f", False, 1, 1, 8, [0.0], [1.0])
FACTS = {"workdir": "/work", "spec": SPEC.to_json()}


def index(**columns: Any) -> pa.Table:
    row = {"clip_id": "c", "shard": "s", "row": 0, "shape": [1, 1, 1, 1]}
    table = pa.Table.from_pylist([dict.fromkeys(INDEX.names) | row], INDEX)
    for name, values in columns.items():
        table = table.drop_columns(name)
        if values is not None:
            table = table.append_column(name, pa.array([values]))
    return table


def damaged(facts: Any) -> pa.Table:
    return index().replace_schema_metadata({b"vidpipe": facts})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table({"a": [1]}), "no index of this version of vidpipe (it has no fact spec)"),
        (with_facts(LATENTS.empty_table(), {"spec": SPEC.to_json()}), "it has no fact workdir"),
        (with_facts(index(text_row=None), FACTS), "it has no column text_row"),
        (with_facts(index(row="first"), FACTS), "is no index: "),
        (with_facts(index(), {**FACTS, "spec": {"vae": "v"}}), "is of another version"),
        (with_facts(index(), {**FACTS, "spec": 3}), "is of another version"),
        (damaged(b"{"), "it has no fact spec"),
        (damaged(json.dumps([1]).encode()), "it has no fact spec"),
    ],
)
def test_a_parquet_file_of_another_kind(tmp_path: Path, table: pa.Table, said: str) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(table, file)
    with pytest.raises(ShardError) as error:
        Index.open(str(file))
    assert said in str(error.value) and len(str(error.value)) < 600


def test_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    write_index(str(file), "/work", [index()], SPEC, {})
    assert Index.open(str(file)).table.equals(index())
    data = file.read_bytes()
    file.write_bytes(data[:60] + bytes(200) + data[260:])
    with pytest.raises(ShardError, match="is no index: "):
        Index.open(str(file))
    file.write_text("no Parquet")
    with pytest.raises(ShardError, match="is no index: "):
        Index.open(str(file))
    with pytest.raises(ShardError, match=r"can't read .*Is a directory"):
        Index.open(str(tmp_path))
    with pytest.raises(ShardError, match=r"no index at .*: run `vidpipe run` first"):
        Index.open(str(tmp_path / "none.parquet"))
