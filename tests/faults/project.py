"""A small real project: sixty short clips, some broken, through the stages that ship."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

from stages.demo.shapes import scene, write_clip

CLIPS, UNIT, CAPTIONS = 60, 6, 20
CONFIG = """\
source: {kind: jsonl, path: ../videos/clips.jsonl, root: ../videos}
sampling: {fps: 8, frames: 4, size: 32, fit: crop}
score: {enabled: false}
filter: {rules: {length: "len == 4"}}
recaption: {enabled: false}
encode: {vae: "demo://vae"}
stages:
  shout: {use: "toy_captions:Shout"}
  chant: {use: "toy_captions:Chant", workers: 2, cpus: 0.5}
run: {unit_size: %d}
"""
TOY = '''\
"""Caption models that cost nothing, beside vidpipe.yaml as a user's own stage is."""

import pyarrow as pa

from stages.base import Stage, StageSettings


class Shout(Stage):
    name = "shout"
    Settings = StageSettings
    reads = ("caption",)
    adds = pa.schema([pa.field("loud", pa.string())])
    after = ("filter",)
    default_batch = 4

    def setup(self):
        return str.upper

    def process(self, rows, model):
        return [{"loud": model(row["caption"])} for row in rows]


class Chant(Shout):
    """On Ray each worker has all rows of some captions, of all units."""

    name = "chant"
    adds = pa.schema([pa.field("chanted", pa.string())])
    once = True

    def process(self, rows, model):
        return [{"chanted": model(row["caption"]) * 2} for row in rows]
'''


def make_videos(folder: Path) -> None:
    """Clips of half a second and a bit; every tenth is too short, every fifteenth no video."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(CLIPS):
        file = folder / f"{number:03}.mp4"
        seconds = 0.2 if number % 10 == 3 else 0.7
        write_clip(file, scene(number), Fraction(24), seconds, (48, 64))
        if number % 15 == 7:
            file.write_bytes(file.read_bytes()[:200])
        rows.append({"path": file.name, "text": f"clip number {number % CAPTIONS}"})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_project(folder: Path) -> Path:
    """A vidpipe.yaml over the videos in ../videos; returns its path."""
    folder.mkdir()
    (folder / "toy_captions.py").write_text(TOY)
    file = folder / "vidpipe.yaml"
    file.write_text(CONFIG % UNIT)
    return file
