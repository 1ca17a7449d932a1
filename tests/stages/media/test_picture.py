from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from numbered import make, picture

from stages.media.few import sample_few
from stages.media.frames import read_clip
from stages.media.picture import Fit, short_side, turned
from stages.media.sampling import Sampling
from stages.media.video import VideoError

ONE = 1 << 16


def flat(y: int, u: int, v: int, colorspace: int, color_range: int) -> av.VideoFrame:
    planes = [np.full((32, 32), value, np.uint8) for value in (y, u, v)]
    frame = av.VideoFrame.from_ndarray(np.stack(planes), "yuv444p")
    frame.colorspace, frame.color_range = colorspace, color_range
    return frame


@pytest.mark.parametrize(
    ("yuv", "colorspace", "color_range"),
    [
        ((63, 102, 240), 1, 1),  # BT.709, limited
        ((54, 99, 255), 1, 2),  # BT.709, full
        ((81, 90, 240), 6, 1),  # BT.601
        ((81, 90, 240), 2, 0),  # unstated: BT.601, limited
        ((76, 85, 255), 6, 2),  # BT.601, full
        ((74, 97, 240), 9, 1),  # BT.2020
    ],
)
def test_red_stays_red(yuv: tuple[int, int, int], colorspace: int, color_range: int) -> None:
    pixels = Fit(16, 16, "crop")(flat(*yuv, colorspace, color_range))
    assert np.abs(pixels[8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_white_and_black_reach_the_ends() -> None:
    assert (Fit(16, 16, "crop")(flat(235, 128, 128, 1, 1)) == 255).all()
    assert (Fit(16, 16, "crop")(flat(16, 128, 128, 1, 1)) == 0).all()


def striped(height: int, width: int) -> av.VideoFrame:
    """Quarters from left to right: red, green, blue, white."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    row = np.repeat(colours, width // 4, axis=0)
    return av.VideoFrame.from_ndarray(np.tile(row, (height, 1, 1)), "rgb24")


def colours(pixels: np.ndarray, row: int) -> str:
    """The colours along a row, at the middles of eight parts."""
    columns = range(pixels.shape[1] // 16, pixels.shape[1], pixels.shape[1] // 8)
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w", (0, 0, 0): "."}
    return "".join(names[tuple(int(c > 127) for c in pixels[row, x])] for x in columns)


def test_fits() -> None:
    frame = striped(64, 128)
    assert colours(Fit(64, 64, "crop")(frame), 32) == "ggggbbbb"
    padded = Fit(64, 64, "pad")(frame)
    assert colours(padded, 32) == "rrggbbww"
    assert (colours(padded, 8), colours(padded, 20)) == ("........", "rrggbbww")
    assert colours(Fit(64, 64, "squash")(frame), 2) == "rrggbbww"
    assert Fit(30, 50, "crop")(frame).shape == (30, 50, 3)


def test_pixels_that_are_not_square_are_squared() -> None:
    frame = striped(64, 64)
    assert colours(Fit(64, 64, "crop")(frame, pixel=2.0), 32) == "ggggbbbb"
    assert colours(Fit(64, 64, "pad")(frame, pixel=2.0), 8) == "........"
    assert short_side(32)(frame, 2.0).shape == (32, 64, 3)


def test_a_line_is_no_picture() -> None:
    with pytest.raises(VideoError, match="4096 x 2 pixels") as extreme:
        Fit(64, 64, "crop")(striped(2, 4096))
    assert extreme.value.error == "extreme_shape"


def test_the_whole_picture_by_its_short_side() -> None:
    assert short_side(32)(striped(64, 128)).shape == (32, 64, 3)
    assert short_side(128)(striped(64, 32)).shape == (256, 128, 3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True)])
def test_a_video_is_turned_as_its_display_matrix_says(
    tmp_path: Path, degrees: int, flip: tuple[bool, bool]
) -> None:
    """`set_display_rotation`: counter-clockwise, mirrored after it."""
    path = make(tmp_path / "a.mp4", 8, 8, rotation=(degrees, *flip))
    expected = np.rot90(picture(6), degrees // 90)
    expected = expected[:: -1 if flip[1] else 1, :: -1 if flip[0] else 1].astype(int)
    frames = read_clip(str(path), Sampling(fps=8, frames=8, size=64)).frames
    assert np.abs(frames[6] - expected).mean() < 3
    few = sample_few(str(path), 1, 64, start=0.75, end=0.9)
    assert np.abs(few.frames[0] - expected).mean() < 3


def test_a_turned_video_fits_an_oblong(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 8, 8, rotation=(90, False, False))
    sampling = Sampling(fps=8, frames=8, size=(32, 64), fit="squash")
    expected = np.rot90(picture(6))[::2].astype(int)
    assert np.abs(read_clip(str(path), sampling).frames[6] - expected).mean() < 5


def test_turning_follows_the_standards_matrix() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    clockwise = (0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30)  # as phones held upright write it
    assert np.array_equal(turned(pixels, clockwise), np.rot90(pixels, -1))
    assert turned(pixels, None) is pixels
