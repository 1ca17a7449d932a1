"""Whole runs on S3, on disks that fill up, and on those that can't be written."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from s3_faults import BUCKET, Proxy
from toys import Heavy, Length, Limit, pipeline

from manifests.shards import Index, read_latents
from manifests.store import StoreUnusable
from pipeline import cli, config, dag, index, query
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from pipeline.upkeep.audit import audit
from pipeline.upkeep.verify import verify

OnRunner = Callable[[str], dict[str, Any]]
CAPTIONS = ["a red cat", "", "bad", "one two three four five", "dog", None]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers find the toys as a user's stages are found: on the path."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def toys(folder: Path, workdir: str, how: Mapping[str, Any] = {}) -> Pipeline:
    """The toy pipeline, its table in `folder` and its workdir anywhere."""
    of = pipeline(folder, CAPTIONS).config
    return dag.build(replace(of, workdir=workdir, run=of.run.model_copy(update=how)))


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_run_on_s3_gives_what_one_on_disk_gives(
    tmp_path: Path, s3: Proxy, on_runner: OnRunner, runner: str
) -> None:
    there = toys(tmp_path, f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}", on_runner(runner))
    here = toys(tmp_path, str(tmp_path / "work"))
    result, expected = (run(made, (), Retry(), Reporter()) for made in (there, here))
    assert not result.faults
    assert result.status == expected.status
    assert query.select(there, None).equals(query.select(here, None))
    assert not audit(there).findings and not list(verify(there))
    before = there.store.find("")
    assert not run(there, (), Retry(), Reporter()).ran
    assert there.store.find("") == before


def test_a_run_through_a_bad_network_is_a_good_run(tmp_path: Path, s3: Proxy) -> None:
    made = toys(tmp_path, f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}")
    for kind, method in (("500", "PUT"), ("lost", "PUT"), ("cut", "GET"), ("503", "HEAD")):
        s3.fault(kind, method, times=1)
    result = run(made, (), Retry(), Reporter())
    assert not result.faults and result.status["shout"].pending == 0
    s3.reset()
    here = toys(tmp_path, str(tmp_path / "work"))
    run(here, (), Retry(), Reporter())
    assert query.select(made, None).equals(query.select(here, None))


def test_a_store_that_goes_away_ends_the_run_and_a_second_one_finishes(
    tmp_path: Path, s3: Proxy
) -> None:
    made = toys(tmp_path, f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}")
    s3.fault("500", "PUT", "/limit/")
    with pytest.raises(StoreUnusable, match=r"can't write s3://videos/.*/limit/"):
        run(made, (), Retry(), Reporter())
    s3.reset()
    result = run(made, (), Retry(), Reporter())
    assert not result.faults and result.status["shout"].pending == 0


YAML = """\
workdir: WORKDIR
source: {kind: folder, path: VIDEOS}
sampling: {fps: 16, frames: 64, size: 64, fit: crop}
filter: {rules: {length: "len == 64"}}
score: {enabled: false}
recaption: {enabled: false}
encode: {vae: "demo://vae"}
"""


def test_real_videos_are_encoded_into_s3(
    tmp_path: Path, s3: Proxy, on_runner: OnRunner, shared_data: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("crystal.mp4", "flower.webm", "fire2.mp4", "broken_header_only.mp4"):
        (videos / name).symlink_to((shared_data / "videos" / name).resolve())
    opened = []
    for workdir, runner in (
        (f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}", "ray"),
        (str(tmp_path / "work"), "local"),
    ):
        file = tmp_path / "vidpipe.yaml"
        file.write_text(YAML.replace("WORKDIR", workdir).replace("VIDEOS", str(videos)))
        how = [f"run.{name}={value}" for name, value in on_runner(runner).items()]
        made = dag.build(config.load(str(file), how))
        result = run(made, (), Retry(), Reporter())
        assert not result.faults and result.status["encode"].kept == 2
        proved = audit(made)
        assert not proved.findings and proved.indexed == 2
        opened.append(Index.open(index.path(made)))
    there, here = opened
    for mine, own in zip(*(i.table.sort_by("clip_id").to_pylist() for i in opened), strict=True):
        assert (mine["clip_id"], mine["shape"]) == (own["clip_id"], own["shape"])
        (one,) = read_latents(there.workdir, mine["shard"], [mine["row"]])
        (two,) = read_latents(here.workdir, own["shard"], [own["row"]])
        values = [np.frombuffer(latent.data, np.float32) for latent in (one, two)]
        assert np.abs(values[0] - values[1]).max() < 1e-4


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_disk_that_fills_up_ends_the_run_and_a_second_one_finishes(
    tmp_path: Path,
    small_disk: Path,
    remount: Callable[[str], None],
    on_runner: OnRunner,
    runner: str,
) -> None:
    def made() -> Pipeline:
        p = pipeline(tmp_path, CAPTIONS, (Length, Limit, Heavy))
        settings = p.config.run.model_copy(update=on_runner(runner))
        return dag.build(replace(p.config, workdir=str(small_disk / "work"), run=settings))

    with pytest.raises(StoreUnusable, match=r"can't write .*/heavy/.*the disk is full \(.* free"):
        run(made(), (), Retry(), Reporter())
    assert not list(small_disk.rglob("*.part"))
    remount("size=64m")
    result = run(made(), (), Retry(), Reporter())
    assert not result.faults
    assert result.status["heavy"].kept == 2 and result.status["heavy"].pending == 0
    log = made().dag.log(made().store, "heavy")
    named = {c.data for unit, listed in log.units().items() for c in log.commits(unit, listed)}
    there = {Path(n).name for n in made().store.find(log.prefix) if n.endswith(".parquet")}
    assert there == named - {None}, "data that no commit names was left"


def test_a_download_that_finds_no_room_ends_the_run_and_fails_no_clip(
    tmp_path: Path, small_disk: Path, remount: Callable[[str], None]
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "a.mp4").write_bytes(bytes(3 << 20))
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        table = tmp_path / "clips.csv"
        table.write_text(f"url\nhttp://127.0.0.1:{server.server_port}/a.mp4\n")
        file = tmp_path / "vidpipe.yaml"
        file.write_text(f"workdir: {small_disk}\nsource: {{kind: csv, path: {table}}}\n")
        made = dag.build(config.load(str(file), ("run.runner=local",)))
        with pytest.raises(StoreUnusable, match=r"can't write .*: the disk is full"):
            run(made, ("download",), Retry(), Reporter())
        remount("size=16m")
        assert run(made, ("download",), Retry(), Reporter()).status["download"].kept == 1
        server.shutdown()


def test_a_read_only_workdir_is_said_before_anything_runs(
    tmp_path: Path, small_disk: Path, remount: Callable[[str], None]
) -> None:
    made = toys(tmp_path, str(small_disk))
    remount("ro")
    with pytest.raises(ConfigError, match="can't be written: Read-only file system"):
        run(made, (), Retry(), Reporter())


def test_a_manifest_that_finds_no_room_leaves_the_old_one(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toys(tmp_path, str(tmp_path / "work"))
    run(made, (), Retry(), Reporter())
    for suffix in ("parquet", "jsonl"):
        out = small_disk / f"clips.{suffix}"
        assert query.write(made, str(out)) == len(CAPTIONS)
        before = out.read_bytes()
        filler = small_disk / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        except OSError:
            pass
        with pytest.raises(StoreUnusable, match=rf"clips\.{suffix}: the disk is full"):
            query.write(made, str(out))
        assert out.read_bytes() == before
        filler.unlink()
        assert [p.name for p in small_disk.iterdir() if p.suffix == ".part"] == []
    assert pq.read_table(small_disk / "clips.parquet").num_rows == len(CAPTIONS)


def test_the_command_says_it_in_one_sentence(
    tmp_path: Path, small_disk: Path, remount: Callable[[str], None], capfd: Any
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    file = tmp_path / "vidpipe.yaml"
    file.write_text(
        YAML.replace("WORKDIR", str(tmp_path / "w")).replace("VIDEOS", str(tmp_path / "videos"))
        + "run: {runner: local}\n"
    )
    assert CliRunner().invoke(cli.cli, ["run", "probe", "-c", str(file)]).exit_code == 0
    remount("ro")
    done = CliRunner().invoke(
        cli.cli, ["manifest", "-c", str(file), "--out", str(small_disk / "clips.jsonl")]
    )
    assert isinstance(done.exception, StoreUnusable)
    assert cli._known(done.exception) == 1
    assert json.dumps(str(done.exception)).count("\\n") == 0
    assert "its file system is read-only" in str(done.exception)
