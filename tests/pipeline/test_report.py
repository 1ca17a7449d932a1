"""What a person sees of a run: plain lines, and one live line a stage on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from toys import pipeline

from manifests.log import Counts
from pipeline import report as reports
from pipeline.plan import StagePlan
from pipeline.report import LiveReporter, PlainReporter, console
from pipeline.run import run
from pipeline.unit import Receipt, Retry

CAPTIONS = ["a red cat", "", "bad", "one two three four five", "dog", "crash"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    said = console(out)
    assert isinstance(said, PlainReporter)
    run(pipeline(tmp_path, CAPTIONS[:5]), (), Retry(), said)
    lines = out.getvalue().splitlines()
    assert lines[0] == "source: 5 rows, 5 new"
    assert lines[1].startswith("length: 5 of 5 rows: 3 kept, 1 rejected, 1 failed")
    assert lines[2].startswith("limit: 3 rows: 2 kept, 1 rejected, 0 failed")


def test_a_live_line_a_stage_on_a_terminal(tmp_path: Path) -> None:
    out = Terminal()
    said = console(out)
    assert isinstance(said, LiveReporter)
    run(pipeline(tmp_path, CAPTIONS), (), Retry(), said)
    text = out.getvalue()
    for stage in ("length", "limit", "shout"):
        assert stage in text
    assert "unit" in text and "raised ZeroDivisionError: a fault of the stage" in text


def test_a_stage_that_raised_was_not_less_than_never_at_work() -> None:
    assert reports.at_work({"process": 3.0, "commit": 1.0, "wait": 1.0}).endswith(
        " 75% of the time"
    )
    assert reports.at_work({"process": 1.0, "wait": 2.0}).endswith(" 0% of the time")
    assert reports.at_work({"read": 1.0, "wait": 2.0}) == ""


def test_tokens_are_told_where_a_stage_counts_them() -> None:
    seconds = {"process": 3.0, "commit": 1.0}
    assert reports.tokens({"tokens": 1000}, seconds) == ", 250 tokens/s a worker"
    cached = {"tokens": 1000, "prompt_tokens": 400, "cached_tokens": 300}
    assert reports.tokens(cached, seconds).endswith(", 75% of the prompts' tokens cached")
    assert reports.tokens({}, seconds) == reports.tokens({"tokens": 9}, {}) == ""
    refused = {"tokens": 9, "asked_again": 31, "originals": 4}
    assert reports.quality(refused) == ", 31 asked again, 4 left with the original caption"
    assert reports.quality({"tokens": 9, "originals": 0}) == ""


def test_long_work_is_told_every_few_seconds_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(reports.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    said = PlainReporter(out)
    plan = StagePlan("encode", Counts(total=100, pending=100), units=["u"])
    said.start({"encode": plan})
    for _ in range(5):
        said.rows("encode", Counts(total=10, kept=9, failed={"decode_error": 1}))
        now[0] += 4.0
    seconds = {"process": 19.0, "wait": 1.0, "commit": 1.0}
    said.unit(Receipt("encode", "u", seconds=seconds, amounts={"tokens": 2000}))
    assert out.getvalue().splitlines() == [
        "encode: 30 of 100 rows: 27 kept, 0 rejected, 3 failed, 3.8 rows/s, 19 s left",
        "encode: 50 of 100 rows: 45 kept, 0 rejected, 5 failed, 3.1 rows/s, 16 s left",
        "encode: 50 of 100 rows: 45 kept, 0 rejected, 5 failed, 2.5 rows/s, 20 s left, "
        "model at work 95% of the time, 100 tokens/s a worker",
    ]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_every_unit_raises_is_told_once(stream: type[io.StringIO]) -> None:
    out = stream()
    said = console(out)
    said.start({"encode": StagePlan("encode", Counts(total=3, pending=3), units=["u", "v", "w"])})
    for unit, error in (("u", "no device"), ("v", "no device"), ("w", "another fault")):
        said.unit(Receipt("encode", unit, error=error))
    said.end()
    assert out.getvalue().count("no device") == 1
    assert "encode: unit w raised another fault" in out.getvalue()
