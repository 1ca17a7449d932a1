"""That each distinct caption goes through the text encoder once: rows with few captions of their
own, embedded by two workers on Ray, then more rows with old captions, by plain commands."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import VIDPIPE, report
from stages.demo.shapes import caption, scene
from stages.models import resolve

CONFIG = """\
workdir: ./work
source: {{kind: csv, path: ./clips.csv}}
run: {{runner: ray, unit_size: {unit}}}
embed: {{encoder: ./encoder, max_length: 64, device: cpu, workers: {workers}, cpus: {cpus}}}
""" + "".join(
    f"{name}: {{{{enabled: false}}}}\n"
    for name in ("download", "probe", "score", "filter", "recaption", "encode")
)


def make_encoder(folder: Path) -> None:
    """A small T5 with random weights, whose words are those of the demo's captioner."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo://captioner"))
    # T5's ends each text with a token, the captioner's does not.
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    T5EncoderModel(config).save_pretrained(folder)


def write_table(file: Path, captions: list[str]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        rows = ((f"clips/{number:07d}.mp4", text) for number, text in enumerate(captions))
        csv.writer(opened).writerows([("video", "caption"), *rows])


def vidpipe(folder: Path, *words: str) -> str:
    done = subprocess.run([*VIDPIPE, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vidpipe {' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def counted(folder: Path) -> tuple[int, Counter[str]]:
    """Rows with an embedding, and what the workers of all runs counted."""
    stages = json.loads(vidpipe(folder, "status", "--json"))["stages"]
    (embed,) = (each for each in stages if each["name"] == "embed")
    return embed["kept"], Counter(embed["amounts"])


def some_captions(count: int) -> list[str]:
    """So many different ones, of the demo's scenes."""
    found = dict.fromkeys(caption(scene(seed)) for seed in range(100 * count))
    return list(islice(found, count))


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_encoder(folder / "encoder")
        # Workers beside each other also where there are two cores, of which Ray leaves one free.
        cpus = min(1.0, 1 / args.workers)
        config = CONFIG.format(unit=args.unit, workers=args.workers, cpus=cpus)
        (folder / "vidpipe.yaml").write_text(config)
        draw = np.random.default_rng(0)
        known = some_captions(args.distinct)
        rows = [known[n % len(known)] for n in draw.permutation(max(args.rows, len(known)))]
        before, figures = Counter[str](), []
        for what, more in (("first run", []), ("second run", draw.choice(known, args.more))):
            rows += map(str, more)
            write_table(folder / "clips.csv", rows)
            vidpipe(folder, "run", "embed")
            kept, now = counted(folder)
            if kept != len(rows):
                raise SystemExit(f"{kept} of {len(rows)} rows have an embedding")
            files = len(list((folder / "work" / "embed").rglob("*.parquet")))
            told = now - before
            figures += [
                (f"{what}: rows, distinct captions", f"{len(rows)}, {len(set(rows))}"),
                (f"{what}: captions encoded, with the empty one", f"{told['encoded']}"),
                (f"{what}: embeddings copied", f"{told['copied']}"),
                (f"{what}: files of embeddings", f"{files}"),
            ]
            before = now
        return figures


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--rows": {"type": int, "default": 2000},
            "--distinct": {"type": int, "default": 299, "help": "captions of these rows"},
            "--more": {"type": int, "default": 500, "help": "rows of the second run"},
            "--unit": {"type": int, "default": 256, "help": "rows stored together"},
            "--workers": {"type": int, "default": 2},
            "--folder": {"type": Path, "default": None, "help": "where to work; default: /tmp"},
        },
    )
