"""Small videos whose every frame shows its own number, in eight blocks of black or white."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SIDE = 64
FAST: dict[str, dict[str, str]] = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12", "crf": "10", "svtav1-params": "lp=1"},
    "mpeg4": {},
    "mpeg2video": {},
}
# For `container`: an MP4 that nobody can decode without the key.
ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
    "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
}


def picture(number: int) -> np.ndarray:
    """RGB [64, 64, 3] of the number's eight bits: 4 blocks of 16 x 32 above 4 others."""
    bits = np.array([number >> bit & 1 for bit in range(8)], np.uint8).reshape(2, 4)
    grey = np.kron(bits, np.ones((32, 16), np.uint8)) * 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def number(frame: np.ndarray) -> int:
    """What a frame of size 64 x 64 shows."""
    blocks = frame.mean(axis=2).reshape(2, 32, 4, 16)[:, 8:24, :, 4:12].mean(axis=(1, 3))
    return int(((blocks.reshape(8) > 128) * 2 ** np.arange(8)).sum())


def numbers(frames: np.ndarray) -> list[int]:
    return [number(frame) for frame in frames]


def make(
    path: Path,
    frames: int = 60,
    fps: Fraction | int = 30,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,
    rotation: tuple[int, bool, bool] | None = None,
    container: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    sound: float = 0.0,
    hidden: int = 0,
    pix_fmt: str = "yuv420p",
    **options: str,
) -> Path:
    """A video of `frames` numbered frames. `pts`: their times in milliseconds, for irregular
    ones; `sound`: seconds of silence beside it; `hidden`: frames that come before time 0, which
    MP4 hides by an edit list; `options`: the encoder's."""
    fps = Fraction(fps)
    with av.open(str(path), "w", options=container or {}) as output:
        output.metadata.update(metadata or {})
        stream: Any = output.add_stream(codec, rate=fps, options={**FAST[codec], **options})
        stream.width = stream.height = SIDE
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        tick = Fraction(1, 1000) if pts else 1 / fps
        stream.codec_context.time_base = tick
        if rotation:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        if sound:
            output.mux(silence(output, sound))
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index), "rgb24")
            frame.time_base = tick
            frame.pts = pts[index] if pts else index - hidden
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def silence(output: Any, seconds: float) -> list[Any]:
    stream = output.add_stream("aac", rate=8000, layout="mono")
    samples = np.zeros((1, int(seconds * 8000)), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
    frame.sample_rate = 8000
    frame.pts = 0
    fifo = av.AudioFifo()
    fifo.write(frame)
    packets = []
    while (part := fifo.read(1024, partial=True)) is not None:
        packets += stream.encode(part)
    return packets + stream.encode(None)
