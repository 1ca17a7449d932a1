"""The encode stage against the way that vid_gen's script does it, on 720p files, with the same VAE
and the whole machine for each: one process, loading apart."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import films, vid_gen_script
from benchmarks.encode import prepared, staged
from benchmarks.figures import report
from stages.vae.vae import Vae


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = folder / "videos"
        films.write(videos, args.clips)
        for size in args.sizes:
            made = prepared(folder / str(size), videos, size, args)
            stage = made.stages["encode"]
            model: Vae = stage.setup()
            best = {"script": float("inf"), "stage": float("inf")}
            for number in range(args.rounds):
                for which in ("script", "stage") if number % 2 else ("stage", "script"):
                    out = folder / "out"
                    shutil.rmtree(out, ignore_errors=True)
                    out.mkdir()
                    began = time.perf_counter()
                    if which == "script":
                        vid_gen_script.encode(videos, out, model.module, size)
                    else:
                        staged(made, stage, model)
                    best[which] = min(best[which], time.perf_counter() - began)
            script, own = (args.clips / best[which] for which in ("script", "stage"))
            rows += [
                (f"{size} px, script", f"{script:.2f} clips/s"),
                (f"{size} px, encode stage", f"{own:.2f} clips/s"),
                (f"{size} px, stage / script", f"{own / script:.2f}"),
            ]
    return [("torch's threads", str(torch.get_num_threads())), *rows]


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--clips": {"type": int, "default": 24},
            "--batch": {"type": int, "default": 1},
            "--rounds": {"type": int, "default": 2},
            "--sizes": {"type": int, "nargs": "+", "default": [64, 128, 256]},
            "--vae": {"default": "demo://vae", "help": "an AutoencoderKL, as encode.vae"},
        },
    )
