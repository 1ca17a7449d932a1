"""Files that are replaced or vanish while they are at work: no wrong result, and a way back."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from manifests.scans import scans
from pipeline import config, dag, query
from pipeline.dag import Pipeline
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.demo.shapes import scene, write_clip

YAML = """\
workdir: ./work
source: {kind: csv, path: ./clips.csv}
sampling: {fps: 8, frames: 4, size: 32}
score: {frames: 2}
recaption: {enabled: false}
encode: {vae: "demo://vae"}
run: {runner: local, unit_size: 2, isolate: false}
"""


def video(path: Path, number: int, frames: int = 8) -> None:
    write_clip(path, scene(number), 8, frames / 8, (64, 64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate("abcd"):
        video(tmp_path / f"{name}.mp4", i)
    video(tmp_path / "other.mp4", 200, frames=12)
    (tmp_path / "clips.csv").write_text("path\na.mp4\nb.mp4\nc.mp4\nd.mp4\n")
    (tmp_path / "vidpipe.yaml").write_text(YAML)
    return tmp_path


def made(folder: Path, *settings: str) -> Pipeline:
    return dag.build(config.load(str(folder / "vidpipe.yaml"), settings))


class Heard(Reporter):
    def __init__(self) -> None:
        self.settled: dict[str, int] = {}

    def rows(self, stage: str, counts: Any) -> None:
        self.settled[stage] = self.settled.get(stage, 0) + counts.total


def go(pipeline: Pipeline, *stages: str, retry: Retry = Retry()) -> dict[str, int]:
    heard = Heard()
    result = run(pipeline, stages, retry, heard)
    assert not result.faults, result.faults[0].trace
    return heard.settled


def rows(pipeline: Pipeline, stage: str) -> dict[str, dict[str, Any]]:
    return {row["uri"][0]: row for row in query.select(pipeline, stage).to_pylist()}


def outcome(pipeline: Pipeline, stage: str, name: str) -> tuple[str, str | None, str]:
    row = rows(pipeline, stage)[name]
    return row["outcome"], row["reason"], row["stage"]


ALL = {"download": 4, "probe": 4, "score": 4, "filter": 4, "encode": 4}
# Without rules the filter reads nothing, so nothing of it changes.
ONE = dict.fromkeys(("download", "probe", "score", "encode"), 1)


def test_a_file_that_is_replaced_behind_the_table_is_computed_anew_and_alone(folder: Path) -> None:
    pipeline = made(folder)
    assert go(pipeline) == ALL
    before = rows(pipeline, "encode")
    kept = folder / "kept.mp4"
    shutil.copy2(folder / "b.mp4", kept)
    assert go(made(folder)) == {}
    shutil.copy(folder / "other.mp4", folder / "b.mp4")
    assert go(made(folder)) == ONE
    after = rows(pipeline, "encode")
    assert after["b"]["content"] == rows(pipeline, "download")["b"]["content"]
    assert after["b"]["content"] != before["b"]["content"]
    assert after["b"]["num_frames"] == 12
    assert {n: r for n, r in after.items() if n != "b"} == {
        n: r for n, r in before.items() if n != "b"
    }
    assert go(made(folder)) == {}
    # Replaced back, time and all: everything is there already.
    shutil.copy2(kept, folder / "b.mp4")
    assert go(made(folder)) == {}
    assert rows(pipeline, "encode") == before


def test_a_file_that_is_only_touched_is_hashed_again_and_nothing_more(folder: Path) -> None:
    go(made(folder))
    os.utime(folder / "c.mp4", ns=(1, 1))
    assert go(made(folder)) == {"download": 1}


@pytest.mark.parametrize("change", ["replaced", "truncated", "same length"])
@pytest.mark.parametrize("stage", ["probe", "score", "encode"])
def test_what_is_not_the_file_that_was_hashed_never_gives_a_result(
    folder: Path, stage: str, change: str
) -> None:
    pipeline = made(folder, "source.watch=0")
    go(pipeline, "download" if stage == "probe" else "filter")
    if stage == "encode":
        go(pipeline, "score")
    file = folder / "b.mp4"
    if change == "replaced":
        shutil.copy(folder / "other.mp4", file)
    elif change == "truncated":
        before = file.stat()
        os.truncate(file, before.st_size - 100)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    go(pipeline, stage)
    assert outcome(pipeline, stage, "b") == ("failed", "source_changed", stage)
    assert "--retry-failed source_changed" in rows(pipeline, stage)["b"]["message"]
    assert {outcome(pipeline, stage, n)[0] for n in "acd"} == {"kept"}
    # The way back that the message names, whatever `watch` says.
    go(pipeline, stage, retry=Retry(True, frozenset({"source_changed"})))
    row = rows(pipeline, stage)["b"]
    if change == "replaced":
        assert (row["outcome"], row["num_frames"]) == ("kept", 12)
    assert row["reason"] != "source_changed"


def test_a_change_while_a_file_is_read_is_noticed_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import probe

    real = probe.probed

    def slow(path: str, *more: Any) -> Any:
        found = real(path, *more)
        if path.endswith("c.mp4"):
            shutil.copy(folder / "other.mp4", path)
        return found

    monkeypatch.setattr(probe, "probed", slow)
    pipeline = made(folder)
    go(pipeline, "download")
    # In this process: the patch reaches no worker.
    (changed,) = pipeline.stages["probe"].process([rows(pipeline, "download")["c"]], None)
    assert changed.error == "source_changed"
    monkeypatch.undo()
    go(made(folder), "probe")
    assert rows(pipeline, "probe")["c"]["num_frames"] == 12


def test_a_file_that_vanished_fails_where_it_is_needed_and_undoes_nothing(folder: Path) -> None:
    pipeline = made(folder)
    go(pipeline, "probe")
    (folder / "a.mp4").rename(folder / "away")
    assert go(made(folder), "probe") == {}, "a share that is not mounted undoes nothing"
    go(made(folder))
    assert outcome(pipeline, "encode", "a") == ("failed", "missing_file", "encode")
    assert outcome(pipeline, "probe", "a") == ("kept", None, "probe")
    # Also where the table is read anew.
    (folder / "clips.csv").write_text("path\na.mp4\nb.mp4\nc.mp4\nd.mp4\ne.mp4\n")
    go(made(folder), "probe")
    assert outcome(pipeline, "probe", "a") == ("kept", None, "probe")
    assert outcome(pipeline, "probe", "e") == ("failed", "missing_file", "download")
    # What comes back as it was is tried again on request; what was never there, by itself.
    (folder / "away").rename(folder / "a.mp4")
    video(folder / "e.mp4", 90)
    assert go(made(folder), "probe") == {"download": 1, "probe": 1}
    go(made(folder), retry=Retry(True, frozenset({"missing_file"})))
    assert outcome(pipeline, "encode", "a") == ("kept", None, "encode")


def test_archives_are_watched_as_the_files_in_them(folder: Path) -> None:
    def pack(name: str) -> None:
        with zipfile.ZipFile(folder / "all.zip", "w") as file:
            file.write(folder / name, "in/b.mp4")
            file.write(folder / "c.mp4", "in/c.mp4")

    pack("b.mp4")
    (folder / "clips.csv").write_text("path\nall.zip/in/b.mp4\nzip://in/c.mp4::all.zip\n")
    assert go(made(folder), "probe") == {"download": 2, "probe": 2}
    assert go(made(folder), "probe") == {}
    pack("other.mp4")
    assert go(made(folder), "probe") == {"download": 2, "probe": 1}, "c is what it was"


def test_a_copy_of_the_workdir_is_as_good(folder: Path) -> None:
    with zipfile.ZipFile(folder / "all.zip", "w") as file:
        file.write(folder / "b.mp4", "b.mp4")
    (folder / "clips.csv").write_text("path\nall.zip/b.mp4\n")
    go(made(folder), "download")
    shutil.copytree(folder / "work", folder / "copy", copy_function=shutil.copy)
    assert go(made(folder, "workdir=./copy"), "probe") == {"probe": 1}
    (media,) = (folder / "copy" / "media").glob("*/*.mp4")
    media.write_bytes(b"")
    go(made(folder, "workdir=./copy"), "encode")
    (row,) = query.select(made(folder, "workdir=./copy"), "encode").to_pylist()
    assert (row["stage"], row["reason"]) == ("encode", "source_changed")
    # As its message says.
    media.unlink()
    shutil.rmtree(folder / "copy" / "download")
    retry = Retry(True, frozenset({"source_changed"}))
    assert go(made(folder, "workdir=./copy"), "encode", retry=retry) == {"download": 1, "encode": 1}


def test_a_list_of_files_that_was_cut_off_is_made_anew(folder: Path) -> None:
    pipeline = made(folder)
    go(pipeline, "download")
    path = folder / "work" / "source" / "files.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    assert go(made(folder), "download") == {}
    assert path.read_bytes()[:4] == whole[:4]
    before = len(scans(pipeline.store))
    go(made(folder), "download")
    assert len(scans(pipeline.store)) == before
