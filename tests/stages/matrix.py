"""The exactness matrix: numbered videos of every kind, and which of their frames a backend gives.

Codec x container x frame rate x groups of pictures x rotation x edit list x start, where valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, cycle, islice, product
from pathlib import Path

import numpy as np
from numbered import make, number

from stages.media.backends.base import Backend
from stages.media.picture import Fit
from stages.media.timeline import timeline
from stages.media.video import Budget, opened

FRAMES = 48
NTSC = Fraction(30000, 1001)
VARIABLE = Fraction(0)  # in place of a frame rate: gaps of 8 to 150 ms
GAPS = (33, 17, 150, 8, 33, 60, 40)  # ms
Turn = tuple[int, bool, bool]  # degrees counter-clockwise, then mirrored left-right, top-bottom
UPRIGHT: Turn = (0, False, False)

CODECS: dict[str, tuple[str, str]] = {
    "h264": ("libx264", "yuv420p"),
    "h264-10": ("libx264", "yuv420p10le"),
    "hevc": ("libx265", "yuv420p"),
    "hevc-10": ("libx265", "yuv420p10le"),
    "vp9": ("libvpx-vp9", "yuv420p"),
    "vp8": ("libvpx", "yuv420p"),
    "av1": ("libsvtav1", "yuv420p"),
    "av1-10": ("libsvtav1", "yuv420p10le"),
    "mpeg4": ("mpeg4", "yuv420p"),
    "mpeg2": ("mpeg2video", "yuv420p"),
}
CONTAINERS: dict[str, tuple[str, ...]] = {
    "h264": ("mp4", "mov", "mkv", "ts", "avi"),
    "h264-10": ("mp4", "mkv"),
    "hevc": ("mp4", "mov", "mkv", "ts"),
    "hevc-10": ("mp4", "mkv"),
    "vp9": ("webm", "mp4", "mkv"),
    "vp8": ("webm", "mkv", "avi"),
    "av1": ("mp4", "webm", "mkv"),
    "av1-10": ("mp4", "mkv"),
    "mpeg4": ("mp4", "mov", "mkv", "avi", "ts"),
    "mpeg2": ("mp4", "mov", "mkv", "ts", "mpg"),
}
X265 = "log-level=none:pools=1:frame-threads=1"
ANY = {"1": {"g": "1"}, "12": {"g": "12"}, "250": {"g": "250"}}
B_FRAMES = {**ANY, "1": {"g": "1", "bf": "0"}, "b": {"g": "12", "bf": "2"}}
LAGGING = {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16", "g": "24"}


def _x264(keys: str, bf: int, more: str) -> dict[str, str]:
    return {"g": keys, "bf": str(bf), "sc_threshold": "0", "x264-params": f"ref=4:{more}"}


def _x265(keys: str, bf: int, more: str) -> dict[str, str]:
    own = f"keyint={keys}:min-keyint={keys}:scenecut=0:bframes={bf}:b-adapt=0:{more}"
    return {"x265-params": f"{X265}:{own}"}


GROUPS: dict[str, dict[str, dict[str, str]]] = {
    "h264": {
        "1": _x264("1", 0, "b-pyramid=none"),
        "12": _x264("12", 0, "b-pyramid=none"),
        "250": _x264("250", 0, "b-pyramid=none"),
        "b": _x264("12", 2, "b-pyramid=none"),
        "pyramid": _x264("24", 3, "b-pyramid=normal"),
        "long-pyramid": _x264("250", 3, "b-pyramid=normal"),
        "open": _x264("15", 3, "b-pyramid=normal:open-gop=1"),
        "refresh": _x264("16", 0, "intra-refresh=1"),
    },
    "hevc": {
        "1": _x265("1", 0, "open-gop=0"),
        "12": _x265("12", 0, "open-gop=0"),
        "250": _x265("250", 0, "open-gop=0"),
        "b": _x265("12", 2, "open-gop=0:b-pyramid=0"),
        "pyramid": _x265("24", 3, "open-gop=0:b-pyramid=1"),
        "open": _x265("15", 3, "open-gop=1:b-pyramid=1"),
        "layers": _x265("24", 3, "open-gop=0:b-pyramid=1:ref=4:temporal-layers=3"),
    },
    "vp9": {**ANY, "hidden": LAGGING},
    "vp8": {**ANY, "hidden": LAGGING},
    "av1": ANY,
    "mpeg4": {**B_FRAMES, "1": {"g": "1", "q": "3"}},
    "mpeg2": B_FRAMES,
}
GROUPS |= {"h264-10": GROUPS["h264"], "hevc-10": GROUPS["hevc"], "av1-10": ANY}
RATES: tuple[Fraction, ...] = (*map(Fraction, (24, 25, 30, 60)), NTSC, VARIABLE)
TURNS: tuple[Turn, ...] = tuple(product((0, 90, 180, 270), (False, True), (False, True)))


@dataclass(frozen=True)
class Case:
    codec: str
    container: str
    group: str = "12"
    rate: Fraction = Fraction(30)
    turn: Turn = UPRIGHT
    hidden: int = 0  # frames that an edit list hides
    begins: int = 0  # ms

    def __str__(self) -> str:
        rate = f"{float(self.rate):.5g}fps" if self.rate else "vfr"
        parts = [self.codec, self.container, f"gop-{self.group}", rate]
        if self.turn != UPRIGHT:
            degrees, across, down = self.turn
            parts.append(f"turned-{degrees}{'-across' * across}{'-down' * down}")
        parts += [f"hidden-{self.hidden}"] * bool(self.hidden)
        parts += [f"from-{self.begins}ms"] * bool(self.begins)
        return " ".join(parts)

    @property
    def times(self) -> list[float]:
        """When its frames are shown, seconds, from the first one that is not hidden."""
        if self.rate:
            return [float(i / self.rate) for i in range(FRAMES - self.hidden)]
        return [t / 1000 for t in accumulate(islice(cycle(GAPS), FRAMES - 1), initial=0)]

    def make(self, folder: Path) -> Path:
        """The video, made once."""
        path = folder / f"{str(self).replace(' ', '_')}.{self.container}"
        if path.exists():
            return path
        codec, pix_fmt = CODECS[self.codec]
        pts = [self.begins + round(1000 * t) for t in self.times]
        return make(
            path,
            FRAMES,
            self.rate or 30,
            codec,
            pts=pts if self.begins or not self.rate else None,
            rotation=self.turn if self.turn != UPRIGHT else None,
            hidden=self.hidden,
            pix_fmt=pix_fmt,
            **GROUPS[self.codec][self.group],
        )


def quick() -> list[Case]:
    """Each value of each kind, with those that it is likeliest to go wrong with."""
    found = [Case(codec, where) for codec in CODECS for where in CONTAINERS[codec]]
    found += [
        Case(codec, where, group)
        for codec in ("h264", "hevc", "vp9", "vp8", "av1", "mpeg4", "mpeg2")
        for where in CONTAINERS[codec][:1] + ("ts",) * ("ts" in CONTAINERS[codec])
        for group in GROUPS[codec]
    ]
    found += [Case("h264", "mkv", group) for group in ("open", "pyramid", "refresh")]
    found += [
        Case(codec, CONTAINERS[codec][0], "pyramid" if "pyramid" in GROUPS[codec] else "12", rate)
        for codec in ("h264", "hevc", "vp9", "av1")
        for rate in RATES
    ]
    found += [Case("h264", "mkv", "pyramid", rate) for rate in (NTSC, VARIABLE)]
    found += [Case("h264", "mp4", "b", turn=turn) for turn in TURNS[::2] + TURNS[1:4:2]]
    found += [Case("hevc", "mov", "b", turn=(90, mirrored, False)) for mirrored in (False, True)]
    found += [Case("h264", "mp4", group, hidden=n) for group in ("b", "open") for n in (3, 17)]
    found += [Case("hevc", "mov", "b", hidden=n) for n in (3, 17)]
    found += [
        Case(codec, where, "b", begins=5000)
        for codec, where in (("h264", "mp4"), ("h264", "mkv"), ("h264", "ts"), ("hevc", "mkv"))
    ]
    return list(dict.fromkeys(found))


def full() -> Iterator[Case]:
    """Every combination that is valid; turns, edit lists and late starts with the first rate."""
    for codec in CODECS:
        for where, group, rate in product(CONTAINERS[codec], GROUPS[codec], RATES):
            if rate == VARIABLE and (where in ("avi", "mpg") or codec == "mpeg2"):
                continue  # no presentation times, no such rate
            yield Case(codec, where, group, rate)
        for where, group in product(CONTAINERS[codec], GROUPS[codec]):
            if where in ("mp4", "mov"):
                yield from (Case(codec, where, group, turn=t) for t in TURNS if t != UPRIGHT)
                # FFmpeg leaves out what comes before the last key frame that is hidden; with intra
                # refresh that is none, and the first frames shown are lost.
                hidden = (3,) if group == "refresh" else (3, 17)
                yield from (Case(codec, where, group, hidden=n) for n in hidden)
            if where not in ("avi", "mpg") and codec != "mpeg2":
                yield Case(codec, where, group, begins=5000)


def asked(case: Case) -> list[list[int]]:
    """Numbers of the frames to ask for: all, sparse ones, late windows, and few at the edges of
    groups."""
    count = len(case.times)
    edges = [edge for edge in (12, 15, 16, 24) if edge + 1 < count]
    return [
        list(range(count)),
        list(range(0, count, 2)),
        [*range(5, 12, 3), *range(20, count - 4, 5)],
        list(range(count - 5, count)),
        *([edge] for edge in edges),
        *([edge - 2, edge - 1, edge + 1] for edge in edges),
        [0],
        [count - 1],
    ]


def shown(backend: Backend, path: str, case: Case) -> list[list[int]]:
    """The numbers that the frames bear which the backend gives for those of `asked`."""
    with opened(path) as video:
        times = timeline(video).times
    assert len(times) == len(case.times)
    # MPEG-PS tells few times, and FFmpeg's guess of those between may be a frame late.
    most = 0.0011 + (1 / case.rate if case.container == "mpg" else 0)
    assert np.abs(np.array(times) - times[0] - case.times).max() < most, "the packets' times"
    fit = Fit(64, 64, "squash")
    return [
        [
            number(unturned(fit(*picture), case.turn)) - case.hidden
            for picture in backend(path, [times[i] for i in each], Budget(), 1)
        ]
        for each in asked(case)
    ]


def unturned(picture: np.ndarray, turn: Turn) -> np.ndarray:
    """What a turned video showed before it was turned."""
    degrees, across, down = turn
    picture = picture[:: -1 if down else 1, :: -1 if across else 1]
    return np.rot90(picture, -degrees // 90)
