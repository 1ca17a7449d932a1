"""That it learns what captions say: shapes that cross the frame go through the whole pipeline, a
small model is trained on their latents, and prompts of scenes it never saw are sampled and judged
by plain rules on pixels. Then all of it with captions shuffled against clips, as the control."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks.figures import VIDPIPE, report
from benchmarks.seen import look
from stages.base import Context, Row
from stages.demo.shapes import COLOURS, DIRECTIONS, Scene, caption, scene, write_clip
from stages.models import resolve
from stages.recaption import Recaption, RecaptionSettings
from trainer import models
from trainer.pictures import across, decode, load_vae, tile, write
from trainer.sample import sample

UNSEEN = 900_000  # the first seed of scenes that no clip shows
SECONDS = 4.0  # in which a shape crosses
RATES = (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30))
TOGETHER = 8  # prompts sampled at once
SHOWN = 16

CONFIG = """\
workdir: {workdir}
source: {{kind: csv, path: {table}, root: ./videos}}
sampling: {{fps: 4, frames: 16, size: 64, fit: crop}}
filter:
  rules:
    length: "len == 16"
recaption: {{engine: transformers, model: "demo://captioner"}}
encode: {{vae: "demo://vae"}}
train:
  steps: {steps}
  batch_size: 8
  learning_rate: 1.0e-3
  lr_schedule: cosine
  warmup: 50
  ema_decay: 0.999
  shift: 3
  compile: true
  model: {{patch: [8, 2, 2], width: 192, depth: 4, heads: 6}}
  text: {{layers: 0}}
  log_every: 100
  save_every: 1000
"""


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    if args.folder is not None:
        return learnt(args, args.folder.resolve())
    with tempfile.TemporaryDirectory() as name:
        return learnt(args, Path(name))


def learnt(args: argparse.Namespace, folder: Path) -> list[tuple[str, str]]:
    began = time.perf_counter()
    make_clips(folder, args.clips)
    told = [crossing(UNSEEN + number) for number in range(args.samples)]
    prompts = recaptioned([caption(each) for each in told])
    rows = [("clips made", f"{args.clips} in {time.perf_counter() - began:.0f} s")]
    for name, table in (("", "clips.csv"), ("control: ", "shuffled.csv")):
        # One workdir for both: what other captions don't change is not computed again.
        config = folder / f"{Path(table).stem}.yaml"
        config.write_text(CONFIG.format(workdir="./work", table=f"./{table}", steps=args.steps))
        seconds = {}
        for command in ("run", "train"):
            began = time.perf_counter()
            output = ["--output", str(folder / config.stem)] * (command == "train")
            done = subprocess.run(
                [*VIDPIPE, command, "-c", str(config), *output], cwd=folder, text=True
            )
            if done.returncode:
                raise SystemExit(f"vidpipe {command} of {config} failed")
            seconds[command] = time.perf_counter() - began
        colour, direction, half = judged(folder / config.stem, told, prompts, args)
        rows += [
            (f"{name}the pipeline", f"{seconds['run']:.0f} s"),
            (f"{name}training, {args.steps} steps", f"{seconds['train'] / 60:.1f} min"),
            (f"{name}colour is the prompt's", share(colour, 1 / len(COLOURS))),
            (f"{name}direction is the prompt's", share(direction, 1 / len(DIRECTIONS))),
            (f"{name}begins in the half that it leaves", share(half, 1 / len(DIRECTIONS))),
        ]
    return rows


def share(right: list[bool], chance: float) -> str:
    return f"{sum(right)} of {len(right)}, {np.mean(right):.0%} (chance {chance:.0%})"


def crossing(seed: int) -> Scene:
    """The demo's scene of a seed, but large, and on its way from one side to the other: where no
    frame shows the way, as in pure noise, half of the picture does."""
    draw = np.random.default_rng([seed, 30])
    base = scene(seed)
    size = draw.uniform(0.15, 0.17)
    room = 0.48 - size
    way = 2 * room * draw.uniform(0.85, 1.0)
    along = -room + draw.uniform(0, 2 * room - way)
    aside = draw.uniform(-room, room)
    dx, dy = DIRECTIONS[base.direction]
    return replace(
        base,
        size=float(size),
        speed=float(way / SECONDS),
        x=float(dx * along if dx else aside),
        y=float(dy * along if dy else aside),
    )


def make_clips(folder: Path, clips: int) -> None:
    """`videos/`, `clips.csv`, and `shuffled.csv`, in which captions are those of other clips."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    names = [f"clip_{number:05d}.mp4" for number in range(clips)]

    def make(number: int) -> None:
        path = folder / "videos" / names[number]
        if not path.exists():
            part = path.with_suffix(".part.mp4")
            write_clip(part, crossing(number), RATES[number % len(RATES)], SECONDS + 0.2)
            part.rename(path)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, range(clips)))
    captions = [caption(crossing(number)) for number in range(clips)]
    shuffled = [captions[n] for n in np.random.default_rng(31).permutation(clips)]
    for table, texts in (("clips.csv", captions), ("shuffled.csv", shuffled)):
        with (folder / table).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("video", "caption"), *zip(names, texts, strict=True)])


def recaptioned(captions: list[str]) -> list[str]:
    """As the pipeline's own captioner puts them."""
    settings = RecaptionSettings(engine="transformers", model="demo://captioner", device="cpu")
    stage = Recaption(settings, Context("."))
    rows: list[Row] = [{"clip_id": str(n), "caption": text} for n, text in enumerate(captions)]
    outcomes = stage.process(rows, stage.setup())
    return [str(each["recaption"]) for each in outcomes if isinstance(each, dict)]


def judged(
    output: Path, told: list[Scene], prompts: list[str], args: argparse.Namespace
) -> tuple[list[bool], list[bool], list[bool]]:
    """Of each prompt's sample: whether colour, direction, and the half it begins in are right."""
    model, config = models.load(output / "model")
    vae = load_vae(resolve("demo://vae"), config.latents)
    videos = []
    for start in range(0, len(prompts), TOGETHER):
        some = prompts[start : start + TOGETHER]
        seeds = range(start, start + len(some))
        z = sample(model, config, some, guidance=args.guidance, seed=list(seeds))
        videos += [decode(vae, one, config.latents) for one in z]
    picture = tile(videos[:SHOWN], prompts[:SHOWN], across(SHOWN))
    write(output / "samples.gif", picture, config.latents["sampling"]["fps"])
    found = [look(video) for video in videos]
    facts = [{**vars(seen), "prompt": text} for seen, text in zip(found, prompts, strict=True)]
    (output / "samples.json").write_text(json.dumps(facts, indent=1))
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    pairs = list(zip(found, told, strict=True))
    return (
        [seen.colour == each.colour for seen, each in pairs],
        [seen.direction == each.direction for seen, each in pairs],
        [seen.begins == opposite[each.direction] for seen, each in pairs],
    )


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--clips": {"type": int, "default": 5000},
            "--steps": {"type": int, "default": 22000},
            "--samples": {"type": int, "default": 64},
            "--guidance": {"type": float, "default": 1.5},
            "--folder": {"type": Path, "help": "kept, and gone on from; default: one that goes"},
        },
    )
