"""The command as users type it: exit codes, what goes to stdout, what to stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

YAML = """\
workdir: ./work
source: {kind: csv, path: ./clips.csv}
sampling: {fps: 8, frames: 8, size: 64}
filter: {rules: {length: "len == 8"}}
recaption: {engine: transformers, model: "demo://captioner"}
encode: {vae: "demo://vae"}
run: {runner: local}
"""


def video(path: Path, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((64, 64, 3), 40 + i * 3 % 200, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    video(folder / "long, with comma.mp4", 48)
    video(folder / "short.mp4", 6)
    (folder / "text.mp4").write_text("no video at all")
    (folder / "clips.csv").write_text(
        "path,text,score\n"
        '"long, with comma.mp4","a red ""circle"",\nmoving left",0.5\n'
        "short.mp4,a blue square moves up,0.25\n"
        "text.mp4,a green triangle,1\n"
        "gone.mp4,a gone thing,1\n"
    )
    (folder / "vidpipe.yaml").write_text(YAML)
    return folder


@pytest.fixture(scope="module")
def encoded(project: Path) -> Path:
    """The project once it has run."""
    assert vidpipe(project, "run", "encode").returncode == 0
    return project


def vidpipe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def stages(folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    done = vidpipe(folder, "status", "--json", *words)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert set(status) == {"workdir", "stages"}
    for stage in status["stages"]:
        assert set(stage) == {
            "name", "fingerprint", "state", "in", "kept", "rejected", "failed", "worth_retry",
            "pending", "amounts", "cost",
        }  # fmt: skip
        settled = sum(stage["rejected"].values()) + sum(stage["failed"].values())
        assert stage["in"] == stage["kept"] + settled + stage["pending"]
    return {stage["name"]: stage for stage in status["stages"]}


def test_a_project_from_first_status_to_manifest(project: Path) -> None:
    before = stages(project)
    assert before["source"]["in"] == before["source"]["pending"] == 4
    plan = vidpipe(project, "plan")
    assert plan.returncode == 0 and "never run" in plan.stdout

    ran = vidpipe(project, "run")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "", "talk goes to stderr"
    assert "failed rows: 1 download.missing_file, 1 probe.not_a_video" in ran.stderr
    assert "rejected rows: 1 filter.length" in ran.stderr
    after = stages(project)
    assert next(iter(after)) == "source"
    assert after["filter"]["rejected"] == {"length": 1}
    assert after["encode"]["kept"] == after["recaption"]["kept"] == 1

    shown = vidpipe(project, "show", "encode", "--format", "jsonl")
    rows = {Path(row["uri"]).name: row for row in objects(shown.stdout)}
    assert shown.stderr == "" and len(rows) == 4
    kept = rows["long, with comma.mp4"]
    assert {
        "clip_id", "uri", "caption", "outcome", "reason", "len", "fps", "num_frames", "duration",
        "width", "height", "recaption",
    } <= set(kept)  # fmt: skip
    assert "latents" not in kept and kept["latents_shape"] == [8, 8, 8, 8]
    assert kept["caption"] == 'a red "circle",\nmoving left'
    assert (kept["outcome"], kept["len"], kept["fps"], kept["source_score"]) == (
        "kept", 8, 24.0, 0.5,
    )  # fmt: skip
    assert rows["gone.mp4"]["outcome"] == "failed" and rows["gone.mp4"]["message"]

    again = vidpipe(project, "run")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    for name in ("out.parquet", "out.jsonl"):
        assert vidpipe(project, "manifest", "--out", name).returncode == 0
    written = pq.read_table(project / "out.parquet").to_pylist()
    assert written == objects((project / "out.jsonl").read_text())
    assert [row["clip_id"] for row in written] == [row["clip_id"] for row in objects(shown.stdout)]


def test_show_selects_rows_and_columns_in_every_format(project: Path) -> None:
    vidpipe(project, "run", "filter")
    words = ["show", "filter", "--where", "outcome = 'rejected'", "--columns", "uri,len"]
    assert objects(vidpipe(project, *words).stdout) == [{"uri": "short.mp4", "len": 2}]
    as_csv = vidpipe(project, *words, "--format", "csv").stdout
    assert as_csv.split() == ["uri,len", "short.mp4,2"]
    assert json.loads(vidpipe(project, *words, "--format", "json").stdout)[0]["len"] == 2
    assert vidpipe(project, *words, "--format", "table").stdout.splitlines()[0] == "uri        len"
    assert vidpipe(project, "show", "probe", "--limit", "2").stdout.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "encod"], "there is no stage 'encod'. Did you mean encode?"),
        (["run", "--set", "filter.rules.a='lenn > 1'"], "Did you mean len?"),
        (["run", "--set", "filter.rules.a='len >'"], "rule a: syntax error"),
        (["run", "--set", "filter.rules.a='(SELECT 1) = 1'"], "a subquery"),
        (["run", "--set", "sampling.frames=few"], "`sampling.frames` is 'few'"),
        (["run", "--set", "encode.vae=./nowhere"], "there is no folder"),
        (["run", "--set", "source.path=./nothing.csv"], "nothing.csv"),
        (["run", "--set", "recaption.prompt='say {captoin}'"], "Did you mean caption?"),
        (["run", "--retry-failed", "missing_fil"], "Did you mean missing_file?"),
        (["run", "--gpus", "-1"], "-1"),
        (["show", "probe", "--columns", "lenn"], "Did you mean len?"),
        (["show", "probe", "--where", "len >"], "--where"),
        (["show", "nothing"], "there is no stage 'nothing'"),
        (["manifest", "--out", "x.txt"], "must end in .parquet or .jsonl"),
        (["status", "-c", "other.yaml"], "vidpipe init"),
        (["train", "--set", "recaption.prompt='{caption} anew'"], "no clip is ready"),
        (["init"], "is there already"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    encoded: Path, words: Sequence[str], told: str
) -> None:
    done = vidpipe(encoded, *words)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_more_gpus_than_there_are_is_said_before_anything_starts(
    encoded: Path, runner: str
) -> None:
    words = ("--runner", runner, "--gpus", "999", "--set", "sampling.size=32")
    done = vidpipe(encoded, "run", "encode", *words)
    assert done.returncode == 2 and done.stderr.startswith("vidpipe: --gpus 999: this machine has")


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "vidpipe.yaml").write_text(
        YAML.replace("csv, path: ./clips.csv", "folder, path: ./videos")
    )
    video(tmp_path / "videos" / "a.mp4", 48)
    video(tmp_path / "videos" / "b.mp4", 48)
    vidpipe(tmp_path, "run", "probe")
    video(tmp_path / "videos" / "a.mp4", 60)
    ran = vidpipe(tmp_path, "run", "probe")
    assert "source: 2 rows, 0 new, 1 changed" in ran.stderr
    rows = objects(vidpipe(tmp_path, "show", "probe").stdout)
    assert [(row["uri"], row["num_frames"], row["outcome"]) for row in rows] == [
        ("b.mp4", 48, "kept"),
        ("a.mp4", 60, "kept"),
    ]


def test_whose_rows_stand_in_the_workdir_is_told(encoded: Path) -> None:
    assert "note:" not in vidpipe(encoded, "status").stderr
    (encoded / "other.csv").write_text("path,text\nshort.mp4,another caption\n")
    words = ("--set", f"source.path={encoded}/other.csv")
    told = vidpipe(encoded, "status", *words)
    assert told.returncode == 0
    assert told.stderr.startswith("note: rows and captions in ")
    assert "are those of clips.csv, which was read last, not those of" in told.stderr
    train = vidpipe(encoded, "train", *words)
    assert train.returncode == 2 and "`vidpipe run` first" in train.stderr


ABORTS_AT_EXIT = """\
import ctypes
from stages.base import Stage, StageSettings

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # as a native thread that outlives its owner


class Late(Stage):
    name = "late"

    def process(self, rows, model):
        return [{} for _ in rows]
"""


def test_a_library_that_aborts_at_exit_changes_no_exit_code(project: Path, tmp_path: Path) -> None:
    (tmp_path / "late_abort.py").write_text(ABORTS_AT_EXIT)
    text = YAML.replace("./clips.csv", str(project / "clips.csv"))
    (tmp_path / "vidpipe.yaml").write_text(text + 'stages: {late: {use: "late_abort:Late"}}\n')
    assert vidpipe(tmp_path, "run", "late").returncode == 0
    assert vidpipe(tmp_path, "run", "latte").returncode == 2
    assert json.loads(vidpipe(tmp_path, "status", "--json").stdout)["stages"][0]["in"] == 4


def test_a_caption_that_is_no_text_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    folder = YAML.replace("csv, path: ./clips.csv", "folder, path: ./videos")
    (tmp_path / "vidpipe.yaml").write_text(folder)
    for name in "ab":
        video(tmp_path / "videos" / f"{name}.mp4", 48)
    (tmp_path / "videos" / "a.txt").write_bytes(b"caf\xe9")
    assert vidpipe(tmp_path, "run", "probe").returncode == 0
    rows = objects(vidpipe(tmp_path, "show", "probe").stdout)
    assert [(r["uri"], r["outcome"], r["reason"]) for r in rows] == [
        ("a.mp4", "rejected", "unreadable_text"),
        ("b.mp4", "kept", None),
    ]
    assert "a.txt:1:4: byte 0xe9" in rows[0]["message"]


def test_the_source_can_be_looked_at_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "vidpipe.yaml").write_text(YAML)
    (tmp_path / "clips.csv").write_text("path,text\na.mp4,one\na.mp4,two\n")
    before = vidpipe(tmp_path, "show", "encode")
    assert (before.returncode, before.stdout, before.stderr) == (0, "", "")
    vidpipe(tmp_path, "run", "download")
    rows = objects(vidpipe(tmp_path, "show", "source").stdout)
    assert [(row["outcome"], row["reason"]) for row in rows] == [
        ("kept", None),
        ("rejected", "duplicate"),
    ]


def test_a_stage_may_follow_retry_failed(encoded: Path) -> None:
    done = vidpipe(encoded, "run", "download", "--retry-failed", "all")
    assert done.returncode == 0 and "download: 1 of 1 rows" in done.stderr
    done = vidpipe(encoded, "run", "--retry-failed", "download")
    assert done.returncode == 0 and "no failed row is worth another try" in done.stderr
    assert "(1 missing_file)" in done.stderr
    done = vidpipe(encoded, "run", "encode", "--retry-failed", "not_a_video")
    assert "probe: 1 of 1 rows" in done.stderr and "download: 1" not in done.stderr


def test_without_a_filter_broken_files_still_stop_at_probe(project: Path) -> None:
    planned = vidpipe(project, "run", "encode", "--set", "filter.enabled=false")
    assert planned.returncode == 0
    got = stages(project, "--set", "filter.enabled=false")
    assert got["encode"]["in"] == got["probe"]["kept"] == 2


def test_init_writes_a_file_that_works(project: Path, tmp_path: Path) -> None:
    assert vidpipe(tmp_path, "init", "--videos", str(project / "clips.csv")).returncode == 0
    planned = vidpipe(tmp_path, "plan")
    assert planned.returncode == 0, planned.stderr
    assert "source: 4 rows, 4 new" in planned.stderr
    assert vidpipe(tmp_path, "doctor").returncode == 0


def test_doctor_says_what_is_wrong(project: Path, tmp_path: Path) -> None:
    (tmp_path / "vidpipe.yaml").write_text(YAML.replace("demo://vae", "./nowhere"))
    done = vidpipe(tmp_path, "doctor")
    assert done.returncode == 1
    assert "FAIL" in done.stdout and "there is no folder" in done.stdout
