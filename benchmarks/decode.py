"""Decoding alone: frames a CPU second by backend and codec, 64 frames at 16 fps, cropped to 256 x
256, of a 720p30 film of 10 s (its beginning, and a window from 5.5 s on) and of the real videos.
All that `read_clip` does counts: opening, finding out which frames, decoding, scaling."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks import films
from benchmarks.figures import report
from stages.media import backends
from stages.media.frames import TooShort, read_clip
from stages.media.sampling import Sampling

SECONDS, LATE = 10.0, 5.5
SAMPLING = Sampling(fps=16, frames=64, size=256)
CODINGS: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"preset": "fast", "crf": "23"}),
    "hevc.mp4": ("libx265", {"preset": "superfast", "x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b": "2M", "g": "120"}),
    "av1.mp4": ("libsvtav1", {"preset": "11", "crf": "35", "g": "150"}),
}


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    rows = []
    names: list[backends.Name] = ["pyav", "decord", "torchcodec"]
    lacking = {name: backends.missing(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        files = {Path(folder, name): coding for name, coding in CODINGS.items()}
        films.film(files, 0, SECONDS)
        for path in files:
            rate = path.stat().st_size * 8 / SECONDS / 1e6
            for name in names:
                figure = f"{path.stem}, 720p30, {rate:.1f} Mbit/s, {name}"
                if lacking[name]:
                    rows.append((figure, "not installed"))
                    continue
                early, late = (speed([path], name, start, args.rounds) for start in (None, LATE))
                rows.append((figure, f"{early:.0f} frames/CPU s; late window {late:.0f}"))
    real = [path for path in sorted(args.videos.glob("*")) if long_enough(path)]
    for name in names:
        if real and not lacking[name]:
            figure = f"{len(real)} real videos, {name}"
            rows.append((figure, f"{speed(real, name, None, args.rounds):.0f} frames/CPU s"))
    return rows


def speed(paths: list[Path], name: backends.Name, start: float | None, rounds: int) -> float:
    """Frames a CPU second in the quickest round: the noise of a shared machine only adds."""
    decode = backends.named(name)
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for path in paths:
            read_clip(str(path), SAMPLING, start, backend=decode)
        best = min(best, time.process_time() - began)
    return len(paths) * SAMPLING.frames / best


def long_enough(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(("broken", "novideo")):
        return False
    try:
        read_clip(str(path), SAMPLING.model_copy(update={"size": 16}))
    except TooShort:
        return False
    return True


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {"--rounds": {"type": int, "default": 3, "help": "of which the quickest counts"}},
    )
