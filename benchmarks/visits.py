"""What the trainer's loader guarantees, counted: every clip once an epoch, captions dropped at the
rate that was set, the same order on any number of processes, memory apart from that of shards."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import report
from benchmarks.loader import MIB, make
from manifests.shards import Index
from trainer.config import TrainSettings
from trainer.data import Loader
from trainer.order import Position

EPOCHS = 3
SMALL = (8, 1, 4, 4)  # 256 bytes: only their order matters
CLIP = (8, 16, 16, 16)  # 64 KB in bfloat16
HELD = 64 * MIB  # `memory` where memory is measured


class Visit(NamedTuple):
    epoch: int
    clip: str
    caption: str
    drawn: str  # digest of the posterior's sample


def settings(index: Path, **values: Any) -> TrainSettings:
    return TrainSettings(index=str(index), output=index.parent / "out", **values)


def visits(index: Path, world: int, start: Position | None = None) -> Iterator[tuple[Visit, Any]]:
    """Those of `world` processes, each of batch 1, in turns; and where the streams then stand."""
    index_of = Index.open(str(index))
    with ExitStack() as stack:
        sources = []
        for rank in range(world):
            loader = Loader(index_of, settings(index, batch_size=1), rank, world)
            batches = loader.batches(start or loader.start())
            sources.append((loader, stack.enter_context(closing(batches))))
        given = sum((start or sources[0][0].start()).given)
        while True:
            # Visit v is of process v modulo their number.
            batch = next(sources[given % world][1])
            drawn = hashlib.sha256(batch.latents().numpy().data).hexdigest()
            yield (
                Visit(batch.epochs[0], batch.clip_ids[0], batch.captions[0], drawn),
                batch.position,
            )
            given += 1


def counted(args: argparse.Namespace) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        clips = math.ceil(args.visits / EPOCHS)
        size = clips * math.prod(SMALL) * 2
        index = make(Path(name), SMALL, size + 7 * 256, 7)
        clips = len(Index.open(str(index)).table)
        total = EPOCHS * clips
        alone = list(islice(visits(index, 1), total))
        one = [visit for visit, _ in alone]
        times = Counter((visit.epoch, visit.clip) for visit in one)
        once = sum(count == 1 for count in times.values())
        drop = settings(index).caption_dropout
        dropped = sum(visit.caption == "" for visit in one)
        sigma = math.sqrt(total * drop * (1 - drop))
        orders = {tuple(v.clip for v in one if v.epoch == epoch) for epoch in range(EPOCHS)}
        rows = [
            (f"visits over {EPOCHS} epochs of {clips} clips, batch 1", f"{total}"),
            ("clips seen exactly once in an epoch", f"{once} of {EPOCHS * clips}"),
            ("epochs in an order of their own", f"{len(orders)} of {EPOCHS}"),
            (
                f"captions dropped, of {drop} set",
                f"{dropped / total:.4f}, off by {abs(dropped - total * drop) / sigma:.2f} sigma",
            ),
            ("posterior samples that differ", f"{len({v.drawn for v in one})} of {total}"),
        ]
        for world in (2, 3, 8):
            other = [visit for visit, _ in islice(visits(index, world), total)]
            same = sum(a == b for a, b in zip(one, other, strict=True))
            rows.append((f"visits that are the same on {world} processes", f"{same} of {total}"))
        stop = total // 2  # within the second epoch
        rest = [visit for visit, _ in islice(visits(index, 2, alone[stop - 1][1]), total - stop)]
        same = sum(a == b for a, b in zip(one[stop:], rest, strict=True))
        rows.append(
            (f"the same when 2 go on where 1 stopped, at {stop}", f"{same} of {total - stop}")
        )
        return rows


def child(index: str) -> None:
    """Reads an epoch; prints what the process held at most, and what it did before it began."""
    loader = Loader(Index.open(index), settings(Path(index), batch_size=4, memory=HELD))
    before = peak()
    with closing(loader.batches(loader.start())) as batches:
        read = sum(batch.stored.nbytes for batch in islice(batches, len(loader) // 4))
    print(json.dumps({"read": read, "before": before, "peak": peak()}))


def peak() -> int:
    """The most bytes that this program held: getrusage counts what its parent held, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def held(args: argparse.Namespace) -> list[tuple[str, str]]:
    rows = []
    for shards in args.shards:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            index = make(Path(name), CLIP, shards * args.mib_a_shard * MIB, shards)
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.visits", "--child", str(index)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout)
            told = "{:.0f} MiB, of which {:.0f} before the first batch".format(
                found["peak"] / MIB, found["before"] / MIB
            )
            rows.append((f"peak memory, {shards} shards ({found['read'] / MIB:.0f} MiB)", told))
    return rows


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [*counted(args), *held(args)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        report(
            measure,
            __doc__ or "",
            {
                "--visits": {"type": int, "default": 10_000, "help": "at least"},
                "--shards": {
                    "type": int,
                    "nargs": "+",
                    "default": [10, 100, 1000],
                    "help": "of which peak memory is measured",
                },
                "--mib-a-shard": {"type": int, "default": 4, "help": "of those"},
                "--folder": {"type": Path, "default": None, "help": "for shards; default: /tmp"},
            },
        )
