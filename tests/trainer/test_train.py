from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from manifests.shards import write_index
from trainer import losses as losses_of
from trainer import objectives
from trainer.config import SettingsError, TrainSettings
from trainer.train import Diverged, main, train

ROOT = Path(__file__).parents[2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def losses(told: str) -> dict[str, str]:
    lines = [line.split() for line in told.splitlines() if line.startswith("step ")]
    return {words[1].split("/")[0]: words[3] for words in lines}


def run_main(settings: TrainSettings, tmp_path: Path) -> int:
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    return main(["--config", str(file)])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_in_two_parts_is_bit_for_bit_one(
    accumulation: int,
    make_index: Any,
    settings_of: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = make_index()  # 21 clips: epochs end within batches
    common = {"gradient_accumulation": accumulation, "caption_dropout": 0.5}
    whole = train(settings_of(made, output=str(tmp_path / "whole"), **common))
    one = losses(capsys.readouterr().err)
    train(settings_of(made, steps=3, **common))
    parts = train(settings_of(made, steps=6, **common))
    told = capsys.readouterr().err
    assert "goes on from" in told and "steps 3 to 6" in told
    assert losses(told) == one and len(one) == 6
    assert weights(whole).keys() == weights(parts).keys()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[name]), name
    assert weights(whole)["unembed.weight"].any()


@pytest.mark.parametrize(
    "objective",
    [
        {"objective": "flow", "shift": 2.0},
        {"objective": "epsilon"},
        {"objective": "v_prediction", "zero_terminal_snr": True, "loss_weight": "min_snr"},
    ],
)
def test_a_few_clips_are_learnt(
    objective: dict[str, Any], make_index: Any, settings_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(sizes=(4,), mean=lambda i: (-3.0, -1.0, 1.0, 3.0)[i])
    values = {"steps": 60, "log_every": 20, "save_every": 60, "batch_size": 8}
    train(settings_of(made, learning_rate=1e-2, **objective, **values))
    first, _, last = (float(loss) for loss in losses(capsys.readouterr().err).values())
    assert last < 0.7 * first


def test_what_a_run_leaves(
    make_index: Any, settings_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index()
    settings = settings_of(made, steps=4, save_every=1, keep=2)
    assert run_main(settings, tmp_path) == 0
    told = capsys.readouterr()
    out = settings.output
    assert told.out == f"checkpoint: {out}/checkpoint-4\n"
    assert "step 4/4  loss " in told.err and "clips/s" in told.err and "data wait" in told.err
    assert {f.name for f in out.iterdir()} == {
        "checkpoint-3",
        "checkpoint-4",
        "last.json",
        "logs",
        "model",
    }
    assert json.loads((out / "last.json").read_text())["checkpoint"] == "checkpoint-4"
    assert list((out / "logs").rglob("events.out.tfevents*"))
    exported = weights(out / "model")
    for name, value in weights(out / "checkpoint-4").items():
        assert torch.equal(value, exported[name])
    # Again there is nothing left to train, and nothing changes.
    for steps in (4, 3):
        assert run_main(settings.model_copy(update={"steps": steps}), tmp_path) == 0
        again = capsys.readouterr().err
        assert "steps 4 to 4" in again
        assert f"4 steps are done, and train.steps is {steps}: raise it to train on" in again


def test_times_are_shifted_by_the_tokens_of_a_clip(make_index: Any, settings_of: Any) -> None:
    made, visits = make_index(sizes=(1,)), [(0, "a"), (3, "b")]
    plain = losses_of.draw_times(settings_of(made), visits, 8)
    shift_tokens = [[2, 0.0], [8, 1.0]]
    for tokens, mu in ((5, 0.5), (80, 1.0)):
        moved = losses_of.draw_times(settings_of(made, shift_tokens=shift_tokens), visits, tokens)
        torch.testing.assert_close(torch.logit(moved), torch.logit(plain) + mu)
    steps = losses_of.draw_times(settings_of(made, objective="epsilon"), visits, 64) * 1000
    assert torch.equal(steps, steps.round())


def test_a_changed_weight_decay_counts_after_resume(make_index: Any, settings_of: Any) -> None:
    made = make_index()
    train(settings_of(made, steps=3, weight_decay=0.0))
    kept = train(settings_of(made, steps=6, weight_decay=0.5))
    state = torch.load(kept / "optimizer.bin", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.0]


# ----------------------------------------------------------------------------- how it ends badly


def test_no_finite_loss_stops_with_step_and_clip(
    make_index: Any, settings_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(mean=lambda i: np.inf if i == 2 else 0.0)
    settings = settings_of(made, steps=20, save_every=1)
    with pytest.raises(Diverged):
        train(settings)
    assert run_main(settings, tmp_path) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    bad = list(made.clips)[2]
    last = json.loads((settings.output / "last.json").read_text())
    assert f"no finite number at step {last['step'] + 1}, of clips {bad}: " in told
    assert "with a lower train.learning_rate from " in told, "bf16 is no remedy in float32"
    assert f"from the last good checkpoint, {settings.output / last['checkpoint']}." in told
    batch = told.split("The batch: ")[1].split(", ")
    assert len(batch) == settings.batch_size and bad in batch and set(batch) <= set(made.clips)
    for folder in settings.output.glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in weights(folder).values())


def test_no_finite_gradient_stops_before_the_weights_take_it(
    make_index: Any, settings_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a loss is finite and its square root at 0 has no derivative."""
    made = make_index()
    plain = objectives.losses

    def rooted(*arguments: Any) -> torch.Tensor:
        found = plain(*arguments)
        return found + (found - found.detach()).abs().sqrt()

    monkeypatch.setattr(objectives, "losses", rooted)
    settings = settings_of(made)
    with pytest.raises(Diverged, match=r"gradient is no finite number at step 1: .*from the start"):
        train(settings)
    assert not list(settings.output.glob("checkpoint-*"))


def empty(made: Any) -> None:
    index = made.open()
    write_index(made.url, index.workdir, [], index.spec, {})


def no_shard(made: Any) -> None:
    made.shards["encode/f/u01.parquet"].unlink()


def cut_shard(made: Any) -> None:
    file = made.shards["encode/f/u01.parquet"]
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "values", "told"),
    [
        (empty, {}, "has no clips"),
        (lambda made: Path(made.url).unlink(), {}, "no index at"),
        (lambda made: None, {"expect": {"fps": 24}}, "train.expect.fps is 24.0"),
        (lambda made: None, {"mixed_precision": "fp16"}, "train.mixed_precision is fp16"),
        (lambda made: None, {"output": "/dev/null/out"}, "train.output cannot be written"),
        (no_shard, {}, "shard encode/f/u01.parquet is missing from "),
        (no_shard, {}, "`vidpipe verify` tells what else is"),
        (cut_shard, {}, "shard encode/f/u01.parquet"),
        (cut_shard, {}, "`vidpipe verify --repair` has it made again"),
        (lambda made: None, {"validation": {"share": 1e-9}}, "holds back 0 of 21 clips"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    spoil: Any,
    values: dict[str, Any],
    told: str,
    make_index: Any,
    settings_of: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if values.get("mixed_precision") and torch.cuda.is_available():
        pytest.skip("a GPU can do that")
    made = make_index()
    spoil(made)
    assert run_main(settings_of(made, **values), tmp_path) == 2
    found = capsys.readouterr().err
    assert told in found[found.index("vidpipe train: ") :] and "Traceback" not in found


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("AdamW-8bit", "Did you mean adamw_8bit?"),
        ("prodigi", "Did you mean prodigy?"),
        ("sgd", "'adamw_offload' or 'prodigy'\n"),
    ],
)
def test_an_unknown_optimiser_is_told_by_the_nearest_name(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"index": "i", "output": "o", "optimizer": name}))
    assert main(["--config", str(file)]) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"vidpipe train: train.optimizer is \"{name}\": it must be 'adamw', ")
    assert told in found and len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"optimizer": "prodigy", "learning_rate": 1},
            "pip install prodigyopt, or set it to adamw",
        ),
        ({"trackers": ["wandb"]}, "train.trackers names wandb, .* pip install wandb, or leave it"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_loaded(
    values: dict[str, Any],
    told: str,
    make_index: Any,
    settings_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("prodigyopt", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    settings = settings_of(make_index(), **values)
    with pytest.raises(SettingsError, match=told):
        train(settings)
    assert not settings.output.exists()


def test_another_model_is_refused(
    make_index: Any, settings_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index()
    settings = settings_of(made, steps=3)
    train(settings)
    other = {"width": 64, "depth": 1, "heads": 2, "patch": [2, 2, 2]}
    assert run_main(settings_of(made, model=other), tmp_path) == 2
    told = capsys.readouterr().err
    assert "model.width is 64, not 32" in told and "checkpoint-3" in told


def test_a_process_is_told_to_stop_and_saves(
    make_index: Any, settings_of: Any, tmp_path: Path
) -> None:
    made = make_index()
    settings = settings_of(made, steps=100_000, save_every=100_000)
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    command = [sys.executable, "-m", "trainer.train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=-1
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line.startswith("step 2/"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 0
        (saved,) = settings.output.glob("checkpoint-*")
        assert f"stopped at step {saved.name.split('-')[1]} of 100000" in rest
        assert process.stdout.read() == f"checkpoint: {saved}\n"


def test_settings_that_are_wrong_give_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"index": "i", "output": "o", "bach_size": 3}))
    done = subprocess.run(
        [sys.executable, "-m", "trainer.train", "--config", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vidpipe train: train.bach_size is unknown: did you mean")
    assert len(done.stderr.splitlines()) == 1
