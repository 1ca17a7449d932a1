from __future__ import annotations

import contextlib
import csv
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
from numbered import ENCRYPTION, make, number, numbers

import stages.media.timeline
import stages.media.video
from stages.base import Context
from stages.files import local_path
from stages.media.few import sample_few
from stages.media.frames import TooShort, read_clip
from stages.media.picks import Clock, picks, seed_picks
from stages.media.sampling import Sampling
from stages.media.timeline import section, timeline
from stages.media.video import Budget, DecodingSettings, Video, VideoError, opened

NTSC = Fraction(30000, 1001)
TV = Sampling(fps=16, frames=32, size=64)


VIDEOS: list[tuple[str, str, Fraction | int, dict[str, str]]] = [
    ("libx264", "mp4", 24, {"g": "12"}),
    ("libx264", "mp4", 25, {"g": "250", "bf": "3"}),
    ("libx264", "mkv", NTSC, {"g": "1"}),
    ("libx264", "mkv", 30, {"g": "15", "bf": "2", "x264-params": "open-gop=1"}),
    ("libx264", "mp4", 60, {"g": "30"}),
    ("libx264", "ts", 25, {"g": "12", "bf": "2"}),
    ("libx264", "avi", 25, {"g": "12", "bf": "2"}),
    ("libx264", "h264", 25, {"g": "12", "bf": "2"}),
    ("libx265", "mp4", 30, {"g": "20", "bf": "2"}),
    ("libx265", "mkv", NTSC, {"g": "250"}),
    ("libvpx-vp9", "webm", 30, {"g": "30"}),
    ("libvpx", "webm", 24, {"auto-alt-ref": "1", "lag-in-frames": "8"}),
    ("libsvtav1", "mp4", 25, {"g": "25"}),
    ("libsvtav1", "webm", NTSC, {"g": "60"}),
    ("mpeg4", "mp4", 30, {"bf": "2", "q": "3"}),
    ("mpeg4", "avi", 25, {"bf": "2"}),
    ("mpeg2video", "mpg", 25, {"bf": "2", "g": "12"}),
]


@pytest.mark.parametrize(
    ("codec", "suffix", "fps", "options"), VIDEOS, ids=[f"{c}-{s}-{f}" for c, s, f, _ in VIDEOS]
)
def test_every_frame_is_the_one_asked_for(
    tmp_path: Path, codec: str, suffix: str, fps: Fraction | int, options: dict[str, str]
) -> None:
    path = str(make(tmp_path / f"a.{suffix}", floor(2.5 * fps), fps, codec, **options))
    clip = read_clip(path, TV)
    assert numbers(clip.frames) == [floor(Fraction(k, 16) * fps) for k in range(32)]
    assert clip.times == pytest.approx([n / fps for n in numbers(clip.frames)], abs=0.00051)
    # A part of it: from the 30th frame on, by seeking where the container can.
    part = read_clip(path, Sampling(fps=8, frames=4, size=64), start=float(30 / fps))
    assert numbers(part.frames) == [30 + floor(Fraction(k, 8) * fps) for k in range(4)]
    # Packets and frames tell the same.
    with opened(path) as video:
        line = timeline(video)
        slack = video.slack
    assert len(line.times) == floor(2.5 * fps)
    assert [
        line.times[i] for i in picks(line.times, line.end, TV, clock=Clock(slack=slack))
    ] == clip.times


@pytest.mark.parametrize("fps", [24, NTSC, 30, 60])
def test_at_its_own_rate_a_file_gives_each_frame_once(tmp_path: Path, fps: Fraction | int) -> None:
    """Though Matroska rounds times, and so the end, to milliseconds."""
    path = str(make(tmp_path / "a.mkv", 100, fps))
    clip = read_clip(path, Sampling(fps=float(fps), frames=200, size=64, short="pad"))
    assert numbers(clip.frames[: clip.length]) == list(range(100))


def test_irregular_frames_are_shown_until_the_next(tmp_path: Path) -> None:
    pts = [0, 17, 350, 360, 1500, 1600, 1633, 1700]
    for suffix in ("mp4", "mkv"):
        path = str(make(tmp_path / f"a.{suffix}", 8, codec="libx264", pts=pts))
        clip = read_clip(path, Sampling(fps=10, frames=17, size=64))
        assert numbers(clip.frames) == [bisect_right(pts, k * 100) - 1 for k in range(17)]


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_time_counts_from_the_first_frame_wherever_the_clock_starts(
    tmp_path: Path, suffix: str
) -> None:
    pts = [5000 + 40 * i for i in range(50)]
    path = str(make(tmp_path / f"a.{suffix}", 50, pts=pts))
    clip = read_clip(path, Sampling(fps=5, frames=9, size=64))
    assert numbers(clip.frames) == [5 * k for k in range(9)]
    assert clip.times[:3] == pytest.approx([0, 0.2, 0.4], abs=0.0005)
    later = read_clip(path, Sampling(fps=5, frames=3, size=64), start=1.0)
    assert numbers(later.frames) == [25, 30, 35]


def test_a_part_ends_where_it_says(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 100, 25, g="12", bf="2"))
    sampling = Sampling(fps=25, frames=25, size=64)
    assert numbers(read_clip(path, sampling, 1.0, 2.0).frames) == list(range(25, 50))
    with pytest.raises(TooShort) as short:
        read_clip(path, sampling, 1.0, 1.8)
    assert (short.value.have, short.value.want) == (20, 25)
    # Millisecond times in tables: 1.3333 s written 1.333 is the frame that begins there.
    path = str(make(tmp_path / "b.mp4", 90, 30))
    assert number(read_clip(path, Sampling(frames=1, size=64), 1.333, 2).frames[0]) == 40
    assert number(read_clip(path, Sampling(frames=1, size=64), 1.33, 2).frames[0]) == 39
    with pytest.raises(VideoError, match=r"starts at 5\.000 s") as outside:
        read_clip(path, sampling, 5.0)
    assert outside.value.error == "empty_section"


def test_moments_count_from_where_a_part_starts(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 30, 10))
    clip = read_clip(path, Sampling(fps=16, frames=3, size=64), start=0.59)
    assert numbers(clip.frames) == [5, 6, 7]  # on show at 0.59, 0.6525 and 0.715 s


def test_a_short_clip_is_rejected_padded_or_repeated(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 25, 25))
    with pytest.raises(TooShort, match="16 of 32 frames"):
        read_clip(path, TV)
    padded = read_clip(path, TV.model_copy(update={"short": "pad"}))
    assert (padded.length, len(padded.frames)) == (16, 32)
    assert not padded.frames[16:].any()
    repeated = read_clip(path, TV.model_copy(update={"short": "repeat"}))
    assert repeated.length == 16
    assert set(numbers(repeated.frames[16:])) == {number(repeated.frames[15])}


def test_the_seed_policy_reads_those_frames(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 70, 30, bf="2"))
    seed = TV.model_copy(update={"policy": "seed"})
    clip = read_clip(path, seed)
    assert numbers(clip.frames) == seed_picks(70, 30, seed)
    assert clip.fps == pytest.approx(31 / (59 / 30))
    with pytest.raises(TooShort) as short:
        read_clip(path, seed, 1.0)
    assert short.value.have == floor(16 * 40 / 30)


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_again_gives_the_same(tmp_path: Path, threads: int) -> None:
    path = str(make(tmp_path / "a.mp4", 60, 25, bf="2"))
    first, again = read_clip(path, TV), read_clip(path, TV, threads=threads)
    assert np.array_equal(first.frames, again.frames)
    assert first.times == again.times


def damage(path: Path, index: int) -> None:
    """Overwrites a frame's data, but for the head of its NAL unit."""
    with opened(str(path)) as video:
        packets = [p for p in video.container.demux(video.stream) if p.size]
        at, size = packets[index].pos, packets[index].size
    data = bytearray(path.read_bytes())
    data[at + 6 : at + size] = b"\xff" * (size - 6)
    path.write_bytes(data)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_damage_fails_the_clips_that_need_it_and_no_other(
    tmp_path: Path, codec: str, threads: int
) -> None:
    keys = {"sc_threshold": "0"} if codec == "libx264" else {}
    path = make(tmp_path / "a.mp4", 200, 25, codec, g="25", bf="0", **keys)
    damage(path, 74)  # the last of its group: shown at 2.96 s
    sampling = Sampling(fps=25, frames=25, size=64)
    assert numbers(read_clip(str(path), sampling, 1.0, 2.2, threads).frames) == list(range(25, 50))
    with pytest.raises(VideoError) as damaged:
        read_clip(str(path), sampling, 2.5, 3.5, threads)
    assert damaged.value.error == "decode_error"
    after = read_clip(str(path), sampling, 3.0, None, threads)
    assert numbers(after.frames) == list(range(75, 100))


@pytest.mark.parametrize("bf", ["0", "3"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_damage_just_past_the_last_frame_needed_costs_nothing(
    tmp_path: Path, codec: str, bf: str
) -> None:
    keys = {"sc_threshold": "0"} if codec == "libx264" else {}
    path = make(tmp_path / "a.mkv", 60, 25, codec, g="25", bf=bf, **keys)
    sound = read_clip(str(path), Sampling(fps=25, frames=25, size=64))
    damage(path, 25)  # the frame after those: the decoder meets it before it gives the last ones
    clip = read_clip(str(path), Sampling(fps=25, frames=25, size=64))
    assert numbers(clip.frames) == list(range(25))
    assert np.array_equal(clip.frames, sound.frames)
    # How long the last one is shown is told by when the lost one begins, not guessed.
    twice = read_clip(str(path), Sampling(fps=50, frames=50, size=64))
    assert numbers(twice.frames) == [k // 2 for k in range(50)]
    with pytest.raises(VideoError) as damaged:
        read_clip(str(path), Sampling(fps=25, frames=26, size=64))
    assert damaged.value.error == "decode_error"


def test_a_frame_made_from_a_damaged_one_is_damaged(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 100, 25, g="50", bf="0", sc_threshold="0")
    damage(path, 60)  # shown at 2.4 s, and what follows it builds on it
    with pytest.raises(VideoError, match=r"the frame at 2\.640 s is damaged"):
        read_clip(str(path), Sampling(fps=25, frames=5, size=64), 2.64)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_stream_that_lost_packets_is_damaged(tmp_path: Path, codec: str) -> None:
    """Decoders go on with the next key frame, and say nothing."""
    path = make(tmp_path / "a.ts", 100, 25, codec, g="12")
    data = path.read_bytes()
    at = len(data) // 2 // 188 * 188
    path.write_bytes(data[:at] + data[at + 188 :])
    with pytest.raises(VideoError, match="part of the stream is missing") as damaged:
        read_clip(str(path), Sampling(fps=25, frames=90, size=64))
    assert damaged.value.error == "decode_error"


def test_a_stream_that_never_ends_costs_the_time_allowed(tmp_path: Path) -> None:
    once = make(tmp_path / "a.ts", 100, 25, "mpeg2video").read_bytes()
    path = tmp_path / "live.ts"
    os.mkfifo(path)
    stop = threading.Event()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), path.open("wb") as pipe:
            while not stop.is_set():
                pipe.write(once)

    feeder = threading.Thread(target=feed)
    feeder.start()
    budget = Budget(DecodingSettings(decode_seconds=0.5), "probe")
    try:
        with (
            pytest.raises(VideoError, match=r"more than 0\.5 s \(probe\.decode_seconds") as error,
            opened(str(path), budget=budget) as video,
        ):
            timeline(video)
    finally:
        stop.set()
        feeder.join()
    assert error.value.error == "decode_timeout"


@pytest.mark.parametrize("read", [read_clip, lambda path, _, **b: sample_few(path, 3, 32, **b)])
def test_all_readings_of_a_clip_share_its_time(tmp_path: Path, read: Any) -> None:
    path = str(make(tmp_path / "a.mp4", 60, 25))
    read(path, TV, budget=Budget())
    with pytest.raises(VideoError, match=r"1e-09 s") as error:
        read(path, TV, budget=Budget(DecodingSettings(decode_seconds=1e-9)))
    assert error.value.error == "decode_timeout"


def test_signs_of_life_come_from_within_a_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make(tmp_path / "a.mp4", 60, 25))
    signs: list[int] = []
    monkeypatch.setattr(stages.media.video, "alive", lambda: signs.append(1))
    read_clip(path, TV)
    assert not signs, "at most one a second"
    monkeypatch.setattr(stages.media.video, "SIGN_OF_LIFE", 0.0)
    read_clip(path, TV)
    assert len(signs) >= 50


def test_frames_that_would_take_gigabytes_are_refused(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 60, 25))
    small = Budget(DecodingSettings(max_pixels=64 * 63), "encode")
    with pytest.raises(VideoError, match=r"64 x 64 pixels, more than encode\.max_pixels") as error:
        read_clip(path, TV, budget=small)
    assert error.value.error == "frame_too_large"
    assert read_clip(path, TV, budget=Budget(DecodingSettings(max_pixels=64 * 64))).length == 32
    # The header is enough to refuse them: a small file, and a gigabyte of decoder.
    large = tmp_path / "large.mkv"
    with av.open(str(large), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 8000, 6000, "yuv420p"
        frame = av.VideoFrame(8000, 6000, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(VideoError, match="8000 x 6000") as error, opened(str(large)):
        pass
    assert error.value.error == "frame_too_large"


def test_more_packets_than_a_day_has_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make(tmp_path / "a.mp4", 60, 25))
    monkeypatch.setattr(stages.media.timeline, "MOST_PACKETS", 59)
    with pytest.raises(VideoError, match="more than 59 frames") as error, opened(path) as video:
        timeline(video)
    assert error.value.error == "too_many_frames"


def test_an_encrypted_video_says_so(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 30, container=ENCRYPTION)
    with pytest.raises(VideoError) as encrypted:
        read_clip(str(path), TV)
    assert encrypted.value.error == "encrypted"


def test_a_url_reads_as_a_file_does(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 60, 25)
    with fsspec.open("memory://run/clips/a.mp4", "wb") as file:
        file.write(path.read_bytes())
    url = local_path("clips/a.mp4", Context("memory://run"))
    assert np.array_equal(read_clip(url, TV).frames, read_clip(str(path), TV).frames)


def test_paths_of_rows(tmp_path: Path) -> None:
    context = Context("/work/dir/")
    assert local_path("download/a.mp4", context) == "/work/dir/download/a.mp4"
    assert local_path("/data/a.mp4", context) == "/data/a.mp4"
    assert local_path("x/a.mp4", Context("s3://bucket/run")) == "s3://bucket/run/x/a.mp4"
    odd = make(tmp_path / "id_00:00:01.5_00:00:03.mp4", 60, 25)
    assert read_clip(str(odd), TV).length == 32


def test_few_frames_for_scoring(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 100, 25, g="10"))
    few = sample_few(path, 5, 64, gap=0.2)
    assert numbers(few.frames) == [10, 30, 50, 70, 90]
    assert numbers(few.later) == [15, 35, 55, 75, 95]
    assert numbers(sample_few(path, 1, 64, 2.0, 3.0).frames) == [62]
    # In a clip shorter than the gap, the last frame is compared.
    tiny = sample_few(path, 2, 64, 2.0, 2.12, gap=0.2)
    assert (numbers(tiny.frames), numbers(tiny.later)) == ([50, 50], [52, 52])


def test_the_size_may_change_within_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.h264"
    with path.open("wb") as file:
        for width in (64, 128):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, 64, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
            for index in range(50):
                frame = av.VideoFrame(width, 64, "yuv420p")
                for plane, value in zip(frame.planes, (200, 128, 128), strict=True):
                    plane.update(bytes([value]) * plane.buffer_size)
                frame.pts = index
                file.write(b"".join(bytes(packet) for packet in encoder.encode(frame)))
            file.write(b"".join(bytes(packet) for packet in encoder.encode(None)))
    few = sample_few(str(path), 4, 64)
    assert few.frames.shape == few.later.shape == (4, 64, 64, 3)
    first, second, third, last = few.frames.mean(axis=(1, 2, 3))
    assert first == second and third == last == pytest.approx(first / 2, abs=8), "on black"
    assert len(read_clip(str(path), Sampling(fps=25, frames=100, size=64)).frames) == 100


def real(shared: Path, ok: str) -> list[dict[str, Any]]:
    with (shared / "SOURCES.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "video"]
    return [row for row in rows if row["expected_ok"] == ok]


def test_real_videos_of_four_seconds_give_64_frames(shared_data: Path) -> None:
    enough = 0
    for row in real(shared_data, "yes"):
        path = str(shared_data / row["path"])
        with opened(path) as video:
            line = timeline(video)
            part = section(line, None, None)
            expected = picks(line.times, part.t1, Sampling(), clock=Clock(slack=video.slack))
        if part.t1 - part.t0 >= 4:
            clip = read_clip(path, Sampling(size=32))
            assert clip.times == [line.times[i] for i in expected], path
            enough += 1
        else:
            with pytest.raises(TooShort) as short:
                read_clip(path, Sampling(size=32))
            assert short.value.have == len(expected), path
    assert enough == 18


def test_real_broken_files_say_what_is_wrong(shared_data: Path) -> None:
    errors = {}
    for row in real(shared_data, "no"):
        with pytest.raises(VideoError) as error:
            read_clip(str(shared_data / row["path"]), Sampling(size=32))
        errors[Path(row["path"]).stem] = error.value.error
        assert not {"Errno", "/", "avcodec"} & set(str(error.value).split())
    assert errors == {
        "broken_zero_length": "empty_file",
        "broken_lfs_pointer": "not_a_video",
        "broken_decord_corrupted": "decode_error",
        "broken_chunk_out_of_range": "bad_header",
        "broken_header_only": "no_frames",
        "broken_vp9_invalid_bitstream": "decode_error",
        "broken_no_streams": "not_a_video",
        "novideo_audio_only": "no_video_stream",
    }


def test_frames_that_lack_what_they_are_made_from_are_not_counted(tmp_path: Path) -> None:
    """A recording that begins amid a group of pictures: its first packets give no frames."""
    path = make(tmp_path / "a.ts", 120, 25, "mpeg2video", bf="2", g="12")
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 4 // 188 * 188 :])
    with opened(str(path)) as video:
        promised = timeline(video).times
    clip = read_clip(str(path), TV)
    shown = numbers(clip.frames)
    assert shown == [shown[0] + floor(k * 25 / 16 + 1e-5) for k in range(32)]
    assert clip.times[0] > promised[0]
    assert clip.times[1] == pytest.approx(clip.times[0] + 0.04)


def test_a_container_that_breaks_off_still_gives_what_comes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make(tmp_path / "a.mkv", 100, 25, bf="2", g="25"))
    whole = read_clip(path, TV)
    read = stages.media.timeline.packets

    def breaking(video: Video, *streams: Any) -> Iterator[Any]:
        for packet in read(video, *streams):
            if packet.dts is not None and packet.dts * video.tick > 2.1:
                raise OSError(5, "Input/output error")
            yield packet

    monkeypatch.setattr(stages.media.timeline, "packets", breaking)
    assert read_clip(path, TV).times == whole.times
    for sampling in (TV.model_copy(update={"frames": 40}), TV.model_copy(update={"frames": 99})):
        with pytest.raises(VideoError) as error:
            read_clip(path, sampling)
        assert error.value.error == "unreadable_file"


def test_no_more_packets_are_read_than_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make(tmp_path / "a.mp4", 250, 25, bf="2", g="25"))
    monkeypatch.setattr(stages.media.timeline, "MOST_PACKETS", 95)  # 2 s, a little, and a group
    assert read_clip(path, TV).length == 32
    assert read_clip(path, TV, 3.0).length == 32
    assert read_clip(path, TV.model_copy(update={"policy": "seed"})).length == 32
