"""Stages whose rows take as long as their captions say: `12 keep` is 12 ms and passes the gate."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa

from stages.base import Outcome, Rejected, Resources, Row, Speed, Stage, StageSettings, count, tell


def nap(row: Row, pace: float = 1.0) -> None:
    ms = int(row["caption"].split()[0])
    time.sleep(ms / 1000 * pace)
    count("ms", ms)


class NapSettings(StageSettings):
    pace: Speed[float] = 1.0


class Nap(Stage[NapSettings, None]):
    """No model, no end of a row before its time."""

    name = "nap"
    Settings = NapSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("napped", pa.int64())])

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        for row in rows:
            nap(row, self.settings.pace)
        return [{"napped": 1} for _ in rows]


class Gate(Stage[StageSettings, None]):
    """Keeps the captions that say so."""

    name = "gate"
    reads = ("caption", "napped")

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        return [r if r["caption"].endswith("keep") else Rejected("dropped") for r in rows]


class DreamSettings(StageSettings):
    raises: Speed[str] = ""  # a caption, or `all`
    gpu: Speed[bool] = False


class Dream(Stage[DreamSettings, str]):
    """Has a model that takes its time to load, counts words, and makes much of each row."""

    name = "dream"
    Settings = DreamSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("seen", pa.binary())])
    after = ("gate",)
    default_batch = 1
    default_resources = Resources(cpus=1)

    @property
    def accelerated(self) -> bool:
        return self.settings.gpu

    def setup(self) -> str:
        time.sleep(0.3)
        return "model"

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        for row in rows:
            if self.settings.raises in (row["caption"], "all"):
                raise ZeroDivisionError("a fault of the stage")
            nap(row)
            count("tokens", 10)
        return [{"seen": bytes(10_000)} for _ in rows]


class KeepSettings(StageSettings):
    pass


class Where(Stage[StageSettings, None]):
    """Tells what its worker has of the machine."""

    name = "where"
    reads = ("caption",)

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        threads, gpus = (os.environ.get(n) for n in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))
        tell(f"{len(os.sched_getaffinity(0))} cores, {threads} threads, GPUs {gpus!r}")
        return [{} for _ in rows]


class Keep(Stage[KeepSettings, None]):
    """Writes a file beside its commits, as download does, once a clip."""

    name = "keep"
    Settings = KeepSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("path", pa.string())])

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        kept: list[Outcome] = []
        for row in rows:
            path = f"media/{row['clip_id']}"
            file = Path(self.context.workdir) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(5000))
            kept.append({"path": path})
        return kept


class Open(Stage[StageSettings, None]):
    """Opens what Keep kept."""

    name = "open"
    reads = ("caption",)
    carries = ("path",)
    adds = pa.schema([pa.field("size", pa.int64())])

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        return [{"size": (Path(self.context.workdir) / row["path"]).stat().st_size} for row in rows]
