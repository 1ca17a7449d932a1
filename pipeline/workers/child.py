"""The worker's process: gets stages and units over a pipe, runs them wholly, commits itself.

Stages and units come as pickles, from the process that started this one; JSON goes back, since
what runs here reads files of strangers: which clips are being processed, signs of life, counts of
rows, the receipt. Rows and payload never cross. `pipeline.workers.worker` is the other end.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from manifests.log import Counts
from manifests.store import Store
from manifests.view import Dag
from pipeline.streams import Streams, Through
from pipeline.unit import Part, Piece, Receipt, Retry
from pipeline.workers.kept import Kept
from pipeline.workers.watch import Verdict, Watch
from stages import base

# How often a sign of life goes over the pipe at most.
ALIVE_SECONDS = 0.2
# The kernel's memory killer shall take this process, and neither its supervisor nor the driver.
OOM_SCORE = 500
# Reads a pipe to its end, and kills its group. Signals to all processes are for the supervisor.
WATCHER = ("/bin/sh", "-c", "trap '' INT TERM HUP; read end; kill -KILL 0")


def tied_to(lifeline: int) -> None:
    """Has the kernel kill this process once the other end of the pipe `lifeline` is closed, as it
    is at the latest when the supervisor dies, by whatever. Unlike a thread that reads the pipe it
    works while C code holds the interpreter; unlike PR_SET_PDEATHSIG it is about the process, not
    about the thread that started this one.

    The rest of its group, which it leads, has a watcher: this process may be gone before the
    supervisor, as Ray kills what its workers have started, and what a stage has started in turn,
    vLLM's engine, would live on and keep its GPU.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    subprocess.Popen(WATCHER, stdin=lifeline, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def serve(connection: Connection) -> NoReturn:
    """Runs what comes over `connection` until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Ctrl-C and Slurm signal whole groups of processes; the supervisor says what to do.
        signal.signal(number, lambda *_: None)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(max(OOM_SCORE, _oom_score())))
    supervisor = _Supervisor(connection)
    base.on_alive(supervisor.alive)
    inbox, job = _Inbox(connection, supervisor), _Job()
    with contextlib.suppress(EOFError, OSError):  # the supervisor has closed its end, or is gone
        while True:
            match inbox.take():
                case ("job", number, *rest):
                    job.take(number, *rest)
                case ("fault", error):
                    job.fault = (
                        f"the stage can't be imported by a worker's process: {error}. Its module "
                        "must lie beside vidpipe.yaml or be installed"
                    )
                case ("unit", *unit):
                    inbox.put(*unit)
                    for piece, receipt in job.run(inbox, supervisor):
                        supervisor.send("receipt", [inbox.number(piece), asdict(receipt)])
                    inbox.stopping = False  # that was about what is through now
    with contextlib.suppress(Exception):  # nobody hears of it any more
        job.close()
    os._exit(0)  # native threads of torch and FFmpeg may abort an ordinary end


class _Job:
    """What units are run with: the stage, and the model of the last stage that has one."""

    fault: str | None = None

    def __init__(self) -> None:
        self._store: Store | None = None
        self._model_of: int | None = None
        self._model: Kept | None = None

    def take(
        self, number: int, store: Store, dag: Dag, stage: base.Stage[Any, Any], retry: Retry
    ) -> None:
        self.fault = None
        if self._store is None or self._store.url != store.url:
            self._store = store  # it remembers what was read last
        self._dag, self._stage, self._retry = dag, stage, retry
        if stage.loads_model and number != self._model_of:
            self.close()  # the last one goes before the next one comes
            gc.collect()
            self._model_of, self._model = number, Kept(stage)

    def close(self) -> None:
        """Gives the model back."""
        kept, self._model = self._model, None
        if kept is not None:
            kept.close()

    def run(self, inbox: _Inbox, supervisor: _Supervisor) -> Through:
        if self.fault is not None or self._store is None:
            while (piece := inbox.next()) is not None:
                yield piece, Receipt("", piece.unit, error=self.fault)
            return
        stage = self._stage
        kept = self._model if stage.loads_model else None
        model: Callable[[], Any] = kept or stage.setup
        with base.telling(functools.partial(supervisor.send, "note")):
            yield from Streams(self._store, self._dag, stage, model, self._retry, inbox.next).run()


def _oom_score() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


class _Supervisor:
    """The other end of the pipe, as seen from here. Any thread may speak."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._spoke = 0.0

    def send(self, what: str, value: Any = None) -> None:
        with self._lock:
            self._connection.send_bytes(json.dumps([what, value]).encode())
            self._spoke = time.monotonic()

    def alive(self) -> None:
        if time.monotonic() - self._spoke >= ALIVE_SECONDS:
            self.send("alive")


class _Inbox:
    """What has come: units that wait, and the wish to stop. For the thread that runs units."""

    def __init__(self, connection: Connection, supervisor: _Supervisor) -> None:
        self._connection, self._supervisor = connection, supervisor
        self._waiting: deque[Piece] = deque()
        self._numbers: dict[Piece, int] = {}
        self._later: tuple[Any, ...] | None = None  # a job, for which the units before must be over
        self.stopping = False

    def take(self) -> tuple[Any, ...]:
        """The next message. Raises EOFError where there will be none."""
        message, self._later = self._later or self._received(), None
        return message

    def _received(self) -> tuple[Any, ...]:
        try:
            return tuple(self._connection.recv())
        except (ImportError, AttributeError) as error:
            return "fault", str(error)

    def put(
        self,
        number: int,
        unit: str,
        part: Part,
        apart: Sequence[Sequence[str]],
        condemned: dict[str, Verdict],
        checks: int,
    ) -> None:
        watch = _Watched(apart, condemned, self, self._supervisor, number)
        piece = Piece(unit, part, watch, watch.rows, checks)
        self._numbers[piece] = number
        self._waiting.append(piece)

    def next(self) -> Piece | None:
        """The one that waits longest, if one does."""
        self.look()
        return self._waiting.popleft() if self._waiting else None

    def number(self, piece: Piece) -> int:
        """By which the supervisor knows it; asked once."""
        return self._numbers.pop(piece)

    def look(self) -> bool:
        """Takes in what has come: whether to stop."""
        try:
            while not self.stopping and self._later is None and self._connection.poll():
                match message := self._received():
                    case ("unit", *unit):
                        self.put(*unit)
                    case ("stop",):
                        self.stopping = True
                    case _:
                        self._later = message
        except (EOFError, OSError):
            self.stopping = True
        return self.stopping


class _Watched(Watch):
    """Watched by the supervisor."""

    def __init__(
        self,
        apart: Sequence[Sequence[str]],
        condemned: dict[str, Verdict],
        inbox: _Inbox,
        supervisor: _Supervisor,
        number: int,
    ) -> None:
        super().__init__(apart, condemned)
        self._inbox, self._supervisor, self._number = inbox, supervisor, number

    def begin(self, ids: pa.ChunkedArray) -> None:
        self._supervisor.send("begin", [self._number, ids.to_pylist()])

    def through(self, ids: pa.ChunkedArray) -> None:
        self._supervisor.send("through", [self._number, ids.to_pylist()])

    def rows(self, stage: str, counts: Counts) -> None:
        self._supervisor.send("rows", [self._number, asdict(counts)])

    def committed(self, counts: Counts) -> None:
        self._supervisor.send("committed", [self._number, asdict(counts)])

    def stopping(self) -> bool:
        return self._inbox.look()
