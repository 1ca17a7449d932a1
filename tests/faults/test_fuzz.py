from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from fuzz import fuzz
from fuzz_run import fuzz_run
from mutations import KINDS, boxes, elements, mutated

SMALL = 400_000


@pytest.fixture(scope="module")
def videos(shared_data: Path) -> list[Path]:
    found = sorted((shared_data / "videos").iterdir())
    return [path for path in found if path.stat().st_size < SMALL]


def test_every_damaged_video_is_accounted_for(videos: list[Path]) -> None:
    """A slice of what `make fuzz` does."""
    report = fuzz(videos, seed=7, numbers=range(60))
    assert (report.files, report.unaccounted) == (60, 0), str(report)
    assert not report.raised and not report.hangs and not report.deaths, str(report)
    assert report.kept >= 5 and report.failed.total() >= 20, str(report)
    assert len(report.failed) >= 4, str(report)
    assert report.peak[0] < 1 << 30


def test_a_run_with_supervised_workers_accounts_for_them_too(
    videos: list[Path], tmp_path: Path
) -> None:
    found, said = fuzz_run(videos, 7, range(16), tmp_path)
    assert found.total() == 16 and not found["pending"], said
    assert found["kept"] >= 1
    alone = fuzz(videos, 7, range(16))
    assert found["kept"] == alone.kept
    # An empty file has the same name whoever finds it.
    assert {k: n for k, n in found.items() if n and k not in ("kept", "rejected", "pending")} == (
        dict(alone.failed)
    )


def misbehave(path: Path, start: float | None, end: float | None) -> tuple[str, str]:
    """As broken stages would, by the number of the file."""
    number = int(path.name[:6])
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        raise ZeroDivisionError("a bug")
    if number == 3:
        time.sleep(600)
    return ("kept", "") if number % 2 else ("rejected", "too_short")


def test_the_harness_sees_crashes_exceptions_and_hangs(videos: list[Path], tmp_path: Path) -> None:
    keep = tmp_path / "bad"
    report = fuzz(videos, 0, range(6), keep, misbehave, silence=10.0)
    assert dict(report.failed) == {"killed_worker": 1, "time_limit": 1}
    assert (report.files, report.kept, report.rejected, report.unaccounted) == (6, 1, 2, 1)
    assert len(report.raised) == 1 and "ZeroDivisionError: a bug" in report.raised[0]
    assert len(report.deaths) == 1 and "exit code -11" in report.deaths[0]
    assert len(report.hangs) == 1 and report.hangs[0].startswith("000003-")
    assert sorted(path.name[:6] for path in keep.iterdir()) == ["000001", "000002", "000003"]


def test_a_seed_and_a_number_name_a_file(videos: list[Path]) -> None:
    files = [mutated(videos, 5, number) for number in range(40)]
    assert files == [mutated(videos, 5, number) for number in range(40)]
    assert len({data for _, data in files}) > 35
    assert {word for name, _ in files for word in name.split("-")} & set(KINDS) >= {
        "flip_bits", "truncate", "edit_fields", "double_part",
    }  # fmt: skip


def test_parts_of_containers_are_found(shared_data: Path) -> None:
    mp4 = (shared_data / "videos" / "flower.mp4").read_bytes()
    names = [part.name for part in boxes(mp4)]
    assert names[:2] == ["ftyp", "moov"] and {"stts", "stsz", "stco", "mdat"} <= set(names)
    webm = (shared_data / "videos" / "elf.webm").read_bytes()
    found = list(elements(webm))
    names = [part.name for part in found]
    assert names[:2] == ["1A45DFA3", "18538067"] and {"1654AE6B", "AE", "1F43B675"} <= set(names)
    assert found[1].end == len(webm)
