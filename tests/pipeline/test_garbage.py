"""What gc finds and removes, and what it must leave alone."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from s3_faults import BUCKET, Proxy
from toys import Length, Limit, Shout, pipeline

from manifests import log as logs
from manifests.schema import digest
from pipeline import config, dag, query
from pipeline.dag import Pipeline
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from pipeline.upkeep import garbage
from pipeline.upkeep.garbage import collect

CAPTIONS = ["a red cat", "", "bad", "one two three four five", "dog", None]
HOUR = 3600.0


def ran(folder: Path, **settings: Any) -> Pipeline:
    made = pipeline(folder, CAPTIONS, settings=settings)
    assert not run(made, (), Retry(), Reporter()).faults
    return made


def plant(made: Pipeline, name: str, data: bytes = b"x" * 10, age: float = 30 * HOUR) -> Path:
    path = Path(made.store.path(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (time.time() - age,) * 2)
    return path


def age_all(made: Pipeline, hours: float = 30) -> None:
    for path in Path(made.store.root).rglob("*"):
        os.utime(path, (time.time() - hours * HOUR,) * 2)


def kinds(found: list[garbage.Found]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for group in found:
        counts[group.kind] = counts.get(group.kind, 0) + group.files
    return counts


def test_a_sound_workdir_has_no_garbage(tmp_path: Path) -> None:
    made = ran(tmp_path)
    age_all(made)
    assert collect(made, HOUR) == []


def test_each_kind_is_found_and_removed_and_nothing_else(tmp_path: Path) -> None:
    made = ran(tmp_path)
    unit = f"{made.dag.log(made.store, 'length').prefix}/000000-0123456789ab"
    hexes = uuid.uuid4().hex
    bad = [
        plant(made, f"{unit}/0123456789ab.parquet"),
        plant(made, f"{unit}/.000000.json.{hexes}.part"),
        plant(made, f"{unit}/000003.json.damaged"),
        plant(made, f"index/train.parquet.{hexes}.part"),
        plant(made, f"source/scans/.000001.json.{hexes}.part"),
        plant(made, f".probe/{hexes}"),
        plant(made, f"media/ab/{'ab' * 32}.mp4"),
        plant(made, f"media/.part/{'cd' * 32}.tag"),
        plant(made, f"media/.uri/ab/{'ef' * 32}.json", json.dumps({"content": "ab" * 32}).encode()),
    ]
    good = [
        plant(made, f"{unit}/notes.txt"),
        plant(made, f"{unit}/mine.parquet"),
        plant(made, "train/step-10/model.safetensors"),
        plant(made, f"train/{'a' * 16}/000000-0123456789ab/000000.json"),
        plant(made, "media/readme.txt"),
        plant(made, f"other/{'a' * 16}/notes.txt"),
        plant(made, "media/ab/holiday.mp4"),
    ]
    age_all(made)
    before = made.store.find("")
    dry = collect(made, HOUR)
    assert kinds(dry) == {
        garbage.DATA: 1, garbage.PARTS: 5, garbage.ASIDE: 1, garbage.MEDIA: 2
    }  # fmt: skip
    assert sum(group.bytes for group in dry) == sum(path.stat().st_size for path in bad)
    assert made.store.find("") == before, "a dry run removes nothing"
    collect(made, HOUR, delete=True)
    assert not any(path.exists() for path in bad)
    assert all(path.exists() for path in good)
    assert set(before) - set(made.store.find("")) == {
        str(path.relative_to(made.store.root)) for path in bad
    }
    assert collect(made, HOUR) == []
    assert not run(made, (), Retry(), Reporter()).ran


def test_nothing_young_is_touched(tmp_path: Path) -> None:
    made = ran(tmp_path)
    unit = made.dag.log(made.store, "length").prefix + "/000000-0123456789ab"
    young = plant(made, f"{unit}/0123456789ab.parquet", age=HOUR)
    assert collect(made, 2 * HOUR, delete=True) == []
    assert young.exists()
    assert kinds(collect(made, HOUR / 2, delete=True)) == {garbage.DATA: 1}
    assert not young.exists()


def test_results_of_other_settings_go_only_when_asked_for(tmp_path: Path) -> None:
    old = ran(tmp_path)
    kept = query.select(old, None)
    made = ran(tmp_path, shout={"mark": "?"})
    age_all(made)
    (group,) = collect(made, HOUR, delete=True)
    assert (group.kind, group.log) == (garbage.UNUSED, old.dag.log(old.store, "shout").prefix)
    assert not group.removed and query.select(old, None).equals(kept)
    (group,) = collect(made, HOUR, delete=True, fingerprints=True)
    assert group.removed
    assert not Path(old.store.path(group.log or "")).exists()
    assert not run(made, (), Retry(), Reporter()).ran, "what is in use is all there"
    assert run(old, (), Retry(), Reporter()).status["shout"].kept == 2, "made again"


def test_settings_that_another_run_uses_now_are_left(tmp_path: Path) -> None:
    old = ran(tmp_path)
    made = ran(tmp_path, shout={"mark": "?"})
    age_all(made)
    at_work = next(Path(old.store.path(old.dag.log(old.store, "shout").prefix)).rglob("*.json"))
    os.utime(at_work)
    assert collect(made, HOUR, delete=True, fingerprints=True) == []


@pytest.mark.parametrize("stop", range(12))
def test_killed_midway_it_leaves_a_state_that_was(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of settings not in use, several commits a unit and a snapshot; then they are used again."""
    monkeypatch.setattr(logs, "_LOOSE_COMMITS", 2)
    monkeypatch.setattr("pipeline.commits.COMMIT_BYTES", 1)
    batches = {"length": {"batch_size": 1}}
    old = ran(tmp_path, **batches)
    expected = query.select(old, None)
    old.dag.log(old.store, "length").compact()
    made = ran(tmp_path, length={"factor": 2})
    age_all(made)
    deleted = 0

    class Killed(BaseException):
        pass

    def delete_many(names: list[str]) -> None:
        nonlocal deleted
        for name in names:
            if deleted == stop:
                raise Killed
            made.store.delete(name)
            deleted += 1

    monkeypatch.setattr(made.store, "delete_many", delete_many)
    try:
        collect(made, HOUR, delete=True, fingerprints=True)
    except Killed:
        pass
    old = pipeline(tmp_path, CAPTIONS, settings=batches)
    assert not run(old, (), Retry(), Reporter()).faults
    assert query.select(old, None).equals(expected)


def test_what_a_snapshot_holds_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ran(tmp_path)
    log = made.dag.log(made.store, "length")
    expected = query.select(made, None)
    monkeypatch.setattr(logs, "_LOOSE_COMMITS", 0)
    assert log.compact() == 2 and log.compact() == 2
    loose = [n for n in made.store.find(log.prefix) if n.endswith(".json")]
    age_all(made)
    first, last = (Path(made.store.path(name)) for name in log.snapshots())
    for path in (first, last):
        os.utime(path)
    assert collect(made, HOUR) == [], "who listed before them may still read the commits"
    age_all(made)
    found = collect(made, HOUR, delete=True)
    assert kinds(found) == {garbage.COMMITS: len(loose), garbage.OLD_SNAPSHOTS: 1}
    assert not [n for n in made.store.find(log.prefix) if n.endswith(".json")]
    assert last.exists() and not first.exists()
    assert query.select(made, None).equals(expected)
    assert not run(made, (), Retry(), Reporter()).ran
    assert log.next_snapshot().endswith("000002.jsonl")


def test_downloads_that_clips_refer_to_stay(tmp_path: Path) -> None:
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    site = tmp_path / "site"
    site.mkdir()
    (site / "a.mp4").write_bytes(b"one video")
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        table = tmp_path / "clips.csv"
        table.write_text(f"url\nhttp://127.0.0.1:{server.server_port}/a.mp4\n")
        file = tmp_path / "vidpipe.yaml"
        file.write_text(f"workdir: ./work\nsource: {{kind: csv, path: {table}}}\n")
        made = dag.build(config.load(str(file), ("run.runner=local",)))
        assert run(made, ("download",), Retry(), Reporter()).status["download"].kept == 1
        server.shutdown()
    orphan = plant(made, f"media/ab/{'ab' * 32}.mp4")
    age_all(made)
    assert kinds(collect(made, HOUR, delete=True)) == {garbage.MEDIA: 1}
    assert not orphan.exists()
    assert len([n for n in made.store.find("media") if n.endswith(".mp4")]) == 1


def test_it_works_on_s3(tmp_path: Path, s3: Proxy) -> None:
    from dataclasses import replace

    of = pipeline(tmp_path, CAPTIONS, (Length, Limit, Shout))
    made = dag.build(replace(of.config, workdir=f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"))
    run(made, (), Retry(), Reporter())
    log = made.dag.log(made.store, "length")
    orphan = f"{log.prefix}/000000-0123456789ab/0123456789ab.parquet"
    other = f"length/{digest('other')}/000000-0123456789ab/000000.json"
    before = made.store.find("")
    for name in (orphan, other, "train/weights"):
        made.store.put(name, b"x")
    assert collect(made, HOUR, delete=True, fingerprints=True) == []
    # moto tells of every upload that it was begun in 2010.
    upload = made.store.fs.call_s3(
        "create_multipart_upload", Bucket=BUCKET, Key=f"{made.store.root.partition('/')[2]}/x"
    )
    assert upload["UploadId"]
    time.sleep(1.1)  # S3 tells times in whole seconds
    found = kinds(collect(made, 0.0, delete=True, fingerprints=True))
    assert found == {garbage.DATA: 1, garbage.UNUSED: 1, garbage.UPLOADS: 1}
    assert made.store.find("") == sorted([*before, "train/weights"])
    assert not made.store.fs.list_multipart_uploads(BUCKET)
