"""Workers and passes: what fits is started, what does not is said before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toys import Length, Limit, Shout, pipeline

from pipeline import ray_data
from pipeline.config import ConfigError, RunSettings
from pipeline.resources import (
    Offer,
    Workers,
    check_workdir,
    cut,
    gpus_here,
    passes,
    share,
    usable_gpus,
)
from stages.base import Stage


class OnGpu(Shout):
    @property
    def accelerated(self) -> bool:
        return True


def stage(folder: Path, cls: type[Stage[Any, Any]], **settings: Any) -> Stage[Any, Any]:
    return pipeline(folder, ["a"], [Length, Limit, cls], {cls.name: settings}).stages[cls.name]


def test_workers_fill_the_machine_but_never_outnumber_units(tmp_path: Path) -> None:
    assert share(stage(tmp_path, Shout), Offer(8, 0), 100).count == 8
    assert share(stage(tmp_path, Shout), Offer(8, 0), 3).count == 3
    assert share(stage(tmp_path, Shout, workers=2), Offer(8, 0), 100).count == 2
    assert share(stage(tmp_path, Shout, cpus=3), Offer(8, 0), 100).count == 2


def test_a_stage_that_can_takes_one_gpu_a_worker(tmp_path: Path) -> None:
    got = share(stage(tmp_path, OnGpu), Offer(64, 8), 100)
    assert (got.count, got.gpus) == (8, 1.0)
    assert got.cpus == 6, "three quarters of the cores make its rows ready"
    assert share(stage(tmp_path, OnGpu, cpus=2), Offer(64, 8), 100).cpus == 2
    assert share(stage(tmp_path, OnGpu), Offer(8, 8), 100).cpus == 1
    assert share(stage(tmp_path, OnGpu), Offer(4, 0), 100).gpus == 0
    assert share(stage(tmp_path, OnGpu, gpus=0.5), Offer(64, 8), 100).count == 16


def test_what_does_not_fit_names_stage_and_setting(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"shout: one worker takes 4 cpus .* there are 2.*shout.cpus"
    ):
        share(stage(tmp_path, Shout, cpus=4), Offer(2, 0), 1)
    with pytest.raises(ConfigError, match=r"shout: 3 workers of 1 cpus don't fit in 2"):
        share(stage(tmp_path, Shout, workers=3), Offer(2, 0), 9)
    with pytest.raises(ConfigError, match=r"--gpus 8: this machine has 0"):
        usable_gpus(RunSettings(gpus=8), 0)
    assert usable_gpus(RunSettings(gpus=2), 8) == 2
    assert usable_gpus(RunSettings(), 8) == 8


def task() -> Workers:
    return Workers(2, 1, 0, 0, actor=False)


def actor(count: int, cpus: float = 1, gpus: float = 0) -> Workers:
    return Workers(count, cpus, gpus, 0, actor=True)


def chained(workers: dict[str, Workers], offer: Offer, mode: str = "auto") -> list[tuple[str, ...]]:
    return [part.stages for part in passes(workers, offer, mode, list(workers))]


def test_stages_are_chained_as_far_as_they_fit() -> None:
    two_models = {"probe": task(), "filter": task(), "caption": actor(2), "encode": actor(2)}
    assert chained(two_models, Offer(2, 0)) == [("probe", "filter"), ("caption",), ("encode",)]
    assert chained(two_models, Offer(5, 0)) == [("probe", "filter", "caption", "encode")]
    assert chained(two_models, Offer(5, 0), "pipelined") == [tuple(two_models)]
    with pytest.raises(ConfigError, match="side by side take more CPUs than there are"):
        chained(two_models, Offer(2, 0), "pipelined")
    assert chained(two_models, Offer(64, 0), "staged") == [(name,) for name in two_models]


def test_a_task_behind_actors_that_hold_all_cpus_gets_a_pass_of_its_own() -> None:
    workers = {"probe": task(), "score": actor(2), "filter": task(), "encode": actor(2)}
    assert chained(workers, Offer(2, 0)) == [("probe",), ("score",), ("filter",), ("encode",)]


def test_two_models_never_share_a_gpu() -> None:
    gpus = {"probe": task(), "caption": actor(1, 1, 1), "encode": actor(1, 1, 1)}
    assert chained(gpus, Offer(64, 1)) == [("probe", "caption"), ("encode",)]
    assert chained(gpus, Offer(64, 2)) == [("probe", "caption", "encode")]
    why = passes(gpus, Offer(64, 1), "auto", list(gpus))[0].why
    assert "encode beside caption would take more GPUs" in why


def test_gpus_are_counted_as_torch_counts_them_and_without_it_where_there_are_none() -> None:
    code = (
        "import sys; from pipeline.resources import gpus_here;"
        "print(gpus_here(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import torch

    assert gpus_here() == torch.cuda.device_count()
    assert done.stdout.split()[0] == str(gpus_here())
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/kfd").exists():
        assert done.stdout.split()[1] == "False"


def test_a_stage_whose_equal_rows_go_to_one_worker_stands_alone() -> None:
    once = Workers(2, 1, 0, 0, actor=True, once=True)
    workers = {"probe": task(), "caption": actor(1), "embed": once, "encode": actor(1)}
    wanted = [("probe", "caption"), ("embed",), ("encode",)]
    assert chained(workers, Offer(64, 0)) == wanted
    assert chained(workers, Offer(64, 0), "pipelined") == wanted
    why = passes(workers, Offer(64, 0), "auto", list(workers))[0].why
    assert why == "equal rows of embed go to one worker, of all units"


@pytest.mark.parametrize(
    ("count", "rows", "parts"), [(1, 8192, 1), (2, 64, 4), (8, 8192, 32), (64, 8192, 128)]
)
def test_units_are_cut_by_keys_so_that_all_workers_get_some(
    count: int, rows: int, parts: int
) -> None:
    assert cut([Workers(count, 1, 0, 0, actor=True, once=True)], 100, rows) == parts


def test_a_worker_gets_its_part_of_all_units(monkeypatch: pytest.MonkeyPatch) -> None:
    units = ["a", "b", "c"]
    (apart,) = ray_data.waves(units, 2, once=False)
    assert apart == [((unit,), n, 2) for unit in units for n in (0, 1)]
    (together,) = ray_data.waves(units, 2, once=True)
    assert together == [(("a", "b", "c"), 0, 2), (("b", "c", "a"), 1, 2)]
    monkeypatch.setattr(ray_data, "WAVE_UNITS", 4)
    assert [len(wave[0][0]) for wave in ray_data.waves(units, 2, once=True)] == [2, 1]


def test_a_workdir_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    check_workdir(str(tmp_path / "new" / "deep"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can't be written: .*--set workdir"):
        check_workdir(str(tmp_path / "file" / "work"))


@pytest.mark.parametrize(
    ("actors", "count", "units", "rows", "parts"),
    [
        (True, 2, 1, 48, 3),  # not below 16 rows
        (True, 8, 1, 1000, 33),
        (True, 8, 122, 8192, 4),  # 1M rows: nor above 2048 rows
        (True, 100, 122, 8192, 4),
        (True, 100, 12, 8192, 34),
        (False, 2, 1, 8192, 8),  # none is without work
        (False, 2, 100, 8192, 1),  # and no more than that
    ],
)
def test_units_are_cut_so_that_all_workers_are_at_work(
    actors: bool, count: int, units: int, rows: int, parts: int
) -> None:
    assert cut([Workers(count, 1, 0, 0, actors)], units, rows) == parts
