"""A disk that is full while a run writes: as a limit on the size of files, which all may set."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from pipeline.launching import Fleet
from trainer import disk
from trainer.checkpoint import CheckpointError, latest
from trainer.train import disk_faults, main

ROOT = Path(__file__).parents[2]


@contextmanager
def files_of(most: int) -> Iterator[None]:
    """No file may have more bytes than `most`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_main(settings: Any, tmp_path: Path) -> int:
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    return main(["--config", str(file)])


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "file"),
    # safetensors takes its file away itself
    [("model.safetensors", ""), ("optimizer.bin", "/optimizer.bin")],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    name: str,
    file: str,
    make_index: Any,
    settings_of: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = make_index()

    def settings(steps: int) -> Any:
        return settings_of(made, steps=steps, trackers=[])

    assert run_main(settings(3), tmp_path) == 0
    out = settings(6).output
    before = names(out)
    kept = out / "checkpoint-3"
    killed = out / "checkpoint-5.part"  # what one that was killed has left
    killed.mkdir()
    with files_of((kept / name).stat().st_size - 1000):
        assert run_main(settings(6), tmp_path) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(
        f"vidpipe train: can't write {out}/checkpoint-6.part{file}: File too large ("
    )
    assert f"The last good checkpoint is {kept}, which takes " in told and "train.keep" in told
    assert "Traceback" not in told and names(out) == before
    assert run_main(settings(6), tmp_path) == 0
    assert "steps 3 to 6" in capsys.readouterr().err
    found = latest(out)
    assert found is not None and found.step == 6


def test_a_model_that_cannot_be_written_leaves_the_one_before(
    make_index: Any, settings_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(make_index(), steps=3, trackers=[])
    assert run_main(settings, tmp_path) == 0
    with files_of(20_000):
        assert run_main(settings, tmp_path) == 2  # it has the steps, and writes the model again
    told = capsys.readouterr().err
    assert f"can't write {settings.output}/model.part: File too large" in told
    assert f"The last good checkpoint is {settings.output}/checkpoint-3" in told
    assert names(settings.output / "model") == {"model.safetensors", "config.json"}
    assert "model.part" not in names(settings.output)


def test_two_processes_end_where_one_cannot_write(make_index: Any, settings_of: Any) -> None:
    settings = settings_of(make_index(), steps=6, save_every=1, trackers=[])
    file = settings.output.with_suffix(".json")
    file.write_text(settings.model_dump_json())
    fleet = Fleet(2)
    with files_of(20_000):
        done = subprocess.run(
            fleet.command("trainer.train", "--config", str(file)),
            env={**os.environ, **fleet.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert done.returncode == 2
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("vidpipe train: "))
    assert "checkpoint-1.part: File too large" in said
    assert "There is no checkpoint yet" in said
    assert "Traceback" not in done.stderr and not names(settings.output)


def test_a_log_that_cannot_be_written_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "events"))

    def work() -> None:
        raise full

    told = f"can't write {tmp_path}/events: No space left on device"
    with pytest.raises(CheckpointError, match=told), disk_faults(tmp_path):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        raise full
    assert capsys.readouterr().err == ""
    with pytest.raises(ConnectionError), disk_faults(tmp_path):
        raise ConnectionError(errno.ECONNRESET, "reset")


def test_what_is_no_fault_of_the_disk_is_left_alone(tmp_path: Path) -> None:
    assert disk.fault(RuntimeError("shapes differ"), tmp_path) is None
    assert disk.fault(SafetensorError("invalid header"), tmp_path) is None
    full = OSError(errno.ENOSPC, "No space left on device")
    assert disk.fault(CheckpointException("", {1: (full, None)}), tmp_path) is full
    quota = disk.fault(SafetensorError("I/O error: Quota (os error 122)"), tmp_path)
    assert quota is not None and quota.errno == errno.EDQUOT
    with pytest.raises(RuntimeError) as error, files_of(1000):
        torch.save(torch.zeros(1000), tmp_path / "a.pt")
    found = disk.fault(error.value, tmp_path)  # there is room again: why is not known
    assert found is not None and found.errno == errno.EIO
    assert names(tmp_path) == {"a.pt"}
