"""The Ray runner on a real Ray: the same files as the loop, faults told, nothing left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from killers import Slow
from toys import Length, Limit, Shout, pipeline

from manifests.log import Counts
from pipeline import query
from pipeline.config import RunSettings
from pipeline.errors import RunError
from pipeline.ray_cluster import cluster
from pipeline.report import Reporter
from pipeline.run import Result, run
from pipeline.unit import Receipt, Retry
from pipeline.workers import stop
from stages.base import Outcome, Row

CAPTIONS = ["a red cat", "", "bad", "one two three four five", "dog", None] * 4


class Heard(Reporter):
    def __init__(self) -> None:
        self.settled: dict[str, int] = {}
        self.units: dict[str, int] = {}
        self.notes: list[str] = []

    def rows(self, stage: str, counts: Counts) -> None:
        self.settled[stage] = self.settled.get(stage, 0) + counts.total

    def unit(self, receipt: Receipt) -> None:
        self.units[receipt.stage] = self.units.get(receipt.stage, 0) + 1

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def rays() -> set[int]:
    """Ray processes of ours: the pids of all whose parent chain leads here."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True)
    lines = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
    return {int(p) for p, parent, args in lines if "ray" in args and int(parent) == os.getpid()}


def manifest(made: Any) -> Any:
    return query.select(made, None).sort_by("clip_id")


COUNTED = {frozenset(("length", outcome)) for outcome in ("kept", "rejected", "bad")}


class Scraping(Heard):
    """Reads the metrics port, as Prometheus would, while the run is going on."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: set[str] = set()

    def unit(self, receipt: Receipt) -> None:
        import ray

        super().unit(receipt)
        port = ray.nodes()[0]["MetricsExportPort"]
        deadline = time.monotonic() + 30
        if receipt.stage != "shout":
            return
        while not self.pairs >= COUNTED and time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                lines = page.read().decode().splitlines()
            self.samples |= {line for line in lines if line.startswith("ray_vidpipe_")}
            time.sleep(0.5)

    @property
    def pairs(self) -> set[frozenset[str]]:
        """What has been counted of what. Processes report by turns, so a page may have a part."""
        label = re.compile(r'(?:[Oo]utcome|[Ss]tage|what)="([^"]+)"')
        return {frozenset(label.findall(line)) for line in self.samples}


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The captions through the loop."""
    made = pipeline(tmp_path_factory.mktemp("loop"), CAPTIONS)
    run(made, (), Retry(), Reporter())
    return made


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Result, Scraping, set[int]]:
    """The same on a private Ray: what was made and heard, and the processes that were left."""
    settings = {name: {"workers": 1, "batch_size": 8} for name in ("length", "limit", "shout")}
    heard = Scraping()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        before = rays()
        how = {"runner": "ray"}
        made = pipeline(tmp_path_factory.mktemp("ray"), CAPTIONS, settings=settings, run=how)
        result = run(made, (), Retry(), heard, explain=True)
    return made, result, heard, rays() - before


def same(made: Any, result: Result, heard: Heard, loop: Any) -> None:
    assert not result.faults
    assert manifest(made).drop_columns("origin").equals(manifest(loop).drop_columns("origin"))
    wanted = {name: result.status[name].total for name in made.stages}
    assert heard.settled == wanted, "every row is reported once"
    assert any(note.startswith("pass 1: length") for note in heard.notes)


def test_the_same_manifest_as_the_loop(
    private: tuple[Any, Result, Scraping, set[int]], loop: Any
) -> None:
    made, result, heard, left = private
    same(made, result, heard, loop)
    assert any(note.startswith("Ray dashboard: http://127.0.0.1:") for note in heard.notes)
    assert not left, "processes were left"


def test_counters_per_stage_and_outcome_are_exported(
    private: tuple[Any, Result, Scraping, set[int]],
) -> None:
    heard = private[2]
    assert heard.pairs >= COUNTED, heard.samples


def test_the_same_manifest_by_two_workers_each_with_a_process_of_its_own(
    tmp_path: Path, ray_address: str, loop: Any
) -> None:
    settings = {name: {"workers": 2, "batch_size": 1} for name in ("length", "limit", "shout")}
    how = {"runner": "ray", "address": ray_address, "isolate": True}
    made = pipeline(tmp_path, CAPTIONS, settings=settings, run=how)
    heard, before = Heard(), rays()
    same(made, run(made, (), Retry(), heard, explain=True), heard, loop)
    assert not rays() - before, "processes were left"


@pytest.mark.parametrize("name", ["t", "long" * 15])
def test_a_ray_that_does_not_start_leaves_nothing(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import ray

    temporary = own_folders.with_name(name)
    temporary.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    given: list[Path] = []

    def late(**options: Any) -> None:
        given.append(Path(os.environ["TMPDIR"]))
        assert given[0].is_dir() and os.environ["RAY_TMPDIR"] == str(own_folders.parent)
        raise Exception("the node timed out")

    monkeypatch.setattr(ray, "init", late)
    before = dict(os.environ)
    with pytest.raises(RunError, match="timed out"), cluster(RunSettings(), tmp_path, Reporter()):
        pass
    assert {name: os.environ.get(name) for name in before} == before
    assert not given[0].exists()
    # For names of sockets, where the folder's own is too long: the one of Ray's logs.
    assert given[0].parent == (temporary if name == "t" else own_folders.parent)


def test_a_second_ctrl_c_takes_rays_temporary_files_along(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Begun:
        dashboard_url = None

    def init(**options: Any) -> Begun:
        places.append(Path(os.environ["TMPDIR"]))
        return Begun()

    places: list[Path] = []
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    with cluster(RunSettings(), tmp_path, Reporter()):
        (places[0] / "file").write_text("of a worker")
        for clean in list(stop._leavings):  # as the process does that ends at once
            clean()
        assert not places[0].exists()


def test_an_exception_is_told_and_the_rest_goes_on(tmp_path: Path, ray_address: str) -> None:
    captions = ["crash", "a", "b", "c", "d e", "f g h", "i", "j"]
    run_settings = {"runner": "ray", "address": ray_address, "unit_size": 4}
    made = pipeline(tmp_path, captions, run=run_settings)
    result = run(made, (), Retry(), Reporter())
    assert [(r.stage, r.error) for r in result.faults] == [
        ("length", "ZeroDivisionError: a fault of the stage")
    ]
    assert result.status["length"] == Counts(8, 4, pending=4)
    assert result.status["shout"].kept == 4


class Dying(Shout):
    """Ray's own process dies, as where a node is lost."""

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        os._exit(9)


def test_a_worker_that_keeps_dying_ends_the_run_and_keeps_what_is_committed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sys.modules["test_ray_data"] = sys.modules[__name__]
    before = rays()
    made = pipeline(tmp_path, ["a", "b"], [Length, Limit, Dying], run={"runner": "ray"})
    with pytest.raises(RunError, match="shout: a worker died and its retries are used up") as told:
        run(made, (), Retry(), Reporter())
    assert ".." not in str(told.value) and "Traceback" not in capfd.readouterr().err
    again = pipeline(tmp_path, ["a", "b"])
    result = run(again, (), Retry(), Reporter())
    assert result.status["shout"] == Counts(2, 2)
    assert not rays() - before, "processes were left"


def test_a_cluster_that_brings_its_workers_is_waited_for(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without CPUs, as in cluster.yaml; a node comes once it is asked for."""
    from ray.cluster_utils import Cluster

    place = own_folders.with_name("head")  # where its dashboard leaves a folder behind
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})

    class Autoscaler(Heard):
        def note(self, text: str) -> None:
            super().note(text)
            if "asking the cluster for 1 CPU" in text:
                cluster.add_node(num_cpus=2)

    try:
        run_settings = {"runner": "ray", "address": cluster.address, "wait": 60}
        heard = Autoscaler()
        made = pipeline(tmp_path, CAPTIONS, run=run_settings)
        result = run(made, (), Retry(), heard)
        assert any("asking the cluster" in note for note in heard.notes)
        assert not result.faults and result.status["shout"].kept == 8
    finally:
        cluster.shutdown()


def test_large_units_travel_in_parts_where_a_model_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str
) -> None:
    for module in ("ray_data", "resources"):
        monkeypatch.setattr(f"pipeline.{module}.PART_ROWS", (5, 5))
    captions = [f"clip {i}" if i % 7 else "bad" for i in range(24)]
    run_settings = {"runner": "ray", "address": ray_address, "unit_size": 12}
    made = pipeline(tmp_path, captions, run=run_settings)
    heard = Heard()
    result = run(made, (), Retry(), heard)
    assert not result.faults
    assert result.status["length"] == Counts(24, 20, {}, {"bad_caption": 4})
    assert result.status["shout"] == Counts(20, 20)
    log = made.dag.log(made.store, "shout")
    assert len(log.units()) == 2
    commits = [c for unit in log.units() for c in log.commits(unit)]
    assert sum(c.rows for c in commits) == 20, "each clip is settled once"
    assert len([c for c in commits if c.data]) > 2, "more than one commit a unit"
    assert heard.units == dict.fromkeys(made.stages, 2), "a unit is told of once"


def test_a_run_outlives_the_process_that_it_reports_to(tmp_path: Path) -> None:
    """On a Ray of its own: one that is shared may give the process of an earlier run again."""
    import psutil

    began = time.time()

    class Killing(Heard):
        killed = 0

        def rows(self, stage: str, counts: Counts) -> None:
            super().rows(stage, counts)
            for process in psutil.Process().children(recursive=True) if not self.killed else ():
                # That of a run before may not be gone yet.
                if process.name().startswith("ray::Tally") and process.create_time() > began:
                    process.kill()
                    self.killed += 1

    made = pipeline(tmp_path, ["0.2"] * 24, [Slow], run={"runner": "ray"})
    heard = Killing()
    result = run(made, (), Retry(), heard)
    assert heard.killed == 1
    assert not result.faults
    assert result.status["slow"] == Counts(24, 24)


def test_a_ray_that_does_not_start_in_time_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(**options: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray has it, bare

    monkeypatch.setattr("ray.init", late)
    with pytest.raises(
        RunError, match=r"on this machine: .* timed out during startup; try again, .*--runner"
    ):
        run(pipeline(tmp_path, CAPTIONS, run={"runner": "ray"}), (), Retry(), Reporter())
