"""Windows and buckets of real files: the frames that are promised are those that are shown."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from numbered import SIDE, make, numbers

from stages.media.frames import Clip, NoBucket, TooShort, read_clip, read_clips
from stages.media.picks import Clock, windows
from stages.media.sampling import Bucket, Sampling
from stages.media.timeline import timeline
from stages.media.video import Budget, DecodingSettings, VideoError, opened

Video = tuple[Path, list[float]]  # and when its frames are shown
STEADY = [i / 25 for i in range(150)]
# Gaps of 20 to 100 ms, the second half of it slower.
ODD = [sum(20 + 10 * (i * 7 % 9) + 20 * (i > 60) for i in range(n)) for n in range(101)]


def steady(folder: Path) -> Video:
    return make(folder / "a.mp4", 150, 25, g="12", bf="2"), STEADY


def variable(folder: Path) -> Video:
    path = make(folder / "a.mkv", 100, pts=ODD[:100], g="12")
    return path, [t / 1000 for t in ODD[:100]]


def late(folder: Path) -> Video:
    path = make(folder / "a.ts", 150, pts=[7000 + 40 * i for i in range(150)], g="12")
    return path, STEADY


def edited(folder: Path) -> Video:
    """Its first 15 frames are hidden by an edit list."""
    source, path = make(folder / "whole.mp4", 165, 25, g="12", bf="2"), folder / "a.mp4"
    with (
        av.open(str(source)) as given,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as output,
    ):
        stream = output.add_stream_from_template(given.streams.video[0])
        hidden = round(15 / 25 / given.streams.video[0].time_base)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - hidden, packet.dts - hidden
                packet.stream = stream
                output.mux(packet)
    return path, STEADY


VIDEOS: dict[str, tuple[Callable[[Path], Video], int]] = {
    "steady": (steady, 0),
    "variable": (variable, 0),
    "late": (late, 0),
    "edited": (edited, 15),
}
WINDOWS = [
    Sampling(fps=16, frames=20, size=64, policy=policy, interval=3, start=start, windows=count)
    for policy in ("time", "seed", "interval")
    for start, count in (
        ("first", 1),
        ("center", 1),
        ("random", 1),
        ("first", "all"),
        ("center", 3),
        ("random", 2),
    )
]


@pytest.mark.parametrize("kind", VIDEOS)
def test_every_window_shows_the_frames_that_it_promises(kind: str, tmp_path: Path) -> None:
    build, first = VIDEOS[kind]
    path, times = build(tmp_path)
    with opened(str(path)) as video:
        end = timeline(video).end
        rate = video.stream.average_rate
        clock = Clock(float(rate) if rate else None, video.slack)
    for sampling in WINDOWS:
        clips = list(read_clips(str(path), sampling, clip="some-clip"))
        expected = windows(times, times[0], end, sampling, clock, "some-clip")
        assert [numbers(clip.frames) for clip in clips] == [
            [first + times.index(t) for t in window.times] for window in expected
        ], sampling
        alone = sampling.model_copy(update={"start": "first", "windows": 1})
        for clip in clips:
            again = read_clip(str(path), alone, clip.start, clip.end)
            assert np.array_equal(again.frames, clip.frames)
            assert again.times == clip.times
            assert again.start == pytest.approx(clip.start)
            if sampling.policy == "time":
                assert clip.fps == sampling.fps
            else:
                assert clip.fps == pytest.approx(19 / (clip.times[-1] - clip.times[0]))


def test_windows_of_a_part_lie_within_it(tmp_path: Path) -> None:
    path = str(steady(tmp_path)[0])
    sampling = Sampling(fps=25, frames=25, size=64, windows="all", start="center")
    clips = list(read_clips(path, sampling, 1.0, 4.4))
    assert [numbers(clip.frames)[0] for clip in clips] == [30, 55, 80]
    assert [(clip.start, clip.end) for clip in clips] == [
        pytest.approx(span) for span in ((1.2, 2.2), (2.2, 3.2), (3.2, 4.2))
    ]


def test_windows_far_apart_are_sought(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 250, 10, g="10", bf="2")
    data, damaged = path.read_bytes(), tmp_path / "b.mp4"
    with av.open(str(path)) as video:
        packets = [p for p in video.demux(video=0) if p.size]
        at, size = packets[60].pos, packets[60].size
    damaged.write_bytes(data[: at + 6] + b"\xff" * (size - 6) + data[at + size :])
    sampling = Sampling(fps=10, frames=8, size=64, windows=2)
    for file in (path, damaged):  # amid the two, where nothing is looked at
        clips = list(read_clips(str(file), sampling))
        assert [numbers(clip.frames)[0] for clip in clips] == [0, 125]


def test_frames_shared_by_two_windows_are_in_both(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 10, 10))
    clips = list(read_clips(path, Sampling(fps=16, frames=4, size=64, windows="all")))
    shown = [numbers(clip.frames) for clip in clips]
    assert shown == [[0, 0, 1, 1], [2, 3, 3, 4], [5, 5, 6, 6], [7, 8, 8, 9]]
    part = list(read_clips(path, Sampling(fps=15, frames=5, size=64, windows="all"), 0.05))
    assert [numbers(clip.frames) for clip in part] == [
        [0, 1, 1, 2, 3],
        [3, 4, 5, 5, 6],
        [7, 7, 8, 9, 9],
    ]


def test_clips_come_as_soon_as_they_are_decoded(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 100, 25, g="25", bf="0", sc_threshold="0")
    with av.open(str(path)) as video:
        packets = [p for p in video.demux(video=0) if p.size]
        at, size = packets[99].pos, packets[99].size
    data = path.read_bytes()
    path.write_bytes(data[: at + 6] + b"\xff" * (size - 6) + data[at + size :])
    clips = read_clips(str(path), Sampling(fps=25, frames=50, size=64, windows="all"))
    assert numbers(next(clips).frames) == list(range(50))
    with pytest.raises(VideoError) as error:
        next(clips)
    assert error.value.error == "decode_error"


BUCKETS = (
    Bucket(frames=33, height=32, width=56),
    Bucket(frames=17, height=32, width=56),
    Bucket(frames=17, height=56, width=32),
    Bucket(frames=17, height=32, width=32),
    Bucket(frames=17, height=256, width=448),
)


def film(path: Path, width: int, height: int, frames: int, **more: object) -> str:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=16, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if turn := more.get("rotation"):
            stream.set_display_rotation(turn)
        if pixel := more.get("pixel"):
            stream.codec_context.sample_aspect_ratio = pixel
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), "rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize(
    ("width", "height", "frames", "more", "expected"),
    [
        (112, 64, 40, {}, "33 x 32 x 56"),  # the one that keeps most
        (112, 64, 33, {}, "33 x 32 x 56"),
        (112, 64, 32, {}, "17 x 32 x 56"),  # too short for that
        (56, 32, 17, {}, "17 x 32 x 56"),
        (640, 360, 20, {}, "17 x 256 x 448"),
        (446, 256, 20, {}, "17 x 32 x 56"),  # two columns short of the large one
        (64, 112, 40, {}, "17 x 56 x 32"),
        (112, 64, 40, {"rotation": 90}, "17 x 56 x 32"),  # as shown
        (64, 64, 40, {}, "17 x 32 x 32"),
        (112, 64, 40, {"pixel": Fraction(4, 7)}, "17 x 32 x 32"),  # 64 x 64 as shown
        (54, 50, 40, {}, "17 x 32 x 32"),
    ],
)
def test_a_clip_goes_to_the_nearest_bucket_that_it_fills(
    tmp_path: Path, width: int, height: int, frames: int, more: dict[str, object], expected: str
) -> None:
    path = film(tmp_path / "a.mp4", width, height, frames, **more)
    clip: Clip = read_clip(path, Sampling(fps=16, buckets=BUCKETS))
    assert " x ".join(map(str, clip.frames.shape[:3])) == expected
    assert clip.length == len(clip.frames)


@pytest.mark.parametrize(
    ("width", "height", "frames", "said"),
    [
        (112, 64, 16, "has 16 frames of 64 x 112 pixels, and the closest bucket takes 17 x 32"),
        (62, 30, 40, "has 33 frames of 30 x 62 pixels, and the closest bucket takes 33 x 32 x 56"),
        (28, 28, 4, "has 4 frames of 28 x 28 pixels"),
    ],
)
def test_a_clip_that_fills_none_says_what_it_lacks(
    tmp_path: Path, width: int, height: int, frames: int, said: str
) -> None:
    path = film(tmp_path / "a.mp4", width, height, frames)
    with pytest.raises(NoBucket, match=said):
        read_clip(path, Sampling(fps=16, buckets=BUCKETS))


def test_buckets_have_windows_too(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", SIDE, SIDE, 70)
    sampling = Sampling(fps=16, buckets=((17, 32, 32), (33, 32, 56)), windows="all")
    assert [clip.frames.shape for clip in read_clips(path, sampling)] == [(17, 32, 32, 3)] * 4


@pytest.mark.parametrize(
    ("sampling", "count", "length"),
    [
        (Sampling(policy="interval", frames=56, interval=4, size=32), 220, 55),
        (Sampling(policy="interval", frames=56, interval=4, size=32), 221, 56),
        (Sampling(policy="interval", frames=150, interval=1, size=32), 149, 149),
        (Sampling(policy="interval", frames=150, interval=1, size=32), 150, 150),
    ],
)
def test_clips_of_native_frames_take_as_many_as_there_are(
    tmp_path: Path, sampling: Sampling, count: int, length: int
) -> None:
    path = str(make(tmp_path / "a.mp4", count, 30))
    if length == sampling.frames:
        assert read_clip(path, sampling).length == length
    else:
        with pytest.raises(TooShort, match=f"{length} of {sampling.frames} frames"):
            read_clip(path, sampling)


def test_a_red_video_stays_red(tmp_path: Path) -> None:
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"qp": "4"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        red = np.zeros((64, 64, 3), np.uint8)
        red[:, :, 0] = 255
        for _ in range(150):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(red, "rgb24")))
        output.mux(stream.encode(None))
    clip = read_clip(str(path), Sampling(policy="interval", interval=1, frames=150, size=64))
    assert clip.frames.mean(axis=(0, 1, 2)) == pytest.approx([255, 0, 0], abs=3)


def test_time_that_windows_wait_for_the_vae_is_not_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make(tmp_path / "a.mp4", 60, 25))
    now = [0.0]
    monkeypatch.setattr("stages.media.video.time", SimpleNamespace(monotonic=lambda: now[0]))
    budget = Budget(DecodingSettings(decode_seconds=1.0))
    sampling = Sampling(fps=25, frames=15, size=64, windows="all")
    clips = []
    for clip in read_clips(path, sampling, budget=budget):
        clips.append(clip)
        with budget.waiting():
            now[0] += 60
    assert len(clips) == 4
    now[0] += 1.5
    with pytest.raises(VideoError, match="took more than 1 s"):
        budget.check()
