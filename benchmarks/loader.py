"""The trainer's loader: MB/s against plain sequential reads of the same files, and how long the
demo's training waits for data."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.figures import VIDPIPE, report
from manifests.facts import with_facts
from manifests.shards import INDEX, LATENTS, Index, LatentSpec, write_index
from manifests.store import Store
from trainer.config import TrainSettings
from trainer.data import Batch, Loader
from trainer.reader import THREADS

MIB = 1 << 20
CHUNK = 16 * MIB  # of a plain read
BATCH = 4
SHAPES = {  # of the stored moments
    "21 x 60 x 104": (32, 21, 60, 104),  # 81 frames of 480 x 832 by Wan's VAE: 8 MB in bfloat16
    "16 x 32 x 32": (8, 16, 32, 32),  # 16 frames of 256 x 256 by Stable Diffusion's: 0.25 MB
    "64 x 8 x 8": (8, 64, 8, 8),  # 64 frames of 64 x 64: 0.06 MB
}


def make(folder: Path, shape: tuple[int, ...], size: int, shards: int) -> Path:
    """Shards as the stage encode writes them, of `size` bytes together; the index' path."""
    store = Store(str(folder))
    clip = int(np.prod(shape)) * 2
    spec = LatentSpec(
        "none", "none", "0" * 64, "f", True, shape[0] // 2, 4, 8, [0.0] * (shape[0] // 2),
        [1.0] * (shape[0] // 2),
    )  # fmt: skip
    draw, rows = np.random.default_rng(0), []
    schema = pa.schema([pa.field("clip_id", pa.string()), *LATENTS])
    for number in range(shards):
        count, name = max(1, size // shards // clip), f"encode/f/u{number}.parquet"
        ids = [f"{number:08}{row:016}" for row in range(count)]
        made = {
            "latents_shape": list(shape),
            "latents_dtype": "bfloat16",
            "frame_times": [k / 16 for k in range(81)],
            "latents_fps": 16.0,
            "window_start": 0.0,
            "window_end": 5.0,
        }
        table = pa.Table.from_pylist(
            [{"clip_id": clip_id, "latents": draw.bytes(clip), **made} for clip_id in ids], schema
        )
        store.write_parquet(name, with_facts(table, {"spec": spec.to_json()}))
        place = {"shard": name, "shape": list(shape), "caption": "a caption"}
        rows += [{"clip_id": c, "row": row, **place} for row, c in enumerate(ids)]
    path = folder / "index.parquet"
    write_index(str(path), str(folder), [pa.Table.from_pylist(rows, INDEX)], spec, {})
    return path


def forget(files: Sequence[Path]) -> None:
    """Has the system's cache drop them, as far as it does."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(files: Sequence[Path], threads: int = 1) -> int:
    """Each file from its beginning to its end, into one buffer a thread; the bytes read."""

    def read(some: Sequence[Path]) -> int:
        total, buffer = 0, bytearray(CHUNK)
        for file in some:
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(buffer):
                    total += count
        return total

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, [files[n::threads] for n in range(threads)]))


def take(batches: Iterator[Batch], count: int) -> int:
    """Batches as the model gets them; the bytes of their latents."""
    return sum(batch.stored.nbytes for batch in islice(batches, count))


def run(work: Callable[[], int]) -> tuple[float, float]:
    """MiB/s, and CPU seconds a GiB of all threads."""
    began, cpu = time.perf_counter(), time.process_time()
    size = work() / MIB
    return size / (time.perf_counter() - began), (time.process_time() - cpu) / size * 1024


def reading(args: argparse.Namespace) -> list[tuple[str, str]]:
    rows = []
    for title, shape in SHAPES.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            index = make(Path(name), shape, args.mib * MIB, args.shards)
            files = sorted(Path(name).rglob("u*.parquet"))
            # A quarter of the clips, at most, in memory: `memory` counts them as float32.
            settings = TrainSettings(
                index=str(index),
                output=index.parent / "out",
                batch_size=BATCH,
                memory=args.mib * MIB // 2,
            )
            loader = Loader(Index.open(str(index)), settings)
            epoch, clip = len(loader) // BATCH, 2 * int(np.prod(shape))
            # What it may have read ahead while the others had their turn.
            ahead = min(epoch // 2, loader.memory // 4 // (BATCH * clip) + settings.read_ahead)
            with closing(loader.batches(loader.start())) as batches:
                take(batches, epoch)  # from here on its memory is used again
                for state in ("from disk", "cached"):
                    found: dict[str, list[tuple[float, float]]] = {}
                    for _ in range(args.rounds):
                        for who, work in (
                            ("plain", partial(plain, files)),
                            (f"plain, {THREADS} threads", partial(plain, files, THREADS)),
                            ("loader", partial(take, batches, epoch - ahead)),
                        ):
                            if state == "from disk":
                                forget(files)
                            if who == "loader":
                                take(batches, ahead)
                            found.setdefault(who, []).append(run(work))
                    rows += told(f"{title}, {state}: ", found)
                few = list(islice(batches, 8))
            rows.append((f"{title}: draws of the posterior on the CPU, one thread", draws(few)))
    return rows


def told(title: str, found: dict[str, list[tuple[float, float]]]) -> list[tuple[str, str]]:
    rows = []
    for who, runs in found.items():
        speed, cpu = (statistics.median(values) for values in zip(*runs))
        ratios = [ours / theirs for (ours, _), (theirs, _) in zip(found["loader"], runs)]
        ratio = f"; loader's ratio {statistics.median(ratios):.2f} (best {max(ratios):.2f})"
        of = ratio if who != "loader" else ""
        rows.append((title + who, f"{speed:.0f} MiB/s, CPU {cpu:.2f} s a GiB{of}"))
    return rows


def draws(batches: Sequence[Batch]) -> str:
    """No part of the loader: the model's device draws, when it has the stored moments."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speed, cpu = run(lambda: sum(b.stored.nbytes for b in batches if len(b.latents())))
    finally:
        torch.set_num_threads(threads)
    return f"{speed:.0f} MiB/s, CPU {cpu:.2f} s a GiB"


def waiting() -> list[tuple[str, str]]:
    """Of `vidpipe demo`'s training, by what it logs every ten steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as name:
        command = [*VIDPIPE, "demo", f"{name}/demo"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        (logs,) = {file.parent for file in Path(name).rglob("events.out.tfevents*")}
        events = EventAccumulator(str(logs))
        events.Reload()
        shares = [event.value for event in events.Scalars("data_wait")]
    told = ", ".join(f"{share:.2%}" for share in shares)
    return [("data-wait share of the demo's training, of ten steps each", told)]


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [*reading(args), *(waiting() if not args.no_demo else [])]


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--mib": {"type": int, "default": 4096, "help": "of shards, for each shape"},
            "--shards": {"type": int, "default": 16, "help": "files they are in"},
            "--rounds": {"type": int, "default": 5, "help": "each: plain reads, then the loader"},
            "--folder": {"type": Path, "default": None, "help": "where shards go; default: /tmp"},
            "--no-demo": {"action": "store_true", "help": "leave the demo's training out"},
        },
    )
