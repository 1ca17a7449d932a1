"""Colours: by the stream's own matrix and range, as they were before they were encoded, and as
FFmpeg's own scaler has them."""

from __future__ import annotations

import importlib
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stages.media import backends
from stages.media.picture import Fit
from stages.media.timeline import timeline
from stages.media.video import Budget, opened

# Weights of red and blue in luma (ITU-R BT.601, BT.709, BT.2020), and FFmpeg's AVColorSpace.
MATRICES = {
    "bt601": (0.299, 0.114, 6),
    "bt709": (0.2126, 0.0722, 1),
    "bt2020": (0.2627, 0.0593, 9),
    "unstated": (0.299, 0.114, 2),  # is taken for BT.601, whatever the size
}
RANGES = {"limited": 1, "full": 2, "unstated": 0}  # unstated is limited
PATCHES = [
    *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)),
    *((0, 0, 0), (200, 120, 40), (30, 90, 160), (128, 128, 128)),
]
SIDE = 32


def yuv(matrix: str, full: bool, bits: int) -> np.ndarray:
    """The patches' values [patch, plane], from the definition."""
    red, blue, _ = MATRICES[matrix]
    rgb = np.array(PATCHES) / 255
    luma = rgb @ [red, 1 - red - blue, blue]
    cb, cr = (rgb[:, 2] - luma) / (2 - 2 * blue), (rgb[:, 0] - luma) / (2 - 2 * red)
    top, middle, unit = 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 8)
    if full:
        values = [top * luma, top * cb + middle, top * cr + middle]
    else:
        values = [unit * (16 + 219 * luma), unit * (128 + 224 * cb), unit * (128 + 224 * cr)]
    return np.clip(np.rint(values), 0, top).astype(np.uint16).T


def patches(matrix: str, span: str, bits: int) -> av.VideoFrame:
    values = yuv(matrix, span == "full", bits)
    form = "yuv420p" if bits == 8 else "yuv420p10le"
    frame = av.VideoFrame(SIDE * len(PATCHES), 64, form)
    for number, plane in enumerate(frame.planes):
        side = SIDE if number == 0 else SIDE // 2
        rows = np.zeros((plane.height, plane.line_size // (1 + (bits > 8))), np.uint16)
        rows[:, : plane.width] = np.repeat(values[:, number], side)
        plane.update(rows.astype(np.uint8 if bits == 8 else "<u2").tobytes())
    frame.colorspace, frame.color_range = MATRICES[matrix][2], RANGES[span]
    return frame


def film(path: Path, codec: str, matrix: str, span: str, bits: int) -> str:
    options = {"crf": "1", "preset": "ultrafast"}
    options |= {"x265-params": "log-level=none"} if codec == "libx265" else {}
    options = {"crf": "4", "b": "0"} if codec == "libvpx-vp9" else options
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=Fraction(10), options=options)
        frame, context = patches(matrix, span, bits), stream.codec_context
        stream.width, stream.height = frame.width, frame.height
        stream.pix_fmt = frame.format.name
        context.colorspace, context.color_range = frame.colorspace, frame.color_range
        for number in range(3):
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return str(path)


def furthest(pixels: np.ndarray) -> int:
    """By how much the middles of patches are off, at most."""
    middles = pixels.reshape(64, len(PATCHES), SIDE, 3)[24:40, :, 12:20].astype(int)
    return int(np.abs(middles - np.array(PATCHES)[:, None]).max())


def read(name: Any, path: str, function: str = "decode") -> np.ndarray:
    if lacking := backends.missing(name):
        pytest.skip(lacking)
    with opened(path) as video:
        times = timeline(video).times
    backend = getattr(importlib.import_module(f"stages.media.backends.{name}"), function)
    (picture,) = backend(path, times[1:2], Budget())
    return Fit(64, SIDE * len(PATCHES), "squash")(*picture)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_come_back(tmp_path: Path, matrix: str, span: str, bits: int) -> None:
    """Pure red stays red. What 8 bits round, and then the others' quicker arithmetic."""
    path = film(tmp_path / "a.mp4", "libx264", matrix, span, bits)
    assert furthest(read("pyav", path)) <= 1
    others: tuple[backends.Name, ...] = ("decord", "torchcodec")
    for name in others:
        if not backends.missing(name):
            assert furthest(read(name, path)) <= 3, name


@pytest.mark.parametrize(("codec", "suffix"), [("libx265", "mp4"), ("libvpx-vp9", "webm")])
@pytest.mark.parametrize("name", ["pyav", "decord", "torchcodec"])
def test_full_range_of_other_codecs(tmp_path: Path, name: str, codec: str, suffix: str) -> None:
    path = film(tmp_path / f"a.{suffix}", codec, "bt709", "full", 8)
    assert furthest(read(name, path)) <= 3


def test_torchcodec_takes_some_full_range_for_limited(tmp_path: Path) -> None:
    """Which is why PyAV reads it in its place."""
    path = film(tmp_path / "a.mp4", "libx264", "bt709", "full", 10)
    if lacking := backends.missing("torchcodec"):
        pytest.skip(lacking)
    from torchcodec.decoders import VideoDecoder

    own = VideoDecoder(path, dimension_order="NHWC").get_frame_at(1).data.numpy()
    assert furthest(own) > 8
    assert furthest(read("torchcodec", path)) <= 1


def view(form: str, matrix: str, span: str) -> av.VideoFrame:
    """A picture full of edges and slopes, 320 x 180."""
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.integers(0, 256, (12, 20, 3)), np.ones((15, 16, 1)))
    slopes = np.linspace(0, 120, 320)[None, :, None] + np.linspace(0, 60, 180)[:, None, None]
    rgb = np.clip(coarse / 2 + slopes, 0, 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=form)
    frame.colorspace, frame.color_range = MATRICES[matrix][2], RANGES[span]
    return frame


def scaled(frame: av.VideoFrame, height: int, width: int, more: str = "") -> np.ndarray:
    """By FFmpeg's filter `scale`."""
    graph = av.filter.Graph()
    flags = "bicubic+accurate_rnd+full_chroma_int"
    steps = [
        graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format.name,
            time_base=Fraction(1, 25),
        ),
        graph.add("scale", f"{width}:{height}:flags={flags}{more}"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    for step, following in pairwise(steps):
        step.link_to(following)
    graph.configure()
    graph.push(frame)
    pixels: np.ndarray = graph.pull().to_ndarray()
    return pixels


@pytest.mark.parametrize("size", [(90, 160), (64, 113), (180, 320), (270, 480)])
@pytest.mark.parametrize("form", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "nv12"])
@pytest.mark.parametrize(
    ("matrix", "span"),
    [("bt601", "limited"), ("bt709", "limited"), ("bt709", "full"), ("unstated", "unstated")],
)
def test_frames_are_ffmpegs(matrix: str, span: str, form: str, size: tuple[int, int]) -> None:
    frame = view(form, matrix, span)
    ours = Fit(*size, "squash")(frame).astype(int)
    assert np.abs(ours - scaled(frame, *size)).max() == 0


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("libx265", "mp4")])
@pytest.mark.parametrize("form", ["yuv420p", "yuv420p10le"])
def test_chroma_lies_where_the_stream_has_it(
    tmp_path: Path, codec: str, suffix: str, form: str
) -> None:
    """Left, if it does not say; FFmpeg's filter has to be told."""
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=25, options={"x265-params": "log-level=none"})
        frame = view(form, "bt709", "limited")
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, form
        output.mux([*stream.encode(frame), *stream.encode(None)])
    with av.open(str(path)) as container:
        (decoded,) = container.decode(video=0)
    ours = Fit(90, 160, "squash")(decoded).astype(int)
    assert np.abs(ours - scaled(decoded, 90, 160, ":in_chroma_loc=left")).max() == 0
    assert np.abs(ours - scaled(decoded, 90, 160, ":in_chroma_loc=center")).max() > 0


def test_chroma_is_as_fine_as_luma(tmp_path: Path) -> None:
    """Half as fine, red beside blue would make a stripe of neither."""
    values = yuv("bt709", False, 8)
    frame = av.VideoFrame(256, 64, "yuv444p")
    for number, plane in enumerate(frame.planes):
        row = np.where(np.arange(256) // 2 % 2, values[0, number], values[2, number])
        plane.update(np.tile(row.astype(np.uint8), (64, 1)).tobytes())
    frame.colorspace, frame.color_range = 1, 1
    pixels = Fit(64, 256, "squash")(frame)[32].astype(int)
    expected = np.where((np.arange(256) // 2 % 2)[:, None], PATCHES[0], PATCHES[2])
    assert np.abs(pixels - expected).max() <= 2
