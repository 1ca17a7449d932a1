"""Creates on file systems that lack something, and on disks that are full or read-only."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from racing import race

from manifests import durable
from manifests.faults import halts, unusable
from manifests.log import Counts, Log
from manifests.shards import INDEX, LatentSpec, write_index
from manifests.store import Store, StoreError, StoreUnusable

TABLE = pa.table({"clip_id": ["a", "b"], "blob": pa.array([os.urandom(1 << 20)] * 2)})


def no_links(*_: Any) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_without_hard_links_one_creator_still_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    store = Store(str(tmp_path))
    race(store)
    assert store.create("commit", store.read("commit")), "a retry meets its own object"
    assert [p.name for p in tmp_path.iterdir()] == ["commit"]


def test_without_any_exclusive_name_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(StoreError, match="without hard links or an exclusive rename"):
        Store(str(tmp_path)).create("commit", b"1")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_commits_nothing_and_says_so(small_disk: Path) -> None:
    store = Store(str(small_disk / "work"))
    log = Log(store, "encode", "f00")
    assert log.append("u1", 0, "s", Counts(), TABLE.slice(0, 1).select(["clip_id"])) is not None
    with pytest.raises(StoreUnusable) as caught:
        log.append("u1", 1, "s", Counts(), TABLE)
    said = str(caught.value)
    assert said.startswith(f"can't write {small_disk}/work/encode/f00/u1/")
    assert "the disk is full" in said and "free)" in said and "vidpipe gc" in said
    assert len(log.commits("u1")) == 1
    assert len(list((small_disk / "work").rglob("*.*"))) == 2, "a part was left"


def fill(folder: Path) -> None:
    """To the last byte."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def test_a_full_disk_stops_creates_puts_and_the_index(small_disk: Path) -> None:
    store = Store(str(small_disk))
    store.put("state", b"old")
    fill(small_disk)
    before = store.find("")
    rows = INDEX.empty_table()
    spec = LatentSpec("v", "AutoencoderKL", "", "f", False, 1, 1, 8, [0.0], [1.0])
    for attempt in (
        lambda: store.create("a/commit", b"x" * 9000),
        lambda: store.put("state", b"x" * 9000),
        lambda: write_index(f"{store.url}/index/t.parquet", store.url, [rows], spec, {}),
    ):
        with pytest.raises(StoreUnusable, match="the disk is full"):
            attempt()
        assert store.find("") == before
    assert store.read("state") == b"old", "what was there stays whole"


def test_a_read_only_disk_says_so(small_disk: Path, remount: Any) -> None:
    store = Store(str(small_disk))
    store.create("commit", b"1")
    remount("ro")
    for attempt in (
        lambda: store.create("other", b"1"),
        lambda: store.put("other", b"1"),
        lambda: store.delete("commit"),
        lambda: store.write_parquet("x.parquet", TABLE),
    ):
        with pytest.raises(StoreUnusable, match="its file system is read-only"):
            attempt()
    assert store.read("commit") == b"1"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EDQUOT, "the quota is used up"),
        (errno.EACCES, "permission denied"),
        (errno.ESTALE, "Stale file handle"),
    ],
)
def test_other_faults_of_a_disk_are_sentences_too(tmp_path: Path, number: int, told: str) -> None:
    said = str(unusable(OSError(number, os.strerror(number)), "write", str(tmp_path / "x/y")))
    assert told in said and str(tmp_path) in said and "`vidpipe run` goes on" in said


def test_only_a_disk_that_can_t_be_written_ends_a_run() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/media/part")
    assert "/media/part" in str(halts(full, "/work"))
    assert "/work" in str(halts(OSError(errno.EROFS, "Read-only"), "/work"))
    assert halts(FileNotFoundError(errno.ENOENT, "none"), "/work") is None
