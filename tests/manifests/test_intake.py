"""Taking in a table: each row in exactly one unit, whatever the table becomes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import intake, reconcile
from manifests.intake import scan, source_layer
from manifests.joins import array
from manifests.scans import SCANS, pool_units
from manifests.sources import SourceSettings, extras_schema, read, read_tables
from manifests.store import Store
from manifests.view import SOURCE_LAYER, Dag, UnitView


def taken_in(store: Store, settings: SourceSettings) -> dict[str, dict[str, Any]]:
    """Every row of the pool that is in the source, by clip id."""
    dag = Dag({SOURCE_LAYER: source_layer(extras_schema(settings))})
    found: dict[str, dict[str, Any]] = {}
    for unit in sorted(pool_units(store)):
        view = UnitView(store, dag, unit)
        settled = view.settled(SOURCE_LAYER)
        counts = view.counts(SOURCE_LAYER)
        assert counts.total == len(view.table)
        for row, outcome, message in zip(
            view.table.to_pylist(), settled.outcome.to_pylist(), settled.message.to_pylist()
        ):
            assert row["clip_id"] not in found, "a clip stands in two units"
            found[row["clip_id"]] = {**row, "outcome": outcome, "message": message}
    return found


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of five rows, so that small tables have many."""
    monkeypatch.setattr(intake, "_ROWS", 5)
    monkeypatch.setattr(reconcile, "_PART", 5)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_the_pool_is_what_the_table_says_whatever_happened_before(
    tmp_path: Path, in_parts: None, kind: str, seed: int
) -> None:
    random_ = random.Random(seed)
    store = Store(str(tmp_path / "work"))
    settings = SourceSettings(kind=kind, path=str(tmp_path / f"clips.{kind}"))
    rows: list[dict[str, Any]] = []
    ids: dict[str, str] = {}
    for step in range(6):
        rows = [r for r in rows if random_.random() > 0.1]
        for row in rows:
            if random_.random() < 0.1:
                row["text"] = f"changed in {step}"
        rows += [{"path": f"{step}-{i}.mp4", "text": f"clip {i}"} for i in range(9)]
        rows += [dict(random_.choice(rows)) for _ in range(random_.randint(0, 2))]
        rows.append({"path": "", "text": f"nothing {step}"})
        if step == 4:
            random_.shuffle(rows)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), settings.path)
        else:
            Path(settings.path).write_text("".join(json.dumps(r) + "\n" for r in rows))
        done = scan(store, settings, 4)
        assert done.rows == len(rows)
        found = taken_in(store, settings)
        assert len(found) == len(rows)
        kept = {f["uri"]: f for f in found.values() if f["outcome"] == "kept"}
        first = {r["path"]: r["text"] for r in reversed(rows) if r["path"]}
        assert {uri: f["caption"] for uri, f in kept.items()} == first
        assert all(ids.setdefault(uri, f["clip_id"]) == f["clip_id"] for uri, f in kept.items())
        repeats = [f for f in found.values() if "repeats the clip of" in (f["message"] or "")]
        named = [r["path"] for r in rows if r["path"]]
        assert sorted(f["uri"] for f in repeats) == sorted(set_apart(named))
        assert scan(store, settings, 4).new == 0
        store.delete(store.find(SCANS)[-1])  # a scan that broke off before its record
        again = scan(store, settings, 4)
        assert again.rows == len(rows)
        assert taken_in(store, settings).keys() == found.keys()


def set_apart(values: list[str]) -> list[str]:
    """Every occurrence but the first of each."""
    seen: set[str] = set()
    return [v for v in values if v in seen or seen.add(v)]  # type: ignore[func-returns-value]


def test_units_hold_rows_in_the_order_of_the_table(tmp_path: Path, in_parts: None) -> None:
    path = tmp_path / "clips.parquet"
    pq.write_table(pa.table({"path": [f"{i}.mp4" for i in range(23)]}), path)
    store = Store(str(tmp_path / "work"))
    told: list[int] = []
    done = scan(store, SourceSettings(kind="parquet", path=str(path)), 10, told.append)
    assert told == [5, 10, 15, 20, 23]
    dag = Dag({SOURCE_LAYER: source_layer()})
    uris = [UnitView(store, dag, unit).table.column("uri").to_pylist() for unit in done.units]
    assert [len(u) for u in uris] == [10, 10, 3]
    assert [uri for unit in uris for uri in unit] == [f"{i}.mp4" for i in range(23)]


@pytest.mark.parametrize(
    "columns",
    [
        {"path": ["a", " ", None], "text": ["x", None, ""], "n": [1, None, 3]},
        {"path": ["a", "b", "c"], "start": [0.5, float("nan"), None], "end": [2, 3, None]},
        {"path": ["a", "b", "c"], "start": ["0.5", "", "00:01"], "ok": [True, None, False]},
        {"path": ["a", "b", "c"], "text": [["x", "y"], None, []]},
        {"path": ["a", "b", "c"], "score": [1.5, float("nan"), None], "s": ["x", None, ""]},
    ],
)
def test_whole_columns_are_read_as_their_rows_are(
    tmp_path: Path, columns: dict[str, list[Any]]
) -> None:
    path = tmp_path / "clips.parquet"
    pq.write_table(pa.table(columns), path)
    settings = SourceSettings(kind="parquet", path=str(path))
    (table,) = read_tables(settings)
    for name in ("uri", "caption", "start", "end", "origin"):
        values = [getattr(row, name) for row in read(settings)]
        assert array(table, name).to_pylist() == values, name
    for field in extras_schema(settings):
        rows = [row.extras[field.name] for row in read(settings)]
        assert str(array(table, field.name).to_pylist()) == str(rows), field.name
        assert table.schema.field(field.name).type == field.type


@pytest.mark.parametrize("dies_at", ["the record", "the second change"])
def test_a_scan_that_breaks_off_amid_changes_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    """Another table is read, the process dies, and the table is the old one again: the same
    signature as the last record's, over rows that are marked as gone."""
    store = Store(str(tmp_path / "work"))
    right, wrong = tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"
    right.write_text("".join(f'{{"path": "{i}.mp4"}}\n' for i in range(8)))
    wrong.write_text('{"path": "other.mp4"}\n')
    good = SourceSettings(kind="jsonl", path=str(right))
    scan(store, good, 4)
    create, commit = Store.create, intake._commit
    changes: list[str] = []

    def no_record(self: Store, name: str, data: bytes) -> bool:
        if name.startswith(SCANS) and name.endswith(".json"):
            raise KeyboardInterrupt
        return create(self, name, data)

    def second(log: Any, unit: str, rows: pa.Table) -> None:
        changes.append(unit)
        if len(changes) == 3:  # the new unit, one of the old ones
            raise KeyboardInterrupt
        commit(log, unit, rows)

    with monkeypatch.context() as patch:
        if dies_at == "the record":
            patch.setattr(Store, "create", no_record)
        else:
            patch.setattr(intake, "_commit", second)
        with pytest.raises(KeyboardInterrupt):
            scan(store, SourceSettings(kind="jsonl", path=str(wrong)), 4)
    assert len(taken_in(store, good)) < 8
    scan(store, good, 4)
    assert len(taken_in(store, good)) == 8
    assert not intake._begun(store), "the mark is gone"
    assert scan(store, good, 4).changed == 0


def test_a_column_of_nulls_may_get_a_type(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "work"))
    path = tmp_path / "clips.jsonl"
    settings = SourceSettings(kind="jsonl", path=str(path))
    for scores in (["1", "2", "null", "null"], ['"a"', '"b"', "null", "null"], ["1.5", "null"]):
        rows = [f'{{"path": "{i}.mp4", "score": {score}}}\n' for i, score in enumerate(scores)]
        path.write_text("".join(rows))
        scan(store, settings, 4)
        found = taken_in(store, settings)
        wanted = {f"{i}.mp4": json.loads(score) for i, score in enumerate(scores)}
        assert {f["uri"]: f["source_score"] for f in found.values()} == wanted
