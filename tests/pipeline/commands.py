"""Real `vidpipe run` processes on toy stages, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "VIDPIPE_TEST_MARK"
SHIPPED = ("download", "probe", "score", "filter", "recaption", "encode")


def project(
    folder: Path,
    captions: Sequence[str],
    stages: Sequence[str] = (),
    more: str = "",
    on: Sequence[str] = (),
) -> Path:
    """A folder with a vidpipe.yaml of toy stages, given as `name: module:Class`, and of our own
    only those that are `on`."""
    folder.mkdir(exist_ok=True)
    rows = [{"path": f"{i}.mp4", "text": caption} for i, caption in enumerate(captions)]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    off = "".join(f"{name}: {{enabled: false}}\n" for name in SHIPPED if name not in on)
    used = "".join(f'  {name}: {{use: "{use}"}}\n' for name, use in (s.split("=") for s in stages))
    (folder / "vidpipe.yaml").write_text(
        "source: {kind: jsonl, path: ./clips.jsonl}\n"
        f"{off}{'stages:' if used else ''}\n{used}{more}"
    )
    return folder


class Command:
    """A `vidpipe` that is running. Its descendants bear a mark by which they are found again.
    Signals are as in a terminal but for those `ignored`: what runs in the background or under
    nohup, as tests may, hands down that some are."""

    def __init__(
        self,
        folder: Path,
        *words: str,
        path: Sequence[Path] = (),
        env: Mapping[str, str] = {},
        ignored: Sequence[int] = (),
    ) -> None:
        def heed() -> None:
            for number in (signal.SIGINT, signal.SIGHUP):
                how = signal.SIG_IGN if number in ignored else signal.SIG_DFL
                signal.signal(number, how)

        self.mark = uuid.uuid4().hex
        paths = os.pathsep.join(map(str, (*path, ROOT, Path(__file__).parent)))
        self._stderr = (folder / f"stderr-{self.mark}.txt").open("w+")
        self._stdout = (folder / f"stdout-{self.mark}.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *words],
            cwd=folder,
            env={**os.environ, **env, "PYTHONPATH": paths, MARK: self.mark},
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
            preexec_fn=heed,
        )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    @property
    def said(self) -> str:
        return Path(self._stderr.name).read_text()

    @property
    def printed(self) -> str:
        return Path(self._stdout.name).read_text()

    def left(self) -> dict[int, str]:
        """Processes that bear the mark and live."""
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes():
                    name = environ.with_name("cmdline").read_bytes()
                    found[int(environ.parent.name)] = name.replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def listens(self) -> bool:
        """Whether it has set its handlers: SIGTERM is among the signals that it catches."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> 14 & 1)


def until(true: Callable[[], object], seconds: float = 240) -> None:
    """Waits for it; raises AssertionError where it does not come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def account(folder: Path, stage: str) -> dict[str, int]:
    """What `vidpipe status --json` says of the stage."""
    command = Command(folder, "status", "--json")
    assert command.wait() == 0, command.said
    stages = json.loads(command.printed)["stages"]
    return next(s for s in stages if s["name"] == stage)
