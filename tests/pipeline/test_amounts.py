"""What stages count is kept by their commits, told over all runs, and priced."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from commands import Command, project
from toys import Length, Limit, Shout, pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from moody import Moody

from manifests.intake import scan
from pipeline.account import account, spent
from pipeline.dag import Pipeline
from pipeline.plan import StagePlan, status_and_amounts
from pipeline.report import PlainReporter, Reporter
from pipeline.run import run
from pipeline.streams import Streams
from pipeline.unit import Piece, Retry
from stages.base import Context, Outcome, Row, RowStage, StageSettings, count
from stages.recaption import Recaption, RecaptionSettings


def counted(p: Pipeline, stage: str) -> list[dict[str, int]]:
    """Of every commit, in order."""
    log = p.dag.log(p.store, stage)
    return [commit.amounts for unit in log.units() for commit in log.commits(unit)]


def test_a_later_run_adds_to_what_was_counted(tmp_path: Path) -> None:
    captions = ["bad", "one", "two", "bad", "bad"]
    p = pipeline(tmp_path, captions)
    run(p, (), Retry(), Reporter())
    assert counted(p, "length") == [{"bad": 2}, {"bad": 1}]
    run(pipeline(tmp_path, [*captions, "bad"]), (), Retry(), Reporter())
    assert status_and_amounts(p)[1]["length"] == {"bad": 4}
    (stage,) = (s for s in account(p)["stages"] if s["name"] == "length")
    assert stage["amounts"] == {"bad": 4} and stage["cost"] is None


def test_commits_that_count_nothing_are_as_they_were(tmp_path: Path) -> None:
    p = pipeline(tmp_path, ["one two"])
    run(p, (), Retry(), Reporter())
    log = p.dag.log(p.store, "shout")
    (unit,) = log.units()
    (name,) = (n for n in p.store.find(f"{log.prefix}/{unit}") if n.endswith(".json"))
    values = json.loads(p.store.read(name))
    assert "amounts" not in values
    # So what was committed before there were any is read as ever.
    assert status_and_amounts(p)[1]["shout"] == {}
    assert log.commits(unit)[0].amounts == {}


class Ahead(RowStage[StageSettings, None]):
    """Takes everything before it answers anything, counts as it answers, sleeps as it takes."""

    name = "ahead"
    reads = ("caption",)
    adds = pa.schema([pa.field("said", pa.string())])
    nap = 0.02

    def setup(self) -> None:
        return None

    def answers(self, rows: Any, model: None) -> Generator[tuple[int, Outcome]]:
        held: list[Row] = []
        for row in rows:
            held.append(row)
            time.sleep(self.nap)
        for number, row in enumerate(held):
            count("tokens", 3)
            yield number, {"said": row["caption"]}


def through(p: Pipeline) -> list[Any]:
    (stage,) = p.stages.values()
    coming = iter([Piece(unit) for unit in p.dag.log(p.store, "source").units()])
    streams = Streams(p.store, p.dag, stage, lambda: None, Retry(), lambda: next(coming, None))
    return [receipt for _, receipt in streams.run()]


def test_units_in_one_stream_lose_none(tmp_path: Path) -> None:
    p = pipeline(tmp_path, [f"clip {i}" for i in range(12)], [Ahead])
    scan(p.store, p.config.source, 3)
    receipts = through(p)
    assert len(receipts) == 4
    assert sum((Counter(r.amounts) for r in receipts), Counter()) == {"tokens": 36}
    assert sum((Counter(c) for c in counted(p, "ahead")), Counter()) == {"tokens": 36}
    # A stage is at work also while it takes the first rows of the next unit.
    assert sum(r.seconds["process"] for r in receipts) >= 12 * Ahead.nap


def test_parts_of_a_unit_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a unit is committed in several goes, each says what came since the one before."""
    monkeypatch.setattr("pipeline.commits.COMMIT_BYTES", 1)
    p = pipeline(tmp_path, [f"clip {i}" for i in range(5)], [Ahead], run={"unit_size": 8})
    scan(p.store, p.config.source, 8)
    through(p)
    assert counted(p, "ahead") == [{"tokens": 3}] * 5


def test_the_price_of_tokens() -> None:
    price = {"input": 0.15, "output": 0.6}
    amounts = {"tokens": 500_000, "prompt_tokens": 2_000_000, "cached_tokens": 1_000_000}
    assert made(price=price).cost(amounts) == pytest.approx(0.3 + 0.3)
    assert made(price={**price, "cached": 0.05}).cost(amounts) == pytest.approx(0.5)
    assert made(price=price).cost({"tokens": 1000}) == pytest.approx(0.0006)
    assert made().cost(amounts) is None
    assert made(price=price).fingerprint == made().fingerprint


@pytest.mark.parametrize(
    "price", [{"input": 1}, {"input": -1, "output": 1}, {"input": 1, "output": 1, "ouput": 1}]
)
def test_a_price_that_is_none(price: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"price\."):
        made(price=price)


def made(**more: Any) -> Recaption:
    settings = RecaptionSettings(engine="openai", endpoints=("http://h:1",), model="m", **more)
    return Recaption(settings, Context(""))


def test_what_is_spent_in_a_sentence() -> None:
    amounts = {"tokens": 31_200, "prompt_tokens": 800_000, "cached_tokens": 600_000}
    assert spent("recaption", amounts, 0.1387) == (
        "recaption: 31,200 tokens, 800,000 prompt tokens (75% cached), cost 0.14"
    )
    assert spent("recaption", {"tokens": 5}, None) == "recaption: 5 tokens"
    assert spent("recaption", {"tokens": 5}, 0.000012) == "recaption: 5 tokens, cost 1.2e-05"
    assert spent("length", {"bad": 3}, None) == ""


def test_the_console_tells_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    from manifests.log import Counts
    from pipeline.unit import Receipt

    report = PlainReporter(sys.stdout)
    price = made(price={"input": 1, "output": 10}).cost
    report.start({"recaption": StagePlan("recaption", units=["u"], cost=price)})
    report.rows("recaption", Counts(2, 2))
    seconds, amounts = {"process": 4.0}, {"tokens": 100_000, "prompt_tokens": 500_000}
    report.unit(Receipt("recaption", "u", Counts(2, 2), seconds, amounts))
    assert "25000 tokens/s a worker, cost 1.50" in capsys.readouterr().out


CONFIG = """
recaption:
  engine: openai
  model: moody
  endpoints: ["%s"]
  prompt: "{caption}"
  quality: {fallback: keep, retries: 0}
  price: {input: 1000, output: 10000, cached: 100}
run: {runner: local, unit_size: 20}
"""


@pytest.fixture
def server() -> Iterator[Moody]:
    with Moody() as moody:
        yield moody


def test_tokens_and_cost_of_real_runs(tmp_path: Path, server: Moody) -> None:
    """An answer is 5 tokens, of a prompt of 20, of which 12 were cached."""
    prompts = [f"a dog of number {number}" for number in range(60)]
    folder = project(tmp_path / "p", prompts[:30], more=CONFIG % server.url, on=("recaption",))

    found = json.loads(said(folder, "estimate", "--json", "--clips", "30"))
    (stage,) = found["stages"]
    assert stage["amounts"]["tokens"]["value"] == pytest.approx(150)
    each = (8 * 1000 + 12 * 100 + 5 * 10000) / 1e6
    assert stage["cost"]["value"] == pytest.approx(30 * each)

    said(folder, "run")
    project(folder, prompts, more=CONFIG % server.url, on=("recaption",))
    said(folder, "run")
    (stage,) = (s for s in json.loads(said(folder, "status", "--json"))["stages"][1:])
    assert stage["amounts"] == {"cached_tokens": 720, "prompt_tokens": 1200, "tokens": 300}
    assert stage["cost"] == pytest.approx(60 * each)
    line = "recaption: 300 tokens, 1,200 prompt tokens (60% cached), cost 3.55"
    assert line in said(folder, "status").splitlines()
    assert line in said(folder, "captions", "check").splitlines()


def said(folder: Path, *words: str) -> str:
    command = Command(folder, *words)
    assert command.wait() == 0, command.said
    return command.printed


def test_stages_without_a_count_have_no_line(tmp_path: Path) -> None:
    stages: Sequence[Any] = (Length, Limit, Shout)
    p = pipeline(tmp_path, ["one"], stages)
    run(p, (), Retry(), Reporter())
    assert not any(spent(s["name"], s["amounts"], s["cost"]) for s in account(p)["stages"])
