"""720p videos as cameras make them: a textured view that pans, a moving shape, grain."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from stages.demo.shapes import frame, scene

HEIGHT, WIDTH, RATE, SECONDS = 720, 1280, 30, 4.2
CODING = ("libx264", {"preset": "veryfast", "crf": "23"})
SHIFT = 2  # pixels that the view pans from one frame to the next


def write(folder: Path, clips: int, distinct: int = 6) -> None:
    """`clips` videos of 4.2 s at 30 fps (h264, veryfast, crf 23: some 1.6 Mbit/s), with `distinct`
    contents: to make them takes longer than to measure."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(clips):
        path = folder / f"{number:04d}.mp4"
        if number < distinct:
            film({path: CODING}, number)
        else:
            shutil.copy(folder / f"{number % distinct:04d}.mp4", path)


def film(
    files: Mapping[Path, tuple[str, dict[str, str]]], seed: int, seconds: float = SECONDS
) -> None:
    """One content in several codings: each file's encoder and its options."""
    rng = np.random.default_rng(seed)
    frames = round(RATE * seconds)
    texture = sum(
        np.kron(rng.normal(0, scale, (-(-HEIGHT // cell), -(-(WIDTH + SHIFT * frames) // cell), 3)),
                np.ones((cell, cell, 1)))[:HEIGHT, : WIDTH + SHIFT * frames]
        for cell, scale in ((2, 6), (8, 10), (32, 16))
    )  # fmt: skip
    grain = rng.normal(0, 3, (4, HEIGHT, WIDTH, 1))
    with ExitStack() as stack:
        outputs = []
        for path, (codec, options) in files.items():
            output = stack.enter_context(av.open(str(path), "w"))
            stream = output.add_stream(codec, rate=Fraction(RATE), options=options)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            outputs.append((output, stream))
        for number in range(frames):
            view = texture[:, SHIFT * number :][:, :WIDTH]
            shape = frame(scene(seed), number / RATE, (HEIGHT, WIDTH))
            picture = np.clip(shape + view + grain[number % 4], 0, 255).astype(np.uint8)
            for output, stream in outputs:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        for output, stream in outputs:
            output.mux(stream.encode(None))
