"""Starts processes that train together: `python -m trainer.launch LAUNCHER ...`, the module of
PyTorch's or accelerate's launcher and what it takes.

Where one of them fails, those launchers log that they end the others, print a report of several
screens and exit with 1. Here the processes' own sentence stays the last, and their exit code counts
(`trainer.ending`).
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from manifests.redact import redact_logs, shown
from trainer import ending

ELASTIC = "torch.distributed.elastic."  # begins the names of what logs for PyTorch's launcher


def launch(module: str, words: list[str]) -> int:
    """Runs a launcher's `main`; returns the exit code of the processes that it starts."""
    notes = os.environ[ending.NOTES] = ending.make_notes()
    sys.argv = [module, *words]
    main = importlib.import_module(module).main
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(ELASTIC):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Its decorator would tell that processes have failed.
    main = getattr(main, "__wrapped__", main)
    try:
        main()
    except ChildFailedError as error:
        return ended(notes, list(error.failures.values()))
    except subprocess.CalledProcessError as error:  # accelerate starts one alone without PyTorch's
        return error.returncode
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, RuntimeError, ValueError, OSError) as error:
        print(shown(f"vidpipe train: the processes cannot be started: {error}"), file=sys.stderr)
        return 2
    return 0


def ended(notes: str, failures: list[ProcessFailure]) -> int:
    """Tells what no process could tell; returns the exit code."""
    code = ending.noted(notes)
    if code is not None and code != ending.LOST:
        return code
    # PyTorch's launcher ends the others by SIGTERM
    killed = [f for f in failures if f.exitcode < 0 and -f.exitcode != signal.SIGTERM]
    if killed:
        which = ", ".join(f"{f.local_rank} (pid {f.pid})" for f in killed)
        number = -killed[0].exitcode
        name = signal.Signals(number).name
        why = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
        print(
            f"vidpipe train: process {which} was ended by signal {number} ({name}){why}: the same "
            "command goes on from the newest checkpoint",
            file=sys.stderr,
        )
        return 128 + number
    return next((f.exitcode for f in failures if f.exitcode > 0), 1)


if __name__ == "__main__":
    redact_logs()
    sys.exit(launch(sys.argv[1], sys.argv[2:]))
