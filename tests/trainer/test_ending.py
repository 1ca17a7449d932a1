"""How a run of several processes ends when one fails: one sentence, and the code of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeline.launching import Fleet
from trainer import ending
from trainer.launch import ended

ROOT = Path(__file__).parents[2]


def run_two(settings: Any) -> subprocess.CompletedProcess[str]:
    file = settings.output.with_suffix(".json")
    file.write_text(settings.model_dump_json())
    fleet = Fleet(2)
    return subprocess.run(
        fleet.command("trainer.train", "--config", str(file)),
        env={**os.environ, **fleet.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )


def told(said: str) -> str:
    """The one sentence, where there is nothing else but what a run tells."""
    lines = [line for line in said.splitlines() if not line.startswith("step ")]
    (sentence,) = (line for line in lines if line.startswith("vidpipe train: "))
    assert len(lines) <= 2 and "Traceback" not in said and "torch" not in said, said
    return sentence


def test_clips_of_all_processes_are_named_where_a_loss_is_no_number(
    make_index: Any, settings_of: Any
) -> None:
    made = make_index(mean=lambda i: np.inf if i in (3, 4) else 0.0)
    settings = settings_of(made, steps=20, save_every=1, batch_size=11)
    done = run_two(settings)  # all of an epoch in the first step
    assert done.returncode == 1
    sentence = told(done.stderr)
    bad = [list(made.clips)[number] for number in (3, 4)]
    named = sentence.split("at step 1, of clips ")[1].split(": look")[0].split(", ")
    assert set(named) == set(bad)
    batch = sentence.split("The batch: ")[1].split(", ")
    assert len(batch) == 22 and set(batch) == set(made.clips)


def test_a_damaged_shard_ends_all_processes(make_index: Any, settings_of: Any) -> None:
    made = make_index()
    file = made.shards["encode/f/u03.parquet"]
    file.write_bytes(file.read_bytes()[:-100])
    done = run_two(settings_of(made, steps=20, batch_size=1))
    assert done.returncode == 2
    assert "shard encode/f/u03.parquet" in told(done.stderr)


# ---------------------------------------------------------------------------- notes


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> str:
    place = ending.make_notes()
    monkeypatch.setenv(ending.NOTES, place)
    return place


def test_the_first_one_tells_and_its_code_counts(
    notes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending.noted() is None
    assert [ending.tell("first", 2), ending.tell("second", 1)] == [2, 2]
    assert ending.tell("third", ending.LOST) == ending.noted() == 2
    assert capsys.readouterr().err == "first\n"
    assert ended(notes, [ProcessFailure(0, 7, 2, ""), ProcessFailure(1, 8, -9, "")]) == 2
    assert capsys.readouterr().err == ""


def test_one_that_lost_the_others_does_not_hide_why(
    notes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [ending.tell("lost", ending.LOST), ending.tell("lost too", ending.LOST)]
    assert [*codes, ending.tell("why", 1)] == [ending.LOST, ending.LOST, 1]
    assert ending.noted() == 1
    assert capsys.readouterr().err == "lost\nwhy\n"


def test_without_notes_each_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ending.NOTES, raising=False)
    assert [ending.tell("one", 1), ending.tell("two", 2)] == [1, 2]
    assert capsys.readouterr().err == "one\ntwo\n"


@pytest.mark.parametrize(
    ("exits", "code", "said"),
    [
        ((-9, -15), 137, "process 0 (pid 5) was ended by signal 9 (SIGKILL), as the system does"),
        ((-15, -11), 139, "process 1 (pid 6) was ended by signal 11 (SIGSEGV): the same command"),
        ((-15, 7), 7, ""),  # it has said why itself
    ],
)
def test_what_no_process_could_tell_is_told(
    exits: tuple[int, int], code: int, said: str, notes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = [ProcessFailure(n, 5 + n, exit, "") for n, exit in enumerate(exits)]
    assert ended(notes, failures) == code
    told = capsys.readouterr().err
    assert said in told and bool(told) == bool(said)


def test_what_is_lost() -> None:
    pair = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    assert ending.lost(RuntimeError(pair)) and ending.lost(DistNetworkError("no answer"))
    assert not ending.lost(RuntimeError("shapes differ"))


def test_one_that_waits_for_another_that_failed_is_ended(notes: str) -> None:
    waits = "from trainer import ending; import time; ending.GRACE_SECONDS = 0; ending.watch(); "
    waits += "print('waits', flush=True); time.sleep(300)"
    with subprocess.Popen(
        [sys.executable, "-c", waits], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        assert process.poll() is None
        ending.tell("another failed", 2)
        assert process.wait(60) == 2
