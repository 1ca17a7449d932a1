from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from manifests.redact import redact
from stages.backoff import retry_after
from stages.transfer import Limits, Stream, TransferError, store

LIMITS = Limits(max_bytes=1 << 20, timeout=1, retries=2, backoff=0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/a.mp4", "https://***@host/a.mp4"),
        ("https://token@host/a.mp4", "https://***@host/a.mp4"),
        ("s3://bucket/a@b.mp4", "s3://bucket/a@b.mp4"),
        (
            "https://h/a?X-Amz-Credential=A%2FB&X-Amz-Date=2026&X-Amz-Signature=ff#t=3",
            "https://h/a?X-Amz-Credential=***&X-Amz-Date=2026&X-Amz-Signature=***#t=3",
        ),
        ("https://h/a?sv=1&sig=ff%3D, said h", "https://h/a?sv=1&sig=*** said h"),
        ("https://h/a?access_token=x&page=2", "https://h/a?access_token=***&page=2"),
        (
            "zip://a::https://u:p@h/b.zip?Key-Pair-Id=9",
            "zip://a::https://***@h/b.zip?Key-Pair-Id=***",
        ),
        ("/videos/token=3/a.mp4", "/videos/token=3/a.mp4"),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert str(TransferError("network", text)) == shown


def test_a_server_may_ask_for_patience() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after("7") == 7.0
    assert 80 < (retry_after(later) or 0) <= 90
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [retry_after(v) for v in (None, "", "soon")] == [None, None, None]


def test_two_workers_bring_one_address_once(tmp_path: Path) -> None:
    opened = threading.Event()
    times = []

    @contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        times.append(start)
        opened.set()

        def chunks() -> Iterator[bytes]:
            yield b"first "
            second.join(0.2)  # the other worker waits all the while
            yield b"second"

        yield Stream(0, 12, "", chunks())

    results = []
    second = threading.Thread(
        target=lambda: (
            opened.wait(20)
            and results.append(store(tmp_path / "media", "a", ".mp4", open_at, LIMITS))
        )
    )
    second.start()
    results.append(store(tmp_path / "media", "a", ".mp4", open_at, LIMITS))
    second.join(20)
    assert results[0] == results[1]
    assert times == [0]
    assert (tmp_path / results[0].path).read_bytes() == b"first second"


def test_a_damaged_record_is_as_good_as_none(tmp_path: Path) -> None:
    @contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        yield Stream(0, None, "", iter([b"abc"]))

    first = store(tmp_path / "media", "a", "", open_at, LIMITS)
    (record,) = (tmp_path / "media" / ".uri").rglob("*.json")
    for damage in ("", "{", "[]", '{"path": "x"}'):
        record.write_text(damage)
        assert store(tmp_path / "media", "a", "", open_at, LIMITS) == first


def test_our_own_disks_fault_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "media").write_text("a file where the folder should be")

    @contextmanager
    def open_at(start: int) -> Iterator[Stream]:
        yield Stream(0, None, "", iter([b"abc"]))

    with pytest.raises(OSError):
        store(tmp_path / "media", "a", "", open_at, LIMITS)
