"""Whether a port of this machine is free: `python -m pipeline.port PORT`, before a launcher of
several nodes listens on it. Exit code 2 where it is not."""

from __future__ import annotations

import os
import socket
import sys


def taken(port: int) -> str | None:
    """Why it cannot be listened on, on any of the machine's addresses; None where it can."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None


def main(arguments: list[str]) -> int:
    port = int(arguments[0])
    if why := taken(port):
        print(
            f"vidpipe train: port {port} of this machine cannot be used ({why}): choose another "
            "with --head HOST:PORT, and start all nodes with what it prints",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
