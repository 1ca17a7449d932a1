"""What trackers are told. wandb and trackio are looked at where they are installed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import trackers
from trainer.train import main, train

ROOT = Path(__file__).parents[2]
NAMES = {
    *("loss", "lr", "grad_norm", "clips_per_second", "clips_per_second_each", "step_seconds"),
    *("data_wait", "memory_gib", "epoch", "seconds_left", "val_loss"),
}


def test_tensorboard_is_told_all_and_goes_on(make_index: Any, settings_of: Any) -> None:
    made = make_index()
    common = {"validation": {"share": 0.3, "every": 3}, "save_every": 4}
    settings = settings_of(made, steps=6, **common)
    train(settings)
    (settings.output / "checkpoint-6" / "trainer.json").unlink()  # as if it ended amid saving
    train(settings_of(made, steps=8, **common))
    told = EventAccumulator(str(settings.output / "logs" / "vidpipe")).Reload()
    scalars = set(told.Tags()["scalars"])
    assert {name for name in scalars if "_at/" not in name} == NAMES
    assert sum(name.startswith("val_loss_at/") for name in scalars) == 8
    assert [event.step for event in told.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8], "each once"
    assert [event.step for event in told.Scalars("val_loss")] == [3, 6, 8]
    rate = {event.step: event.value for event in told.Scalars("lr")}
    assert rate[1] == pytest.approx(5e-4) and rate[8] == pytest.approx(1e-3)
    (first, again) = told.Tensors("settings/text_summary")
    text = first.tensor_proto.string_val[0].decode()
    assert json.loads(text)["batch_size"] == 4 and (first.step, again.step) == (0, 4)


def test_none_at_all(make_index: Any, settings_of: Any) -> None:
    settings = settings_of(make_index(), trackers=[], steps=1)
    train(settings)
    assert not (settings.output / "logs").exists()


def test_secrets_are_masked(make_index: Any, settings_of: Any) -> None:
    secret = "hf_" + "abcdefghijklmnopqrstuvwxyz012345678"
    settings = settings_of(make_index(), steps=1, run_name=f"with token={secret}")
    train(settings)
    for file in (settings.output / "logs").rglob("*"):
        assert file.is_dir() or secret.encode() not in file.read_bytes()


@pytest.fixture
def vae_settings(make_index: Any, settings_of: Any, vae: Path) -> Any:
    made = make_index(vae=vae)

    def settings(**values: Any) -> Any:
        samples = {"prompts": ["a red square"], "every": 3, "steps": 1}
        return settings_of(made, samples=samples, **values)

    return settings


def records(file: Path) -> Iterator[Any]:
    """Of a .wandb file: 7 bytes, then blocks of 32 KiB of pieces, each with a checksum, a length
    and which piece of a record it is (whole, first, middle, last), as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, at, gathered = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) < 7:
            at += left
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        gathered += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(gathered)
            gathered = b""


def test_wandb_goes_on_with_the_same_run(
    vae_settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(vae_settings(trackers=["wandb"], steps=3))
    time.sleep(1.1)  # its folders are named by the second
    settings = vae_settings(trackers=["wandb"], steps=6)
    train(settings)
    run = json.loads((settings.output / "trackers.json").read_text())["run"]
    found: dict[str, list[Any]] = {}
    configs = []
    for folder in sorted((settings.output / "wandb").glob("offline-run-*")):
        (file,) = folder.glob("*.wandb")
        assert file.name == f"run-{run}.wandb"
        assert list((folder / "files" / "media" / "videos").glob("*.gif"))
        for record in records(file):
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                found.setdefault(key, []).append(json.loads(item.value_json))
            configs += [u.value_json for u in record.config.update if u.key == "batch_size"]
    assert found["_step"] == [1, 2, 3, 4, 5, 6]
    assert len(found["loss"]) == 6 and found["samples/_type"] == ["video-file"] * 2
    assert configs and set(configs) == {"4"}


def test_trackio_goes_on_with_the_same_run(vae_settings: Any, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    place = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, env=place, cwd=ROOT, text=True, stdout=-1)
        assert done.returncode == 0
        return done.stdout

    file = tmp_path / "settings.json"
    for steps in (3, 6):
        settings = vae_settings(trackers=["trackio"], steps=steps)
        file.write_text(settings.model_dump_json())
        told = run("-m", "trainer.train", "--config", str(file))
        assert told == f"checkpoint: {settings.output / f'checkpoint-{steps}'}\n"
    name = "out-" + json.loads((settings.output / "trackers.json").read_text())["run"]
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as s; print(json.dumps("
        f"[s.get_runs('vidpipe'), s.get_logs('vidpipe', {name!r}), "
        f"s.get_run_config('vidpipe', {name!r})], default=str))"
    )
    runs, logs, config = json.loads(run("-c", script))
    assert len(runs) == 1 and name in str(runs)
    assert sorted(log["step"] for log in logs if "loss" in log) == [1, 2, 3, 4, 5, 6]
    assert sorted(log["step"] for log in logs if "samples" in log) == [3, 6]
    assert config["batch_size"] == 4
    assert len(list((tmp_path / "trackio" / "media").rglob("*.gif"))) == 2


def test_a_tracker_that_cannot_begin_is_told(
    make_index: Any,
    settings_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_of(make_index())
    (settings.output).mkdir()
    (settings.output / "logs").touch()  # where TensorBoard's folder is to be
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    assert main(["--config", str(file)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("vidpipe train: train.trackers: one of tensorboard cannot begin: ")


def test_a_tracker_that_fails_ends_no_training(
    vae_settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At steps 2 to 4, at what it is shown, and when it is ended."""
    log, finish = TensorBoardTracker.log, TensorBoardTracker.finish

    def fails(tracker: Any, values: Any, step: int, **options: Any) -> None:
        if 2 <= step <= 4:
            raise ConnectionResetError("the server is gone\nsince yesterday")
        log(tracker, values, step, **options)

    def cannot_finish(tracker: Any) -> None:
        finish(tracker)
        raise RuntimeError

    def cannot_show(*values: Any) -> None:
        raise ValueError("no such picture")

    monkeypatch.setattr(TensorBoardTracker, "log", fails)
    monkeypatch.setattr(TensorBoardTracker, "finish", cannot_finish)
    monkeypatch.setattr(trackers, "_to_tensorboard", cannot_show)
    settings = vae_settings(steps=6)
    saved = train(settings)
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if ": tensorboard " in line]
    why = "tensorboard cannot be told, which ends no training"
    assert told == [
        f"step 2: {why}: ConnectionResetError: the server is gone",
        "step 5: tensorboard can be told again",
        f"step 6: {why}: ValueError: no such picture",
    ]
    assert saved.name == "checkpoint-6" and captured.out == f"checkpoint: {saved}\n"
    found = EventAccumulator(str(settings.output / "logs" / "vidpipe")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 5, 6]
