"""A worker: one child process, watched, that costs a clip and not the run when it dies.

Decoders crash, memory runs out, loops never end. So stages run in a process of their own
(`child`), and both runners hold the `Worker` that supervises it. When the process dies, or is
silent beyond the stage's time limit, what it was processing is known: the unit is run again by a
new process with these clips split into smaller and smaller calls, until the one that kills stands
alone and is settled as failed (`suspects`).
"""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import queue
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from manifests.log import Counts
from pipeline.settle import AnyStage
from pipeline.streams import run_piece
from pipeline.unit import WHOLE, OnRows, Part, Piece, Receipt
from pipeline.workers.kept import Kept
from pipeline.workers.process import Job, Process, seen
from pipeline.workers.suspects import Death, Suspects
from pipeline.workers.watch import Watch
from stages.base import telling

# Units that a worker has at once: the one at work, and the one that its stage's stream goes on to.
AHEAD = 2
# Deaths of the process while no clip is in flight, in `setup` for instance, that a unit may cost.
IDLE_DEATHS = 3
# Units in a row that come to this without a clip tried; after that a stage is not tried again.
STILLBORN_UNITS = 2
# How long a batch may go on after somebody asked to stop.
GRACE_SECONDS = 5.0
TICK_SECONDS = 0.25


@dataclass(frozen=True)
class Driver:
    """What a worker tells whoever drives it, and asks."""

    rows: OnRows
    note: Callable[[str], None]
    stopping: Callable[[], bool]


class Runs(ABC):
    """Runs units."""

    @abstractmethod
    def submit(
        self, job: Job, unit: str, driver: Driver, part: Part = WHOLE, checks: int = 0
    ) -> Future[Receipt]:
        """Has `part` of `unit` settled at the job's stage and committed; the stage is to look at
        so many of the rows again, or of later ones where there are none. Once `driver.stopping`,
        what is done is committed and the rest stays pending."""

    @abstractmethod
    def close(self) -> None:
        """Gives the model back, and ends what runs."""

    def run(
        self, job: Job, unit: str, driver: Driver, part: Part = WHOLE, checks: int = 0
    ) -> Receipt:
        return self.submit(job, unit, driver, part, checks).result()


class InProcess(Runs):
    """Runs units in this process: easier to debug, and a clip that kills it ends the run."""

    def __init__(self) -> None:
        self._stage: AnyStage | None = None
        self._model: Kept | None = None
        self._lock = threading.Lock()  # an actor on Ray has several calls at once
        self._unchecked = 0

    def submit(
        self, job: Job, unit: str, driver: Driver, part: Part = WHOLE, checks: int = 0
    ) -> Future[Receipt]:
        """It is run when this returns, with the model of the last stage that has one kept."""
        done: Future[Receipt] = Future()
        with self._lock:
            receipt = self._through(job, unit, driver, part, checks + self._unchecked)
            self._unchecked = receipt.unchecked
        done.set_result(receipt)
        return done

    def _through(self, job: Job, unit: str, driver: Driver, part: Part, checks: int) -> Receipt:
        stage = job.stage
        model: Callable[[], Any] = stage.setup
        if stage.loads_model:
            if stage is not self._stage:
                self.close()
                self._stage, self._model = stage, Kept(stage)
            model = self._model or stage.setup
        piece = Piece(unit, part, _Stoppable(driver), driver.rows, checks)
        with telling(driver.note):
            return run_piece(job.store, job.dag, stage, model, piece, job.retry)

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


class _Order:
    """A unit that a worker was asked to run, and how far that is."""

    def __init__(self, job: Job, unit: str, part: Part, driver: Driver, checks: int) -> None:
        self.job, self.unit, self.part, self.driver = job, unit, part, driver
        self.checks = checks
        self.done: Future[Receipt] = Future()
        self.suspects = Suspects()
        self.idle = 0  # deaths with no clip in flight
        self.begin()

    def begin(self) -> None:
        """A process gets it, the first or another one."""
        self.ids: dict[str, None] = {}  # in flight, in the order in which they were taken
        self.tried = False  # whether any clip was
        self.uncommitted = Counts()  # of what the driver was told

    @property
    def stage(self) -> str:
        return self.job.stage.name

    def end(self, error: str | None = None) -> None:
        """Without a receipt of the process."""
        self.done.set_result(Receipt(self.stage, self.unit, error=error))

    def take_back(self) -> None:
        """Has the driver forget what was settled and is lost with its process."""
        if self.uncommitted.total:
            self.driver.rows(self.stage, -self.uncommitted)


class Worker(Runs):
    """Supervises one child process at a time, which is started when there is something to run and
    never outlives this one. A thread follows it, so that a stream goes on to the unit that was
    submitted next while `submit`'s callers wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        # The rest is the thread's.
        self._process: Process | None = None
        self._waiting: deque[_Order] = deque()
        self._open: dict[int, _Order] = {}  # what the process has, in order, by number
        self._numbers = itertools.count()
        self._heard = 0.0
        self._asked: float | None = None  # when the process was asked to stop
        self._unchecked = 0  # rows to look at again, for which there was none
        self._stillborn: dict[str, list[str]] = {}  # errors of units that ended with no clip tried

    def submit(
        self, job: Job, unit: str, driver: Driver, part: Part = WHOLE, checks: int = 0
    ) -> Future[Receipt]:
        """A batch that takes too long once somebody asked to stop is given up."""
        order = _Order(job, unit, part, driver, checks)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True)
                self._thread.start()
            self._orders.put(order)
        return order.done

    def close(self) -> None:
        """Ends the process, if there is one, and all that it started."""
        with self._lock:
            thread = self._thread
            if thread is not None:
                self._orders.put(None)
        if thread is not None:
            thread.join()

    def _serve(self) -> None:
        fault: BaseException = CancelledError()
        try:
            while self._take():
                self._give()
                if self._open:
                    self._follow()
        except BaseException as error:  # noqa: BLE001  a driver that is gone: its callers hear of it
            fault = error
        self._end()
        with self._lock:  # nothing is submitted to this thread any more
            self._thread = None
            while not self._orders.empty():
                self._order_in()
            left = [*self._open.values(), *self._waiting]
            self._open, self._waiting = {}, deque()
        for order in left:
            order.done.set_exception(fault)

    def _take(self) -> bool:
        """Takes in what was submitted, and waits for it where nothing is to be done. False where
        this is closed."""
        while not (self._open or self._waiting) or not self._orders.empty():
            if not self._order_in():
                return False
        return True

    def _order_in(self) -> bool:
        order = self._orders.get()
        if order is not None:
            self._waiting.append(order)
        return order is not None

    def _give(self) -> None:
        """Hands orders to the process, as many as it may have at once."""
        while self._waiting and len(self._open) < AHEAD:
            order = self._waiting[0]
            beside = next(iter(self._open.values()), order)
            # A unit with suspects is alone: nothing else is to be blamed, or lost, for them.
            if beside is not order and (
                beside.job is not order.job or beside.suspects.any or order.suspects.any
            ):
                return
            stillborn = self._stillborn.get(order.stage, [])
            if order.driver.stopping():
                order.end()
            elif len(stillborn) >= STILLBORN_UNITS:
                order.end(stillborn[-1])
            else:
                self._hand(order)
            self._waiting.popleft()  # not before: whatever was raised, its caller hears of it

    def _hand(self, order: _Order) -> None:
        if not self._open:
            if self._process is not None and self._process.seen != seen():
                self._end()
            self._asked, self._heard = None, time.monotonic()
        self._process = self._process or Process()
        number = next(self._numbers)
        suspects = order.suspects
        order.checks, self._unchecked = order.checks + self._unchecked, 0
        try:
            self._process.give(
                order.job,
                (number, order.unit, order.part, suspects.apart, suspects.condemned, order.checks),
            )
        except OSError:
            pass  # it has died, as will be noticed
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            order.end(
                f"{order.stage} can't be handed to a worker's process ({error}): define its class "
                "at the top of a module, and open files and the like in setup"
            )
            return
        order.begin()
        self._open[number] = order

    def _follow(self) -> None:
        """Takes in one message, or looks at the clock."""
        process = self._process
        assert process is not None
        stops = self._asked is None and any(o.driver.stopping() for o in self._open.values())
        message: bytes | None = None
        try:
            if stops:
                self._asked = time.monotonic()
                process.connection.send(("stop",))
            if process.connection.poll(TICK_SECONDS):
                message = process.connection.recv_bytes()
            # A process that the child left behind may hold the pipe open.
            elif process.process.poll() is not None and not process.connection.poll():
                raise EOFError
        except (EOFError, OSError):
            self._died(Death(process.wait()), given_up=self._asked is not None)
            return
        if message is not None:  # what a driver raises is no death
            self._hear(*json.loads(message))
        now = time.monotonic()
        if self._asked is not None and now - self._asked > GRACE_SECONDS and self._open:
            process.kill()
            self._died(Death(-signal.SIGKILL), given_up=True)
            return
        flying = (order for order in self._open.values() if order.ids)
        limit = next((order.job.stage.time_limit for order in flying), None)
        if limit is not None and now - self._heard > limit:
            process.kill()
            self._died(Death(-signal.SIGKILL, limit))

    def _hear(self, what: str, value: Any) -> None:
        self._heard = time.monotonic()
        if what == "alive":
            return
        if what == "note":
            next(iter(self._open.values())).driver.note(value)
            return
        number, told = value
        order = self._open[number]
        if what == "begin":
            order.ids |= dict.fromkeys(told)
            order.tried = True
        elif what == "through":
            for clip in told:
                order.ids.pop(clip, None)  # the condemned never were
        elif what == "rows":
            counts = Counts(**told)
            order.uncommitted += counts
            order.driver.rows(order.stage, counts)
        elif what == "committed":
            order.uncommitted += -Counts(**told)
        elif what == "receipt":
            del self._open[number]
            self._stillborn.pop(order.stage, None)
            counts = Counts(**told["counts"])
            self._unchecked += told["unchecked"]
            order.done.set_result(Receipt(**{**told, "stage": order.stage, "counts": counts}))

    def _died(self, death: Death, given_up: bool = False) -> None:
        """Ends what is left of the process, and has its units run again."""
        orders = list(self._open.values())
        self._end()
        for order in orders:
            order.take_back()
        blamed = [] if given_up else [order for order in orders if order.ids]
        for order in blamed:
            order.suspects.died(order.stage, list(order.ids), death)
        if blamed:
            blamed[0].driver.note(_told(blamed, death))
        self._open = {}  # not before: what a driver raises up to here, all their callers hear
        if given_up:
            for order in orders:
                order.end()
            return
        if orders and not blamed and self._idle(orders[0], death):
            del orders[0]
        self._waiting.extendleft(reversed(orders))

    def _idle(self, order: _Order, death: Death) -> bool:
        """Whether this was one death too many with no clip in flight."""
        order.idle += 1
        if order.idle < IDLE_DEATHS:
            return False
        error = (
            f"the worker's process {death.how}, {order.idle} times, while no clip was being "
            f"processed: {order.stage} can't be set up on this machine, or its results can't be "
            "committed. `--set run.isolate=false` runs it where a debugger sees it"
        )
        if not order.tried:
            self._stillborn.setdefault(order.stage, []).append(error)
        order.end(error)
        return True

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


@functools.cache
def own_worker(isolate: bool) -> Runs:
    """The one worker of this process, for those who have no place to keep one."""
    return Worker() if isolate else InProcess()


def _told(blamed: list[_Order], death: Death) -> str:
    ids = [clip for order in blamed for clip in order.ids]
    if len(ids) > 1:
        what = f"{len(ids)} clips, which are tried apart"
    elif ids[0] in blamed[0].suspects.condemned:
        what = f"clip {ids[0]}, which is settled as failed"
    else:
        what = f"clip {ids[0]}, which is tried again"
    return f"{blamed[0].stage}: a worker {death.how} at {what}"
