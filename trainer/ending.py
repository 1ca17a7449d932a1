"""How processes that train together end when one of them fails: by its sentence, told once, and its
exit code; none waits for one that is gone.

`trainer.launch` gives them a file in memory, where each notes what it ends with. Without it (one
process, or another launcher) each speaks for itself.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

NOTES = "VIDPIPE_TRAINER_NOTES"  # names the file: a line for each process that failed, its code
LOST = 3  # the code of one that lost the others, which is nobody's exit code where that is known
GRACE_SECONDS = 5.0  # in which processes end by themselves after another has


def make_notes() -> str:
    """A file for the processes that this one starts, in memory: it is gone when this one is."""
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('trainer-notes')}"


def noted(place: str | None = None) -> int | None:
    """The exit code of the run: that of the first process that failed of itself, or else LOST; None
    where none has failed, or there is nothing to note it in."""
    try:
        codes = [int(line) for line in Path(place or os.environ[NOTES]).read_text().splitlines()]
    except (KeyError, OSError):
        return None
    return next((code for code in codes if code != LOST), LOST if codes else None)


def tell(sentence: str, code: int) -> int:
    """Prints why this process ends, unless another told before why they all do; returns the exit
    code of the run."""
    with suppress(KeyError, OSError), Path(os.environ[NOTES]).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = noted()
        file.write(f"{code}\n")
        file.flush()
        if before is not None and (before != LOST or code == LOST):
            return before
    print(sentence, file=sys.stderr, flush=True)
    return code


def lost(error: BaseException) -> bool:
    """Whether it is that other processes do not answer any more."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def watch() -> None:
    """Ends this process, whatever it does, some seconds after another has failed: one that waits
    for it in an exchange over NCCL would for minutes."""
    if NOTES in os.environ:
        threading.Thread(target=_watch, name="ending", daemon=True).start()


def _watch() -> None:
    while (code := noted()) is None:
        time.sleep(1.0)
    time.sleep(GRACE_SECONDS)
    os._exit(code)
