"""The process that a worker supervises: how it is started, spoken to and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any

from manifests.store import Store
from manifests.view import Dag
from pipeline.settle import AnyStage
from pipeline.unit import Retry

# How long a process that is at its end gets to be gone.
END_SECONDS = 2.0
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


class Process:
    """The process, its pipe, and a second pipe whose closing kills it."""

    def __init__(self) -> None:
        self.seen = seen()
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


def seen() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in SEEN)
