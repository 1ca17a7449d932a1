"""Clips a second of a VAE on this machine's GPU, setting by setting, with random weights.

Frames lie in memory already, and go to the device as bytes; latents come back. One case more takes
them from mp4 files, through the encode stage. `benchmarks/gpu.sh` says what has to be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from pipeline.output import text_table
from stages.vae.trial import MOST
from stages.vae.vae import Options, Vae

SD = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SMALL = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
SMALL_WAN = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
# Name: class of diffusers, its configuration (else its own, which is Wan 2.1's), clips (F, H, W).
FULL: dict[str, tuple[str, dict[str, Any], list[tuple[int, int, int]]]] = {
    "sd": ("AutoencoderKL", SD, [(64, 256, 256), (81, 480, 832)]),
    "wan": ("AutoencoderKLWan", {}, [(65, 256, 256), (81, 480, 832)]),
}
SMOKE: dict[str, tuple[str, dict[str, Any], list[tuple[int, int, int]]]] = {
    "sd": ("AutoencoderKL", SD | SMALL, [(4, 32, 32)]),
    "wan": ("AutoencoderKLWan", SMALL_WAN, [(5, 32, 32)]),
}


@dataclass(frozen=True)
class Case:
    """One setting, and what was measured; None where it does not fit, or nothing tells it."""

    vae: str
    shape: tuple[int, int, int]
    dtype: str
    batch: int
    channels_last: bool
    compile: bool
    clips_per_second: float | None = None
    of_matmul: float | None = None  # share of what matrices of that dtype are multiplied with
    busy: float | None = None  # share of the time with a kernel at work, by nvidia-smi
    peak_gib: float | None = None
    tflop: float | None = None  # of a clip
    frames: str = "memory"  # or files
    note: str = ""


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    if device == "cpu" and not args.smoke:
        raise SystemExit("there is no CUDA device (torch sees none): --smoke tries the script only")
    kinds = SMOKE if args.smoke else FULL
    rates = {dtype: matmul(dtype, device) for dtype in args.dtypes}
    facts = machine(device) | {"matmul_tflops": {d: round(r / 1e12, 2) for d, r in rates.items()}}
    print(json.dumps(facts, indent=1), flush=True)
    done: list[Case] = []
    with tempfile.TemporaryDirectory() as name:
        for vae in args.only or kinds:
            cls, config, shapes = kinds[vae]
            folder = str(Path(name, vae))
            saved(cls, config, folder)
            for shape in shapes:
                cost = flops(cls, config, shape)
                for case in cases(vae, shape, args):
                    done.append(measured(case, folder, device, cost, rates, args.seconds))
                    print(json.dumps(asdict(done[-1])), flush=True)
                if args.files and shape == shapes[0]:
                    best = max(done, key=lambda c: (c.vae == vae, c.clips_per_second or 0))
                    done.append(from_files(best, folder, device, args))
                    print(json.dumps(asdict(done[-1])), flush=True)
    Path(args.out).write_text(
        json.dumps({"machine": facts, "cases": [asdict(c) for c in done]}, indent=1)
    )
    print(table(done), end="")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(FULL), help="may be repeated")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], metavar="DTYPE"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too: minutes more")
    parser.add_argument("--files", type=int, default=0, metavar="N", help="N mp4 files, too")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each setting")
    parser.add_argument("--smoke", action="store_true", help="tiny VAEs on the CPU")
    parser.add_argument("--out", default="gpu.json", metavar="FILE")
    args = parser.parse_args()
    if args.smoke:
        args.batches, args.seconds = [1, 2], min(args.seconds, 0.05)
    return args


def cases(vae: str, shape: tuple[int, int, int], args: argparse.Namespace) -> Iterator[Case]:
    """Each setting by itself, around what vidpipe does by default: not every one with every one."""
    default = Case(vae, shape, args.dtypes[0], args.batches[0], vae == "sd", compile=False)
    yield from (replace(default, batch=batch) for batch in args.batches)
    yield from (replace(default, dtype=dtype) for dtype in args.dtypes[1:])
    yield replace(default, channels_last=not default.channels_last)
    if args.compile:
        for channels_last in (False, True):
            yield replace(default, channels_last=channels_last, compile=True)
    yield replace(default, batch=0)  # found by trial


def measured(
    case: Case,
    folder: str,
    device: str,
    cost: float,
    rates: dict[str, float],
    seconds: float,
) -> Case:
    """The case with its figures."""
    # All frames of a picture VAE's batch go through it at once, but for the default of `auto`.
    pictures = case.shape[0] * case.batch or Options().pictures
    options = Options(pictures, case.channels_last, case.compile)
    vae = Vae(folder, case.dtype, device, options)
    shape = (*case.shape, 3)
    note = ""
    if not case.batch:
        found = vae.best_batch(shape)
        case, note = replace(case, batch=found), f"auto, of at most {MOST}"
    draw = np.random.default_rng(0)
    clips = [draw.integers(0, 256, shape, dtype=np.uint8) for _ in range(case.batch)]
    run(vae, clips, 0.0)  # kernels are chosen, or compiled
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with utilisation() as busy:
        rate = run(vae, clips, seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    if vae._halving.most:
        note = f"does not fit: halved to {min(vae._halving.most.values())}"
    made = replace(
        case,
        clips_per_second=rate,
        of_matmul=rate * cost / rates[case.dtype],
        busy=mean(busy) / 100 if busy else None,
        peak_gib=peak,
        tflop=cost / 1e12,
        note=note,
    )
    del vae
    if device == "cuda":
        torch.cuda.empty_cache()
    return made


def run(vae: Vae, clips: list[np.ndarray], seconds: float) -> float:
    """Clips a second of the same batch again and again, as the encode stage does it: the next one
    is launched before the last one is fetched."""
    flying = vae.encode(vae.batch(clips), True)
    began, batches = time.perf_counter(), 0
    while batches < 2 or time.perf_counter() - began < seconds:
        following = vae.encode(vae.batch(clips), True)
        vae.fetch(flying)
        flying, batches = following, batches + 1
    vae.fetch(flying)
    return len(clips) * (batches + 1) / (time.perf_counter() - began)


def from_files(best: Case, folder: str, device: str, args: argparse.Namespace) -> Case:
    """The whole encode stage on mp4 files in the best setting, decoding with all cores."""
    from benchmarks import films
    from stages.base import Context
    from stages.encode import Encode, EncodeSettings
    from stages.media.sampling import Sampling

    frames, height, width = best.shape
    with tempfile.TemporaryDirectory() as name:
        films.write(Path(name), args.files, distinct=min(args.files, 4))
        settings = EncodeSettings(
            vae=folder,
            dtype=best.dtype,
            device=device,
            batch_size=best.batch,
            pictures=frames * best.batch,
            channels_last=best.channels_last,
            compile=best.compile,
            threads=len(os.sched_getaffinity(0)),
            check_clips=0,
        )
        sampling = Sampling(fps=min(16.0, frames / 4), frames=frames, size=(height, width))
        stage = Encode(settings, Context(name, sampling=sampling))
        model = stage.setup()
        rows = [
            {"clip_id": path.stem, "path": str(path), "start": None, "end": None}
            for path in sorted(Path(name).glob("*.mp4"))
        ]
        stage.process(rows[: 2 * best.batch], model)
        with utilisation() as busy:
            began = time.perf_counter()
            made = stage.process(rows, model)
            took = time.perf_counter() - began
    lost = [one for one in made if not isinstance(one, dict)]
    return replace(
        best,
        clips_per_second=len(rows) / took,
        of_matmul=None,
        busy=mean(busy) / 100 if busy else None,
        frames="files",
        note=f"{len(lost)} clips were not encoded: {lost[0]}" if lost else f"{len(rows)} files",
    )


def saved(cls: str, config: dict[str, Any], folder: str) -> None:
    """A VAE of that class with random weights, as `save_pretrained` leaves it."""
    import diffusers

    torch.manual_seed(0)
    getattr(diffusers, cls)(**config).save_pretrained(folder)


def flops(cls: str, config: dict[str, Any], shape: tuple[int, int, int]) -> float:
    """Floating-point operations of encoding a clip, two for each multiplication and addition,
    counted by torch on tensors without content."""
    import diffusers
    from torch.utils.flop_counter import FlopCounterMode

    frames, height, width = shape
    with torch.device("meta"), torch.inference_mode():
        module = getattr(diffusers, cls)(**config).eval()
        pictures = cls == "AutoencoderKL"
        size = (1, 3, height, width) if pictures else (1, 3, frames, height, width)
        with FlopCounterMode(display=False) as counter:
            module.encode(torch.empty(size))
    return float(counter.get_total_flops() * (frames if pictures else 1))


def matmul(dtype: str, device: str) -> float:
    """Operations a second of a large product of matrices: what the card can do, measured. float32
    without TF32, as vidpipe encodes."""
    torch.backends.cuda.matmul.allow_tf32 = False
    side = 8192 if device == "cuda" else 256
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        wait(device)
        best = max(best, 5 * 2 * side**3 / (time.perf_counter() - began))
    return best


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def utilisation() -> Iterator[list[float]]:
    """Samples of the share of time, in percent, for which a kernel was at work, taken ten times a
    second by `nvidia-smi`; they are there after the block. None without a GPU."""
    samples: list[float] = []
    if not torch.cuda.is_available():
        yield samples
        return
    card = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    form = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
    with tempfile.TemporaryFile("w+") as said:
        sampler = subprocess.Popen(["nvidia-smi", card, *form], stdout=said)
        try:
            yield samples
        finally:
            sampler.terminate()
            sampler.wait()
        said.seek(0)
        samples += [float(line) for line in said.read().split() if line.isdigit()]


def machine(device: str) -> dict[str, Any]:
    """The card and the versions that figures are about."""
    import diffusers

    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    if device == "cpu":
        return facts | {"device": "cpu"}
    known = torch.cuda.get_device_properties(0)
    return facts | {
        "device": known.name,
        "memory_gib": round(known.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def table(done: list[Case]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    names = ["vae", "clip", "dtype", "batch", "channels_last", "compile", "frames in"]
    names += ["clips/s", "of matmul", "busy", "peak GiB", ""]
    rows = [
        [
            *(case.vae, "x".join(map(str, case.shape)), case.dtype, case.batch),
            *("yes" if on else "" for on in (case.channels_last, case.compile)),
            case.frames,
            cell(case.clips_per_second, ".2f"),
            cell(case.of_matmul, ".1%"),
            cell(case.busy, ".0%"),
            cell(case.peak_gib, ".1f"),
            case.note,
        ]
        for case in done
    ]
    return text_table(names, rows)


if __name__ == "__main__":
    main()
