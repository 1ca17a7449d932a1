"""A few rounds of the crash harness; `make faults ROUNDS=200` plays many."""

from __future__ import annotations

from pathlib import Path

import pytest
from crashes import Crash, Harness
from evidence import opened, wrong

from manifests.scans import SCANS, scans

QUICK = [
    Crash("local", "driver", "half commit", 11),  # the record of the scan, after ten units
    Crash("local", "driver", "half data", 4),
    Crash("local", "worker", "after data", 2),
    Crash("local", "driver", "after commit", 5),
    Crash("local", "driver", "half compaction", 1),
    Crash("ray", "driver", seconds=0.2),
    Crash("ray", "node", seconds=0.3, begun="chant"),  # Ray notices seconds after its actors
]


@pytest.fixture(scope="module")
def harness(own_folders: Path) -> Harness:
    return Harness(own_folders.with_name("crashes"), seed=0)


def test_nothing_is_lost_doubled_or_different_after_crashes(harness: Harness) -> None:
    report = harness.rounds(QUICK)
    assert not report.faults
    assert report.kills.total() >= 4, str(report)
    assert report.again <= report.bound


def test_the_harness_sees_what_is_wrong(harness: Harness) -> None:
    """What it proves by must be able to fail."""
    file = harness.folder / "undisturbed" / "vidpipe.yaml"
    assert not wrong(file)
    made = opened(file)
    log = made.dag.log(made.store, "encode")
    unit = next(unit for unit in log.units() if any(c.data for c in log.commits(unit)))
    commit = next(c for c in log.commits(unit) if c.data)
    table = made.store.read_parquet(log.data_name(unit, commit))
    log.append(unit, len(log.commits(unit)), commit.inputs, commit.counts, table)
    assert any("several commits" in fault for fault in wrong(file))
    with Path(made.store.path(log.data_name(unit, commit))).open("r+b") as data:
        data.seek(200)
        data.write(b"rot")
    assert any("another sha256" in fault for fault in wrong(file))


def test_a_half_written_record_of_a_scan_is_not_read(harness: Harness) -> None:
    made = opened(harness.folder / "undisturbed" / "vidpipe.yaml")
    known = scans(made.store)
    record = Path(made.store.path(SCANS)) / ".000001.json.0123456789abcdef.part"
    record.write_bytes(b'{"rows": 6')
    assert known and scans(made.store) == known
