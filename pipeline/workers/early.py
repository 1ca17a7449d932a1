"""Ctrl-C while the command is still importing ends it quietly: `pipeline.cli` imports this first.

Imports next to nothing itself. Where another program imports the command line, it does nothing.
"""

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nvidpipe: stopped before anything was begun\n")
    os._exit(128 + number)


if os.path.basename(sys.argv[0]) in ("vidpipe", "cli.py"):  # noqa: PTH119  pathlib takes its time
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
