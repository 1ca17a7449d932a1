from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from av.stream import Disposition
from numbered import ENCRYPTION, SIDE, make, picture, silence

from stages.base import Context, Failed, Row
from stages.media.frames import read_clips
from stages.media.sampling import Bucket, Sampling
from stages.probe import Probe, ProbeSettings, irregular


def probe(path: Path, start: float | None = None, end: float | None = None, **settings: Any) -> Any:
    stage = Probe(ProbeSettings(**settings), Context("/nowhere"))
    return stage.process([{"path": str(path), "start": start, "end": end}], None)[0]


def test_facts_of_a_video(tmp_path: Path) -> None:
    row = probe(make(tmp_path / "a.mp4", 75, Fraction(30000, 1001), g="30", bf="2", sound=3.0))
    assert set(row) == set(Probe.adds.names)
    assert row["fps"] == pytest.approx(30000 / 1001)
    assert row["fps_nominal"] == pytest.approx(30000 / 1001)
    assert row["duration"] == pytest.approx(75 * 1001 / 30000)
    fixed = {k: v for k, v in row.items() if k not in ("fps", "fps_nominal", "duration")}
    assert fixed == {
        "codec": "h264",
        "pix_fmt": "yuv420p",
        "width": 64,
        "height": 64,
        "rotation": 0,
        "num_frames": 75,
        "num_frames_header": 75,
        "start_time": 0.0,
        "vfr": False,
        "has_audio": True,
        "video_streams": 1,
        "len": 41,
    }


def test_facts_of_a_part(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", 100, 25, g="10")
    row = probe(path, 1.0, 3.0)
    assert (row["num_frames"], row["len"]) == (50, 32)
    assert row["duration"] == pytest.approx(2.0)
    assert row["start_time"] == pytest.approx(1.0)
    row = probe(path, 2.5)
    assert row["num_frames"] == 38  # the frame shown at 2.5 s appeared at 2.48 s
    assert row["duration"] == pytest.approx(1.5)
    # Tables round to milliseconds: 40/30 s is written 1.333, and 80/30 s 2.667.
    row = probe(make(tmp_path / "b.mp4", 90, 30), 1.333, 2.667)
    assert (row["num_frames"], row["len"]) == (40, 22)
    assert (row["start_time"], row["duration"]) == pytest.approx((40 / 30, 40 / 30))
    assert probe(path, 9.0, 12.0) == Failed(
        "empty_section", "the clip starts at 9.000 s, where the video has ended: it has 4.000 s"
    )
    assert probe(path, 2.0, 2.0).error == "empty_section"


@pytest.mark.parametrize("policy", ["time", "seed", "interval"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mp4", {"frames": 50, "fps": 25, "bf": "2"}),
        ("a.mkv", {"frames": 77, "fps": Fraction(30000, 1001)}),
        ("a.ts", {"frames": 40, "pts": [3000 + 40 * i for i in range(40)]}),
        ("a.avi", {"frames": 40, "fps": 20}),
        ("b.mkv", {"frames": 30, "pts": [i * i * 3 for i in range(30)]}),
    ],
)
def test_len_is_what_encode_finds(
    tmp_path: Path, policy: str, name: str, how: dict[str, Any]
) -> None:
    path = make(tmp_path / name, **how)
    for frames in (8, 30, 99):
        for start, end in ((None, None), (0.5, None), (0.3, 1.1)):
            sampling = Sampling(
                fps=16, frames=frames, size=64, policy=policy, interval=2, short="pad"
            )
            row = {"path": str(path), "start": start, "end": end}
            (facts,) = Probe(ProbeSettings(), Context("/w", sampling=sampling)).process([row], None)
            for where in ("first", "center", "random"):
                for count in (1, 2, "all"):
                    own = sampling.model_copy(update={"start": where, "windows": count})
                    found = list(read_clips(str(path), own, start, end, clip="a"))
                    assert {clip.length for clip in found} == {facts["len"]}
            bucketed = sampling.model_copy(
                update={"frames": 1, "buckets": (Bucket(frames=frames, height=9, width=9),)}
            )
            stage = Probe(ProbeSettings(), Context("/w", sampling=bucketed))
            assert stage.process([row], None)[0]["len"] == facts["len"]


def test_variable_rate(tmp_path: Path) -> None:
    row = probe(make(tmp_path / "a.mp4", 5, pts=[0, 100, 200, 700, 800]))
    assert row["vfr"] is True
    assert row["duration"] == pytest.approx(0.9, abs=0.1)
    assert not irregular([0.0, 0.033, 0.067, 0.1], slack=0.0005)
    assert not irregular([round(i / 120, 3) for i in range(50)], slack=0.0005)
    assert irregular([i * 0.033 for i in range(20)] + [0.7], slack=0.0005)
    assert not irregular([0.0], slack=0.0)


def test_a_file_cut_short_is_truncated(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.mp4", 150, 30, container={"movflags": "faststart"})
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    failed = probe(whole)
    assert failed.error == "truncated"
    assert failed.message.endswith("of 150 frames")
    row = probe(whole, tolerance=0.9)
    assert row["num_frames"] < row["num_frames_header"] == 150

    late = make(tmp_path / "b.mp4", 50)
    data = late.read_bytes()
    late.write_bytes(data[: data.index(b"moov") + 100])
    assert probe(late) == Failed("truncated", "the index (moov) is missing: the file was cut short")

    mkv = make(tmp_path / "c.mkv", 150, 30)
    data = mkv.read_bytes()
    mkv.write_bytes(data[: len(data) // 2])
    failed = probe(mkv)
    assert failed.error == "truncated"
    assert failed.message.endswith("of 5.0 seconds")


def test_sound_that_outlasts_the_picture_is_no_truncation(tmp_path: Path) -> None:
    assert probe(make(tmp_path / "a.mkv", 30, 30, sound=3.0))["num_frames"] == 30


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    assert probe(tmp_path / "none.mp4") == Failed("missing_file", "the file is not there")
    assert probe(tmp_path) == Failed("not_a_video", "this is a folder, not a file")
    page = tmp_path / "page.mp4"
    page.write_text("<!DOCTYPE html><html><body>404</body></html>")
    assert probe(page).message == "this is a web page or an error message, not a video"

    path = make(tmp_path / "a.mp4", 10)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert probe(path).error == "unknown_codec"

    assert probe(make(tmp_path / "b.mp4", 10, container=ENCRYPTION)).error == "encrypted"


def test_a_picture_of_the_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as output:
        cover = output.add_stream("mjpeg", rate=1)
        cover.width = cover.height = SIDE
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        output.mux(silence(output, 1.0))
        output.mux(cover.encode(av.VideoFrame.from_ndarray(picture(5), "rgb24")))
        output.mux(cover.encode(None))
    assert probe(path).error == "no_video_stream"


def test_metadata_that_is_no_text_is_no_fault(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 10, metadata={"title": "HEREISATITLE"})
    path.write_bytes(path.read_bytes().replace(b"HEREISATITLE", b"\xff\xfe" * 6))
    assert probe(path)["num_frames"] == 10


def test_one_bad_row_costs_one_row(tmp_path: Path) -> None:
    good = make(tmp_path / "a.mp4", 10)
    rows: list[Row] = [
        {"path": str(path), "start": None, "end": None}
        for path in (good, tmp_path / "none.mp4", good)
    ]
    outcomes = Probe(ProbeSettings(), Context("/nowhere")).process(rows, None)
    assert [type(outcome) for outcome in outcomes] == [dict, Failed, dict]


def test_only_what_picks_frames_is_in_the_fingerprint() -> None:
    def fingerprint(**sampling: Any) -> str:
        return Probe(ProbeSettings(), Context("/w", sampling=Sampling(**sampling))).fingerprint

    assert fingerprint() == fingerprint(size=512, fit="pad", short="repeat")
    assert fingerprint() != fingerprint(frames=49)


def real(shared: Path) -> list[dict[str, str]]:
    with (shared / "SOURCES.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "video"]


# The table has no duration of these streams, only of the container: in the first it counts from
# 0 and not from the first frame, in the others the sound outlasts the picture.
COUNTED = {
    "asl_book.mkv": 3.633,
    "flower.webm": 5.005,
    "tears-of-steel-battle-clip-medium.webm": 70.458,
}


def test_real_videos_agree_with_their_ground_truth(shared_data: Path) -> None:
    seen = 0
    for truth in real(shared_data):
        name = Path(truth["path"]).name
        if truth["expected_ok"] != "yes" or name == "nasa_13013.mp4":
            continue
        row = probe(shared_data / truth["path"])
        size = [int(truth["width"]), int(truth["height"])]
        rotation = int(truth["rotation"])
        assert [row["width"], row["height"]] == (size[::-1] if rotation % 180 else size), name
        assert row["rotation"] == rotation, name
        assert row["num_frames"] == int(truth["nb_frames"]), name
        assert row["num_frames_header"] == (int(truth["nb_frames_header"] or 0) or None), name
        assert row["vfr"] == (truth["is_vfr"] == "yes"), name
        assert row["has_audio"] == (truth["has_audio"] == "yes"), name
        assert (row["codec"], row["pix_fmt"]) == (truth["codec"], truth["pix_fmt"]), name
        duration = COUNTED.get(name) or float(truth["stream_duration"] or truth["duration"])
        # An edit list may end within the last frame: that one is counted whole.
        assert row["duration"] == pytest.approx(duration, abs=0.021), name
        seen += 1
    assert seen == 23


def test_of_two_video_streams_the_one_that_ffmpeg_takes(shared_data: Path) -> None:
    """The table counts the first stream; FFmpeg, and so read_clip, takes the larger second."""
    row = probe(shared_data / "videos" / "nasa_13013.mp4")
    assert (row["width"], row["height"], row["video_streams"]) == (480, 270, 2)
    assert (row["num_frames"], row["duration"]) == (390, pytest.approx(13.013))


def test_real_broken_files_fail_with_a_reason(shared_data: Path) -> None:
    outcomes = {
        Path(truth["path"]).stem: probe(shared_data / truth["path"])
        for truth in real(shared_data)
        if truth["expected_ok"] == "no"
    }
    # Damaged in the middle, which only decoding tells: read_clip does, and encode fails it.
    assert outcomes.pop("broken_decord_corrupted")["num_frames"] == 50
    assert {name: outcome.error for name, outcome in outcomes.items()} == {
        "broken_zero_length": "empty_file",
        "broken_lfs_pointer": "not_a_video",
        "broken_chunk_out_of_range": "bad_header",
        "broken_header_only": "no_frames",
        "broken_vp9_invalid_bitstream": "decode_error",
        "broken_no_streams": "not_a_video",
        "novideo_audio_only": "no_video_stream",
    }
    assert outcomes["broken_header_only"].message == (
        "its header promises 297 frames; there are none"
    )
