"""`vidpipe estimate` as it is typed: tables, JSON, exit codes, on toys and on real videos."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Command, project, until

HERE = Path(__file__).parent
FIGURE = {"value", "low", "high"}


def vidpipe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (ROOT, HERE, HERE.parent)))
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert not list(temporary.glob("vidpipe-*"))
    return done


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    rng = random.Random(0)
    captions = [f"1 {'keep' if rng.random() < 0.5 else 'drop'}" for _ in range(80)]
    stages = ("nap=naps:Nap", "gate=naps:Gate", "dream=naps:Dream")
    return project(tmp_path / "project", captions, stages)


def test_tables_for_a_person_and_json_for_a_program(toys: Path) -> None:
    done = vidpipe(toys, "estimate", "--clips", "40", "--gpus", "8", "--seed", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("80 of 80 clips have work to do; 40 of them")
    assert lines[2].split() == [
        "stage",
        "rows",
        "to",
        "do",
        "kept",
        "a",
        "row",
        "start",
        *("disk", "on"),
    ]
    assert [line.split()[0] for line in lines[3:6]] == ["nap", "gate", "dream"]
    assert any(line.startswith("dream: ") and line.endswith(" tokens") for line in lines)
    assert any(line.split()[:3] == ["gate", "rejected", "dropped"] for line in lines)
    assert sum("bounds it" in line for line in lines) == 2
    assert "cores, 8 GPUs: " in done.stdout
    assert "note: 8 GPUs: of machines like this one" in done.stderr
    assert not (toys / "work").exists()

    done = vidpipe(toys, "estimate", "--clips", "40", "--gpus", "8", "--seed", "3", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    check_schema(found)
    assert (found["clips"], found["with_work"], found["sample"]) == (80, 80, 40)
    assert [stage["name"] for stage in found["stages"]] == ["nap", "gate", "dream"]
    assert found["there"]["gpus"] == 8


def check_schema(found: dict[str, Any]) -> None:
    keys = ("clips", "with_work", "sample", "seed", "level", "stages", "here", "there", "notes")
    assert set(found) == set(keys)
    for stage in found["stages"]:
        names = ("name", "sample", "device", "meant_for", "rows", "seconds_a_row")
        more = ("start_seconds", "amounts", "disk_bytes", "error")
        assert set(stage) >= {*names, *more}
        assert set(stage["sample"]) == {"total", "kept", "rejected", "failed", "pending"}
        for figure in (stage["rows"], stage["disk_bytes"], *stage["amounts"].values()):
            check_figure(figure)
        if stage["seconds_a_row"] is not None:
            check_figure(stage["seconds_a_row"])
    for forecast in (found["here"], found["there"]):
        if forecast is not None:
            check_figure(forecast["hours"])
            names = [stage["name"] for stage in forecast["stages"]]
            assert names == [name for cut in forecast["passes"] for name in cut["stages"]]
            assert forecast["bound"] in names
            for stage in forecast["stages"]:
                check_figure(stage["hours"])


def check_figure(figure: dict[str, float | None]) -> None:
    assert set(figure) == FIGURE
    if figure["low"] is not None and figure["high"] is not None and figure["value"] is not None:
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"]


def test_nothing_to_do_is_no_fault(toys: Path) -> None:
    assert vidpipe(toys, "run", "--set", "run.runner=local").returncode == 0
    done = vidpipe(toys, "estimate")
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing to do: nap, gate, dream: up to date" in done.stderr
    done = vidpipe(toys, "estimate", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["stages"] == []


def test_what_a_user_gets_wrong(toys: Path) -> None:
    done = vidpipe(toys, "estimate", "drem")
    assert done.returncode == 2 and "Did you mean dream?" in done.stderr
    assert vidpipe(toys, "estimate", "--clips", "0").returncode == 2
    assert vidpipe(toys, "estimate", "-c", "nothing.yaml").returncode == 2
    done = vidpipe(toys, "estimate", "--set", "source.path=./gone.jsonl")
    assert done.returncode == 2 and "gone.jsonl" in done.stderr
    done = vidpipe(toys, "estimate", "--set", "run.gpus=64")
    assert done.returncode == 2 and "--gpus 64: this machine has" in done.stderr


def test_a_stage_that_raises_ends_with_1_and_its_trace(toys: Path) -> None:
    done = vidpipe(toys, "estimate", "--clips", "40", "--set", "stages.dream.raises=all")
    assert done.returncode == 1
    assert "note: dream raised ZeroDivisionError: a fault of the stage" in done.stderr
    assert "in process" in done.stderr  # the trace
    assert any(line.startswith("nap ") for line in done.stdout.splitlines())


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = project(tmp_path / "p", ["300 keep"] * 60, ["nap=naps:Nap"])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = Command(folder, "estimate", path=[HERE], env={"TMPDIR": str(temporary)})
    until(lambda: list(temporary.glob("vidpipe-estimate-*/work/source/pool/*")))
    time.sleep(1.0)
    command.signal(signal.SIGINT)
    assert command.wait(30) == 130, command.said
    assert not list(temporary.glob("vidpipe-*")) and not (folder / "work").exists()
    until(lambda: not command.left(), 10)


def test_a_second_ctrl_c_leaves_neither_the_sample_nor_secrets(tmp_path: Path) -> None:
    folder = project(tmp_path / "p", [], ["slow=killers:Slow"])
    urls = [f"https://u:p{i}@h.invalid/{i}.mp4?token=s{i}" for i in range(8)]
    rows = [json.dumps({"path": url, "text": f"600 {tmp_path}"}) for url in urls]
    (folder / "clips.jsonl").write_text("\n".join(rows))
    temporary, state = tmp_path / "temporary", tmp_path / "state"
    temporary.mkdir()
    env = {"TMPDIR": str(temporary), "XDG_STATE_HOME": str(state)}
    command = Command(folder, "estimate", path=[HERE], env=env)
    until((tmp_path / "at-work").exists)
    assert list(temporary.glob("vidpipe-*")) and list(state.glob("vidpipe/*"))
    command.signal(signal.SIGINT)
    time.sleep(0.3)
    command.signal(signal.SIGINT)
    assert command.wait(30) == 130, command.said
    assert "stopped at once" in command.said
    assert not list(temporary.glob("vidpipe-*")) and not list(state.glob("vidpipe/*"))
    until(lambda: not command.left(), 10)


REAL = """\
workdir: ./work
source: {kind: folder, path: VIDEOS}
sampling: {fps: 16, frames: 16, size: 64, fit: crop}
filter: {rules: {length: "len == 16"}}
encode: {vae: "demo://vae"}
"""


def test_real_videos(tmp_path: Path, shared_data: Path) -> None:
    (tmp_path / "vidpipe.yaml").write_text(REAL.replace("VIDEOS", str(shared_data / "videos")))
    done = vidpipe(tmp_path, "estimate", "encode", "--clips", "14", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    check_schema(found)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["download", "probe", "filter", "encode"]
    assert found["with_work"] == 32 and stages["download"]["sample"]["total"] == 14
    # Of the 32 videos 8 have a fault of their own; each has its class.
    assert sum(stages["probe"]["sample"]["failed"].values()) >= 1
    encode = stages["encode"]
    assert encode["seconds_a_row"]["value"] > 0 and encode["start_seconds"] > 0
    # 16 frames are 2 times 8x8 latents at most; moments in float32, and some thousand bytes a file.
    assert 0 < encode["disk_bytes"]["value"] / encode["rows"]["value"] < 1 << 20
    assert encode["rows"]["low"] <= 24 <= encode["rows"]["high"]
    assert not (tmp_path / "work").exists()
