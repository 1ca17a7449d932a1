"""`vidpipe decode`, and what encode tells by itself: on the demo's clips, VAE and command line."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from commands import Command
from PIL import Image

from pipeline import config, dag
from pipeline.config import ConfigError
from pipeline.decoded import decode, find
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.demo.shapes import make_demo

YAML = """\
source: {kind: openvid, path: ./clips.csv, root: ./videos}
sampling: {fps: 16, frames: 8, size: 64}
filter: {rules: {length: "len == 8", light: "luminance > 40"}}
recaption: {enabled: false}
encode: {vae: "demo://vae", check_clips: 3}
run: {runner: local, unit_size: 8}
"""


class Heard(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project that has run, and what the run said."""
    folder = tmp_path_factory.mktemp("project")
    make_demo(folder, 16)
    (folder / "vidpipe.yaml").write_text(YAML)
    command = Command(folder, "run")
    assert command.wait(240) == 0, command.said
    return folder, command.said


def test_a_run_tells_how_like_its_clips_are(made: tuple[Path, str]) -> None:
    lines = [line for line in made[1].splitlines() if "decoded again" in line]
    assert 1 <= len(lines) <= 3  # the first clip, and others by chance
    assert all(float(line.split()[-2]) > 20 for line in lines)
    assert "warning" not in made[1]


def test_a_clip_beside_its_source(made: tuple[Path, str], tmp_path: Path) -> None:
    pipeline = dag.build(config.load(str(made[0] / "vidpipe.yaml")))
    (found,) = find(pipeline, [], 1)
    (shown,) = decode(pipeline, [found.clip], tmp_path)
    assert shown.psnr is not None and shown.psnr > 20 and shown.message is None
    assert shown.file == str(tmp_path / f"{found.clip}.mp4")
    with av.open(shown.file) as video:
        assert video.streams.video[0].average_rate == 16
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (64, 128, 3)
    source, again = np.stack(frames).astype(float).reshape(8, 64, 2, 64, 3).swapaxes(0, 2)[:2]
    error = np.square(source - again).mean()
    assert 10 * np.log10(255**2 / error) == pytest.approx(shown.psnr, abs=2.5), "but for libx264"
    (again_shown,) = decode(pipeline, [found.clip[:12]], tmp_path, png=True)
    assert again_shown.psnr == shown.psnr
    with Image.open(tmp_path / f"{found.clip}.png") as picture:
        assert picture.size == (128, 8 * 64)


def test_ids_that_fit_none_or_several(made: tuple[Path, str]) -> None:
    pipeline = dag.build(config.load(str(made[0] / "vidpipe.yaml")))
    every = find(pipeline, [], 1000)
    ids = [found.clip for found in every]
    assert len(set(ids)) == len(ids) > 8
    assert {f.clip for f in find(pipeline, [], 5)} < set(ids)
    assert [f.clip for f in find(pipeline, [ids[3], ids[1]], 1)] == [ids[3], ids[1]]
    with pytest.raises(ConfigError, match=r"no encoded clip has an id that begins with 'nothing'"):
        find(pipeline, ["nothing"], 1)
    with pytest.raises(ConfigError, match=rf"'' begins the ids of {len(ids)} clips"):
        find(pipeline, [""], 1)


def test_the_command(made: tuple[Path, str]) -> None:
    folder, _ = made
    ran = Command(folder, "decode", "--n", "2", "--json", "--png", "--out", "seen")
    assert ran.wait(240) == 0, ran.said
    shown = json.loads(ran.printed)
    assert [set(each) for each in shown] == [{"clip_id", "psnr", "file", "message"}] * 2
    assert all((folder / each["file"]).is_file() for each in shown)
    ran = Command(folder, "decode", "nothing")
    assert ran.wait(240) == 2 and "no encoded clip" in ran.said


def test_a_source_that_is_gone(made: tuple[Path, str], tmp_path: Path) -> None:
    pipeline = dag.build(config.load(str(made[0] / "vidpipe.yaml")))
    (found,) = find(pipeline, [], 1)
    video = Path(found.source["path"])
    video.rename(tmp_path / "aside")
    try:
        (shown,) = decode(pipeline, [found.clip], tmp_path)
    finally:
        (tmp_path / "aside").rename(video)
    assert shown.psnr is None and Path(str(shown.file)).is_file()
    assert shown.message == "the source can't be read again: the file is not there"


def test_a_window_is_compared_with_its_own_frames(made: tuple[Path, str], tmp_path: Path) -> None:
    own = ("sampling.windows=2", "run.isolate=false")
    pipeline = dag.build(config.load(str(made[0] / "vidpipe.yaml"), own))
    heard = Heard()
    assert not run(pipeline, (), Retry(), heard).faults
    told = [note for note in heard.notes if "decoded again" in note]
    assert len(told) == 3, "told without a process of its own, too"
    every = find(pipeline, [], 1000)
    parent = every[0].source["clip_id"]
    windows = [found.clip for found in every if found.source["clip_id"] == parent]
    assert len(windows) == 2 and parent not in windows
    shown = list(decode(pipeline, windows, tmp_path, png=True))
    assert [(s.psnr or 0) > 20 and s.message is None for s in shown] == [True] * 2, shown
    pictures = [(tmp_path / f"{clip}.png").read_bytes() for clip in windows]
    assert pictures[0] != pictures[1]
