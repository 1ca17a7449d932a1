"""Objects created once, whole and durable; Parquet files that name their own damage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from racing import race

from manifests.store import Store, StoreError

TABLE = pa.table({"clip_id": ["a", "b"], "n": [1, 2]})


def test_an_object_is_created_once(store: Store) -> None:
    assert store.create("a/b.json", b"first")
    assert not store.create("a/b.json", b"second")
    assert store.read("a/b.json") == b"first"
    assert store.find("a") == ["a/b.json"]


def test_a_retry_after_a_lost_reply_meets_its_own_object(store: Store) -> None:
    assert store.create("commit", b"mine")
    assert store.create("commit", b"mine"), "it is there, and it is ours"
    assert not store.create("commit", b"theirs")


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    race(store)
    assert [p.name for p in tmp_path.iterdir()] == ["commit"], "a temporary file was left"


def test_payload_is_stored_raw_in_bounded_row_groups(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store = Store(str(tmp_path))
    blob = bytes(6 << 20)
    table = pa.table({"clip_id": list("abcde"), "latents": pa.array([blob] * 5, pa.binary())})
    store.write_parquet("x.parquet", table)
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    assert metadata.num_row_groups == 3
    latents = metadata.row_group(0).column(1)
    assert latents.compression == "UNCOMPRESSED"
    assert latents.total_compressed_size >= 2 * len(blob)


def test_unreadable_data_is_named(store: Store) -> None:
    store.write_parquet("probe/x.parquet", TABLE)
    store.fs.pipe_file(store.path("probe/x.parquet"), b"PAR1 no more")
    with pytest.raises(StoreError, match=r"probe/x\.parquet"):
        store.read_parquet("probe/x.parquet")
