"""Kills a process of a run at a named point; python imports this first, as it lies on PYTHONPATH.

CRASH_PLAN names a folder with plan.json: {"point", "call", "victim"}. At the `call`-th time that a
process comes to the point it kills itself, or the driver, once in all (`fired` is created for it).
Every batch and every unit that is begun or ended is noted in `log`, for the count of what is
computed again.
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("CRASH_PLAN", ""))


def kill(victim):
    try:
        (FOLDER / "fired").touch(exist_ok=False)
    except FileExistsError:
        return
    if victim == "driver":
        os.kill(int(os.environ["CRASH_DRIVER"]), signal.SIGKILL)
        time.sleep(30)  # until the kernel has killed this one with it
    os.kill(os.getpid(), signal.SIGKILL)


class Points:
    """Counts how often each point was reached in this process."""

    def __init__(self):
        self.plan = json.loads((FOLDER / "plan.json").read_text())
        self.calls = 0

    def reached(self, point):
        if point == self.plan.get("point"):
            self.calls += 1
            if self.calls == self.plan["call"]:
                kill(self.plan["victim"])


def note(*words):
    with (FOLDER / "log").open("a") as file:
        file.write(" ".join(words) + "\n")


def patch_store(module):
    points, store = Points(), module.Store
    write, create = store.write_parquet, store.create

    def write_parquet(self, name, table):
        points.reached("before data")
        if points.plan.get("point") == "half data":
            written = write(self, name, table)
            os.truncate(self.path(name), written[1] // 2)
            points.reached("half data")  # goes on where it is not the one
            return write(self, name, table)
        written = write(self, name, table)
        points.reached("after data")
        return written

    def created(self, name, data):
        kind = "compaction" if name.endswith(".jsonl") else "commit"
        points.reached(f"before {kind}")
        done = create(self, name, data)
        points.reached(f"after {kind}")
        return done

    store.write_parquet, store.create = write_parquet, created


def patch_durable(module):
    points, link = Points(), module.link

    def linked(part, path):
        kind = "compaction" if path.suffix == ".jsonl" else "commit"
        if points.plan.get("point") == f"half {kind}":
            whole = part.read_bytes()
            os.truncate(part, len(whole) // 2)
            points.reached(f"half {kind}")  # goes on where it is not the one
            part.write_bytes(whole)
        link(part, path)

    module.link = linked


def patch_log(module):
    module._LOOSE_COMMITS = 4  # so that sixty clips are enough for a snapshot


def patch_unit(module):
    unit = module.OpenUnit
    open_, batch, close = unit.__init__, unit.batch, unit.close

    def opened(self, store, dag, stage, model, retry, piece, *rest):
        self.noted = (stage.name, piece.unit)
        note("begin", *self.noted)
        open_(self, store, dag, stage, model, retry, piece, *rest)

    def noted(self, number, places):
        rows = batch(self, number, places)
        ids = self._book.column("clip_id").to_pylist()
        for place in places:
            note("row", *self.noted, ids[place])
        return rows

    def closed(self, keep=True):
        close(self, keep)
        note("end", *self.noted)

    unit.__init__, unit.batch, unit.close = opened, noted, closed


PATCHES = {
    "manifests.durable": patch_durable,
    "manifests.store": patch_store,
    "manifests.log": patch_log,
    "pipeline.unit": patch_unit,
}


class Patching(importlib.abc.MetaPathFinder):
    """Patches a module right after it was imported."""

    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("CRASH_PLAN"):
    os.environ.setdefault("CRASH_DRIVER", str(os.getpid()))
    sys.meta_path.insert(0, Patching())
