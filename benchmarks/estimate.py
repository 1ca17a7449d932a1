"""What `vidpipe estimate` says of the real videos, from a few of them, and what a run then takes.

python -m benchmarks.estimate --videos FOLDER --clips 12 --seeds 5
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from pipeline import config, dag
from pipeline.estimate.estimate import Estimate, estimate
from pipeline.estimate.spread import Figure
from pipeline.output import text_table
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Receipt, Retry

CONFIG = """\
workdir: ./work
source: {kind: folder, path: VIDEOS}
sampling: {fps: 16, frames: 64, size: 64, fit: crop}
filter: {rules: {length: "len == 64"}}
encode: {vae: "demo://vae"}
run: {runner: RUNNER}
"""


class Added(Reporter):
    """Adds up what the receipts of a run say."""

    def __init__(self) -> None:
        self.settled, self.seconds = Counter[str](), Counter[str]()

    def unit(self, receipt: Receipt) -> None:
        self.settled[receipt.stage] += receipt.counts.total
        spent = receipt.seconds
        own = spent.get("process", 0.0) - spent.get("start", 0.0)
        self.seconds[receipt.stage] += own  # as the estimate counts them


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", required=True)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runner", choices=["local", "ray"], default="local")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "vidpipe.yaml"
        videos = str(Path(args.videos).resolve())
        file.write_text(CONFIG.replace("VIDEOS", videos).replace("RUNNER", args.runner))
        pipeline = dag.build(config.load(str(file)))
        found = [
            estimate(pipeline, ["encode"], args.clips, seed, None, Reporter())
            for seed in range(args.seeds)
        ]
        actual = Added()
        began = time.monotonic()
        run(pipeline, ["encode"], Retry(), actual)
        wall = time.monotonic() - began
        disk = {
            name: sum(one.size for one in pipeline.store.listing(f"{name}/").values())
            for name in pipeline.stages
        }
    held, tried = Counter[str](), Counter[str]()
    for seed, one in enumerate(found):
        print(f"seed {seed}")
        print(_table(one, actual, disk, wall, held, tried))
    print("held: " + ", ".join(f"{n} of {tried[what]} {what}" for what, n in held.items()))


def _table(
    found: Estimate,
    actual: Added,
    disk: dict[str, int],
    wall: float,
    held: Counter[str],
    tried: Counter[str],
) -> str:
    """Predicted and actual; counts in `held` the intervals that hold the truth, of `tried`."""
    rows: list[list[float | str | None]] = []

    def compare(stage: str, what: str, one: Figure, truth: float, factor: float = 1.0) -> None:
        low, high = one.low, one.high
        inside = low is not None and high is not None and low <= truth <= high
        held[what] += inside
        tried[what] += 1
        shown = [None if n is None else n * factor for n in (one.value, low, high, truth)]
        rows.append([stage, what, *shown, "yes" if inside else "no"])

    for stage in found.stages:
        name = stage.name
        each = actual.seconds[name] / max(1, actual.settled[name])
        compare(name, "rows", stage.rows, actual.settled[name])
        if stage.need is not None:
            compare(name, "ms a row", stage.need.seconds, each, 1000)
            compare(name, "KiB", stage.disk, disk[name], 1 / 1024)
    if found.here is not None:
        compare("all", "s", found.here.hours, wall / 3600, 3600)
    return text_table(["stage", "what", "predicted", "low", "high", "actual", "held"], rows)


if __name__ == "__main__":
    main()
