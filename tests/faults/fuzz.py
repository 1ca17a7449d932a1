"""Damaged videos through probe, score and encode's decoding, each accounted for: `make fuzz`.

A child process does the work, as a run's worker does, so that a crash within FFmpeg costs one file
and is counted, not hidden.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
from fuzz_run import Trivial, fuzz_run, part_of
from mutations import mutated

VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"
SILENCE = 60.0  # seconds without a sign of life: the worker hangs
DECODE_SECONDS = 30.0
FILES_A_WORKER = 250
Settle = Callable[[Path, float | None, float | None], tuple[str, str]]


@dataclass
class Report:
    """What became of the files. `killed_worker` and `time_limit` are among the failed ones."""

    files: int = 0
    kept: int = 0
    rejected: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    deaths: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)  # exceptions out of a stage
    longest: tuple[float, str] = (0.0, "")
    peak: tuple[int, str] = (0, "")  # bytes, and the file that raised it last
    seconds: float = 0.0

    @property
    def unaccounted(self) -> int:
        return self.files - self.kept - self.rejected - self.failed.total()

    def __str__(self) -> str:
        classes = ", ".join(f"{n} {name}" for name, n in self.failed.most_common())
        return "\n".join(
            (
                f"files {self.files}, kept {self.kept}, rejected {self.rejected}, "
                f"failed {self.failed.total()}, unaccounted {self.unaccounted}",
                f"failed: {classes}",
                f"worker deaths {len(self.deaths)}, hangs {len(self.hangs)}, "
                f"exceptions {len(self.raised)}",
                *(self.deaths + self.hangs + self.raised),
                f"longest {self.longest[0]:.2f} s: {self.longest[1]}",
                f"peak memory {self.peak[0] >> 20} MiB: {self.peak[1]}",
                f"{self.seconds:.0f} s in all",
            )
        )


def settle(path: Path, start: float | None, end: float | None) -> tuple[str, str]:
    """(outcome, reason) of a file, by the stages themselves."""
    from stages.base import Context, Failed, Rejected
    from stages.encode import Encode, EncodeSettings
    from stages.media.sampling import Sampling
    from stages.probe import Probe, ProbeSettings
    from stages.score import Score, ScoreSettings

    context = Context(str(path.parent), sampling=Sampling(frames=32, size=64))
    limit = {"decode_seconds": DECODE_SECONDS}
    probe = Probe(ProbeSettings(**limit), context)
    score = Score(ScoreSettings(frames=3, side=64, **limit), context)
    encode = Encode(EncodeSettings(**limit), context)
    row = {"clip_id": path.name, "path": str(path), "start": start, "end": end}
    for stage, model in ((probe, None), (score, None), (encode, Trivial())):
        (outcome,) = stage.process([row], model)
        match outcome:
            case Failed(error, _):
                return "failed", error
            case Rejected(reason, _):
                return "rejected", reason
            case _:
                assert set(stage.adds.names) <= set(outcome), f"{stage.name} left columns out"
                pa.Table.from_pylist([outcome], stage.adds)  # as the commit will
    return "kept", ""


def work(settle: Settle, inbox: Connection, outbox: Connection) -> None:
    """A worker: files in, outcomes out, until None comes."""
    from stages.base import on_alive

    on_alive(lambda: outbox.send(("alive",)))
    while (job := inbox.recv()) is not None:
        path, start, end = job
        began = time.monotonic()
        try:
            outcome, reason = settle(path, start, end)
        except Exception:  # noqa: BLE001  it is what is looked for
            outcome, reason = "raised", traceback.format_exc()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        outbox.send(("done", outcome, reason, time.monotonic() - began, peak))


class Worker:
    """A child process, and the two ends to it."""

    def __init__(self, settle: Settle, silence: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        theirs_in, self._inbox = spawn.Pipe(duplex=False)
        self._outbox, theirs_out = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=work, args=(settle, theirs_in, theirs_out), daemon=True)
        self.process.start()
        theirs_in.close()
        theirs_out.close()
        self.files, self._silence = 0, silence

    def settle(self, *job: Any) -> tuple[str, str, float, int]:
        """(outcome, reason, seconds, peak memory) of one file, whatever happens."""
        self.files += 1
        self._inbox.send(job)
        try:
            while self._outbox.poll(self._silence):
                message = self._outbox.recv()
                if message[0] == "done":
                    return message[1:]
        except EOFError:
            self.process.join()
            return "failed", "killed_worker", 0.0, 0
        self.process.kill()
        self.process.join()
        return "failed", "time_limit", self._silence, 0

    def close(self) -> None:
        if self.process.is_alive():
            self._inbox.send(None)
        self.process.join()


def fuzz(
    videos: Sequence[Path],
    seed: int,
    numbers: Sequence[int],
    keep: Path | None = None,
    settle: Settle = settle,
    silence: float = SILENCE,
) -> Report:
    """Makes the files of these numbers and settles each. `keep`: a folder for the bad ones."""
    report = Report()
    began = time.monotonic()
    worker: Worker | None = None
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            name, data = mutated(list(videos), seed, number)
            path = Path(folder, name)
            path.write_bytes(data)
            start, end = part_of(seed, number)
            if worker is None or worker.files >= FILES_A_WORKER or not worker.process.is_alive():
                if worker:
                    worker.close()
                worker = Worker(settle, silence)
            outcome, reason, seconds, peak = worker.settle(path, start, end)
            what = f"{name} ({start}..{end})"
            report.files += 1
            report.kept += outcome == "kept"
            report.rejected += outcome == "rejected"
            report.failed.update([reason] if outcome == "failed" else [])
            if reason == "killed_worker":
                report.deaths.append(f"{what}: exit code {worker.process.exitcode}")
            if reason == "time_limit":
                report.hangs.append(what)
            if outcome == "raised":
                report.raised.append(f"{what}: {reason}")
            if keep and (outcome == "raised" or reason in ("killed_worker", "time_limit")):
                keep.mkdir(exist_ok=True)
                (keep / name).write_bytes(data)
            report.longest = max(report.longest, (seconds, what))
            if peak > report.peak[0]:
                report.peak = (peak, what)
            path.unlink()
        if worker:
            worker.close()
    report.seconds = time.monotonic() - began
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--keep", type=Path, help="where files go that broke something")
    parser.add_argument("--run", action="store_true", help="as a run does it, workers and commits")
    options = parser.parse_args()
    videos = sorted(VIDEOS.iterdir())
    numbers = range(options.first, options.first + options.files)
    if options.run:
        with tempfile.TemporaryDirectory() as folder:
            found, said = fuzz_run(videos, options.seed, numbers, Path(folder))
        print(*said, f"{found.total()} of {len(numbers)}: {dict(found.most_common())}", sep="\n")
        sys.exit(1 if found.total() != len(numbers) or found["pending"] else 0)
    report = fuzz(videos, options.seed, numbers, options.keep)
    print(report)
    sys.exit(1 if report.unaccounted or report.hangs or report.raised else 0)


if __name__ == "__main__":
    main()
