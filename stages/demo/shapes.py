"""Moving shapes: scenes drawn as a function of time, their captions, and the demo's folder.

A scene is one shape that moves straight on at one speed before a plain backdrop. It is drawn at a
time in seconds, so the same scene at 24 or 60 fps shows the same motion, and frames picked by
presentation time look the same whatever the file's rate.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 38, 42),
    "green": (36, 172, 72),
    "blue": (44, 78, 226),
    "yellow": (240, 218, 44),
    "white": (246, 246, 246),
    "purple": (150, 52, 188),
    "orange": (246, 136, 24),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TOWARD = {"left": "to the left", "right": "to the right", "up": "upward", "down": "downward"}
GROUNDS = {"dark": 56, "grey": 112, "light": 182}  # grey levels, before the tint
LONGEST = 6.0  # seconds for which every scene keeps its shape within the frame
RATES = (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60))

# What is wrong with some files, on purpose, among 48: every stage has something to refuse.
FAULTS = {"short": 4, "dark": 3, "cut": 1, "cut_index_first": 1, "empty": 1, "text": 1}


@dataclass(frozen=True)
class Scene:
    """Lengths are in short sides of the frame, positions from its centre (x to the right, y down):
    a centre crop to a square loses nothing of the shape."""

    shape: str
    colour: str
    direction: str
    x: float
    y: float
    size: float  # half of the shape's height
    speed: float  # short sides a second
    ground: str
    backdrop: tuple[int, int, int]
    seed: int  # of the backdrop's texture and of the caption's wording

    @property
    def pace(self) -> str:
        return "slow" if self.speed < 0.075 else "fast"

    def position(self, time: float) -> tuple[float, float]:
        """The shape's centre at a time in seconds."""
        dx, dy = DIRECTIONS[self.direction]
        return self.x + dx * self.speed * time, self.y + dy * self.speed * time


def scene(seed: int) -> Scene:
    """The scene of a seed: a pure function, the same on every machine."""
    draw = np.random.default_rng([seed, 20])
    shape = SHAPES[draw.integers(len(SHAPES))]
    colour = list(COLOURS)[draw.integers(len(COLOURS))]
    direction = list(DIRECTIONS)[draw.integers(len(DIRECTIONS))]
    size = draw.uniform(0.11, 0.17)
    speed = draw.uniform(0.052, 0.065) if draw.random() < 0.5 else draw.uniform(0.085, 0.098)
    room = 0.48 - size  # how far from the centre the shape may be and stay within the frame
    along = draw.uniform(-room, room - speed * LONGEST)
    across = draw.uniform(-room, room)
    dx, dy = DIRECTIONS[direction]
    ground = list(GROUNDS)[draw.integers(len(GROUNDS))]
    red, green, blue = (int(GROUNDS[ground] + tint) for tint in draw.integers(-6, 7, size=3))
    return Scene(
        shape=shape,
        colour=colour,
        direction=direction,
        x=float(dx * along if dx else across),
        y=float(dy * along if dy else across),
        size=float(size),
        speed=float(speed),
        ground=ground,
        backdrop=(red, green, blue),
        seed=seed,
    )


def frame(scene: Scene, time: float, size: tuple[int, int]) -> Frame:
    """The scene at `time` seconds: uint8 RGB, (height, width, 3), edges anti-aliased."""
    height, width = size
    side = min(size)
    x, y = scene.position(time)
    # Distances to the shape's outline in pixels, negative inside; half a pixel each way is blended.
    dx = np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2 - x * side)
    dy = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5 - height / 2 - y * side)
    cover = np.clip(0.5 - _distance(scene.shape, dx, dy, scene.size * side), 0, 1)[..., None]
    backdrop = _backdrop(scene.backdrop, scene.seed, height, width)
    colour = np.array(COLOURS[scene.colour], dtype=np.float32)
    return np.asarray(backdrop + cover * (colour - backdrop) + 0.5, dtype=np.uint8)


def _distance(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], size: float
) -> NDArray[np.float32]:
    if shape == "circle":
        distance = np.hypot(x, y) - size
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.88 * size
    else:
        distance = np.maximum(y - size, (2 * np.abs(x) - y - size) / np.sqrt(5))
    return distance.astype(np.float32)


@lru_cache(maxsize=64)
def _backdrop(
    colour: tuple[int, int, int], seed: int, height: int, width: int
) -> NDArray[np.float32]:
    """Soft clouds and a little grain, so that no frame is flat."""
    draw = np.random.default_rng([seed, 21])
    clouds = draw.uniform(-9, 9, size=(4, 4))
    rows = np.stack([np.interp(np.linspace(0, 3, height), np.arange(4), c) for c in clouds.T], 1)
    grid = np.stack([np.interp(np.linspace(0, 3, width), np.arange(4), r) for r in rows])
    grain = draw.normal(0, 1.2, size=(height, width))
    picture = np.array(colour) + (grid + grain)[..., None]
    return np.clip(picture, 0, 254).astype(np.float32)


# Short captions as found on the web, each with the number of the rewrite that it asks for.
WORDINGS = (
    ("{colour} {shape} going {direction}", 0),
    ("{a} {colour} {shape} moves {direction}", 0),
    ("clip of {a} {colour} {shape}, heading {direction}", 1),
    ("{colour} {shape} sliding {toward} on a {ground} background", 3),
    ("video of a {pace} {colour} {shape} moving {direction}", 2),
    ("{a} {colour} {shape} drifts {toward}", 4),
    ("{colour} {shape} {direction} motion, {ground} bg", 1),
    ("stock footage: {colour} {shape} gliding {toward}", 1),
    ("{ground} background, {pace} {colour} {shape} moving {direction}", 3),
    ("{shape}, {colour}, moving {direction}", 2),
    ("a {pace} {colour} {shape} travels {toward}", 4),
    ("{direction}-moving {colour} {shape}", 0),
    ("{colour} {shape} floats {toward}, {ground} backdrop", 4),
    ("{a} {colour} {shape} goes {direction}, {pace}", 2),
    ("{shape} in {colour} moving {toward} hd video", 3),
    ("loop {pace} {colour} {shape} animation {direction} {ground} bg", 0),
)
REWRITES = (
    "{A} {colour} {shape} moves {how} {toward} across a plain {ground}background. "
    "The camera stays still and nothing else is in view.",
    "Against a plain {ground}background, {a} {colour} {shape} glides {how} {toward} in one even "
    "motion. No other object appears.",
    "{A} {colour} {shape} travels {toward} in a straight line, moving {how}. "
    "The {ground}background is plain and the view does not change.",
    "On a plain {ground}background, {a} {colour} {shape} slides {how} {toward}. "
    "Its path is straight and its size stays the same.",
    "A single {colour} {shape} drifts {how} {toward} over a plain {ground}background, "
    "with nothing else in the frame.",
)
HOW = {"slow": "slowly", "fast": "quickly"}


def _wording(scene: Scene) -> tuple[str, int, bool, bool]:
    """Wording, number of its rewrite, whether with a capital, whether with a full stop."""
    draw = np.random.default_rng([scene.seed, 24])
    return *WORDINGS[draw.integers(len(WORDINGS))], draw.random() < 0.5, draw.random() < 0.3


def caption(scene: Scene) -> str:
    """A short caption in one of the web's manners; the scene's seed chooses which."""
    wording, _, capital, stop = _wording(scene)
    text = wording.format(
        a=_article(scene.colour),
        shape=scene.shape,
        colour=scene.colour,
        direction=scene.direction,
        toward=TOWARD[scene.direction],
        pace=scene.pace,
        ground=scene.ground,
    )
    return (text[0].upper() + text[1:] if capital else text) + "." * stop


def rewrite(scene: Scene) -> str:
    """The long caption that a rewriter should answer to `caption(scene)`: at most 45 words.

    It tells what the short caption tells and beside that only what holds for every scene, so the
    short text alone decides it.
    """
    wording, number, _, _ = _wording(scene)
    article = _article(scene.colour)
    return REWRITES[number].format(
        a=article,
        A=article.capitalize(),
        shape=scene.shape,
        colour=scene.colour,
        toward=TOWARD[scene.direction],
        how=HOW[scene.pace] if "{pace}" in wording else "steadily",
        ground=scene.ground + " " if "{ground}" in wording else "",
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def named(text: str) -> tuple[str, str, str] | None:
    """The (shape, colour, direction) that a text names; None unless it names one of each."""
    found = []
    for words in (SHAPES, COLOURS, DIRECTIONS):
        hits = set(re.findall(rf"\b({'|'.join(words)})(?:wards?)?\b", text.lower()))
        if len(hits) != 1:
            return None
        found.append(hits.pop())
    shape, colour, direction = found
    return shape, colour, direction


def write_clip(
    path: Path,
    scene: Scene,
    fps: Fraction | int = 30,
    seconds: float = 5.0,
    size: tuple[int, int] = (96, 128),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    gain: float = 1.0,
) -> int:
    """Writes the scene as a video in yuv420p and returns the number of frames.

    `size` is (height, width), both even. The container follows the path's suffix. `options` go to
    the codec (default for libx264: ultrafast, crf 18). `gain` scales the light: 0.03 is nearly
    black.
    """
    import av

    if options is None:
        options = {"preset": "ultrafast", "crf": "18"} if codec == "libx264" else {}
    height, width = size
    frames = round(seconds * fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # small frames: threads cost more than they give
        for number in range(frames):
            picture = frame(scene, float(number / fps), size)
            if gain != 1.0:
                picture = (picture * gain).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return frames


@dataclass(frozen=True)
class _Clip:
    """One row of the demo: a scene, and how it becomes a file."""

    scene: Scene
    fault: str | None
    fps: Fraction
    seconds: float
    size: tuple[int, int]


COLUMNS = (
    "video",
    "caption",
    "aesthetic score",
    "motion score",
    "temporal consistency score",
    "camera motion",
    "frame",
    "fps",
    "seconds",
)


def make_demo(folder: Path | str, clips: int = 48, seed: int = 0) -> Path:
    """Writes `videos/clip_0000.mp4`, ... and their table `clips.csv`; returns the table's path.

    The table has the columns of OpenVid-1M (https://huggingface.co/datasets/nkp37/OpenVid-1M), its
    `video` the file's name within `videos/`. Of 48 clips 4 are shorter than 4 s, 3 nearly black,
    2 cut off (one before its index, one after), 1 is empty and 1 is a text; fewer clips have
    proportionally fewer such faults, rounded down. The same arguments give the same files.
    """
    folder = Path(folder)
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    plan = list(_plan(clips, seed))
    names = [f"clip_{number:04d}.mp4" for number in range(clips)]
    with ThreadPoolExecutor(2) as pool:  # PyAV and numpy let go of the lock where the time goes
        list(pool.map(lambda job: _write(videos / job[0], job[1]), zip(names, plan, strict=True)))
    table = folder / "clips.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for name, clip in zip(names, plan, strict=True):
            rows.writerow([name, *_columns(clip)])
    return table


def _plan(clips: int, seed: int) -> Iterator[_Clip]:
    draw = np.random.default_rng([seed, 22])
    faults: list[str | None] = [f for f, n in FAULTS.items() for _ in range(n * clips // 48)]
    faults += [None] * (clips - len(faults))
    for number, place in enumerate(draw.permutation(clips)):
        fault = faults[place]
        seconds = draw.uniform(1.6, 3.4) if fault == "short" else draw.uniform(4.2, LONGEST)
        yield _Clip(
            scene=scene(seed * 1_000_000 + number),
            fault=fault,
            fps=RATES[number % len(RATES)],
            seconds=float(seconds),
            size=(96, 96 + 16 * int(draw.integers(5))),
        )


def _write(path: Path, clip: _Clip) -> None:
    if clip.fault == "empty":
        path.write_bytes(b"")
        return
    if clip.fault == "text":
        path.write_text("<html><body>404: this video is no longer available</body></html>\n")
        return
    gain = 0.03 if clip.fault == "dark" else 1.0
    write_clip(path, clip.scene, clip.fps, clip.seconds, clip.size, gain=gain)
    if clip.fault == "cut":  # the index (moov) stands at the end: such a file cannot be opened
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    elif clip.fault == "cut_index_first":
        _cut_index_first(path)


def _cut_index_first(path: Path) -> None:
    """Moves the index to the front, then cuts: the file opens and claims its full length."""
    import av

    whole = path.with_suffix(".part.mp4")
    with (
        av.open(str(path)) as source,
        av.open(str(whole), "w", options={"movflags": "+faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    whole.unlink()


def _columns(clip: _Clip) -> list[str | int]:
    """What a table of the web claims of a clip, true or not: all columns after the name."""
    draw = np.random.default_rng([clip.scene.seed, 23])
    aesthetic = draw.uniform(3.2, 3.8) if clip.fault == "dark" else draw.uniform(4.6, 6.2)
    frames = round(clip.seconds * clip.fps)
    return [
        caption(clip.scene),
        f"{aesthetic:.4f}",
        f"{clip.scene.speed * 60:.4f}",
        f"{draw.uniform(0.97, 0.999):.4f}",
        "static",
        frames,
        f"{float(clip.fps):.6g}",
        f"{frames / float(clip.fps):.4f}",
    ]
