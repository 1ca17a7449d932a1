"""Workers that really die and really hang: a clip that kills costs itself, under both runners."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import Command, project, until
from killers import Killer, Loader, Returner, Unready
from toys import Length, Limit, Shout, pipeline

from manifests.log import Counts
from pipeline import query
from pipeline.report import Reporter
from pipeline.run import Result, run
from pipeline.unit import Receipt, Retry
from pipeline.workers.suspects import Death, Suspects

ISOLATED = {"local": {"isolate": True}, "ray": {"runner": "ray", "isolate": True}}


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(params=["local", "ray"])
def isolated(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ISOLATED[request.param]


class Heard(Reporter):
    def __init__(self) -> None:
        self.settled: dict[str, int] = {}
        self.notes: list[str] = []

    def rows(self, stage: str, counts: Counts) -> None:
        self.settled[stage] = self.settled.get(stage, 0) + counts.total

    def note(self, text: str) -> None:
        self.notes.append(text)


def children() -> dict[int, str]:
    """Processes that we started, and those that they did."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True)
    lines = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
    found = {os.getpid(): ""}
    for pid, parent, args in lines:
        if int(parent) in found and not args.startswith("ps "):
            found[int(pid)] = args
    return {pid: args for pid, args in found.items() if args}


def go(made: Any, retry: Retry = Retry()) -> tuple[Heard, Result]:
    heard, before = Heard(), children()
    result = run(made, (), retry, heard)
    for name, counts in result.status.items():
        sums = sum(counts.rejected.values()) + sum(counts.failed.values())
        assert counts.total == counts.kept + sums + counts.pending, name
    assert not children().keys() - before.keys(), "processes were left"
    return heard, result


def rows(made: Any, stage: str = "killer") -> dict[str, dict[str, Any]]:
    return {row["caption"]: row for row in query.select(made, stage).to_pylist()}


def test_exactly_the_clips_that_kill_are_lost(tmp_path: Path, isolated: dict[str, Any]) -> None:
    deadly = ["SIGSEGV", "SIGKILL", "exit", "hang", "hang in C"]
    # Two kill only side by side, one only the first time, one takes longer than the limit but is
    # heard of, and SIGTERM, which Slurm sends to all processes, is for the supervisor: all of them
    # are kept.
    odd = ["together", "dynamite", "once", "slow", "SIGTERM"]
    sound = [f"clip {i}" for i in range(31)]
    captions = [*sound[:20], *deadly[:3], *sound[20:], *deadly[3:], *odd]
    settings = {"killer": {"time_limit": 1.0, "folder": str(tmp_path)}}
    made = pipeline(tmp_path, captions, [Killer], settings, isolated)
    heard, result = go(made)
    assert not result.faults
    assert result.status["killer"] == Counts(41, 36, {}, {"killed_worker": 3, "time_limit": 2})
    assert heard.settled == {"killer": 41}, "what was lost with a worker is not counted twice"
    found = rows(made)
    assert all(found[caption]["outcome"] == "kept" for caption in [*sound, *odd])
    assert (tmp_path / "once").exists(), "it did kill once"
    for caption in deadly:
        own = found[caption]
        assert own["outcome"] == "failed" and own["stage"] == "killer"
        assert "3 attempts" in own["message"], own["message"]
    assert "killed by SIGSEGV" in found["SIGSEGV"]["message"]
    assert "memory killer" in found["SIGKILL"]["message"]
    assert "exit code 7" in found["exit"]["message"]
    for caption in ("hang", "hang in C"):
        assert found[caption]["reason"] == "time_limit"
        assert "1 s" in found[caption]["message"] and "time_limit" in found[caption]["message"]
    assert any("killed by SIGSEGV" in note for note in heard.notes)
    again, second = go(made)
    assert not second.ran and not again.settled


def test_attempts_are_counted_over_retries(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["a", "SIGABRT"], [Killer], run=ISOLATED["local"])
    go(made)
    again, result = go(made, Retry(True, frozenset({"killed_worker"})))
    assert again.settled == {"killer": 1}
    assert result.status["killer"] == Counts(2, 1, {}, {"killed_worker": 1})
    log = made.dag.log(made.store, "killer")
    attempts = [
        row["attempts"]
        for unit, commits in log.units().items()
        for commit in log.commits(unit)
        if commit.data
        for row in made.store.read_parquet(log.data_name(unit, commit)).to_pylist()
        if row["outcome"] == "failed"
    ]
    assert attempts == [3, 6]


def test_the_model_is_loaded_once_and_stays_through_stages_without_one(tmp_path: Path) -> None:
    captions = [f"clip {i}" for i in range(6)]
    settings = {"loader": {"folder": str(tmp_path)}}
    run_ = {**ISOLATED["local"], "unit_size": 2}
    made = pipeline(tmp_path, captions, [Length, Loader, Limit, Shout], settings, run_)
    go(made)
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == 1 and int(loads[0]) != os.getpid()
    pids = {row["pid"] for row in query.select(made, "loader").to_pylist()}
    assert pids == {int(loads[0])}


def test_a_process_that_dies_before_any_clip_is_an_error_and_not_an_endless_loop(
    tmp_path: Path,
) -> None:
    (tmp_path / "no-gpu").touch()
    settings = {"loader": {"folder": str(tmp_path), "workers": 1}}
    run_ = {**ISOLATED["local"], "unit_size": 1}
    made = pipeline(tmp_path, ["a", "b", "c", "d"], [Loader], settings, run_)
    _, result = go(made)
    assert len(result.faults) == 4 and result.status["loader"] == Counts(4, pending=4)
    assert all("killed by SIGSEGV, 3 times" in (r.error or "") for r in result.faults)
    assert len((tmp_path / "loads").read_text().split()) == 6, "two units are enough to know"
    (tmp_path / "no-gpu").unlink()
    assert go(made)[1].status["loader"] == Counts(4, 4)


def test_errors_come_back_as_they_are(tmp_path: Path) -> None:
    run_ = {**ISOLATED["local"], "unit_size": 1}
    made = pipeline(tmp_path, ["crash", "b"], [Length, Unready], run=run_)
    _, result = go(made)
    told = {receipt.stage: receipt for receipt in result.faults}
    assert told["length"].error == "ZeroDivisionError: a fault of the stage"
    assert "in one" in (told["length"].trace or "")
    assert told["unready"].error == "the weights are missing: download them"
    assert told["unready"].trace is None


def test_a_stage_that_does_not_pickle_is_told_so(tmp_path: Path) -> None:
    class Inner(Killer):
        pass

    made = pipeline(tmp_path, ["a"], [Inner], run=ISOLATED["local"])
    _, result = go(made)
    assert "define its class at the top of a module" in (result.faults[0].error or "")


def test_isolation_gives_the_same_manifest(tmp_path: Path) -> None:
    captions = ["a red cat", "", "bad", "one two three four five", "dog", None] * 3
    made = []
    for name, run_ in {"in": {}, "out": ISOLATED["local"]}.items():
        (tmp_path / name).mkdir()
        made.append(pipeline(tmp_path / name, captions, run=run_))
        go(made[-1])
    tables = [query.select(m, None).sort_by("clip_id").drop_columns("origin") for m in made]
    assert tables[0].equals(tables[1])


def test_the_process_dies_with_its_supervisor(tmp_path: Path) -> None:
    """Even while C code holds the interpreter, and though nobody can clean up after a -9."""
    code = (
        "import sys; from pathlib import Path; from killers import Killer; import toys;"
        "from pipeline.run import run; from pipeline.unit import Retry;"
        "from pipeline.report import Reporter;"
        "run(toys.pipeline(Path(sys.argv[1]), ['hang in C'], [Killer], run={'isolate': True}),"
        " (), Retry(), Reporter())"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    before = children().keys()
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    deadline = time.monotonic() + 60
    while len(children().keys() - before) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # until it hangs
    worker, watcher = sorted(children().keys() - before - {driver.pid})
    driver.kill()
    driver.wait()
    until(lambda: gone(worker) and gone(watcher), 30)


def gone(process: int) -> bool:
    """Whether it has ended, be it that nobody has asked how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("runner", ["local", "ray"])
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "at its end"])
def test_what_a_stage_has_started_dies_with_its_worker(
    tmp_path: Path, own_folders: Path, runner: str, killed: bool
) -> None:
    more = f"  parent: {{use: 'killers:Parent', folder: {tmp_path}}}\n"
    captions = ["hang" if killed else "fine"]
    made = project(tmp_path, captions, more=f"stages:\n{more}")
    temporary = own_folders.with_name(f"{runner}-{killed}")
    temporary.mkdir()  # what is killed can't clean up
    command = Command(made, "run", "--runner", runner, env={"TMPDIR": str(temporary)})
    note = tmp_path / "child"
    until(lambda: note.exists() and note.read_text())
    child = int(note.read_text())
    if killed:
        assert not gone(child)
        command.signal(signal.SIGKILL)
    assert command.wait() == (-signal.SIGKILL if killed else 0), command.said
    until(lambda: gone(child), 30)
    if not killed:  # else agents of Ray's own wait for a minute for their head to come back
        until(lambda: not command.left(), 30)


def test_importing_the_worker_s_process_is_cheap() -> None:
    code = (
        "import sys, pipeline.workers.child, stages.encode, stages.probe;"
        "print(sorted({m.split('.')[0] for m in sys.modules} &"
        " {'torch', 'ray', 'rich', 'click', 'duckdb', 'diffusers', 'transformers', 'av'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_batch_is_split_into_groups_and_then_single_clips() -> None:
    suspects = Suspects()
    death = Death(-11)
    ids = [f"c{i}" for i in range(64)]
    suspects.died("encode", ids, death)
    assert [len(group) for group in suspects.apart] == [8] * 8
    suspects.died("encode", suspects.apart[2], death)
    assert [len(group) for group in suspects.apart] == [8] * 7 + [1] * 8
    suspects.died("encode", ["c17"], death)
    assert set(suspects.condemned) == {"c17"} and suspects.condemned["c17"].attempts == 3
    assert [c for group in suspects.apart for c in group].count("c17") == 0
    suspects.died("encode", ["c63x"], death)
    suspects.died("encode", ["c63x"], death)
    assert "c63x" not in suspects.condemned
    suspects.died("encode", ["c63x"], death)
    assert suspects.condemned["c63x"].attempts == 3


class Counted(Reporter):
    def __init__(self) -> None:
        self.amounts: Counter[str] = Counter()

    def unit(self, receipt: Receipt) -> None:
        self.amounts.update(receipt.amounts)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_model_is_given_back_and_what_a_stage_counts_is_in_the_receipts(
    tmp_path: Path, isolate: bool
) -> None:
    settings = {"returner": {"folder": str(tmp_path)}}
    how = {"isolate": isolate, "unit_size": 2}
    captions = ["a", "bc", "def", "gh", "i"]
    made = pipeline(tmp_path, captions, [Returner], settings, how)
    counted = Counted()
    result = run(made, (), Retry(), counted)
    assert result.status["returner"].kept == 5
    assert (tmp_path / "notes").read_text() == "taken given back "
    assert counted.amounts == {"letters": 9}
