"""Toy stages that really kill or hang their process at certain captions."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pyarrow as pa

from stages.base import Outcome, Row, Stage, StageError, StageSettings, alive, count


class KillerSettings(StageSettings):
    folder: str = ""  # where it notes what it was called with, if anywhere


class Killer(Stage[KillerSettings, None]):
    """Dies at the caption that says how; "together" only kills beside "dynamite", "once" once."""

    name = "killer"
    Settings = KillerSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("said", pa.string())])
    default_batch = 10

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        said = {row["caption"] for row in rows}
        if {"together", "dynamite"} <= said:
            os.kill(os.getpid(), signal.SIGSEGV)
        for row in rows:
            alive()
            self.one(row["caption"])
        return [{"said": row["caption"]} for row in rows]

    def one(self, caption: str) -> None:
        if caption in ("SIGSEGV", "SIGKILL", "SIGABRT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, caption))
        if caption == "exit":
            os._exit(7)
        if caption == "hang":
            time.sleep(600)
        if caption == "hang in C":  # PyDLL keeps the interpreter's lock
            ctypes.PyDLL(None).sleep(600)
        if caption == "slow":
            for _ in range(8):
                alive()
                time.sleep(0.2)
        if caption == "once":
            mark = Path(self.settings.folder) / "once"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


class Streaming(Killer):
    """Takes rows one by one, four further than it has answered, and answers the last one first."""

    name = "streaming"
    default_batch = 1

    def stream(
        self, batches: Iterator[pa.Table], model: None
    ) -> Generator[tuple[int, list[Outcome]]]:
        flying: list[tuple[int, list[Outcome]]] = []
        for number, batch in enumerate(batches):
            flying.append((number, self.process(batch.to_pylist(), model)))
            if len(flying) == 4:
                yield from reversed(flying)
                flying = []
        yield from reversed(flying)


class Modelled(Streaming):
    """Has a model, takes its time, and notes each of its streams in the folder of its settings."""

    name = "modelled"

    def setup(self) -> None:
        return None

    def one(self, caption: str) -> None:
        if caption == "crash":
            raise ZeroDivisionError("a fault of the stage")
        time.sleep(0.05)
        count("answers", 1)

    def stream(
        self, batches: Iterator[pa.Table], model: None
    ) -> Generator[tuple[int, list[Outcome]]]:
        with (Path(self.settings.folder) / "streams").open("a") as file:
            file.write("stream ")
        yield from super().stream(batches, model)


class Loader(Stage[KillerSettings, str]):
    """Has a model, whose every loading it notes; can die while it loads it."""

    name = "loader"
    Settings = KillerSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("pid", pa.int64())])

    def setup(self) -> str:
        with (Path(self.settings.folder) / "loads").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if (Path(self.settings.folder) / "no-gpu").exists():
            os.kill(os.getpid(), signal.SIGSEGV)
        return "model"

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        assert model == "model"
        return [{"pid": os.getpid()} for _ in rows]


class Parent(Stage[KillerSettings, subprocess.Popen[bytes]]):
    """Has a model that is a process, as vLLM's engine is, and never ends it; notes its id."""

    name = "parent"
    Settings = KillerSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("child", pa.int64())])

    def setup(self) -> subprocess.Popen[bytes]:
        started = subprocess.Popen(["sleep", "600"])
        (Path(self.settings.folder) / "child").write_text(str(started.pid))
        return started

    def process(self, rows: list[Row], model: subprocess.Popen[bytes]) -> list[Outcome]:
        if rows[0]["caption"] == "hang":
            time.sleep(600)
        return [{"child": model.pid} for _ in rows]


class Unready(Stage[StageSettings, str]):
    """Can't be set up, and knows it."""

    name = "unready"
    Settings = StageSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("never", pa.string())])

    def setup(self) -> str:
        raise StageError("the weights are missing: download them")

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        return [{"never": ""} for _ in rows]


class Returner(Stage[KillerSettings, Path]):
    """Notes in the folder of its settings what it takes and gives back; counts letters."""

    name = "returner"
    Settings = KillerSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("letters", pa.int64())])

    def setup(self) -> Path:
        note = Path(self.settings.folder) / "notes"
        with note.open("a") as file:
            file.write("taken ")
        return note

    def teardown(self, model: Path) -> None:
        with model.open("a") as file:
            file.write("given back ")

    def process(self, rows: list[Row], model: Path) -> list[Outcome]:
        for row in rows:
            count("letters", len(row["caption"]))
        return [{"letters": len(row["caption"])} for row in rows]


class Slow(Stage[KillerSettings, None]):
    """Takes as many seconds as the caption says, a row a batch, and notes its begin in the folder
    that the caption names."""

    name = "slow"
    Settings = KillerSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("took", pa.float64())])
    default_batch = 1

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        seconds, *folder = rows[0]["caption"].split()
        if folder:
            with (Path(folder[0]) / "at-work").open("a") as file:
                file.write(".")
        time.sleep(float(seconds))
        return [{"took": float(seconds)}]
