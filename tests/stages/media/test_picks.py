from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.media.picks import Clock, Window, enough, picks, seed_picks, windows
from stages.media.sampling import Sampling
from stages.media.timeline import Reach, Timeline, section

NTSC = Fraction(30000, 1001)


def steady(count: int, fps: float) -> tuple[list[float], float]:
    return [i / fps for i in range(count)], count / fps


@pytest.mark.parametrize(
    ("fps", "count", "length"),
    [
        (30, 120, 64),
        (30, 119, 63),
        (29.97, 120, 64),
        (30.000001, 120, 63),
        (24, 96, 64),
        (25, 100, 64),
        (10, 40, 64),
        (10, 39, 62),
        (30, 1, 0),
    ],
)
def test_the_seed_policy_is_vid_gens(fps: float, count: int, length: int) -> None:
    times, end = steady(count, fps)
    assert len(picks(times, end, Sampling(policy="seed"), clock=Clock(fps))) == length


def test_the_seed_policys_indices() -> None:
    picked = seed_picks(120, 30, Sampling())
    assert picked[:4] == [0, 1, 3, 5]
    assert picked[-1] == 119
    assert seed_picks(64, 16, Sampling()) == list(range(64))
    assert len(set(seed_picks(40, 10, Sampling()))) == 40


@pytest.mark.parametrize(
    ("fps", "count", "length"),
    [
        (30, 120, 64),
        (30, 119, 64),  # the 64th moment is at 3.9375 s, and 119 frames last 3.967 s
        (30, 118, 63),
        (29.97, 120, 64),
        (30.000001, 120, 64),
        (24, 96, 64),
        (25, 100, 64),
        (16, 64, 64),
        (16, 63, 63),
        (10, 40, 64),
        (10, 39, 63),
        (30, 1, 1),
    ],
)
def test_the_time_policy_picks_the_frame_on_show(fps: float, count: int, length: int) -> None:
    times, end = steady(count, fps)
    picked = picks(times, end, Sampling())
    assert picked == [floor(k * fps / 16 + 1e-5) for k in range(length)]


@pytest.mark.parametrize("fps", [23.976, 24, 25, 29.97, 30, 30.000001, 29.999999, 48, 60])
def test_sampling_at_about_its_own_rate_takes_each_frame_once(fps: float) -> None:
    times, end = steady(90, fps)
    assert picks(times, end, Sampling(fps=round(fps, 3), frames=90)) == list(range(90))


@pytest.mark.parametrize("fps", [24, float(NTSC), 30, 60])
def test_timestamps_rounded_to_milliseconds_lose_no_frame(fps: float) -> None:
    times = [round(i / fps, 3) for i in range(90)]
    end = round(times[-1] + 1 / fps, 3)
    assert picks(times, end, Sampling(fps=fps, frames=1000), clock=Clock(slack=0.0005)) == list(
        range(90)
    )


def test_a_frame_is_shown_until_the_next() -> None:
    times = [0.0, 1.0, 1.1, 3.0]
    assert picks(times, 3.6, Sampling(fps=2, frames=9)) == [0, 0, 1, 2, 2, 2, 3, 3]
    assert picks(times, 3.6, Sampling(fps=2, frames=3), t0=1.05) == [1, 2, 2]


INTERNVID = Sampling(policy="interval", frames=56, interval=4)
CELEBV = Sampling(policy="interval", frames=150, interval=1)


@pytest.mark.parametrize(
    ("sampling", "count", "length"),
    [(INTERNVID, 221, 56), (INTERNVID, 220, 55), (CELEBV, 150, 150), (CELEBV, 149, 149)],
)
@pytest.mark.parametrize("fps", [10, 24, float(NTSC), 60])
def test_the_interval_policy_is_internvids_and_celebvs(
    sampling: Sampling, count: int, length: int, fps: float
) -> None:
    times, end = steady(count, fps)
    picked = picks(times, end, sampling)
    assert picked == list(range(0, count, sampling.interval))[:length]
    (window,) = windows(times, 0.0, end, sampling)
    assert window.times == [times[i] for i in picked]
    assert window.fps == pytest.approx(fps / sampling.interval)


def starts(found: list[Window]) -> list[float]:
    return [round(window.start, 6) for window in found]


@pytest.mark.parametrize(
    ("policy", "how", "expected"),
    [
        ("time", {}, [0.0]),
        ("time", {"start": "center"}, [3.0]),
        ("time", {"windows": "all"}, [0.0, 4.0]),
        ("time", {"windows": "all", "start": "center"}, [1.0, 5.0]),
        ("time", {"windows": 2}, [0.0, 5.0]),
        ("time", {"windows": 2, "start": "center"}, [0.5, 5.5]),
        ("time", {"windows": 9}, [0.0, 5.0]),
        ("seed", {"start": "center"}, [3.0]),
        ("seed", {"windows": "all"}, [0.0, 4.0]),
        ("seed", {"windows": 2, "start": "center"}, [0.48, 5.48]),
        # 64 frames 2 apart take 127 frames: a window every 128 frames of the 250.
        ("interval", {"interval": 2, "start": "center"}, [2.44]),
        ("interval", {"interval": 2, "windows": "all"}, [0.0]),
        ("interval", {"interval": 1, "windows": "all"}, [0.0, 2.56, 5.12]),
        ("interval", {"interval": 1, "windows": 2, "start": "center"}, [1.2, 6.2]),
    ],
)
def test_where_windows_lie(policy: str, how: dict[str, object], expected: list[float]) -> None:
    times, end = steady(250, 25)
    sampling = Sampling(policy=policy, **how)
    found = windows(times, 0.0, end, sampling)
    assert starts(found) == expected
    assert all(len(window.times) == 64 for window in found)
    width = {"time": 4.0, "seed": 4.0, "interval": (63 * sampling.interval + 1) / 25}[policy]
    assert [round(w.end - w.start, 6) for w in found] == [round(width, 6)] * len(found)


def test_a_random_start_is_the_clips_own() -> None:
    times, end = steady(600, 30)
    for policy in ("time", "seed", "interval"):
        sampling = Sampling(policy=policy, start="random", frames=16)
        found = {
            clip: windows(times, 0.0, end, sampling, clip=clip) for clip in map(str, range(99))
        }
        assert found["7"] == windows(times, 0.0, end, sampling, clip="7")
        begins = sorted(window.start for (window,) in found.values())
        latest = end - (1.0 if policy != "interval" else 61 / 30)
        assert len(set(begins)) > 80
        assert begins[0] < 1.5 and latest - 1.5 < begins[-1] <= latest
    several = sampling.model_copy(update={"windows": 3})
    parts = windows(times, 0.0, end, several, clip="a")
    assert [floor(part.start / (end / 3)) for part in parts] == [0, 1, 2]
    assert len({round(part.start % (end / 3), 3) for part in parts}) == 3


def test_a_random_start_reaches_every_place_alike() -> None:
    times, end = steady(5, 25)
    sampling = Sampling(policy="interval", interval=1, frames=3, start="random")
    found = [windows(times, 0.0, end, sampling, clip=str(n))[0].times[0] for n in range(900)]
    assert {round(t * 25): found.count(t) for t in set(found)} == pytest.approx(
        {0: 300, 1: 300, 2: 300}, abs=50
    )


def test_a_short_clip_is_its_only_window() -> None:
    times, end = steady(50, 25)
    for policy in ("time", "seed", "interval"):
        for start in ("first", "center", "random"):
            for count in (1, 3, "all"):
                sampling = Sampling(policy=policy, start=start, windows=count)
                (window,) = windows(times, 0.0, end, sampling, clip="a")
                assert (window.start, window.end) == (0.0, 2.0)
                assert len(window.times) == {"time": 32, "seed": 32, "interval": 13}[policy]


@st.composite
def videos(draw: st.DrawFn) -> tuple[list[float], float, Clock]:
    """Times in ticks of 1/90000 s, regular or not, from a start that need not be 0."""
    ticks = draw(
        st.one_of(
            st.tuples(st.integers(60, 400), st.sampled_from([1500, 3000, 3003, 3600, 3750])).map(
                lambda steady: [steady[1]] * steady[0]
            ),
            st.lists(st.integers(300, 30000), min_size=40, max_size=400),
        )
    )
    at = draw(st.integers(0, 90000))
    stamps = [at := at + gap for gap in ticks]
    times = [stamp / 90000 for stamp in stamps]
    return times, times[-1] + ticks[-1] / 90000, Clock(draw(st.sampled_from([25.0, float(NTSC)])))


SAMPLINGS = st.builds(
    Sampling,
    policy=st.sampled_from(["time", "seed", "interval"]),
    start=st.sampled_from(["first", "center", "random"]),
    windows=st.one_of(st.just("all"), st.integers(1, 4)),
    frames=st.integers(1, 40),
    fps=st.sampled_from([4.0, 8.0, 16.0, 23.976, 25.0, 30.0, 100.0]),
    interval=st.integers(1, 5),
)


@settings(max_examples=300, deadline=None)
@given(video=videos(), sampling=SAMPLINGS, clip=st.text(max_size=4))
def test_windows_are_in_order_within_the_clip_and_clips_of_their_own(
    video: tuple[list[float], float, Clock], sampling: Sampling, clip: str
) -> None:
    times, end, clock = video
    found = windows(times, times[0], end, sampling, clock, clip)
    assert found == windows(times, times[0], end, sampling, clock, clip)
    for window in found:
        assert times[0] <= window.start < window.end <= end
        assert all(a <= b for a, b in pairwise(window.times))
        assert set(window.times) <= set(times)
    for one, other in pairwise(found):
        assert one.end <= other.start + 0.001
    if len(found[0].times) < sampling.frames:
        assert len(found) == 1
        return
    line = Timeline(times, end)
    alone = sampling.model_copy(update={"start": "first", "windows": 1})
    for window in found:
        assert len(window.times) == sampling.frames
        cut = section(line, window.start, window.end)
        own = times[cut.first : cut.last]
        (again,) = windows(own, cut.t0, cut.t1, alone, clock)
        assert again.times == window.times
        assert (again.start, again.end) == pytest.approx((window.start, window.end), abs=0.0011)


@settings(max_examples=200, deadline=None)
@given(video=videos(), sampling=SAMPLINGS, share=st.floats(0, 0.99))
def test_what_is_picked_needs_no_more_than_is_enough(
    video: tuple[list[float], float, Clock], sampling: Sampling, share: float
) -> None:
    """A timeline that ends as soon as enough is known gives the same as all of it."""
    times, end, clock = video
    at = times[0] + share * (times[-1] - times[0])
    sampling = sampling.model_copy(update={"start": "first", "windows": 1})
    known = enough(sampling, clock)
    reach, read = Reach(at, None, known), []
    for time in times:
        reach.add(time)
        read.append(time)
        if reach.past(time - 0.5):
            break
    whole, part = (section(Timeline(t, end), at, None) for t in (times, read))
    first, second = (
        windows(t[cut.first : cut.last], cut.t0, cut.t1, sampling, clock)[0]
        for t, cut in ((times, whole), (read, part))
    )
    assert (first.times, first.fps) == (second.times, second.fps)
    assert first.start == second.start
