"""Local and Ray, one and two workers, batches of 1 and 8: are the manifests the same, and the
latents? On real videos, through the whole DAG but captions."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.figures import VIDPIPE, report, timed
from manifests.shards import read_latents
from pipeline import config, dag, query

YAML = """\
workdir: ./work
source: {{kind: folder, path: "{videos}"}}
sampling: {{fps: 16, frames: 64, size: 64, fit: crop}}
filter: {{rules: {{length: "len == 64"}}}}
recaption: {{enabled: false}}
encode: {{vae: "demo://vae"}}
"""
STAGES = ("download", "probe", "score", "filter", "encode")


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    rows = []
    first: tuple[pa.Table, dict[str, np.ndarray]] | None = None
    with tempfile.TemporaryDirectory() as name:
        for runner, workers in (("local", 1), ("ray", 1), ("ray", 2)):
            for batch in (1, 8):
                folder = Path(name) / f"{runner}-{workers}-{batch}"
                folder.mkdir()
                file = folder / "vidpipe.yaml"
                file.write_text(YAML.format(videos=args.videos.resolve()))
                settings = [
                    word
                    for stage in STAGES
                    for key, value in (("workers", workers), ("batch_size", batch))
                    for word in ("--set", f"{stage}.{key}={value}")
                ]
                wall, _ = timed([*VIDPIPE, "run", "--runner", runner, *settings], folder)
                made = dag.build(config.load(str(file)))
                got = query.select(made, None), latents(made)
                first = first or got
                rows.append(
                    (
                        f"{runner}, {workers} workers, batch {batch}",
                        f"manifest {'identical' if got[0].equals(first[0]) else 'DIFFERS'}, "
                        f"{len(got[1])} latents, max difference {difference(got[1], first[1]):.2g}"
                        f", {wall:.0f} s",
                    )
                )
    return rows


def latents(made: dag.Pipeline) -> dict[str, np.ndarray]:
    log = made.dag.log(made.store, "encode")
    found = {}
    for unit, names in log.units().items():
        for commit in log.commits(unit, names):
            if commit.data is not None:
                shard = log.data_name(unit, commit)
                outcomes = made.store.read_parquet(shard, ["outcome"]).column(0).to_pylist()
                kept = [i for i, outcome in enumerate(outcomes) if outcome == "kept"]
                for one in read_latents(made.config.workdir, shard, kept):
                    found[one.clip_id] = np.frombuffer(one.data, np.float32)
    return found


def difference(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    if some.keys() != others.keys():
        return float("inf")
    return max(float(np.abs(values - others[clip]).max()) for clip, values in some.items())


if __name__ == "__main__":
    report(measure, __doc__ or "")
