"""So many rows of a run are looked at again, whatever the number of units and workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from toys import Looking, pipeline

from pipeline.report import Reporter
from pipeline.resources import spread
from pipeline.run import run
from pipeline.unit import Retry

CAPTIONS = ["a", "empty", "b", "c"] * 12


class Heard(Reporter):
    def __init__(self) -> None:
        self.looked_at: list[str] = []

    def note(self, text: str) -> None:
        if text.startswith("looked at "):
            self.looked_at.append(text.split()[-1])


def looked_at(folder: Path, captions: list[str], most: int, **how: Any) -> list[str]:
    settings = {"looking": {"most": most, **how.pop("stage", {})}}
    heard = Heard()
    made = pipeline(folder, captions, [Looking], settings, how)
    result = run(made, (), Retry(), heard)
    assert not result.faults and not result.status["looking"].pending
    assert len(set(heard.looked_at)) == len(heard.looked_at)
    return heard.looked_at


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_so_many_of_a_run_by_one_worker(tmp_path: Path, most: int, isolate: bool) -> None:
    assert len(looked_at(tmp_path, CAPTIONS, most, isolate=isolate)) == most
    assert not looked_at(tmp_path, CAPTIONS, most, isolate=isolate), "nothing was to be done"
    assert len(looked_at(tmp_path, [*CAPTIONS, "new"], most, isolate=isolate)) == min(1, most)


def test_so_many_of_a_run_by_workers_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    how = {"runner": "ray", "address": ray_address, "isolate": True}
    stage = {"workers": 3, "cpus": 0.3}
    assert len(looked_at(tmp_path, CAPTIONS, 5, stage=stage, **how)) == 5


@pytest.mark.parametrize("isolate", [False, True])
def test_units_that_come_to_nothing_pass_theirs_on(tmp_path: Path, isolate: bool) -> None:
    captions = ["empty"] * 8 + ["a"] * 4 + ["empty"] * 8
    assert 1 <= len(looked_at(tmp_path, captions, 2, isolate=isolate)) <= 2


def test_the_first_is_of_the_first_and_the_others_are_of_any() -> None:
    assert spread(0, ["a", "b"]) == spread(3, []) == Counter()
    assert all(spread(1, ["a", "b", "c"]) == {"a": 1} for _ in range(20))
    drawn = [spread(3, list("abcd")) for _ in range(200)]
    assert all(one["a"] >= 1 and one.total() == 3 for one in drawn)
    assert {unit for one in drawn for unit in one} == set("abcd")
