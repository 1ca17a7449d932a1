"""The demo's videos: scenes, captions, rewrites, files."""

from __future__ import annotations

import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stages.demo.shapes import (
    COLOURS,
    COLUMNS,
    DIRECTIONS,
    LONGEST,
    RATES,
    SHAPES,
    Scene,
    caption,
    frame,
    make_demo,
    named,
    rewrite,
    scene,
    write_clip,
)

MANY = [scene(seed) for seed in range(400)]


def mask(picture: np.ndarray, colour: str) -> np.ndarray:
    """Pixels nearer to the colour than to the backdrop, which the corner shows."""
    pixels = picture.astype(float)
    to_colour = np.abs(pixels - COLOURS[colour]).sum(axis=2)
    return to_colour < np.abs(pixels - pixels[:2, :2].mean(axis=(0, 1))).sum(axis=2)


def centroid(picture: np.ndarray, colour: str) -> np.ndarray:
    rows, columns = np.nonzero(mask(picture, colour))
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def test_a_seed_gives_one_scene_and_one_picture() -> None:
    assert scene(7) == scene(7)
    assert scene(7) != scene(8)
    first, again = (frame(scene(7), 1.25, (48, 64)) for _ in range(2))
    assert first.shape == (48, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)


def test_seeds_cover_every_shape_colour_and_direction() -> None:
    seen = {(s.shape, s.colour, s.direction) for s in (scene(seed) for seed in range(1500))}
    assert len(seen) == len(SHAPES) * len(COLOURS) * len(DIRECTIONS)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (120, 80)])
def test_the_shape_stays_in_the_centre_square(size: tuple[int, int]) -> None:
    for one in MANY:
        for time in (0.0, LONGEST):
            x, y = one.position(time)
            assert max(abs(x), abs(y)) + one.size <= 0.481
    # ... and as drawn: the border of the square shows the backdrop only.
    one = MANY[3]
    side, (height, width) = min(size), size
    top, left = (height - side) // 2, (width - side) // 2
    square = frame(one, LONGEST, size)[top : top + side, left : left + side]
    covered = mask(square, one.colour)
    assert covered.any()
    assert not covered[[0, -1]].any() and not covered[:, [0, -1]].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pixels_move_as_the_direction_says(direction: str) -> None:
    for one in [s for s in MANY if s.direction == direction][:10]:
        move = centroid(frame(one, 4, (96, 128)), one.colour) - centroid(
            frame(one, 0, (96, 128)), one.colour
        )
        expected = np.array(DIRECTIONS[direction]) * one.speed * 4 * 96
        assert np.abs(move - expected).max() < 0.8
        assert np.abs(expected).max() > 0.2 * 96


@pytest.mark.parametrize(
    ("shape", "fill"), [("circle", np.pi / 4), ("square", 1), ("triangle", 0.5)]
)
def test_a_shape_fills_its_box_as_its_kind_does(shape: str, fill: float) -> None:
    covered = mask(frame(replace(MANY[0], shape=shape), 2, (256, 256)), MANY[0].colour)
    rows, columns = np.nonzero(covered)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert covered.sum() / box == pytest.approx(fill, abs=0.03)


def test_edges_are_blended() -> None:
    one = replace(MANY[0], shape="circle", colour="white", backdrop=(20, 20, 20))
    levels = frame(one, 1, (64, 64))[..., 0]
    between = (levels > 60) & (levels < 200)
    assert 20 < between.sum() < 80  # about one pixel along the outline


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_survives_the_file_at_64_pixels(colour: str, tmp_path: Path) -> None:
    one = replace(MANY[1], colour=colour, shape="square", direction="right", x=-0.2, y=0.0)
    write_clip(tmp_path / "a.mp4", one, 24, 0.5, (64, 64))
    picture = decode(tmp_path / "a.mp4")[0].astype(float)
    x, y = (round(32 + 64 * c) for c in one.position(0))
    shown = picture[y - 2 : y + 2, x - 2 : x + 2].mean(axis=(0, 1))
    distances = {name: np.abs(shown - rgb).sum() for name, rgb in COLOURS.items()}
    assert min(distances, key=distances.__getitem__) == colour
    assert distances[colour] < 45


def test_caption_and_rewrite_name_the_same_facts() -> None:
    for one in MANY:
        facts = (one.shape, one.colour, one.direction)
        assert named(caption(one)) == facts
        assert named(rewrite(one)) == facts
        assert 12 <= len(rewrite(one).split()) <= 45
        assert ("slow" in rewrite(one)) == ("slow" in caption(one).lower())
        assert ("dark" in rewrite(one)) == ("dark" in caption(one).lower())


def test_the_short_caption_alone_decides_the_rewrite() -> None:
    answers: dict[str, str] = {}
    for seed in range(4000):
        one = scene(seed)
        assert answers.setdefault(caption(one), rewrite(one)) == rewrite(one)
    assert len(answers) > 2000


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("A red circle moves leftward.", ("circle", "red", "left")),
        ("Down-moving white square", ("square", "white", "down")),
        ("A red circle moves from right to left.", None),
        ("A red circle.", None),
        ("A red or blue circle goes up.", None),
        ("a coloured circle goes up", None),
    ],
)
def test_named(text: str, facts: tuple[str, str, str] | None) -> None:
    assert named(text) == facts


@pytest.mark.parametrize("fps", RATES)
def test_time_not_frame_number_moves_the_shape(fps: Fraction, tmp_path: Path) -> None:
    one: Scene = MANY[5]
    path = tmp_path / "a.mp4"
    count = write_clip(path, one, fps, 2.5, (64, 80))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == fps
        times, pictures = [], []
        for shown in container.decode(stream):
            times.append(shown.time)
            pictures.append(shown.to_ndarray(format="rgb24"))
    assert len(times) == count == round(2.5 * fps)
    assert times == pytest.approx([k / float(fps) for k in range(count)], abs=1e-3)
    for k in (0, count // 2, count - 1):
        drawn = frame(one, float(k / fps), (64, 80)).astype(float)
        assert np.abs(pictures[k] - drawn).mean() < 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


def kind(path: Path) -> str:
    """What becomes of a file that somebody decodes."""
    if path.stat().st_size == 0:
        return "empty"
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            declared = float(stream.duration * stream.time_base)
            packets = sum(p.size > 0 for p in container.demux(stream))
            rate = float(stream.average_rate)
        with av.open(str(path)) as container:
            first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    except av.FFmpegError:
        return "text" if path.read_bytes().startswith(b"<html>") else "not opened"
    if packets < 0.9 * declared * rate:
        return "cut"
    if first.max() < 40:
        return "dark"
    return "short" if declared < 4 else "good"


def test_the_demo_holds_what_it_says(demo: Path) -> None:
    kinds = [kind(path) for path in sorted((demo.parent / "videos").iterdir())]
    counts = {name: kinds.count(name) for name in set(kinds)}
    assert counts == {
        "good": 37,
        "short": 4,
        "dark": 3,
        "cut": 1,
        "not opened": 1,
        "empty": 1,
        "text": 1,
    }


def test_the_table_names_every_video_with_its_caption(demo: Path) -> None:
    with demo.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert ",".join(header) == (
        "video,caption,aesthetic score,motion score,temporal consistency score,"
        "camera motion,frame,fps,seconds"
    )
    assert tuple(header) == COLUMNS
    assert [row[0] for row in rows] == sorted(p.name for p in (demo.parent / "videos").iterdir())
    for number, row in enumerate(rows):
        assert row[1] == caption(scene(number))
        assert int(row[6]) == pytest.approx(float(row[7]) * float(row[8]), rel=1e-3)
    assert {row[7] for row in rows} == {"24", "25", "29.97", "30", "60"}


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first, again, other = (
        make_demo(tmp_path / name, clips=12, seed=seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    videos = sorted((tmp_path / "a" / "videos").iterdir())
    assert len(videos) == 12
    for path in videos:
        assert path.read_bytes() == (tmp_path / "b" / "videos" / path.name).read_bytes()
