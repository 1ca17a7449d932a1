"""A device that is not there is told before anything runs, by every stage that takes one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline import config, dag
from pipeline.config import ConfigError
from stages.base import StageError
from stages.devices import check_device, usable

SECTIONS = {
    "encode": "encode: {device: 'cuda:9'}",
    "recaption": "recaption: {engine: transformers, model: 'demo://captioner', device: cuda}",
}


def test_names_of_devices() -> None:
    assert usable("cpu").type == "cpu" and usable("auto").type in ("cpu", "cuda")
    with pytest.raises(StageError, match="device abacus can't be used: "):
        usable("abacus")
    with pytest.raises(StageError, match="device cuda:99 can't be used: "):
        check_device("cuda:99")


def test_to_look_for_a_gpu_takes_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def taken(*_: object, **__: object) -> None:
        raise AssertionError("the driver would hold a part of the GPU")

    monkeypatch.setattr(torch, "empty", taken)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(StageError, match="device cuda:2 can't be used: PyTorch finds 2 GPUs"):
        check_device("cuda:2")
    with pytest.raises(StageError, match="device cuda:x can't be used: "):
        check_device("cuda:x")


@pytest.mark.parametrize("stage", ["encode", "recaption"])
def test_told_before_the_run_where_the_workers_are_on_this_machine(
    tmp_path: Path, stage: str
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has such a device")
    file = tmp_path / "vidpipe.yaml"
    (tmp_path / "clips.csv").write_text("path,text\n")
    others = "".join(
        f"{name}: {{enabled: false}}\n" for name in ("score", "recaption") if name != stage
    )
    file.write_text(f"source: {{kind: csv, path: ./clips.csv}}\n{others}{SECTIONS[stage]}\n")
    with pytest.raises(ConfigError, match=rf"{stage}: device cuda\S* can't be used: "):
        dag.build(config.load(str(file), ())).bind([stage])
    away = config.load(str(file), ("run.address=auto",))
    dag.build(away).bind([stage])  # the driver's machine need not have what the workers' have


def test_what_is_always_there_costs_no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    check_device("auto")
    check_device("cpu")
