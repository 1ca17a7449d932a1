"""Damage of every kind: found, named, and mended by making anew what hung on it, no more."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3_faults import BUCKET, Proxy
from toys import pipeline

from manifests import log as logs
from manifests.log import Counts, standing
from manifests.store import StoreError
from pipeline import dag, query
from pipeline import plan as planning
from pipeline.dag import Pipeline
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from pipeline.upkeep.repair import repair
from pipeline.upkeep.verify import Damage, verify

CAPTIONS = ["a red cat", "", "bad", "one two three four five", "dog", None]


class Heard(Reporter):
    def __init__(self) -> None:
        self.settled: dict[str, int] = {}

    def rows(self, stage: str, counts: Counts) -> None:
        self.settled[stage] = self.settled.get(stage, 0) + counts.total


def ran(made: Pipeline) -> dict[str, int]:
    """Runs to the end; says how many rows each stage settled."""
    heard = Heard()
    assert not run(made, (), Retry(), heard).faults
    return heard.settled


def first(made: Pipeline, stage: str, ending: str) -> str:
    log = made.dag.log(made.store, stage)
    return next(n for n in made.store.find(log.prefix) if n.endswith(ending))


def flip(made: Pipeline, name: str) -> None:
    """One bit in the middle, the length as it was."""
    data = bytearray(made.store.read(name))
    data[len(data) // 2] ^= 1
    made.store.put(name, bytes(data))


def cut(made: Pipeline, name: str) -> None:
    made.store.put(name, made.store.read(name)[:-7])


def remove(made: Pipeline, name: str) -> None:
    made.store.delete(name)


def table_of(made: Pipeline) -> list[dict[str, Any]]:
    return sorted(query.select(made, None).to_pylist(), key=lambda row: row["uri"])


def test_a_sound_workdir_is_sound(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    assert list(verify(made)) == [], "nothing has run"
    ran(made)
    assert list(verify(made)) == []
    assert list(verify(made, quick=True)) == []


@pytest.mark.parametrize(
    ("harm", "finding", "quick"),
    [
        (flip, "its sha256 is another than was committed", False),
        (cut, "bytes, ", True),
        (remove, "missing", True),
    ],
)
@pytest.mark.parametrize("stage", ["length", "shout"])
def test_damaged_data_is_found_and_made_anew_alone(
    tmp_path: Path, harm: Callable[..., None], finding: str, quick: bool, stage: str
) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    ran(made)
    expected = table_of(made)
    name = first(made, stage, ".parquet")
    harm(made, name)
    (damage,) = verify(made)
    assert (damage.kind, damage.stage, damage.file) == ("data", stage, name)
    assert finding in damage.finding
    assert len(list(verify(made, quick=True))) == quick
    assert list(verify(made, ["limit"])) == [], "of other stages only"
    rest = {n: made.store.read(n) for n in made.store.find("") if n != name}
    made = pipeline(tmp_path, CAPTIONS)
    repair(made, [damage])
    assert all(made.store.read(n) == data for n, data in rest.items()), "what is sound stays"
    assert list(verify(made)) == []
    lost = planning.status(made)[stage].pending
    assert lost > 0
    assert ran(made) == {stage: lost}
    assert table_of(made) == expected
    assert ran(made) == {}


def test_a_damaged_commit_is_put_aside_and_its_rows_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of several: numbers must keep no gap, and later counts must not stand."""
    monkeypatch.setattr("pipeline.commits.COMMIT_BYTES", 1)
    made = pipeline(tmp_path, CAPTIONS, settings={"length": {"batch_size": 1}})
    ran(made)
    expected = table_of(made)
    name = first(made, "length", "000000.json")
    made.store.put(name, b'{"seq": 0, "att')
    with pytest.raises(StoreError, match="vidpipe verify --repair"):
        planning.status(made)
    (damage,) = verify(made)
    assert (damage.kind, damage.file) == ("commit", name)
    repair(made, [damage])
    assert list(verify(made)) == []
    assert planning.status(made)["length"].pending == 1
    assert ran(made) == {"length": 1}
    assert table_of(made) == expected
    assert [n for n in made.store.find("length") if n.endswith(".damaged")]


def test_a_commit_that_is_gone_is_noticed_by_the_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.commits.COMMIT_BYTES", 1)
    made = pipeline(tmp_path, CAPTIONS, settings={"length": {"batch_size": 1}})
    ran(made)
    expected = table_of(made)
    name = first(made, "length", "000001.json")
    made.store.delete(name)
    (damage,) = verify(made)
    assert (damage.kind, damage.file, damage.finding) == ("commit", name, "missing")
    repair(made, [damage])
    assert ran(made) == {"length": 1}
    assert table_of(made) == expected and list(verify(made)) == []


@pytest.mark.parametrize("collected", [False, True], ids=["commits-there", "commits-collected"])
@pytest.mark.parametrize("stage", ["length", "source"])
def test_a_damaged_snapshot_is_salvaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, collected: bool
) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    ran(made)
    expected = table_of(made)
    monkeypatch.setattr(logs, "_LOOSE_COMMITS", 0)
    log = made.dag.log(made.store, stage)
    log.compact()
    (name,) = log.snapshots()
    if collected:
        for loose in made.store.find(log.prefix):
            if loose.endswith(".json"):
                made.store.delete(loose)
    lines = made.store.read(name).splitlines()
    assert len(lines) == 2
    made.store.put(name, lines[0][: len(lines[0]) // 2] + b"\n" + lines[1])
    made = pipeline(tmp_path, CAPTIONS)
    damages = list(verify(made))
    found = [(d.kind, d.file, d.finding) for d in damages]
    assert found[0] == ("snapshot", name, "1 of 2 units can't be read")
    if collected and stage == "source":  # what the source has lost, no other stage would miss
        assert found.pop()[2] == "missing, with all of its unit"
    assert len(found) == 1
    repair(made, damages)
    made = pipeline(tmp_path, CAPTIONS)
    assert list(verify(made)) == []
    settled = ran(made)
    if not collected:
        assert settled == {}
    elif stage == "length":
        assert settled == {"length": 4}
    assert table_of(made) == expected
    assert ran(made) == {} and list(verify(made)) == []


@pytest.mark.parametrize("harm", [flip, cut, remove])
def test_damaged_source_data_is_read_anew(tmp_path: Path, harm: Callable[..., None]) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    ran(made)
    expected = table_of(made)
    harm(made, first(made, "source", ".parquet"))
    made = pipeline(tmp_path, CAPTIONS)
    (damage,) = verify(made)
    assert (damage.kind, damage.stage) == ("data", "source")
    repair(made, [damage])
    assert planning.status(made)["source"].total == 2
    ran(made)
    status = planning.status(made)
    assert status["source"].total == 6 and status["shout"].pending == 0
    assert table_of(made) == expected and list(verify(made)) == []


def test_a_damaged_commit_of_the_source_too(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    ran(made)
    expected = table_of(made)
    made.store.put(first(made, "source", ".json"), b"\xff\xfe")
    repair(made, list(verify(made)))
    ran(made)
    assert table_of(made) == expected and list(verify(made)) == []


def test_a_damaged_record_of_a_scan_costs_nothing_where_it_was_the_last(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    ran(made)
    expected = table_of(made)
    made.store.put("source/scans/000000.json", b"[]")
    with pytest.raises(StoreError, match="vidpipe verify --repair"):
        planning.status(made)
    damages = list(verify(made))
    assert [(d.kind, d.file) for d in damages] == [("scan", "source/scans/000000.json")]
    repair(made, damages)
    assert ran(made) == {}
    assert table_of(made) == expected and list(verify(made)) == []


def test_a_damaged_download_is_fetched_again_and_nothing_else(tmp_path: Path) -> None:
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    from pipeline import config

    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    site = tmp_path / "site"
    site.mkdir()
    for name in "abc":
        (site / f"{name}.mp4").write_bytes(name.encode() * 1000)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rows = "".join(f"http://127.0.0.1:{server.server_port}/{n}.mp4\n" for n in "abc")
        (tmp_path / "clips.csv").write_text("url\n" + rows)
        file = tmp_path / "vidpipe.yaml"
        file.write_text("workdir: ./work\nsource: {kind: csv, path: clips.csv}\n")
        made = dag.build(config.load(str(file), ("run.runner=local",)))
        assert run(made, ("download",), Retry(), Reporter()).status["download"].kept == 3
        asked.clear()
        name = next(n for n in made.store.find("media") if n.endswith(".mp4"))
        flip(made, name)
        assert list(verify(made, ["download"], quick=True)) == []
        damages = list(verify(made, ["download"]))
        assert [(d.kind, d.file) for d in damages] == [("download", name)]
        repair(made, damages)
        assert run(made, ("download",), Retry(), Reporter()).status["download"].kept == 3
        assert len(asked) == 1, "the other two were there"
        assert list(verify(made, ["download"])) == []
        server.shutdown()


def test_a_run_that_goes_on_is_not_taken_for_damage(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS, settings={"length": {"batch_size": 1}})
    found: list[Damage] = []

    class Looking(Reporter):
        def rows(self, stage: str, counts: Counts) -> None:
            found.extend(verify(made))

    run(made, (), Retry(), Looking())
    assert found == []


def test_it_works_on_s3(tmp_path: Path, s3: Proxy) -> None:
    of = pipeline(tmp_path, CAPTIONS).config
    made = dag.build(replace(of, workdir=f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"))
    ran(made)
    expected = table_of(made)
    flip(made, first(made, "shout", ".parquet"))
    made.store.put(first(made, "length", ".json"), b"{")
    made = dag.build(made.config)
    damages = list(verify(made))
    assert [(d.kind, d.stage) for d in damages] == [("commit", "length"), ("data", "shout")]
    repair(made, damages)
    assert ran(made) == {"length": 4, "shout": 1}
    assert table_of(made) == expected and list(verify(made)) == []


def test_void_attempts_do_not_count(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    ran(made)
    name = first(made, "length", ".parquet")
    flip(made, name)
    repair(made, list(verify(made)))
    log = made.dag.log(made.store, "length")
    unit = name.rsplit("/", 2)[1]
    commits = log.commits(unit)
    assert commits[-1].voids == [commits[0].attempt] and standing(commits) == []
    assert json.loads(made.store.read(f"{log.prefix}/{unit}/000001.json"))["data"] is None
