"""The damaged videos through a whole run with supervised workers: download to encode, commits and
account included. Slower to tell which file did what than `fuzz`, which measures each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from mutations import mutated

from manifests.sources import SourceSettings
from pipeline.config import Config, RunSettings
from pipeline.dag import build
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.base import Context
from stages.checks import Checks
from stages.download import Download, DownloadSettings
from stages.encode import Encode, EncodeSettings
from stages.media.sampling import Sampling
from stages.probe import Probe, ProbeSettings
from stages.score import Score, ScoreSettings

LIMITS: dict[str, Any] = {"decode_seconds": 30.0, "time_limit": 60.0}


class Trivial:
    """Stands in for the VAE: latents of one number a clip."""

    decoding_threads = 1
    checks = Checks()
    device = SimpleNamespace(type="cpu")

    def idle(self) -> bool:
        return True

    def best_batch(self, shape: tuple[int, ...]) -> int:
        return 1

    def batch(self, clips: Any) -> Any:
        return clips

    def encode(self, clips: Any, moments: bool) -> list[Any]:
        import torch

        return [torch.full((1, 1, 1, 1), float(clip.mean())) for clip in clips]

    def fetch(self, encoded: list[Any]) -> list[Any]:
        return encoded


class Decode(Encode):
    """encode without a VAE, and no latents to index."""

    name = "decode"
    after = ("score",)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "sampling": self.context.sampling.times()}

    def check(self) -> None:
        """There is no VAE whose shapes could be wrong."""

    def setup(self) -> Any:
        return Trivial()

    def metadata(self, model: Any) -> dict[str, Any]:
        return {}


def part_of(seed: int, number: int) -> tuple[float | None, float | None]:
    """The part of a file that its row asks for: often all of it."""
    rng = Random(f"{seed}:{number}:part")
    start = rng.choice((None, None, 0.0, 0.5, rng.uniform(0, 10)))
    end = None if start is None or rng.random() < 0.5 else start + rng.uniform(0.1, 5)
    return start, end


class Notes(Reporter):
    """What the run said: deaths of workers among it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def fuzz_run(
    videos: Sequence[Path], seed: int, numbers: Sequence[int], folder: Path
) -> tuple[Counter[str], list[str]]:
    """How many files came to what (`kept`, `rejected`, a failure's class, `pending`), and what
    the run said. Every file is counted once."""
    with (folder / "clips.jsonl").open("w") as table:
        for number in numbers:
            name, data = mutated(list(videos), seed, number)
            (folder / name).write_bytes(data)
            start, end = part_of(seed, number)
            table.write(json.dumps({"path": name, "start": start, "end": end}) + "\n")
    source = SourceSettings(kind="jsonl", path=str(folder / "clips.jsonl"))
    sampling = Sampling(frames=32, size=64)
    context = Context(str(folder / "work"), str(folder), sampling)
    stages = {
        "download": Download(DownloadSettings(), context),
        "probe": Probe(ProbeSettings(**LIMITS), context),
        "score": Score(ScoreSettings(frames=3, side=64, **LIMITS), context),
        "decode": Decode(EncodeSettings(check_clips=0, **LIMITS), context),
    }
    file = str(folder / "vidpipe.yaml")
    settings = RunSettings(runner="local", isolate=True)
    made = build(Config(file, context.workdir, source, sampling, settings, {}, stages, source))
    notes = Notes()
    result = run(made, (), Retry(), notes)
    assert result.status["source"].kept == len(numbers)
    found = Counter({"kept": result.status["decode"].kept})
    for name in stages:
        counts = result.status[name]
        found["pending"] += counts.pending
        found["rejected"] += sum(counts.rejected.values())
        found.update(counts.failed)
    return found, [*notes.said, *(f"{f.stage}: {f.error}" for f in result.faults)]
