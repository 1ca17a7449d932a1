"""Real `vidpipe run` commands over a caption server that dies amid, and comes back or does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Command, account, project, until

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from moody import Moody

CLIPS = 240
AT_ONCE = 8
PROMPTS = [f"a dog of number {number}" for number in range(CLIPS)]
OnRunner = Callable[[str], dict[str, str]]
RUNNERS = ["local", "ray"]
# Set aside after the first connection that fails, and tried again after `backoff`, twice that, ...
CONFIG = """
recaption:
  engine: openai
  model: moody
  endpoints: ["%s"]
  prompt: "{caption}"
  quality: {fallback: keep, retries: 0}
  concurrency: %d
  timeout: 20
  retries: %d
  backoff: 0.2
run: {unit_size: 60}
"""


@pytest.fixture
def server() -> Iterator[Moody]:
    with Moody(delay=0.05) as moody:
        yield moody


def captions(folder: Path, server: Moody, retries: int) -> Path:
    return project(folder, PROMPTS, more=CONFIG % (server.url, AT_ONCE, retries), on=("recaption",))


def recaption(folder: Path, how: dict[str, str]) -> Command:
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    return Command(folder, "run", "recaption", *words)


def answered(server: Moody) -> int:
    return server.met["none"]


def asked_twice(server: Moody) -> int:
    return server.asked.total() - len(server.asked)


def right(folder: Path) -> None:
    """Every clip has its own caption, once, and the account is that of the data."""
    show = Command(folder, "show", "recaption", "--format", "jsonl")
    assert show.wait() == 0, show.said
    rows = [json.loads(line) for line in show.printed.splitlines()]
    assert sorted(row["caption"] for row in rows) == sorted(PROMPTS)
    assert all(row["recaption"] == f"re: {row['caption']}" for row in rows)
    audit = Command(folder, "audit")
    assert audit.wait() == 0, audit.printed + audit.said


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_server_that_comes_back_is_waited_for(
    tmp_path: Path, server: Moody, on_runner: OnRunner, runner: str
) -> None:
    made = captions(tmp_path, server, retries=20)
    command = recaption(made, on_runner(runner))
    until(lambda: answered(server) >= 70)
    server.close()
    until(lambda: "is set aside" in command.said)
    assert command.process.poll() is None
    server.open()
    assert command.wait() == 0, command.said
    assert "answers again" in command.said
    assert account(made, "recaption")["kept"] == CLIPS
    assert asked_twice(server) <= server.most, "only what was in flight is asked again"
    right(made)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_server_that_stays_away_ends_the_run_and_the_next_one_finishes(
    tmp_path: Path, server: Moody, on_runner: OnRunner, runner: str
) -> None:
    made = captions(tmp_path, server, retries=2)
    command = recaption(made, on_runner(runner))
    until(lambda: answered(server) >= 70)
    server.close()
    assert command.wait() == 1, command.said
    said = " ".join(command.said.split())
    assert "no caption was had from the server (engine_unreachable)" in said
    assert "No row is settled by that: start it, or mend recaption's endpoints" in said
    assert "Traceback" not in said
    before = account(made, "recaption")
    assert answered(server) - server.most <= before["kept"] <= answered(server)
    assert before["kept"] + before["pending"] == CLIPS
    assert not sum(before["failed"].values())
    server.open()
    again = recaption(made, on_runner(runner))
    assert again.wait() == 0, again.said
    assert account(made, "recaption")["kept"] == CLIPS
    assert asked_twice(server) <= server.most, "what is committed is not asked again"
    right(made)
