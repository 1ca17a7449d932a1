"""Estimates against the truth, on stages whose costs are known; and that nothing is touched."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from naps import Dream, Gate, Keep, Nap, Open, Where
from s3_faults import BUCKET, Proxy
from toys import Echo, Length, Limit, Shout, Words, pipeline

from manifests.credentials import Credentials
from pipeline.account import account
from pipeline.dag import Pipeline, build
from pipeline.errors import RunError
from pipeline.estimate.estimate import PREFIX, Estimate, StageEstimate, estimate
from pipeline.estimate.pilot import _Listener
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.encode import BESIDE


class Heard(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Samples go here, and nothing of them stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def naps(number: int, mean: float = 10.0, seed: int = 1) -> list[str]:
    """Captions that keep 40%, with a long tail of times."""
    rng = random.Random(seed)
    lengths = [max(1, round(rng.expovariate(1 / mean))) for _ in range(number)]
    return [f"{n} keep" if rng.random() < 0.4 else f"{n} drop" for n in lengths]


def seconds(captions: Sequence[str]) -> float:
    return sum(int(c.split()[0]) for c in captions) / 1000


def of(found: Estimate, name: str) -> StageEstimate:
    return next(stage for stage in found.stages if stage.name == name)


def looked(p: Pipeline, names: Sequence[str] = (), clips: int = 80, **more: Any) -> Estimate:
    return estimate(
        p, names, clips, more.get("seed", 0), more.get("gpus"), more.get("report", Reporter())
    )


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder, with what is in it and when it was written."""
    return {
        str(path.relative_to(folder)): f"{path.stat().st_mtime_ns} "
        + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def test_the_truth_is_where_the_intervals_say(tmp_path: Path) -> None:
    captions = naps(300, 100.0)  # long, as a busy machine lets one sleep some ms more
    found = looked(pipeline(tmp_path, captions, (Nap, Gate, Dream)), clips=40)
    assert (found.clips, found.population, found.sample) == (300, 300, 40)
    kept = [c for c in captions if c.endswith("keep")]
    nap, gate, dream = (of(found, name) for name in ("nap", "gate", "dream"))

    assert nap.rows.value == nap.rows.low == nap.rows.high == 300
    assert nap.need is not None and nap.need.seconds.low and nap.need.seconds.high
    assert nap.need.seconds.low <= seconds(captions) / 300 <= nap.need.seconds.high

    assert gate.rows.value == 300  # nap keeps all
    assert gate.tried.kept + gate.tried.rejected["dropped"] == gate.tried.total == 40

    assert dream.rows.low is not None and dream.rows.high is not None
    assert dream.rows.low <= len(kept) <= dream.rows.high < 200
    assert dream.need is not None and 0.3 <= dream.need.start < 3
    tokens = dream.amounts["tokens"]
    assert tokens.value == pytest.approx(10 * dream.rows.value)
    assert tokens.low is not None and tokens.low <= 10 * len(kept) <= (tokens.high or 0)
    ms = dream.amounts["ms"]
    assert ms.low is not None and ms.low <= 1000 * seconds(kept) <= (ms.high or 0)
    # A payload of 10,000 bytes is not compressed, and a file has some thousand bytes of its own.
    assert 10_000 <= dream.disk.value / dream.rows.value < 13_000

    assert found.here is not None and found.here.hours.low and found.here.hours.high
    truth = seconds(captions) + seconds(kept) + 0.3
    assert found.here.hours.low <= truth / 3600 <= found.here.hours.high
    assert found.here.hours.high < 3 * found.here.hours.low
    assert found.here.bound == "nap"


def test_the_truth_is_there_as_often_as_it_should(tmp_path: Path) -> None:
    """By what is counted, which no busy machine disturbs: 90% intervals, 14 samples."""
    captions = naps(400, 25.0)
    rows = {"unit_size": 50}
    p = pipeline(tmp_path, captions, (Nap, Gate, Dream), {"nap": {"pace": 0.0}}, rows)
    held = 0
    for seed in range(14):
        ms = of(looked(p, ["nap"], 60, seed=seed), "nap").amounts["ms"]
        held += ms.low is not None and ms.low <= 1000 * seconds(captions) <= (ms.high or 0)
    assert held >= 11


def test_the_workdir_is_left_as_it_is(tmp_path: Path) -> None:
    p = pipeline(tmp_path, naps(40, 1), (Nap, Gate, Dream))
    looked(p, clips=10)
    assert not (tmp_path / "work").exists()
    run(p, ["nap"], Retry(), Reporter())
    before = tree(tmp_path / "work")
    # New rows of the source are seen, and not taken in.
    p = pipeline(tmp_path, naps(40, 1) + ["1 keep"] * 8, (Nap, Gate, Dream))
    found = looked(p, clips=30)
    assert found.clips == 48 and of(found, "nap").rows.value == 8
    assert tree(tmp_path / "work") == before


def test_the_sample_follows_from_the_seed_and_is_spread_over_the_source(tmp_path: Path) -> None:
    captions = [f"0 x{i}" for i in range(400)]
    p = pipeline(tmp_path, captions, (Nap, Gate, Dream), run={"unit_size": 20})
    shares = [looked(p, ["gate"], 200, seed=seed) for seed in (5, 5, 6)]
    assert of(shares[0], "gate").tried == of(shares[1], "gate").tried
    drops = pipeline(
        tmp_path, ["0 drop"] * 200 + ["0 keep"] * 200, (Nap, Gate, Dream), run={"unit_size": 100}
    )
    tried = of(looked(drops, ["gate"], 100), "gate").tried
    assert 35 <= tried.kept <= 65  # not the first ones, nor all of one unit


def test_what_is_settled_is_not_tried_again(tmp_path: Path) -> None:
    captions = naps(60, 1)
    p = pipeline(tmp_path, captions, (Nap, Gate, Dream))
    run(p, ["gate"], Retry(), Reporter())
    found = looked(p, clips=500)
    assert [stage.name for stage in found.stages] == ["dream"]
    kept = sum(c.endswith("keep") for c in captions)
    assert found.population == found.sample == kept
    assert of(found, "dream").rows.value == of(found, "dream").tried.total == kept
    assert any(f"only {kept} have work to do" in note for note in found.notes)


def test_half_done_work_counts_what_is_left(tmp_path: Path) -> None:
    """Of 40 clips 16 went through all; another 24 came later."""
    captions = ["1 keep", "2 drop"] * 20
    run(pipeline(tmp_path, captions[:16], (Nap, Gate, Dream)), (), Retry(), Reporter())
    p = pipeline(tmp_path, captions, (Nap, Gate, Dream))
    run(p, ["nap"], Retry(), Reporter())
    found = looked(p, clips=24)
    assert (found.clips, found.population) == (40, 24)
    assert of(found, "gate").rows.value == 24
    assert of(found, "dream").rows.value == of(found, "dream").rows.high == 12


def test_nothing_to_do(tmp_path: Path) -> None:
    p = pipeline(tmp_path, ["1 keep"] * 4, (Nap, Gate, Dream))
    run(p, (), Retry(), Reporter())
    found = looked(p)
    assert found.stages == [] and found.here is None and found.population == 0


def test_parts_of_clips_are_reckoned_with(tmp_path: Path) -> None:
    captions = ["a b c", "d", "e f", "g h i j"] * 25
    found = looked(pipeline(tmp_path, captions, (Length, Words, Echo)), clips=40)
    echo = of(found, "echo")
    assert echo.rows.low is not None and echo.rows.low <= 250 <= (echo.rows.high or 0)
    assert echo.tried.total > 60
    run(pipeline(tmp_path, captions, (Length, Words, Echo)), ["words_of"], Retry(), Reporter())
    known = looked(pipeline(tmp_path, captions, (Length, Words, Echo)), clips=40)
    assert [stage.name for stage in known.stages] == ["echo"]
    assert of(known, "echo").rows.value == of(known, "echo").rows.high == 250


def test_failures_of_the_sample_are_told(tmp_path: Path) -> None:
    captions = ["bad", "", "one two", "three"] * 20
    found = looked(pipeline(tmp_path, captions, (Length, Limit, Shout)), clips=80)
    length = of(found, "length").tried
    assert length.failed == {"bad_caption": 20} and length.rejected == {"empty": 20}
    assert of(found, "shout").rows.value == 40


def test_a_stage_that_raises_has_its_error_told_and_the_rest_is_reckoned(tmp_path: Path) -> None:
    p = pipeline(tmp_path, naps(60, 1), (Nap, Gate, Dream), {"dream": {"raises": "all"}})
    found = looked(p, clips=60)
    assert [stage.name for stage in found.faults] == ["dream"]
    dream = of(found, "dream")
    assert dream.error == "ZeroDivisionError: a fault of the stage" and dream.need is None
    assert dream.trace is not None and "raise ZeroDivisionError" in dream.trace
    assert any("dream raised ZeroDivisionError" in n and "none was" in n for n in found.notes)
    assert found.here is not None and [s.name for s in found.here.stages] == ["nap", "gate"]


def test_a_stage_that_raises_at_some_rows_is_reckoned_by_the_others(tmp_path: Path) -> None:
    captions = [f"1 x{i} keep" for i in range(80)]
    p = pipeline(tmp_path, captions, (Nap, Gate, Dream), {"dream": {"raises": captions[7]}})
    found = looked(p, clips=80)
    dream = of(found, "dream")
    assert dream.need is not None and dream.error and 60 <= dream.tried.total < 80
    assert dream.rows.value == 80
    assert any(f"({dream.tried.total} rows were settled)" in note for note in found.notes)


def test_what_a_fault_hides_of_later_stages_is_not_taken_for_nothing(tmp_path: Path) -> None:
    """Where nothing comes through a stage that raises, what comes after it is unknown."""
    captions = ["crash"] + ["one"] * 3  # one group, its stage raises at the first batch
    found = looked(pipeline(tmp_path, captions, (Length, Limit, Shout)), clips=4)
    assert [stage.name for stage in found.faults] == ["length"]
    shout = of(found, "shout")
    assert shout.need is None and not shout.rows.known
    assert any("none of the sample came to shout" in note for note in found.notes)
    assert found.here is None


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    p = pipeline(
        tmp_path, ["1 keep"] * 60, (Nap, Gate, Dream), {"dream": {"gpu": True}},
        run={"runner": "ray"},
    )  # fmt: skip
    found = looked(p, clips=60, gpus=4)
    dream = of(found, "dream")
    assert (dream.device, dream.meant) == ("cpu", "gpu")
    assert any("dream: meant for a GPU, and tried on a CPU" in note for note in found.notes)
    assert found.here is not None and found.here.gpus == 0
    assert found.there is not None and found.there.gpus == 4
    workers = {stage.name: stage for stage in found.there.stages}
    assert (workers["dream"].workers, workers["dream"].gpus) == (4, 1)
    each = {stage.name: stage.hours.value for stage in found.here.stages}
    assert workers["dream"].hours.value < each["dream"]


def test_files_beside_the_commits_count_and_are_not_made_again(tmp_path: Path) -> None:
    p = pipeline(tmp_path, ["1 keep"] * 30, (Keep, Open))
    found = looked(p, clips=20)
    assert 5000 * 30 <= of(found, "keep").disk.value < 7000 * 30
    assert of(found, "open").tried == of(found, "keep").tried
    run(p, ["keep"], Retry(), Reporter())
    again = looked(p, clips=20)
    assert [stage.name for stage in again.stages] == ["open"]
    assert of(again, "open").tried.kept == 20  # of the workdir's own files


def test_disk_is_what_a_run_then_takes(tmp_path: Path) -> None:
    """Of stages that make little, groups of few rows pack less well: at most as much."""
    p = pipeline(tmp_path, naps(400, 1), (Nap, Gate, Dream), run={"unit_size": 100})
    found = looked(p, clips=80)
    run(p, (), Retry(), Reporter())
    for stage in found.stages:
        files = p.store.listing(f"{stage.name}/").items()
        taken = sum(file.size for name, file in files if name.endswith(".parquet"))
        most = 1.1 if stage.name == "dream" else 3
        assert 0.85 * taken < stage.disk.value < most * taken


def test_no_room_for_the_sample(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toys import Heavy

    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    p = pipeline(tmp_path, ["one"] * 8, (Length, Limit, Heavy))
    report = Heard()
    with pytest.raises(RunError, match=r"the disk is full.*TMPDIR names another folder"):
        looked(p, clips=8, report=report)
    assert any("warning" in note and "where the sample goes" in note for note in report.notes)
    assert not list(small_disk.glob(f"{PREFIX}*"))
    assert account(p)["stages"][1]["pending"] == 0  # nothing was ever taken in


def test_secrets_of_the_sample_are_forgotten(tmp_path: Path) -> None:
    rows = [
        {"path": f"https://u:p{i}@h.invalid/{i}.mp4?token=s{i}", "text": "1 keep"}
        for i in range(20)
    ]
    table = tmp_path / "clips.jsonl"
    p = pipeline(tmp_path, ["x"], (Nap, Gate))
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    p = build(replace(p.config))
    home = Path(os.environ["XDG_STATE_HOME"]) / "vidpipe"
    before = set(home.glob("*")) if home.exists() else set()
    assert of(looked(p, clips=20), "nap").tried.kept == 20
    assert set(home.glob("*")) == before
    run(p, ["nap"], Retry(), Reporter())
    assert Credentials(p.config.workdir)
    looked(p, clips=20)
    assert Credentials(p.config.workdir)


def test_nobody_is_sent_to_latents_that_are_gone() -> None:
    told: list[str] = []

    class Told(Reporter):
        def note(self, text: str) -> None:
            told.append(text)

    _Listener(Told()).note(f"warning: latents of clip c do not look like it: 1 dB. {BESIDE} c`")
    _Listener(Told()).note("12 rows")
    assert told == ["warning: latents of clip c do not look like it: 1 dB.", "12 rows"]


def test_the_sample_is_run_by_a_process_of_its_own(tmp_path: Path) -> None:
    p = pipeline(tmp_path, ["1 keep"] * 12, (Nap, Gate, Dream), run={"isolate": True})
    found = looked(p, clips=12)
    assert of(found, "dream").tried.kept == 12 and of(found, "dream").tried.total == 12


def test_a_worker_has_its_share_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    cores = os.sched_getaffinity(0)
    told = []
    for runner in ("ray", "local"):
        p = pipeline(tmp_path, ["1 keep"] * 4, (Where,), run={"runner": runner, "isolate": True})
        report = Heard()
        looked(p, clips=4, report=report)
        told.append(report.notes)
    assert told == [
        ["1 cores, 1 threads, GPUs ''"],
        [f"{len(cores)} cores, None threads, GPUs None"],
    ]
    assert os.sched_getaffinity(0) == cores and "OMP_NUM_THREADS" not in os.environ


def test_a_workdir_on_s3_is_only_read(tmp_path: Path, s3: Proxy) -> None:
    made = pipeline(tmp_path, naps(30, 1), (Nap, Gate, Dream))
    p = build(replace(made.config, workdir=f"s3://{BUCKET}/work"))
    run(p, ["nap"], Retry(), Reporter())
    before = p.store.listing("")
    found = looked(p, clips=30)
    assert [stage.name for stage in found.stages] == ["gate", "dream"]
    assert of(found, "gate").tried.total == 30
    assert p.store.listing("") == before


def test_what_waits_is_not_multiplied_in_silence(tmp_path: Path) -> None:
    captions = ["120 keep"] * 24
    run_settings = {"runner": "ray", "isolate": True}
    p = pipeline(tmp_path, captions, (Nap, Gate, Dream), run=run_settings)
    waits = [n for n in looked(p, ["nap"], 24, gpus=8).notes if n.startswith("nap: its worker had")]
    assert len(waits) == 1 and "waited for a network, a server or a disk" in waits[0]
    local = pipeline(tmp_path, captions, (Nap, Gate, Dream), run={"isolate": True})
    assert not [n for n in looked(local, ["nap"], 24).notes if "its worker had" in n]
