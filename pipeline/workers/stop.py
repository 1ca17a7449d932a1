"""Ctrl-C, SIGTERM (spot instances, Slurm) and SIGHUP: the first asks, the second ends at once.

While a run is at work (`orderly`) the first signal only sets `asked`: workers commit what is done
and the run ends by `Stopped`. A thread sees to it that the process is gone in time, whatever its
main thread is stuck in, and that a second signal ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds after the first signal at which the process ends, whatever is still going on.
LAST_SECONDS = 9.0
GOES_ON = "what is committed stays, `vidpipe run` goes on from there"

_asked: int | None = None
_worked = False  # `orderly` was entered
_orderly = False
_now = False  # raise even within `orderly`
_interrupted = False  # this process sends itself a signal
_leavings: list[Callable[[], None]] = []  # what is to be cleaned up at the end
_stderr = 2  # a copy, while others may point 2 elsewhere


class Stopped(KeyboardInterrupt):
    """Somebody asked this process to stop, and it has."""


def asked() -> bool:
    """Whether the run is to commit what is done and end."""
    return _asked is not None


def early() -> bool:
    """Whether a signal came before any work began: a library may have made an error of its own of
    what was raised in it, or have swallowed it."""
    return not _worked and _asked is not None


def heed() -> None:
    """Raises Stopped where a signal came early."""
    if early():
        raise Stopped


def code() -> int:
    """The exit code of a process that was stopped: as the shell has it for that signal."""
    return 128 + (_asked or signal.SIGINT)


def sentence() -> str:
    """What happened, and how to go on."""
    by = "Ctrl-C" if _asked in (None, signal.SIGINT) else signal.Signals(_asked).name
    return f"stopped by {by}; {GOES_ON}"


def listen() -> None:
    """From now on a signal raises Stopped in the main thread, outside of `orderly`."""
    _handle(_heard)


def _handle(handler: Any) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and jobs in the background
            signal.signal(number, handler)


def _heard(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = number
    if not _orderly or _now:
        raise Stopped


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """Within it a signal is asked about, not raised; raises Stopped at its end if one came, and at
    its beginning if one came early."""
    global _asked, _now, _orderly, _stderr, _worked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heed()
    _worked = True
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _stderr = os.dup(2)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ours,), daemon=True)
    watcher.start()
    _asked, _now, _orderly = None, False, True
    _handle(_heard)
    try:
        yield
    except SystemExit:  # a library's own handler: Ray sets one while it starts
        if _asked is None:
            raise
    finally:
        _orderly = False
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()  # the thread ends
        watcher.join()
        ours.close()
        os.close(_stderr)
        _stderr = 2
    if _asked is not None:
        raise Stopped


@contextlib.contextmanager
def cleaning(clean: Callable[[], None]) -> Iterator[None]:
    """Has `clean`, which may be called again, called at the end of the block however that comes:
    also where a signal ends the process at once, or comes while it cleans."""
    _leavings.append(clean)
    try:
        yield
    finally:
        while clean in _leavings:
            with contextlib.suppress(Stopped):
                clean()
                _leavings.remove(clean)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within `orderly`: while nothing is at work yet, a signal raises Stopped all the same."""
    global _now
    before, _now = _now, True
    try:
        if _orderly and _asked is not None:
            raise Stopped
        yield
    finally:
        _now = before


def interrupt() -> None:
    """Raises Stopped in the main thread now, from any other: enough time was given."""
    global _now, _interrupted
    if _orderly and _asked is not None:
        _now = _interrupted = True
        signal.pthread_kill(threading.main_thread().ident or 0, _asked)


def renew() -> None:
    """Takes the signals back from a library that has set handlers of its own within `orderly`."""
    if _orderly:
        _handle(_heard)


def _watch(wakeups: socket.socket) -> None:
    """Ends the process at the second signal, or when the first is too long ago."""
    global _asked, _interrupted
    first: int | None = None
    deadline = 0.0
    while True:
        wait = None if first is None else max(0.0, deadline - time.monotonic())
        if not select.select([wakeups], [], [], wait)[0]:
            _end(first or signal.SIGINT, f"stopped, and a batch was abandoned; {GOES_ON}")
        heard = wakeups.recv(64)
        if not heard:
            return
        for number in heard:
            if number not in SIGNALS:
                continue
            if _interrupted:
                _interrupted = False  # that one is ours
                continue
            if first is not None:
                _end(number, f"stopped at once; {GOES_ON}")
            _asked = first = number
            deadline = time.monotonic() + LAST_SECONDS


def _end(number: int, text: str) -> None:
    """Ends this process and all that it started, now. Workers' processes follow by themselves."""
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live report hides it
    os.write(_stderr, f"{cursor}\nvidpipe: {text}\n".encode())
    sweep()
    for clean in list(_leavings):
        with contextlib.suppress(Exception):  # nothing may keep it from ending
            clean()
    os._exit(128 + number)


def sweep() -> None:
    """Kills all that this process started, and what these did."""
    for process in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def _descendants(root: int) -> list[int]:
    """The processes that `root` started, and those that they did; parents before children."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(root, ()))
    for process in found:
        found += children.get(process, ())
    return found
