"""score: sharpness, brightness, motion and, with a CLIP model, aesthetics of a few frames.

Scores only: what is good enough is for the filter to say, so a threshold can change without
scoring again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from stages.aesthetics import Aesthetics
from stages.base import Context, Failed, Outcome, Row, Speed, Stage, StageError, alive
from stages.devices import check_device
from stages.files import CARRIED, clip_file
from stages.media.few import Few, sample_few
from stages.media.picture import Pixels
from stages.media.video import READING_MAY_PASS, Budget, DecodingSettings, VideoError
from stages.models import check, model_identity, resolve

if TYPE_CHECKING:
    import torch

Luma = NDArray[np.float32]
# Rec. 601: the luma that blur and brightness measures in use were set on (OpenCV's grey).
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class ScoreSettings(DecodingSettings):
    frames: int = Field(5, ge=1, le=64, description="frames looked at, from 10% to 90% of the clip")
    side: int = Field(384, ge=32, description="pixels of their short side, for all but aesthetics")
    gap: float = Field(0.125, gt=0, description="seconds between the frames compared for motion")
    clip: str | None = Field(None, description="CLIP model for aesthetics: folder or hub id")
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    aesthetic_head: str | None = Field(
        None, description="weights on CLIP features (.pth, .safetensors): LAION's linear or MLP"
    )
    device: Speed[str] = Field("auto", description="of the CLIP model: auto, cpu, cuda, cuda:1")
    pictures: Speed[int] = Field(64, ge=1, description="frames that go through CLIP at once")


def _sha256(file: str) -> str:
    """Raises StageError."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise StageError(f"aesthetic_head: {file} can't be read: {error.strerror}") from error


class Score(Stage[ScoreSettings, Aesthetics | None]):
    """Means over a few frames of the clip.

    `sharpness`: variance of the luma's Laplacian. `luminance`: luma, 0 to 255. `motion`: absolute
    difference of luma over `gap` seconds, 0 to 1. `aesthetic`, only with `clip`: about 1 to 10.
    """

    name = "score"
    version = 2  # 2: chroma as fine as luma
    Settings = ScoreSettings
    reads = ("content", "start", "end")
    after = ("probe",)  # what probe can't open need not fail twice
    carries = CARRIED
    default_batch = 16
    default_time_limit = 600.0
    transient = READING_MAY_PASS

    def __init__(self, settings: ScoreSettings, context: Context) -> None:
        super().__init__(settings, context)
        names = ["sharpness", "luminance", "motion", *(["aesthetic"] if settings.clip else [])]
        self.adds = pa.schema([(name, pa.float32()) for name in names])

    @property
    def accelerated(self) -> bool:
        return bool(self.settings.clip) and self.settings.device.startswith(("auto", "cuda"))

    def identity(self) -> dict[str, Any]:
        s = self.settings
        if not (s.clip and s.aesthetic_head):
            return super().identity()
        models = {
            "clip": model_identity(s.clip, s.revision),
            "head": _sha256(s.aesthetic_head),
        }
        return {**super().identity(), "models": models}

    def check(self) -> None:
        s = self.settings
        if bool(s.clip) != bool(s.aesthetic_head):
            raise StageError(
                "score: aesthetics take both a CLIP model (`clip`) and the head trained on it"
                " (`aesthetic_head`): set both or neither"
            )
        if s.clip and s.aesthetic_head:
            check(s.clip)
            if not Path(s.aesthetic_head).is_file():
                raise StageError(f"score: aesthetic_head: there is no file {s.aesthetic_head}")

    @property
    def loads_model(self) -> bool:
        return bool(self.settings.clip)

    def check_here(self) -> None:
        if self.settings.clip:
            check_device(self.settings.device)

    def setup(self) -> Aesthetics | None:
        s = self.settings
        if not (s.clip and s.aesthetic_head):
            return None
        return Aesthetics(resolve(s.clip, s.revision), s.aesthetic_head, s.device, s.pictures)

    def process(self, rows: list[Row], model: Aesthetics | None) -> list[Outcome]:
        outcomes: list[Outcome] = []
        scored: dict[int, Row] = {}
        pictures: list[torch.Tensor] = []
        for row in rows:
            alive()
            try:
                few = self._few(row)
            except VideoError as error:
                outcomes.append(Failed(error.error, str(error)))
                continue
            scored[len(outcomes)] = row = measured(few)
            outcomes.append(row)
            if model is not None:
                pictures.append(model.prepared(few.frames))
        if model is not None and pictures:
            for i, score in zip(scored, model.scores(pictures), strict=True):
                if isinstance(score, Failed):
                    outcomes[i] = score
                else:
                    scored[i]["aesthetic"] = score
        return outcomes

    def _few(self, row: Row) -> Few:
        s = self.settings
        budget = Budget(s, self.name)
        with clip_file(row, self.context) as path:
            return sample_few(path, s.frames, s.side, row["start"], row["end"], s.gap, budget)


def measured(few: Few) -> Row:
    """The model-free scores of a clip."""
    now, later = luma(few.frames), luma(few.later)
    return {
        "sharpness": sharpness(now),
        "luminance": float(now.mean()),
        "motion": float(np.abs(later - now).mean()) / 255,
    }


def luma(frames: Pixels) -> Luma:
    """RGB [..., 3] to luma 0..255."""
    return frames.astype(np.float32) @ LUMA


def sharpness(pictures: Luma) -> float:
    """The variance of the 4-neighbour Laplacian (Pech-Pacheco et al., ICPR 2000), mean over
    pictures [n, height, width]. Blur lowers it; so does upscaling."""
    centre = pictures[:, 1:-1, 1:-1]
    around = pictures[:, :-2, 1:-1] + pictures[:, 2:, 1:-1]
    around = around + pictures[:, 1:-1, :-2] + pictures[:, 1:-1, 2:]
    return float((around - 4 * centre).var(axis=(1, 2)).mean())
