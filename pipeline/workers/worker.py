"""A worker: one child process, watched, that costs a clip and not the run when it dies.

Decoders crash, memory runs out, loops never end. So stages run in a process of their own
(`child`), and both runners hold the `Worker` that supervises it. When the process dies, or is
silent beyond the stage's time limit, what it was processing is known: the unit is run again by a
new process with these clips split into smaller and smaller calls, until the one that kills stands
alone and is settled as failed (`suspects`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any, Protocol

from manifests.log import Counts
from manifests.store import Store
from manifests.view import Dag
from pipeline.settle import AnyStage
from pipeline.unit import WHOLE, OnRows, Part, Receipt, Retry, run_unit
from pipeline.workers.kept import Kept
from pipeline.workers.suspects import Death, Suspects
from pipeline.workers.watch import Watch
from stages.base import telling

# Deaths of the process while no clip is in flight, in `setup` for instance, that a unit may cost.
IDLE_DEATHS = 3
# Units in a row that come to this without a clip tried; after that a stage is not tried again.
STILLBORN_UNITS = 2
# How long a process that is at its end gets to be gone.
END_SECONDS = 2.0
# How long a batch may go on after somebody asked to stop.
GRACE_SECONDS = 5.0
TICK_SECONDS = 0.25
# What a process sees of the machine is fixed when it starts.
SEEN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS")

# The modules are found as in this process: a stage may lie beside vidpipe.yaml.
_START = """\
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from pipeline.workers.child import serve, tied_to
tied_to(int(sys.argv[2]))
serve(connection)
"""


@dataclass(frozen=True)
class Job:
    """What units are run with."""

    store: Store
    dag: Dag
    stage: AnyStage
    retry: Retry


@dataclass(frozen=True)
class Driver:
    """What a worker tells whoever drives it, and asks."""

    rows: OnRows
    note: Callable[[str], None]
    stopping: Callable[[], bool]


class Runs(Protocol):
    """Runs units, one after the other."""

    def run(self, job: Job, unit: str, driver: Driver, part: Part = WHOLE) -> Receipt: ...

    def close(self) -> None: ...


class InProcess:
    """Runs units in this process: easier to debug, and a clip that kills it ends the run."""

    def __init__(self) -> None:
        self._stage: AnyStage | None = None
        self._model: Kept | None = None

    def run(self, job: Job, unit: str, driver: Driver, part: Part = WHOLE) -> Receipt:
        """`run_unit`, with the model of the last stage that has one kept."""
        stage = job.stage
        model: Callable[[], Any] = stage.setup
        if stage.loads_model:
            if stage is not self._stage:
                self.close()
                self._stage, self._model = stage, Kept(stage)
            model = self._model or stage.setup
        with telling(driver.note):
            return run_unit(
                *(job.store, job.dag, stage, model, unit, job.retry, driver.rows),
                *(_Stoppable(driver), part),
            )

    def close(self) -> None:
        """Gives the model back: there is no process to end."""
        kept, self._stage, self._model = self._model, None, None
        if kept is not None:
            kept.close()


class _Stoppable(Watch):
    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def stopping(self) -> bool:
        return self._driver.stopping()


class Worker:
    """Supervises one child process at a time, which is started when there is something to run and
    never outlives this one."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._stillborn: dict[str, list[str]] = {}  # errors of units that ended with no clip tried

    def run(self, job: Job, unit: str, driver: Driver, part: Part = WHOLE) -> Receipt:
        """Has `part` of `unit` settled at the job's stage and committed. Once `driver.stopping`,
        what is done is committed and the rest stays pending; a batch that then takes too long is
        given up."""
        name = job.stage.name
        suspects = Suspects()
        idle = 0
        while not driver.stopping():
            stillborn = self._stillborn.get(name, [])
            if len(stillborn) >= STILLBORN_UNITS:
                return Receipt(name, unit, error=stillborn[-1])
            try:
                end = _Attempt(self._started(), job, driver).run(unit, part, suspects)
            except BaseException:
                self.close()  # it is amid a unit that nobody follows any more
                raise
            if isinstance(end, Receipt):
                self._stillborn.pop(name, None)
                return end
            self.close()
            if end.given_up:
                break
            if end.ids:
                suspects.died(name, end.ids, end.death)
                driver.note(_told(name, suspects, end))
                continue
            idle += 1
            if idle == IDLE_DEATHS:
                error = (
                    f"the worker's process {end.death.how}, {idle} times, while no clip was being "
                    f"processed: {name} can't be set up on this machine, or its results can't be "
                    "committed. `--set run.isolate=false` runs it where a debugger sees it"
                )
                if not end.tried:
                    self._stillborn.setdefault(name, []).append(error)
                return Receipt(name, unit, error=error)
        return Receipt(name, unit)

    def close(self) -> None:
        """Ends the process, if there is one, and all that it started."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _started(self) -> _Child:
        if self._child is not None and self._child.seen != _seen():
            self.close()
        if self._child is None:
            self._child = _Child()
        return self._child


@functools.cache
def own_worker(isolate: bool) -> Runs:
    """The one worker of this process, for those who have no place to keep one."""
    return Worker() if isolate else InProcess()


def _told(stage: str, suspects: Suspects, end: _Ended) -> str:
    if len(end.ids) > 1:
        what = f"{len(end.ids)} clips, which are tried apart"
    elif end.ids[0] in suspects.condemned:
        what = f"clip {end.ids[0]}, which is settled as failed"
    else:
        what = f"clip {end.ids[0]}, which is tried again"
    return f"{stage}: a worker {end.death.how} at {what}"


@dataclass
class _Ended:
    """An attempt that gave no receipt."""

    death: Death
    ids: list[str]  # what was in flight
    tried: bool  # whether any clip was
    given_up: bool = False  # it took too long after somebody asked to stop


class _Attempt:
    """One run of a unit by the child, followed over the pipe."""

    def __init__(self, child: _Child, job: Job, driver: Driver) -> None:
        self._child, self._job, self._driver = child, job, driver
        self._name = job.stage.name
        self._ids: dict[str, None] = {}  # in flight, in the order in which they were taken
        self._tried = False
        self._open = Counts()  # told to the driver and not committed yet
        self._heard = time.monotonic()

    def run(self, unit: str, part: Part, suspects: Suspects) -> Receipt | _Ended:
        asked: float | None = None
        limit = self._job.stage.time_limit
        try:
            self._child.give(self._job, (unit, part, suspects.apart, suspects.condemned))
            while True:
                if asked is None and self._driver.stopping():
                    asked = time.monotonic()
                    self._child.connection.send("stop")
                receipt = self._listen()
                if receipt is not None:
                    return receipt
                now = time.monotonic()
                if asked is not None and now - asked > GRACE_SECONDS:
                    self._child.kill()
                    return self._ended(Death(-signal.SIGKILL), given_up=True)
                if limit is not None and self._ids and now - self._heard > limit:
                    self._child.kill()
                    return self._ended(Death(-signal.SIGKILL, limit))
        except (EOFError, OSError):
            return self._ended(Death(self._child.wait()), given_up=asked is not None)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            reason = (
                f"{self._name} can't be handed to a worker's process ({error}): define its class "
                "at the top of a module, and open files and the like in setup"
            )
            return Receipt(self._name, unit, error=reason)

    def _listen(self) -> Receipt | None:
        """Takes in one message, if there is one before the next look at the clock."""
        connection = self._child.connection
        if not connection.poll(TICK_SECONDS):
            # A process that the child left behind may hold the pipe open.
            if self._child.process.poll() is not None and not connection.poll():
                raise EOFError
            return None
        what, value = json.loads(connection.recv_bytes())
        self._heard = time.monotonic()
        if what == "begin":
            self._ids |= dict.fromkeys(value)
            self._tried = True
        elif what == "rows":
            counts = Counts(**value)
            self._open += counts
            self._driver.rows(self._name, counts)
        elif what == "through":
            for clip in value:
                self._ids.pop(clip, None)  # the condemned never were
        elif what == "committed":
            self._open += _taken_back(Counts(**value))
        elif what == "note":
            self._driver.note(value)
        elif what == "receipt":
            counts = Counts(**value["counts"])
            return Receipt(**{**value, "stage": self._name, "counts": counts})
        return None

    def _ended(self, death: Death, given_up: bool = False) -> _Ended:
        if self._open.total:
            self._driver.rows(self._name, _taken_back(self._open))
        return _Ended(death, list(self._ids), self._tried, given_up)


def _taken_back(counts: Counts) -> Counts:
    """The counts of rows that were settled and are lost with their worker."""
    rejected = {reason: -n for reason, n in counts.rejected.items()}
    failed = {reason: -n for reason, n in counts.failed.items()}
    return Counts(-counts.total, -counts.kept, rejected, failed, -counts.pending)


class _Child:
    """The process, its pipe, and a second pipe whose closing kills it."""

    def __init__(self) -> None:
        self.seen = _seen()
        self._job: Job | None = None
        self._modelled: AnyStage | None = None  # the last stage that has a model, and its number
        self._number = 0
        self.connection, theirs = Pipe()
        watched, self._lifeline = os.pipe()
        handles = (theirs.fileno(), watched)
        command = [sys.executable, "-P", "-c", _START, *map(str, handles)]
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                stdout=2,  # ours is for data
                start_new_session=True,  # Ctrl-C is for the supervisor
            )
        finally:
            theirs.close()
            os.close(watched)
        self.connection.send(sys.path)

    def give(self, job: Job, unit: tuple[Any, ...]) -> None:
        """Has the unit run. What it is run with is sent once, with a number by which the process
        knows whether it has the stage's model."""
        if job is not self._job:
            stage = job.stage
            if stage.loads_model and stage is not self._modelled:
                self._modelled = stage
                self._number += 1
            self.connection.send(("job", self._number, job.store, job.dag, stage, job.retry))
            self._job = job
        self.connection.send(("unit", *unit))

    def kill(self) -> None:
        """Kills the process and those that it started, which are in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """How the process ended: it has closed its pipe, and now it ends or is ended."""
        deadline = time.monotonic() + END_SECONDS
        how = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while (
            self.process.returncode is None
            and not os.waitid(os.P_PID, self.process.pid, how)
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        self.kill()  # before the process is waited for, as long as its id is surely its own
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs in the kernel, on a dead mount
            return -signal.SIGKILL

    def end(self) -> None:
        """Ends the process, however it is."""
        self.connection.close()
        if self.process.returncode is None:
            self.wait()
        os.close(self._lifeline)


def _seen() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in SEEN)
