"""Real commands that are told to stop: in time, with what is done committed and nothing left."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from commands import Command, account, project, until

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SLOW = ["slow=killers:Slow"]


def begun(folder: Path) -> bool:
    """Whether the stage is at work: a batch has noted it."""
    return (folder / "at-work").exists()


def stopped(command: Command, number: signal.Signals) -> float:
    """Sends the signal; the seconds that the command then takes to end."""
    sent = time.monotonic()
    command.signal(number)
    assert command.wait(60) == CODES[number], command.said
    took = time.monotonic() - sent
    until(lambda: not command.left(), 20)
    assert "Traceback" not in command.said
    return took


@pytest.mark.parametrize("number", CODES)
def test_what_is_done_is_committed(tmp_path: Path, number: signal.Signals) -> None:
    made = project(tmp_path, [f"0.2 {tmp_path} {i}" for i in range(60)], SLOW)
    command = Command(made, "run", "--runner", "local")
    until(lambda: begun(made))
    stopped(command, number)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"stopped by {name}; what is committed stays, `vidpipe run` goes on" in command.said
    found = account(made, "slow")
    assert 0 < found["kept"] < 60 and found["kept"] + found["pending"] == 60


def test_under_nohup_it_outlives_its_terminal(tmp_path: Path) -> None:
    made = project(tmp_path, [f"0.1 {tmp_path} {i}" for i in range(10)], SLOW)
    command = Command(made, "run", "--runner", "local", ignored=[signal.SIGHUP])
    until(lambda: begun(made))
    command.signal(signal.SIGHUP)
    assert command.wait() == 0, command.said
    assert account(made, "slow")["kept"] == 10


def test_in_the_debugger_s_way_too(tmp_path: Path) -> None:
    made = project(tmp_path, [f"0.2 {tmp_path} {i}" for i in range(60)], SLOW)
    command = Command(made, "run", "--runner", "local", "--set", "run.isolate=false")
    until(lambda: begun(made))
    stopped(command, signal.SIGINT)
    assert 0 < account(made, "slow")["kept"] < 60


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_a_batch_that_takes_too_long_is_given_up(tmp_path: Path, isolate: str) -> None:
    made = project(tmp_path, [f"0.1 {tmp_path}", f"600 {tmp_path}"], SLOW)
    command = Command(made, "run", "--runner", "local", "--set", f"run.isolate={isolate}")
    until(lambda: begun(made) and (made / "at-work").stat().st_size == 2)
    assert stopped(command, signal.SIGTERM) < 20, "10 s are promised where cores are free"
    assert account(made, "slow")["pending"] == 2


def test_the_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    made = project(tmp_path, [f"600 {tmp_path}"], SLOW)
    command = Command(made, "run", "--runner", "local")
    until(lambda: begun(made))
    command.signal(signal.SIGINT)
    time.sleep(0.3)
    stopped(command, signal.SIGINT)
    assert "stopped at once" in command.said


def test_during_imports_it_ends_without_a_trace(tmp_path: Path) -> None:
    made = project(tmp_path, ["0"] * 3, SLOW)
    chance = random.Random(0)
    for number in [signal.SIGINT] * 5 + [signal.SIGTERM]:
        command = Command(made, "run", "--runner", "local")
        until(command.listens)
        time.sleep(chance.random() * 0.6)
        command.signal(number)
        assert command.wait() in (CODES[number], 0), command.said
        assert "Traceback" not in command.said, command.said
        assert "KeyboardInterrupt" not in command.said
        until(lambda left=command.left: not left(), 20)


LIBRARY = """
import signal

from killers import Slow
from pydantic_core import SchemaValidator, core_schema


class Loud(Slow):
    pass


class Value:
    def __hash__(self):
        signal.raise_signal(signal.SIGTERM)

    @property
    def value(self):
        signal.raise_signal(signal.SIGTERM)


SchemaValidator({})
"""


@pytest.mark.parametrize(
    "schema", ["enum_schema(Value, [Value()])", "literal_schema([Value()])"], ids=["own", "none"]
)
def test_a_library_that_makes_its_own_error_of_a_signal_or_none(
    tmp_path: Path, schema: str
) -> None:
    """pydantic does both while it builds the settings of a stage."""
    made = project(tmp_path, [f"0 {tmp_path}"], ["slow=loud:Loud"])
    (tmp_path / "loud.py").write_text(LIBRARY.format(f"core_schema.{schema}"))
    command = Command(made, "run", "--runner", "local", path=[tmp_path])
    assert command.wait() == CODES[signal.SIGTERM], command.said
    assert "stopped by SIGTERM" in command.said
    assert "Traceback" not in command.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_ray(tmp_path: Path, number: signal.Signals) -> None:
    """Two workers at work, many units in line; the first batch of one never ends."""
    captions = [f"600 {tmp_path}", *(f"0.3 {tmp_path} {i}" for i in range(99))]
    made = project(tmp_path, captions, SLOW, "run: {unit_size: 20}\n")
    command = Command(made, "run", "--runner", "ray")
    until(lambda: begun(made) and (made / "at-work").stat().st_size > 3, 120)
    took = stopped(command, number)
    assert took < 30, "10 s are promised where cores are free"
    print(f"{took:.1f} s")
    found = account(made, "slow")
    assert 0 < found["kept"] < 99 and found["kept"] + found["pending"] == 100


def test_while_ray_starts(tmp_path: Path) -> None:
    """Ray has its own idea of SIGTERM by then, and half of its processes."""
    made = project(tmp_path, [f"0.3 {tmp_path}"], SLOW)
    command = Command(made, "run", "--runner", "ray")
    until(lambda: any("gcs_server" in name for name in command.left().values()))
    stopped(command, signal.SIGTERM)
    assert "stopped by SIGTERM" in command.said
