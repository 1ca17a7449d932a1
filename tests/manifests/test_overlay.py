"""A workdir with something over it: both are seen, what is below is never written."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from manifests.overlay import Overlay
from manifests.store import Store


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Overlay, Store]:
    below = Store(str(tmp_path / "below"))
    below.create("a/first", b"below")
    below.write_parquet("a/rows.parquet", pa.table({"x": [1, 2]}))
    return Overlay(str(tmp_path / "over"), below), below


def test_both_are_seen(stores: tuple[Overlay, Store]) -> None:
    over, below = stores
    assert over.create("a/second", b"over") and over.create("b/third", b"over")
    assert over.find("a") == ["a/first", "a/rows.parquet", "a/second"]
    assert list(over.listing("")) == ["a/first", "a/rows.parquet", "a/second", "b/third"]
    assert (over.read("a/first"), over.read("a/second")) == (b"below", b"over")
    with over.opened("a/first") as one, over.opened("b/third") as other:
        assert (one.read(), other.read()) == (b"below", b"over")
    assert over.exists("a/first") and over.exists("b/third") and not over.exists("b/first")
    assert over.read_parquet("a/rows.parquet").column("x").to_pylist() == [1, 2]
    assert below.find("") == ["a/first", "a/rows.parquet"]


def test_what_is_there_is_not_created_again(stores: tuple[Overlay, Store]) -> None:
    over, _ = stores
    assert not over.create("a/first", b"other")
    assert over.create("a/first", b"below")  # the same attempt
    assert over.read("a/first") == b"below"
    with pytest.raises(FileNotFoundError):
        over.read("a/none")


def test_what_is_written_over_it_counts(stores: tuple[Overlay, Store]) -> None:
    over, below = stores
    over.write_parquet("a/rows.parquet", pa.table({"x": [3]}))
    assert over.read_parquet("a/rows.parquet").column("x").to_pylist() == [3]
    over.delete("a/first")
    assert over.read("a/first") == b"below"
    assert below.read_parquet("a/rows.parquet").column("x").to_pylist() == [1, 2]


def test_it_travels_to_a_worker(stores: tuple[Overlay, Store]) -> None:
    over, _ = stores
    over.create("b/third", b"over")
    again = pickle.loads(pickle.dumps(over))
    assert again.find("") == over.find("") and again.read("a/first") == b"below"
