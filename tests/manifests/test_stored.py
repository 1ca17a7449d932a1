"""What finding embeddings in a workdir costs: which objects are read, and that it says it lives."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.log import Counts, Log, line_of
from manifests.shards import EMBEDDINGS
from manifests.store import Store
from manifests.stored import StoredEmbeddings


def committed(log: Log, unit: str, key: str) -> None:
    row = {"embedding": b"1234", "embedding_key": key, "embedding_row": 0}
    table = pa.Table.from_pylist([dict.fromkeys(EMBEDDINGS.names) | row], EMBEDDINGS)
    assert log.append(unit, len(log.commits(unit)), "", Counts(), table)


def snapshot(log: Log) -> None:
    lines = [line_of(unit, log.commits(unit, history)) for unit, history in log.units().items()]
    assert log.store.create(log.next_snapshot(), "\n".join(lines).encode())


def test_commits_that_a_snapshot_holds_are_not_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(Store(str(tmp_path)), "embed", "f")
    for n in range(8):
        committed(log, f"u{n % 2}", f"{n}" * 32)
    snapshot(log)
    committed(log, "u0", "a" * 32)
    read: list[str] = []
    plain = Store.read

    def noted(store: Store, name: str) -> bytes:
        read.append(name.removeprefix("embed/f/"))
        return plain(store, name)

    monkeypatch.setattr(Store, "read", noted)
    stored = StoredEmbeddings(str(tmp_path), "embed", "f")
    stored.look()
    assert read == ["snapshots/000000.jsonl", "u0/000004.json"] and len(stored) == 9
    read.clear()
    stored.look()
    assert not read, "all of them are known"
    committed(log, "u1", "b" * 32)
    snapshot(log)
    read.clear()
    stored.look()
    assert read == ["snapshots/000001.jsonl", "u1/000004.json"] and len(stored) == 10


def test_a_long_look_gives_signs_of_life(tmp_path: Path) -> None:
    """In silence a worker would be ended, and the clips in flight be blamed."""
    log = Log(Store(str(tmp_path)), "embed", "f")
    for n in range(4):
        committed(log, f"u{n}", f"{n}" * 32)
    heard: list[int] = []
    stored = StoredEmbeddings(str(tmp_path), "embed", "f")
    stored.look(lambda: heard.append(len(stored)))
    assert len(heard) == 8, "for each commit, and for each file"
    assert len(stored) == 4


@pytest.mark.parametrize(
    "other",
    [
        pa.table({"of": ["another program"]}),
        pa.table({"embedding_key": ["no digits"], "embedding_row": pa.array([0], pa.int32())}),
        pa.table({"embedding_key": [None], "embedding_row": pa.array([0], pa.int32())}),
        pa.table({"embedding_key": [1], "embedding_row": ["0"]}),
    ],
)
def test_a_file_that_is_none_of_embeddings_counts_as_not_there(
    tmp_path: Path, other: pa.Table
) -> None:
    log = Log(Store(str(tmp_path)), "embed", "f")
    committed(log, "u0", "a" * 32)
    (data,) = tmp_path.glob("embed/f/u0/*.parquet")
    pq.write_table(other, data)
    committed(log, "u1", "b" * 32)
    stored = StoredEmbeddings(str(tmp_path), "embed", "f")
    stored.look()
    assert len(stored) == 1 and stored.find(["a" * 32, "b" * 32]).keys() == {"b" * 32}
