"""Every backend gives the frames asked for, over the matrix of `matrix`; and what of it PyAV has to
read in its place is known."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from matrix import Case, asked, quick, shown
from numbered import make, number

from stages.media import backends
from stages.media.backends import pyav, sparing
from stages.media.backends.others import Unable
from stages.media.frames import read_clip
from stages.media.sampling import Sampling
from stages.media.timeline import timeline
from stages.media.video import Budget, opened

CASES = quick()
PROGRAM_STREAMS = ("ts", "mpg")


def mirrored(case: Case) -> bool:
    return case.turn[1] != case.turn[2]


# What each reads wrongly, or not at all: there, and nowhere else, PyAV steps in.
FAULTS: dict[str, Callable[[Case], bool]] = {
    "decord": lambda case: (
        case.container in PROGRAM_STREAMS or case.codec.startswith("av1") or mirrored(case)
    ),
    "torchcodec": lambda case: (
        case.container in (*PROGRAM_STREAMS, "avi")
        or mirrored(case)
        or (case.codec, case.group) in (("h264", "open"), ("h264", "refresh"))
    ),
}


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def module(name: Any) -> Any:
    if lacking := backends.missing(name):
        pytest.skip(lacking)
    return importlib.import_module(f"stages.media.backends.{name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pyav_gives_every_frame_right_to_the_bit(
    videos: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed decoded and no more, but for streams without presentation times."""
    path = str(case.make(videos))
    if case.container != "avi":
        monkeypatch.setattr(pyav, "_chosen", None)
    assert shown(pyav.decode, path, case) == asked(case)
    with av.open(path) as container:  # everything, in order: nothing sought, nothing skipped
        plain = [frame.to_ndarray() for frame in container.decode(video=0)]
    with opened(path) as video:
        times = timeline(video).times
    for each in asked(case):
        pictures = pyav.decode(path, [times[i] for i in each], Budget())
        for i, picture in zip(each, pictures, strict=True):
            assert np.array_equal(picture.frame.to_ndarray(), plain[i])


@pytest.mark.parametrize("name", ["decord", "torchcodec"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_backends_give_every_frame(videos: Path, case: Case, name: str) -> None:
    backend, path = module(name), str(case.make(videos))
    try:
        assert shown(backend.alone, path, case) == asked(case)
    except Unable:
        assert FAULTS[name](case), "a fault that is not known"
        assert shown(backend.decode, path, case) == asked(case)
    else:
        assert name == "torchcodec" or not FAULTS[name](case), "a fault that is none"


def test_decord_by_number_is_wrong_at_open_groups(videos: Path) -> None:
    """Which is why it reads from the beginning on."""
    decord = pytest.importorskip("decord")
    path = str(Case("h264", "mp4", "open").make(videos))
    found = [number(decord.VideoReader(path, num_threads=1)[i].asnumpy()) for i in range(45)]
    assert found != list(range(45))


@pytest.mark.parametrize("name", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("container", ["mp4", "ts"])
def test_clips_are_the_same_by_every_backend(videos: Path, name: Any, container: str) -> None:
    decode = module(name).decode
    path = str(Case("h264", container, "pyramid").make(videos))
    sampling = Sampling(fps=16, frames=12, size=64)
    for start in (None, 0.4, 0.8):
        clip = read_clip(path, sampling, start, backend=decode)
        first = 0 if start is None else start * 30
        assert [number(f) for f in clip.frames] == [int(first + k * 30 / 16) for k in range(12)]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_threads_change_nothing(videos: Path, codec: str) -> None:
    group = "12" if codec == "vp9" else "open"
    path = str(Case(codec, "mkv", group).make(videos))
    with opened(path) as video:
        times = timeline(video).times[::3]
    one = [p.frame.to_ndarray() for p in pyav.decode(path, times, Budget(), 1)]
    for threads in (2, 5):
        more = [p.frame.to_ndarray() for p in pyav.decode(path, times, Budget(), threads)]
        assert np.array_equal(one, more)


def test_groups_without_a_wanted_frame_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make(tmp_path / "a.mp4", 120, 30, g="10", bf="2", sc_threshold="0"))
    fed: list[int] = []
    decode = sparing._Decoding._decode

    def counted(self: Any, packet: Any, leading: bool) -> None:
        fed.append(packet.pts)
        decode(self, packet, leading)

    monkeypatch.setattr(sparing._Decoding, "_decode", counted)
    frames = list(pyav.decode(path, [0.1, 1.0, 1 + 2 / 3], Budget()))
    assert [number(p.frame.to_ndarray(format="rgb24")) for p in frames] == [3, 30, 50]
    assert len(fed) <= 4 + 1 + 1


def test_a_key_frame_that_is_none_is_no_start(tmp_path: Path) -> None:
    """Intra refresh: what files mark as key frames are made from those before."""
    path = make(tmp_path / "a.mkv", 90, 30, g="15", **{"x264-params": "intra-refresh=1"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        keys = [p for p in container.demux(stream) if p.is_keyframe]
        assert len(keys) > 3
        assert [sparing.intra(packet, codec) for packet in keys] == [True] + [False] * (
            len(keys) - 1
        )
    clip = read_clip(str(path), Sampling(fps=30, frames=5, size=64), start=2.0)
    assert [number(f) for f in clip.frames] == list(range(60, 65))


def test_the_type_of_a_slice() -> None:
    assert sparing.slice_type(bytes([0b1_00110_00, 0])) == 5  # ue(0), ue(5)
    assert sparing.slice_type(bytes([0b1_1_000000, 0])) == 0
    assert sparing.slice_type(bytes([0b00100_000, 0b1000_0000])) == 7  # ue(3), ue(7)


def test_program_streams_are_not_sought(tmp_path: Path) -> None:
    """After a seek their packets come with other times."""
    path = str(make(tmp_path / "a.mpg", 90, Fraction(30), "mpeg2video", bf="0", g="12"))
    for start in (0.5, 1.0, 2.0):
        clip = read_clip(path, Sampling(fps=15, frames=8, size=64), start)
        assert [number(f) for f in clip.frames] == [int(start * 30) + 2 * k for k in range(8)]
