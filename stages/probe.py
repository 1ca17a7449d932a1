"""probe: what a video is, from its header and its packets; one picture is decoded, for a test."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

import pyarrow as pa
from pydantic import Field

from stages.base import Failed, Outcome, Row, Stage, alive
from stages.files import CARRIED, clip_file
from stages.media.look import first_picture
from stages.media.picks import Clock, picks
from stages.media.sampling import Sampling
from stages.media.timeline import Timeline, section, timeline
from stages.media.video import (
    READING_MAY_PASS,
    Budget,
    DecodingSettings,
    Video,
    VideoError,
    opened,
    packets,
)

# A gap between frames is irregular from this share of the median on (and beyond rounding).
IRREGULAR = 0.1


class ProbeSettings(DecodingSettings):
    tolerance: float = Field(
        0.1, ge=0, le=1, description="share of the header's length that may be missing"
    )


class Probe(Stage[ProbeSettings, None]):
    """Facts about each clip. Broken, encrypted and truncated files fail here, with the reason.

    `num_frames`, `duration`, `fps`, `vfr`, `len` are of the clip (`start`..`end`), counted from
    presentation timestamps: the header's claims stand beside them. `len`: frames that sampling
    finds. `width` and `height` are as shown, after rotation, in the video's own pixels.
    """

    name = "probe"
    Settings = ProbeSettings
    reads = ("content", "start", "end")
    carries = CARRIED
    adds = pa.schema(
        [
            ("codec", pa.string()),
            ("pix_fmt", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("rotation", pa.int32()),  # degrees counter-clockwise that show it upright
            ("fps", pa.float64()),  # frames over seconds
            ("fps_nominal", pa.float64()),  # the header's average; null where it has none
            ("num_frames", pa.int64()),
            ("num_frames_header", pa.int64()),  # of the whole file; null where it has none
            ("duration", pa.float64()),  # seconds
            ("start_time", pa.float64()),  # of the first frame, seconds after the file's start
            ("vfr", pa.bool_()),
            ("has_audio", pa.bool_()),
            ("video_streams", pa.int32()),
            ("len", pa.int32()),
        ]
    )
    default_batch = 64
    default_time_limit = 300.0
    transient = READING_MAY_PASS

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "sampling": self.context.sampling.times()}

    def process(self, rows: list[Row], model: None) -> list[Outcome]:
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> Outcome:
        sampling, tolerance = self.context.sampling, self.settings.tolerance
        budget = Budget(self.settings, self.name)
        try:
            with clip_file(row, self.context) as path:
                return probed(path, sampling, row["start"], row["end"], tolerance, budget)
        except VideoError as error:
            return Failed(error.error, str(error))
        finally:
            alive()


def probed(
    path: str,
    sampling: Sampling,
    start: float | None,
    end: float | None,
    tolerance: float,
    budget: Budget,
) -> Row:
    """The columns of `Probe.adds` for one clip. Raises VideoError."""
    with opened(path, budget=budget) as video:
        line = timeline(video, start, end)
        if start is None and end is None:
            complete(video, line, tolerance)
        part = section(line, start, end)
        look = first_picture(video, line.first_key)
        times = line.times[part.first : part.last]
        rate = video.stream.average_rate
        nominal = float(rate) if rate else None
        longest = sampling.model_copy(update={"frames": sampling.most})
        picked = picks(times, part.t1, longest, part.t0, Clock(nominal, video.slack))
        return {
            "codec": video.stream.codec_context.codec.canonical_name,
            "pix_fmt": look.pix_fmt,
            "width": look.width,
            "height": look.height,
            "rotation": look.rotation,
            "fps": len(times) / (part.t1 - part.t0),
            "fps_nominal": nominal,
            "num_frames": len(times),
            "num_frames_header": video.stream.frames or None,
            "duration": part.t1 - part.t0,
            "start_time": times[0],
            "vfr": irregular(times, video.slack),
            "has_audio": bool(video.container.streams.audio),
            "video_streams": len(video.container.streams.video),
            "len": len(picked),
        }


def complete(video: Video, line: Timeline, tolerance: float) -> None:
    """Raises VideoError where packets are missing that the header promises: a file cut short
    keeps the header of the whole."""
    stream = video.stream
    promised = stream.frames
    if promised and not line.packets:
        raise VideoError("no_frames", f"its header promises {promised} frames; there are none")
    if promised and line.packets < (1 - tolerance) * promised:
        raise VideoError("truncated", f"the file has {line.packets} of {promised} frames")
    if promised or not line.times:
        return
    length = (video.container.duration or 0) / 1_000_000
    if length and line.end < (1 - tolerance) * length:
        # Sound may go on when the picture ends, so the last packet of any stream decides.
        reached = last_moment(video)
        if reached < (1 - tolerance) * length:
            raise VideoError("truncated", f"the file has {reached:.1f} of {length:.1f} seconds")


def last_moment(video: Video) -> float:
    """When the last packet of any stream ends, seconds."""
    video.container.seek(0)
    return max(
        float((packet.pts + (packet.duration or 0)) * packet.time_base) - video.origin
        for packet in packets(video)
        if packet.pts is not None
    )


def irregular(times: list[float], slack: float) -> bool:
    """Whether frames come at a variable rate: one gap differs from the median by over 10%."""
    gaps = [b - a for a, b in pairwise(times)]
    if not gaps:
        return False
    usual = median(gaps)
    return any(abs(gap - usual) > IRREGULAR * usual + 2 * slack for gap in gaps)
