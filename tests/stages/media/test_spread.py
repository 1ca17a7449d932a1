"""Frames spread over a clip: which ones, by the numbers that they show, and of what size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numbered import make, numbers

from stages.media.frames import NoBucket, read_clip, read_clips
from stages.media.picture import longest_side
from stages.media.sampling import Sampling
from stages.media.spread import FramesSettings, spread
from stages.media.video import VideoError

LONG = Sampling(fps=16, frames=9999)  # nothing is left out


def shown(path: Path, sampling: Sampling = LONG, **frames: object) -> list[int]:
    return numbers(spread(str(path), FramesSettings(**frames), sampling, clip="a").frames)


@pytest.mark.parametrize(
    ("frames", "fps", "settings", "expected"),
    [
        (60, 30, {}, [0, 15, 30, 45]),  # two seconds at 2 fps
        (120, 30, {}, [0, 15, 30, 45, 60, 75, 90, 105]),
        (120, 30, {"count": 3}, [12, 52, 92]),  # each of half a second amid 4/3
        (120, 30, {"count": 1}, [52]),
        (120, 30, {"count": 99}, [0, 15, 30, 45, 60, 75, 90, 105]),
        (120, 30, {"count": 99, "fps": 5}, [*range(0, 120, 6)]),
        (240, 24, {"count": 4}, [24, 84, 144, 204]),
        (12, 24, {}, [0, 3, 6, 9]),  # half a second: four all the same
        (2, 24, {}, [0, 1]),
        (1, 24, {}, [0]),
        (30, 1, {"count": 30}, [*range(30)]),  # slower than asked: each once
    ],
)
def test_one_from_the_middle_of_each_part(
    tmp_path: Path, frames: int, fps: int, settings: dict[str, object], expected: list[int]
) -> None:
    assert shown(make(tmp_path / "a.mp4", frames, fps), **settings) == expected


def test_by_the_times_at_which_they_are_shown(tmp_path: Path) -> None:
    pts = [*range(0, 1000, 100), *range(1000, 5000, 1000)]  # ten in a second, then one a second
    path = make(tmp_path / "a.mp4", len(pts), 10, pts=pts)
    found = spread(str(path), FramesSettings(count=5, fps=1), LONG)
    assert found.times == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert numbers(found.frames) == [0, 10, 11, 12, 13]
    assert found.fps == pytest.approx(5 / 4.1), "the last frame's length is not known"


def test_of_a_cut_out_part(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 200, 25)
    found = spread(str(path), FramesSettings(), LONG, 2.0, 4.0)
    assert numbers(found.frames) == [50, 62, 75, 87]
    assert found.times == pytest.approx([2.0, 2.48, 3.0, 3.48])


@pytest.mark.parametrize("start", ["first", "center", "random"])
@pytest.mark.parametrize("policy", ["time", "seed", "interval"])
def test_of_what_is_trained_on_and_nothing_else(tmp_path: Path, start: str, policy: str) -> None:
    path = make(tmp_path / "a.mp4", 200, 25)
    sampling = Sampling(fps=8, frames=16, size=64, policy=policy, start=start, interval=3)
    clip = next(read_clips(str(path), sampling, clip="a"))
    found = spread(str(path), FramesSettings(count=16, fps=50), sampling, clip="a")
    assert len(found.times) == 16
    assert clip.start - 1e-6 <= found.times[0] and found.times[-1] < clip.end
    apart = (clip.end - clip.start) / 16
    assert found.times[0] < clip.start + apart and found.times[-1] > clip.end - 1.5 * apart
    whole = spread(str(path), FramesSettings(span="clip"), sampling, clip="a")
    assert whole.times[-1] > 6.0


def test_of_all_of_a_clip_that_becomes_several(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 200, 25)
    sampling = Sampling(fps=8, frames=8, windows="all")
    assert shown(path, sampling, count=4) == shown(path, LONG, count=4)
    settings = FramesSettings()
    assert settings.identity(sampling) == {}
    assert settings.identity(sampling.model_copy(update={"windows": 1}))["frames"] == 8


def test_buckets_are_those_of_the_clip(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 200, 25)
    fits = Sampling(fps=8, buckets=[[16, 32, 32], [16, 9999, 9999]])
    found = spread(str(path), FramesSettings(), fits)
    assert found.times[-1] < 2.0
    with pytest.raises(NoBucket):
        spread(str(path), FramesSettings(), Sampling(buckets=[[16, 128, 128]]))


def test_the_longer_side_is_made_smaller_and_never_larger(tmp_path: Path) -> None:
    wide = np.zeros((60, 120, 3), np.uint8)
    assert longest_side(40)(wide).shape == (20, 40, 3)
    assert longest_side(40)(wide.swapaxes(0, 1)).shape == (40, 20, 3)
    assert longest_side(500)(wide).shape == (60, 120, 3)
    path = make(tmp_path / "a.mp4", 30, 30)
    small = spread(str(path), FramesSettings(side=32), LONG).frames
    assert small.shape == (4, 32, 32, 3)
    same = spread(str(path), FramesSettings(side=64, fps=30, count=3), LONG)
    whole = read_clip(str(path), Sampling(fps=30, frames=30, size=64))
    places = [whole.times.index(time) for time in same.times]
    assert np.array_equal(same.frames, whole.frames[places]), "the pixels that encode gets"


def test_faults_are_those_of_encode(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 30, 30)
    with pytest.raises(VideoError) as outside:
        spread(str(path), FramesSettings(), LONG, 5.0, 6.0)
    assert outside.value.error == "empty_section"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(VideoError) as cut:
        spread(str(path), FramesSettings(), LONG)
    assert cut.value.error == "truncated"
