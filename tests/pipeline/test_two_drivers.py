"""Two `vidpipe run` at once on one workdir: both finish, and nothing stands twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from commands import Command, account, project

from pipeline import config, dag
from pipeline.dag import Pipeline
from stages.demo.shapes import make_demo

ENCODING = """\
source: {kind: openvid, path: ./clips.csv, root: ./videos}
sampling: {fps: 16, frames: 8, size: 16, fit: crop}
filter: {rules: {length: "len == 8"}}
recaption: {enabled: false}
score: {enabled: false}
encode: {vae: "demo://vae"}
run: {runner: local, unit_size: 5}
"""


def settled(made: Pipeline, stage: str) -> Counter[tuple[str, str]]:
    """How often each clip stands in the stage's commits under each row key."""
    log = made.dag.log(made.store, stage)
    return Counter(
        (row["clip_id"], row["row_key"])
        for unit in log.units()
        for commit in log.commits(unit)
        if commit.data
        for row in made.store.read_parquet(log.data_name(unit, commit)).to_pylist()
    )


def both(folder: Path) -> list[Command]:
    drivers = [Command(folder, "run"), Command(folder, "run")]
    for driver in drivers:
        assert driver.wait(240) == 0, driver.said
        assert "raised" not in driver.said
    assert not any(driver.left() for driver in drivers)
    return drivers


@pytest.mark.parametrize("run", ["runner: local", "runner: local, isolate: false"])
def test_toy_stages(tmp_path: Path, run: str) -> None:
    captions = [f"0.02{i:03}" for i in range(120)]
    stages = ["slow=killers:Slow", "killer=killers:Killer"]
    made = project(tmp_path, captions, stages, f"run: {{unit_size: 10, {run}}}\n")
    both(made)
    for stage in ("slow", "killer"):
        found = account(made, stage)
        assert (found["in"], found["kept"]) == (120, 120)
    again = Command(made, "run")
    assert again.wait() == 0 and "nothing to do" in again.said


def test_latents(tmp_path: Path) -> None:
    make_demo(tmp_path, 20)
    (tmp_path / "vidpipe.yaml").write_text(ENCODING)
    both(tmp_path)
    made = dag.build(config.load(str(tmp_path / "vidpipe.yaml")))
    for stage in made.stages:
        found = settled(made, stage)
        assert found and set(found.values()) == {1}, stage
    kept = account(tmp_path, "encode")["kept"]
    log = made.dag.log(made.store, "encode")
    files = [
        log.data_name(unit, commit)
        for unit in log.units()
        for commit in log.commits(unit)
        if commit.data
    ]
    latents = [
        n for f in files for n in made.store.read_parquet(f)["latents"].is_valid().to_pylist()
    ]
    assert sum(latents) == kept > 0
    on_disk = {p.name for p in (tmp_path / "work" / "encode").rglob("*.parquet")}
    assert on_disk == {Path(f).name for f in files}, "what lost the race is gone"
