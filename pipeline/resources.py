"""Workers for stages: what a machine or cluster offers, what each stage takes, what fits together.

A run that can't start must say so before it starts: Ray waits silently for resources that will
never come.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import ConfigError, RunSettings
from stages.base import Stage

AnyStage = Stage[Any, Any]
T = TypeVar("T")
GIB = 1 << 30
# Where models are at work units travel in parts of so many rows, at least and at most: few enough
# to keep all workers at work, and many, as a part's beginning and end leave its model waiting.
PART_ROWS = (16, 2048)
# Units or parts that each worker gets at least, where there are enough: the last ones end together.
ROUNDS = 4
# Rows of a unit that are committed together, where equal rows go to one worker: at least so many,
# unless there are so many workers that some would get none.
ONCE_ROWS = 256
# Of all cores, for the workers that have a GPU.
CPU_SHARE = 0.75


@dataclass(frozen=True)
class Offer:
    """What there is to run on."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Workers:
    """One stage's share: `count` processes of `cpus` cores and `gpus` GPUs each."""

    count: int
    cpus: float
    gpus: float
    memory: int
    actor: bool  # keeps a model loaded between units, and so holds its resources
    once: bool = False  # each gets the rows of some keys, of all units

    @property
    def held(self) -> tuple[float, float]:
        """CPUs and GPUs held for as long as the stage may get a unit."""
        return (self.count * self.cpus, self.count * self.gpus) if self.actor else (0.0, 0.0)


def share(stage: AnyStage, offer: Offer, units: int) -> Workers:
    """How many workers a stage gets, if it has the whole offer. Raises ConfigError."""
    asked = stage.resources
    cpus, gpus = asked.cpus, asked.gpus
    if stage.settings.gpus is None and stage.accelerated and offer.gpus >= 1:
        gpus = 1.0
    if gpus and stage.settings.cpus is None:
        # They get rows ready for their GPU; the rest of the cores is for the stages before it.
        cpus = max(cpus, float(int(CPU_SHARE * offer.cpus * gpus / offer.gpus)))
    for kind, per_worker, there in (("cpus", cpus, offer.cpus), ("gpus", gpus, offer.gpus)):
        if per_worker > there:
            raise ConfigError(
                f"{stage.name}: one worker takes {per_worker:g} {kind} and there are {there:g}: "
                f"set {stage.name}.{kind} lower, or run on a larger machine with --address"
            )
    fits = int(offer.gpus // gpus) if gpus else int(offer.cpus // cpus)
    count = asked.workers or max(1, min(fits, units))
    if asked.workers and stage.loads_model and asked.workers > fits:
        kind, per_worker, there = ("gpus", gpus, offer.gpus) if gpus else ("cpus", cpus, offer.cpus)
        raise ConfigError(
            f"{stage.name}: {asked.workers} workers of {per_worker:g} {kind} don't fit in "
            f"{there:g} {kind}: lower {stage.name}.workers or {stage.name}.{kind}"
        )
    return Workers(count, cpus, gpus, asked.memory, stage.loads_model, stage.once)


def cut(workers: Sequence[Workers], units: int, rows: int) -> int:
    """Into how many parts `units` of up to `rows` rows are cut: where no model is at work only so
    that no worker is without one, as reading and committing have their price."""
    least, most = PART_ROWS
    if any(each.once for each in workers):
        count = max(each.count for each in workers)
        return 1 if count == 1 else max(2 * count, min(ROUNDS * count, rows // ONCE_ROWS))
    if any(each.actor for each in workers):
        each_gets = rows * units // (ROUNDS * max(w.count for w in workers if w.actor))
        return -(-rows // min(most, max(least, each_gets)))
    return min(-(-rows // least), -(-ROUNDS * max(each.count for each in workers) // units))


def spread(number: int, pieces: Sequence[T]) -> Counter[T]:
    """Of which pieces of a run's work so many rows are to be looked at again: one of the first, so
    that a fault is seen early, and the others of any."""
    if not number or not pieces:
        return Counter()
    return Counter([pieces[0], *random.choices(pieces, k=number - 1)])


@dataclass(frozen=True)
class Pass:
    """Stages that run chained: a unit goes on to the next as soon as one has committed it."""

    stages: tuple[str, ...]
    why: str


def passes(
    workers: Mapping[str, Workers], offer: Offer, mode: str, stages: Sequence[str]
) -> list[Pass]:
    """Cuts the stages, in order, into passes.

    `auto` chains as long as all workers that hold a model fit side by side, with a CPU left for
    the stages that hold none: so models of two GPU stages never share a GPU. A stage whose equal
    rows go to one worker stands alone: what is chained goes where its unit goes. Raises ConfigError
    where `pipelined` asks for what does not fit: Ray would wait for ever.
    """
    if mode == "staged":
        return [Pass((name,), "run.mode is staged") for name in stages]
    done: list[Pass] = []
    chain: list[str] = []
    for name in stages:
        if chain and (workers[name].once or workers[chain[-1]].once):
            once = name if workers[name].once else chain[-1]
            done.append(Pass(tuple(chain), f"equal rows of {once} go to one worker, of all units"))
            chain = []
        over = _over([workers[n] for n in (*chain, name)], offer)
        if over and mode == "pipelined":
            raise ConfigError(
                f"run.mode is pipelined, but {', '.join((*chain, name))} side by side take more "
                f"{' and '.join(over)} than there are: lower their workers, or leave run.mode auto"
            )
        if over and chain:
            beside = " and ".join(n for n in chain if workers[n].actor) or chain[-1]
            why = f"{name} beside {beside} would take more {' and '.join(over)} than there are"
            done.append(Pass(tuple(chain), why))
            chain = []
        chain.append(name)
    return [*done, Pass(tuple(chain), "the rest fits side by side" if done else "all fit")]


def _over(workers: Sequence[Workers], offer: Offer) -> list[str]:
    """What these workers side by side would take too much of."""
    spare = 0.0 if all(w.actor for w in workers) else 1.0
    cpus = sum(w.held[0] for w in workers) + spare
    gpus = sum(w.held[1] for w in workers)
    return [
        kind
        for kind, n, there in (("CPUs", cpus, offer.cpus), ("GPUs", gpus, offer.gpus))
        if n > there
    ]


def check_workdir(workdir: str) -> None:
    """Raises ConfigError where a local workdir can't be written. Of remote ones `Store.prove` tells
    more."""
    if "://" in workdir:
        return
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} can't be written: {error.strerror}. Mend that (`vidpipe gc` shows "
            "what may go from a full one), or name another with `--set workdir=...`."
        ) from error


def free_space(workdir: str) -> int | None:
    """Free bytes where a local workdir lies."""
    return None if "://" in workdir else shutil.disk_usage(workdir).free


def shared_memory() -> int | None:
    """Bytes of /dev/shm, which Ray's object store wants; None where there is none."""
    try:
        stat = os.statvfs("/dev/shm")  # noqa: S108  the kernel's, not a temporary file
    except OSError:
        return None
    return stat.f_frsize * stat.f_blocks


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Devices of GPUs' drivers: NVIDIA's on servers, on Jetson and on Windows' Linux, AMD's.
_DRIVERS = ("nvidia*", "nvhost*", "nvgpu*", "dxg", "kfd")


def gpus_here() -> int:
    """GPUs that processes of this machine may use."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DRIVERS):
        return 0
    import torch  # takes seconds

    return torch.cuda.device_count()


def usable_gpus(run: RunSettings, there: float) -> float:
    """The GPUs to use. Raises ConfigError where more are asked for than there are."""
    if run.gpus is None:
        return there
    if run.gpus > there:
        raise ConfigError(
            f"--gpus {run.gpus}: this {'cluster' if run.address else 'machine'} has {there:g}. "
            "Leave --gpus out to use what there is."
        )
    return float(run.gpus)
