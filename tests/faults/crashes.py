"""Kills a real run again and again and compares what comes of it: `make faults ROUNDS=200`.

A campaign is a workdir that is brought to its end through one crash after another. Each round is
one crash, at a named point (before, within and after data, commits and snapshots, of the driver or
of its worker) or at a random moment, on the local runner or on Ray. After each crash the workdir
is proved sound; when a run gets to the end, it is compared with one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "pipeline"), str(HERE.parents[1])]

from commands import Command, until  # noqa: E402
from evidence import Evidence, evidence, wrong  # noqa: E402
from project import UNIT, make_project, make_videos  # noqa: E402

POINTS = tuple(
    f"{when} {what}"
    for what in ("data", "commit", "compaction")
    for when in ("before", "half", "after")
)
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray-dashboard")
LONGEST = 400.0  # seconds that a command may take, on a busy machine: after that it hangs


@dataclass(frozen=True)
class Crash:
    """What is killed and when: at a point (`call` times through it), or after some seconds."""

    runner: str
    victim: str  # driver | worker | ray worker | raylet | node
    point: str | None = None
    call: int = 0
    seconds: float = 0.0
    begun: str = ""  # on Ray they are counted from when this stage has begun, or any
    signal: int = signal.SIGKILL

    @property
    def name(self) -> str:
        how = self.point or ("SIGTERM" if self.signal == signal.SIGTERM else "some moment")
        of = f" of {self.begun}" if self.begun else ""
        return f"{self.runner}: {self.victim}, {how}{of}"


@dataclass
class Report:
    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    campaigns: int = 0
    faults: list[str] = field(default_factory=list)  # nothing must ever stand here
    computed: int = 0  # rows of stages begun
    again: int = 0  # of these, those begun before
    bound: int = 0  # rows of the units that were in flight when something died
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{n:>5}  {name}" for name, n in sorted(self.kills.items())]
        lines += [
            f"rounds {self.rounds}, kills {self.kills.total()}, campaigns {self.campaigns}, "
            f"{self.seconds:.0f} s",
            f"rows computed {self.computed}, computed again {self.again}, "
            f"rows of units in flight at the kills {self.bound}",
            f"lost, doubled, differing or unsound: {len(self.faults)}",
            *self.faults,
        ]
        return "\n".join(lines)


class Harness:
    """Runs campaigns in `folder`. `say` is told of each round."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None] = print) -> None:
        self.folder, self.say = folder, say
        self.chance = Random(seed)
        self.report = Report()
        make_videos(folder / "videos")
        (folder / "t").mkdir()  # what is killed can't clean up
        whole = make_project(folder / "undisturbed")
        began = time.monotonic()
        command = self._command(whole, "run", "--runner", "local", plan=None)
        assert command.wait(LONGEST) == 0, command.said
        self.takes = time.monotonic() - began
        self.wanted: Evidence = evidence(whole)
        assert not wrong(whole), wrong(whole)
        self.file: Path | None = None

    def rounds(self, crashes: Iterable[Crash]) -> Report:
        """Plays the crashes, campaign after campaign, and ends the last one undisturbed."""
        began = time.monotonic()
        for crash in crashes:
            self._round(crash)
        if self.file is not None:
            self._finish()
        self.report.seconds = time.monotonic() - began
        return self.report

    def random_crashes(self, kills: int, ray: float) -> Iterator[Crash]:
        """Crashes of all kinds until `kills` of them came in time; `ray`: the share on Ray."""
        while self.report.kills.total() < kills:
            yield self._on_ray() if self.chance.random() < ray else self._local()

    def _local(self) -> Crash:
        chance = self.chance
        victim = chance.choice(("driver", "worker"))
        if chance.random() < 0.6:
            point = chance.choice(POINTS)
            most = 3 if "compaction" in point else 8
            return Crash("local", victim, point, chance.randint(1, most))
        number = signal.SIGKILL
        if victim == "driver" and chance.random() < 0.2:
            number = signal.SIGTERM
        return Crash("local", victim, seconds=chance.uniform(0.3, 0.8 * self.takes), signal=number)

    def _on_ray(self) -> Crash:
        victim = self.chance.choice(("driver", "worker", "ray worker", "raylet", "node"))
        if self.chance.random() < 0.5:
            return Crash("ray", victim, seconds=self.chance.uniform(0.0, 4.0))
        return Crash("ray", victim, seconds=self.chance.uniform(0.0, 1.0), begun="chant")

    def _round(self, crash: Crash) -> None:
        self.report.rounds += 1
        if self.file is None:
            name = f"campaign{self.report.campaigns}"
            self.file = make_project(self.folder / name)
        plan = self.folder / "plan"
        shutil.rmtree(plan, ignore_errors=True)
        plan.mkdir()
        values = {"point": crash.point, "call": crash.call, "victim": crash.victim}
        (plan / "plan.json").write_text(json.dumps(values))
        with self._cluster(crash, plan) as (words, remove):
            command = self._command(self.file, "run", "--runner", crash.runner, *words, plan=plan)
            killed = self._await(command, crash, plan, remove)
            code = command.process.returncode
        self._read_log(plan)
        if killed:
            self.report.kills[crash.name] += 1
        self.say(f"{self.report.rounds:>4}  {crash.name}: {'killed' if killed else 'too late'}")
        fine = (0, -signal.SIGKILL, 143) if killed else (0,)
        if crash.victim == "raylet" and killed:
            fine = (0, 1, -signal.SIGKILL)  # Ray's own head is gone: the run says so
        if code not in fine:
            self._fault(crash, f"the command left with {code}: {command.said}")
        for fault in wrong(self.file):
            self._fault(crash, fault)
        if code == 0:
            self._compare()

    def _await(
        self, command: Command, crash: Crash, plan: Path, remove: Callable[[], None]
    ) -> bool:
        """Lets the command run until it has ended, killing what is to be killed at a moment;
        whether anything was killed."""
        killed = False
        if crash.point is None:
            killed = self._kill(command, crash, remove)
        try:
            command.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self._fault(crash, f"it hangs: {command.said}")
            command.process.kill()
        try:
            until(lambda: not _ours(command), 60)
        except AssertionError:
            self._fault(crash, f"processes are left: {_ours(command)}")
        return killed or (plan / "fired").exists()

    def _kill(self, command: Command, crash: Crash, remove: Callable[[], None]) -> bool:
        if crash.runner == "ray":  # the moment is counted from when the work has begun
            log = self.folder / "plan" / "log"

            def begun() -> bool:
                if command.process.poll() is not None:
                    return True
                return log.exists() and f"begin {crash.begun}" in log.read_text()

            with contextlib.suppress(AssertionError):
                until(begun, LONGEST)
        deadline = time.monotonic() + crash.seconds
        while time.monotonic() < deadline and command.process.poll() is None:
            time.sleep(0.01)
        if command.process.poll() is not None:
            return False
        if crash.victim == "node":
            remove()
            return True
        if crash.victim == "driver":
            command.signal(crash.signal)
            return True
        # Where there is none yet, there soon is.
        names = {
            "worker": "from pipeline.workers.child",
            "ray worker": "ray::",
            "raylet": "raylet/raylet",
        }
        wanted = names[crash.victim]
        while command.process.poll() is None:
            found = [pid for pid, name in sorted(command.left().items()) if wanted in name]
            if found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.chance.choice(found), signal.SIGKILL)
                    return True
            time.sleep(0.05)
        return False

    @contextlib.contextmanager
    def _cluster(
        self, crash: Crash, plan: Path
    ) -> Iterator[tuple[tuple[str, ...], Callable[[], None]]]:
        """Two nodes beside a head, for a crash that takes one of them away."""
        if crash.victim != "node":
            yield (), lambda: None
            return
        from ray.cluster_utils import Cluster

        with mock.patch.dict(os.environ, self._env(plan)):  # its workers inherit these
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
            nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        try:
            yield (
                ("--address", cluster.address),
                lambda: cluster.remove_node(nodes[0], allow_graceful=False),
            )
        finally:
            cluster.shutdown()

    def _finish(self) -> None:
        """Runs the campaign to its end and compares it."""
        assert self.file is not None
        command = self._command(self.file, "run", "--runner", "local", plan=None)
        if command.wait(LONGEST) != 0:
            self.report.faults.append(f"the last run failed: {command.said}")
        self.report.faults += wrong(self.file)
        self._compare()

    def _compare(self) -> None:
        assert self.file is not None
        found = evidence(self.file)
        if found.rows != self.wanted.rows:
            self.report.faults.append(f"{self.file.parent}: the manifest differs")
        if found.latents != self.wanted.latents:
            self.report.faults.append(f"{self.file.parent}: latents differ")
        self.report.campaigns += 1
        if not self.report.faults:
            shutil.rmtree(self.file.parent)
        self.file = None
        self._begun.clear()

    def _command(self, file: Path, *words: str, plan: Path | None) -> Command:
        return Command(file.parent, *words, path=[HERE / "inject"], env=self._env(plan))

    def _env(self, plan: Path | None) -> dict[str, str]:
        env = {
            "OMP_NUM_THREADS": "1",  # torch's threads would wait for each other more than work
            "TMPDIR": str(self.folder / "t"),
        }
        return env if plan is None else env | {"CRASH_PLAN": str(plan)}

    _begun: Counter[tuple[str, ...]] = Counter()

    def _read_log(self, plan: Path) -> None:
        """Counts what was computed, what of it again, and what was in flight when all ended."""
        log = plan / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        flying: Counter[tuple[str, ...]] = Counter()
        for line in lines:
            what, *words = line.split()
            if what == "row":
                self.report.computed += 1
                self.report.again += self._begun[tuple(words)] > 0
                self._begun[tuple(words)] += 1
            else:
                flying[tuple(words)] += 1 if what == "begin" else -1
        self.report.bound += UNIT * sum(flying.values())

    def _fault(self, crash: Crash, text: str) -> None:
        self.report.faults.append(f"{self.report.rounds} {crash.name} {asdict(crash)}: {text}")
        self.say(self.report.faults[-1])


def _ours(command: Command) -> list[str]:
    """Processes of the command that are left. Ray's agents are not counted: they take up to some
    minutes to notice that their raylet is gone, and do nothing."""
    found = (name.strip()[:80] for name in command.left().values())
    return [name for name in found if not name.startswith(AGENTS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", type=float, default=0.06, help="share of rounds on Ray")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vidpipe-crashes-"))
    harness = Harness(folder, asked.seed)
    report = harness.rounds(harness.random_crashes(asked.kills, asked.ray))
    print(report)
    if report.faults or report.again > report.bound:
        print(f"kept for a look: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
