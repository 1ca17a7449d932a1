"""Small stages that need no video and misbehave on command, and a pipeline of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from manifests.schema import child_id
from manifests.sources import SourceSettings
from pipeline.config import Config, RunSettings
from pipeline.dag import Pipeline, build
from stages.base import (
    Context,
    Failed,
    Outcome,
    Rejected,
    Row,
    Speed,
    Stage,
    StageSettings,
    count,
    tell,
)
from stages.checks import Checks
from stages.media.sampling import Sampling


class LengthSettings(StageSettings):
    factor: int = 1
    noise: Speed[int] = 0  # no result depends on it


class Length(Stage[LengthSettings, None]):
    """Measures the caption; an empty one is rejected, "bad" fails and is counted, also where there
    is none, "crash" is a bug."""

    name = "length"
    Settings = LengthSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("words", pa.int64()), pa.field("blob", pa.binary())])

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        count("bad", sum(row["caption"] == "bad" for row in rows))
        return [self.one(row["caption"]) for row in rows]

    def one(self, caption: str | None) -> Outcome:
        if not caption:
            return Rejected("empty", "no caption")
        if caption == "crash":
            raise ZeroDivisionError("a fault of the stage")
        if caption == "bad":
            return Failed("bad_caption", "the caption says bad")
        words = len(caption.split()) * self.settings.factor
        return {"words": words, "blob": caption.encode() * 10}


class LimitSettings(StageSettings):
    most: int = 3


class Limit(Stage[LimitSettings, None]):
    """A gate: keeps captions of few words."""

    name = "limit"
    Settings = LimitSettings
    reads = ("words",)

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        most = self.settings.most
        return [r if r["words"] <= most else Rejected("too_long", f"{r['words']}") for r in rows]


class ShoutSettings(StageSettings):
    mark: str = "!"


class Shout(Stage[ShoutSettings, str]):
    """Has a model, and comes after the gate without reading what it reads."""

    name = "shout"
    Settings = ShoutSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("loud", pa.string())])
    after = ("limit",)

    def setup(self) -> str:
        return self.settings.mark

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        return [{"loud": row["caption"].upper() + model} for row in rows]


class LookingSettings(StageSettings):
    most: Speed[int] = 3


class Looking(Stage[LookingSettings, Checks]):
    """Has a model, and says which rows it has looked at again; "empty" it does not keep."""

    name = "looking"
    Settings = LookingSettings
    reads = ("caption",)

    @property
    def checks(self) -> int:
        return self.settings.most

    def setup(self) -> Checks:
        return Checks()

    def check_rows(self, number: int, rows: int, model: Checks) -> None:
        model.ask(number, rows)

    def process(self, rows: list[Row], model: Checks) -> list[Outcome]:
        return [self.one(row, model) for row in rows]

    def one(self, row: Row, model: Checks) -> Outcome:
        if row["caption"] == "empty":
            model.passed()
            return Rejected("empty", "")
        if model.due():
            tell(f"looked at {row['clip_id']}")
        return {}


class Heavy(Stage[StageSettings, None]):
    """Makes more than a small disk holds."""

    name = "heavy"
    Settings = StageSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("weight", pa.binary())])
    after = ("limit",)

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        return [{"weight": bytes(3 << 20)} for _ in rows]


class Words(Stage[StageSettings, None]):
    """Splits a clip into one part per word of its caption."""

    name = "words_of"
    Settings = StageSettings
    splits = True
    reads = ("caption",)
    adds = pa.schema([pa.field("word", pa.string())])
    after = ("length",)

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        return [
            [
                {"clip_id": child_id(row["clip_id"], float(i), None), "word": word}
                for i, word in enumerate(row["caption"].split())
            ]
            for row in rows
        ]


class Echo(Stage[StageSettings, None]):
    """Downstream of the split."""

    name = "echo"
    Settings = StageSettings
    reads = ("word",)
    adds = pa.schema([pa.field("echoed", pa.string())])

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        return [{"echoed": row["word"] * 2} for row in rows]


def pipeline(
    folder: Path,
    captions: Sequence[str | None],
    stages: Sequence[type[Stage[Any, Any]]] = (Length, Limit, Shout),
    settings: dict[str, dict[str, Any]] | None = None,
    run: dict[str, Any] | None = None,
) -> Pipeline:
    """A pipeline over one clip per caption, its table written to `folder`."""
    table = folder / "clips.jsonl"
    rows = [{"path": f"{i}.mp4", "text": caption} for i, caption in enumerate(captions)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not table.exists() or table.read_text() != text:
        table.write_text(text)
    source = SourceSettings(kind="jsonl", path=str(table))
    context = Context(str(folder / "work"), str(folder), Sampling())
    made = {
        cls.name: cls(cls.Settings(**(settings or {}).get(cls.name, {})), context) for cls in stages
    }
    # A few clips shall make several units, as a large table does.
    small = {"runner": "local", "isolate": False, "unit_size": 4}
    run_settings = RunSettings(**small | (run or {}))
    file = str(folder / "vidpipe.yaml")
    return build(
        Config(file, context.workdir, source, context.sampling, run_settings, {}, made, source)
    )
