"""The demo's shipped models at their work on what they never saw: PSNR, facts kept, tokens/s."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import stages
from benchmarks.figures import report
from stages.base import Context, Row
from stages.demo.shapes import RATES, caption, named, scene, write_clip
from stages.demo.train_vae import psnr
from stages.media.frames import read_clip
from stages.media.sampling import Sampling
from stages.models import resolve
from stages.recaption import Recaption, RecaptionSettings

CLIPS, CAPTIONS = 10, 200
UNSEEN = 60_000  # seeds far below those of training


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    torch.set_num_threads(1)
    home = Path(stages.__file__).parent / "demo"
    sizes = {
        name: sum(f.stat().st_size for f in (home / name).iterdir()) / 1e6
        for name in ("vae", "captioner")
    }
    return [
        ("VAE, folder", f"{sizes['vae']:.2f} MB"),
        (f"VAE, PSNR of {CLIPS} unseen mp4 files, 64 frames each", rebuilt()),
        ("captioner, folder", f"{sizes['captioner']:.2f} MB"),
        *captions(),
    ]


def rebuilt() -> str:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(resolve("demo://vae")).float().eval()
    each = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(CLIPS):
            path = Path(folder) / f"{number}.mp4"
            write_clip(path, scene(UNSEEN + number), RATES[number % len(RATES)], 4.2)
            clip = read_clip(str(path), Sampling(size=64)).frames
            x = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                each.append(psnr(x, vae.decode(vae.encode(x).latent_dist.mode()).sample))
    return f"{np.mean(each):.1f} dB ({min(each):.1f} to {max(each):.1f})"


def captions() -> list[tuple[str, str]]:
    settings = RecaptionSettings(engine="transformers", model="demo://captioner", device="cpu")
    stage = Recaption(settings, Context("."))
    engine = stage.setup()
    rows: list[Row] = [
        {"clip_id": str(i), "caption": caption(scene(UNSEEN + i))} for i in range(CAPTIONS)
    ]
    began = time.perf_counter()
    outcomes = stage.process(rows, engine)
    seconds = time.perf_counter() - began
    kept = [o for o in outcomes if isinstance(o, dict)]
    right = sum(
        named(outcome["recaption"]) == named(row["caption"])
        for row, outcome in zip(rows, outcomes, strict=True)
        if isinstance(outcome, dict)
    )
    tokens = sum(outcome["recaption_tokens"] for outcome in kept)
    return [
        ("captioner, shape, colour and direction kept", f"{100 * right / CAPTIONS:.1f}% of 200"),
        ("captioner, transformers on one thread", f"{tokens / seconds:.0f} tokens/s"),
    ]


if __name__ == "__main__":
    report(measure, __doc__ or "")
