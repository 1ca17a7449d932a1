"""The commit log: created once, named by what was read, nothing left by the one who lost."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from manifests.store import Commit, Counts, Log, Store, StoreError

TABLE = pa.table({"clip_id": ["a", "b"], "n": [1, 2], "blob": pa.array([b"x" * 9, b"y"])})


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and an fsspec store with a conditional put."""
    url = str(tmp_path / "work") if request.param == "local" else f"memory://{tmp_path.name}"
    return Store(url)


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
    won: list[int] = []
    ready = threading.Barrier(8)

    def create(n: int) -> None:
        ready.wait()
        if store.create("commit", str(n).encode()):
            won.append(n)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("commit") == str(won[0]).encode()
    assert [p.name for p in tmp_path.iterdir()] == ["commit"], "a temporary file was left"


def test_a_commit_names_its_data_with_checksum_and_counts(store: Store) -> None:
    log = Log(store, "probe", "f00")
    counts = Counts(total=3, kept=2, failed={"not_a_video": 1})
    commit = log.append("u1", 0, "state", counts, TABLE, {"process": 1.5})
    assert commit is not None
    name = log.data_name("u1", commit)
    data = store.read(name)
    assert hashlib.sha256(data).hexdigest() == commit.sha256
    assert (commit.size, commit.rows) == (len(data), 2)
    assert store.read_parquet(name).equals(TABLE)
    assert store.read_parquet(name, ["n"]).column_names == ["n"]
    assert log.commits("u1") == [commit]
    assert log.units() == {"u1": ["probe/f00/u1/000000.json"]}


def test_who_loses_the_race_leaves_nothing(store: Store) -> None:
    log = Log(store, "probe", "f00")
    first = log.append("u1", 0, "s", Counts(), TABLE)
    before = store.find("")
    assert log.append("u1", 0, "s", Counts(), TABLE) is None
    assert store.find("") == before
    assert log.commits("u1") == [first]


def test_a_commit_survives_json() -> None:
    counts = Counts(total=2, rejected={"length": 1}, pending=1)
    commit = Commit(3, "abc", "state", counts, "abc.parquet", "00ff", 7, 2, {"read": 0.1}, 5.0)
    assert Commit.from_json(commit.to_json()) == commit


def test_unreadable_data_is_named(store: Store) -> None:
    log = Log(store, "probe", "f00")
    commit = log.append("u1", 0, "s", Counts(), TABLE)
    assert commit is not None
    name = log.data_name("u1", commit)
    store.fs.pipe_file(store.path(name), b"PAR1 no more")
    with pytest.raises(StoreError, match=commit.attempt):
        store.read_parquet(name)


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


def test_counts_add_up() -> None:
    counts = Counts()
    for outcome, reason in (
        ("kept", None),
        ("rejected", "length"),
        ("failed", "truncated"),
        (None, None),
    ):
        counts.add(outcome, reason)
    counts += counts
    assert counts == Counts(8, 2, {"length": 2}, {"truncated": 2}, 2)
    assert counts.total == counts.kept + 2 + 2 + counts.pending
