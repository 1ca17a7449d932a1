"""The commit log: created once, named by what was read, nothing left by the one who lost."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pytest

from manifests import log as logs
from manifests.log import Commit, Counts, History, Log, line_of, standing
from manifests.store import Store, StoreError

TABLE = pa.table({"clip_id": ["a", "b"], "n": [1, 2], "blob": pa.array([b"x" * 9, b"y"])})


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
    (history,) = log.units().values()
    assert (history.old, history.loose) == (None, ["probe/f00/u1/000000.json"])
    assert history.files == [commit.data]
    assert log.commits("u1", history) == [commit]


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


def test_amounts_are_kept_and_older_commits_have_none(store: Store) -> None:
    log = Log(store, "recaption", "f00")
    spent = {"tokens": 12, "prompt_tokens": 90}
    commit = log.append("u1", 0, "s", Counts(), TABLE, {"process": 1.0}, amounts=spent)
    assert commit is not None and commit.amounts == spent
    assert log.commits("u1") == [commit]
    (again,) = json.loads(line_of("u1", [commit]))["commits"]
    assert Commit.from_values(again) == commit
    plain = log.append("u2", 0, "s", Counts(), None)
    assert plain is not None and b"amounts" not in plain.to_json()
    assert Commit.from_json(plain.to_json()).amounts == {}


def test_a_damaged_commit_is_named(store: Store) -> None:
    log = Log(store, "probe", "f00")
    log.append("u1", 0, "s", Counts(), None)
    store.fs.pipe_file(store.path("probe/f00/u1/000000.json"), b"{")
    with pytest.raises(StoreError, match=r"000000\.json is damaged"):
        log.commits("u1")


def test_void_data_stands_no_more(store: Store) -> None:
    log = Log(store, "probe", "f00")
    first = log.append("u1", 0, "s", Counts(), TABLE)
    second = log.append("u1", 1, "s", Counts(), TABLE)
    assert first and second
    third = log.append("u1", 2, "", Counts(), None, voids=[first.attempt])
    assert log.commits("u1") == [first, second, third]
    assert standing(log.commits("u1")) == [second]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are worth their while from two commits on."""
    monkeypatch.setattr(logs, "_LOOSE_COMMITS", 2)


def test_snapshots_hold_what_the_commits_say(store: Store, eager: None) -> None:
    log = Log(store, "probe", "f00")
    log.append("u1", 0, "s", Counts(1, 1), TABLE)
    assert log.compact() == 0, "one commit is not worth it"
    for n in range(3):
        log.append(f"u{n}", int(n == 1), "s", Counts(1, 1), TABLE)
    known = {unit: log.commits(unit) for unit in log.units()}
    assert log.compact() == 4
    assert log.compact() == 0, "nothing new"
    assert {unit: log.commits(unit) for unit in log.units()} == known
    for name in store.find("probe/f00"):
        if name.endswith(".json"):
            store.delete(name)
    assert {unit: log.commits(unit) for unit in log.units()} == known
    assert {unit: log.commits(unit, h) for unit, h in log.units().items()} == known
    added = log.append("u1", 2, "s", Counts(1, 1), TABLE)
    assert log.commits("u1") == [*known["u1"], added]
    assert log.units()["u1"].loose == ["probe/f00/u1/000002.json"]


def test_a_latecomer_changes_nothing_that_a_snapshot_holds(store: Store, eager: None) -> None:
    """A worker that saw the unit before the snapshot, and whose number was collected since."""
    log = Log(store, "probe", "f00")
    commits = [log.append("u1", n, "s", Counts(1, 1), TABLE) for n in range(2)]
    log.compact()
    store.delete("probe/f00/u1/000001.json")
    late = log.append("u1", 1, "s", Counts(1, 1), TABLE)
    assert late is not None, "it believes that it won"
    assert log.commits("u1") == commits
    assert log.append("u1", 2, "s", Counts(1, 1), TABLE) is not None


def test_of_two_who_compact_at_once_the_one_who_knows_less_leaves_no_snapshot(
    store: Store, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(store, "probe", "f00")
    for n in range(2):
        log.append("u1", n, "s", Counts(1, 1), TABLE)
    slow = Log(Store(store.url), "probe", "f00")
    units = slow.units

    def overtaken() -> dict[str, History]:
        listed = units()
        monkeypatch.undo()
        log.append("u1", 2, "s", Counts(1, 1), TABLE)
        monkeypatch.setattr(logs, "_LOOSE_COMMITS", 2)
        assert log.compact() == 3
        return listed

    monkeypatch.setattr(slow, "units", overtaken)
    slow.compact()
    assert len(log.snapshots()) == 1
    for name in store.find("probe/f00/u1"):
        if name.endswith(".json"):
            store.delete(name)
    assert [c.seq for c in Log(Store(store.url), "probe", "f00").commits("u1")] == [0, 1, 2]


def test_a_gap_is_named(store: Store) -> None:
    log = Log(store, "probe", "f00")
    for n in range(3):
        log.append("u1", n, "s", Counts(1, 1), TABLE)
    history = log.units()["u1"]
    missed = History(None, history.loose[:1] + history.loose[2:], history.files)
    assert [c.seq for c in log.commits("u1", missed)] == [0, 1, 2], "listed once more"
    store.delete("probe/f00/u1/000001.json")
    with pytest.raises(StoreError, match=r"has no commit 000001: .*verify --repair"):
        log.commits("u1")


def test_a_damaged_snapshot_is_named(store: Store, eager: None) -> None:
    log = Log(store, "probe", "f00")
    for n in range(2):
        log.append("u1", n, "s", Counts(1, 1), TABLE)
    log.compact()
    (name,) = log.snapshots()
    whole = store.read(name)
    assert json.loads(whole)["unit"] == "u1"
    store.fs.pipe_file(store.path(name), whole.replace(b'"commits"', b'"comets"'))
    with pytest.raises(StoreError, match=r"000000\.jsonl is damaged"):
        Log(Store(store.url), "probe", "f00").commits("u1")


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
