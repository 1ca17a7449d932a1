"""describe: what a model that sees says of a clip, shown a few of its frames.

The prompt may name columns, too: `{caption?}` is a hint where there is one. Threads read frames
ahead of the engine.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from stages.ahead import ahead
from stages.base import Failed, Outcome, Rejected, Row, Speed, alive
from stages.captions.captioner import Captioner, CaptionSettings, Question
from stages.captions.quality import QualitySettings
from stages.captions.verdict import columns
from stages.engines.base import Engine, Pictures, Prepared
from stages.engines.choice import open_engine
from stages.files import CARRIED, clip_file
from stages.media.frames import Unsuited
from stages.media.spread import FramesSettings, spread
from stages.media.video import READING_MAY_PASS, Budget, DecodingSettings, VideoError

MOST_THREADS = 8  # by default: some 40 clips a second, which is more than a model looks at
Seen = tuple[Prepared, list[float]] | Rejected | Failed


class DescribeQuality(QualitySettings):
    """As for recaption; but by default the source's caption is not read.

    What that says need not be in the picture, and a new one describes nothing anew."""

    min_overlap: float = Field(
        0.0, ge=0, le=1, description="of content words with the original: less is `unrelated`"
    )
    fallback: Literal["original", "reject", "keep"] = Field(
        "reject",
        description="where none passes: the original caption, or no clip, or the last answer",
    )


class DescribeSettings(CaptionSettings, DecodingSettings):
    sees: ClassVar[bool] = True
    model: str = Field(
        "Qwen/Qwen2.5-VL-7B-Instruct", description="that sees: hub id, folder, or as served"
    )
    preset: str | None = Field(
        None, description="a prompt of ours; default: describe-dense, without the two above"
    )
    frames: FramesSettings = Field(
        default_factory=FramesSettings, description="which frames are shown: see below"
    )
    quality: DescribeQuality = Field(
        default_factory=DescribeQuality, description="what a description must be: see below"
    )
    max_tokens: int = Field(512, ge=1, description="of an answer")
    max_model_len: int = Field(8192, ge=16, description="vllm: tokens of frames, prompt and answer")
    batch_size: Speed[int | None] = Field(
        None, ge=1, description="transformers: clips of one forward pass; default 4"
    )
    threads: Speed[int | None] = Field(
        None, ge=1, description="that read frames ahead of the engine; default: the cores, up to 8"
    )
    ahead: Speed[int] = Field(
        1 << 30, ge=1, description="bytes of frames that are held, half of them by the engine"
    )


class Describe(Captioner[DescribeSettings]):
    """What a model that sees says of the clip, beside the raw answer and what made it."""

    name = "describe"
    column = "description"
    Settings = DescribeSettings
    carries = CARRIED
    adds = pa.schema([*columns(column), pa.field("description_times", pa.list_(pa.float64()))])
    after = ("filter",)
    on_request = True
    default_time_limit = 900.0
    transient = (*Captioner.transient, *READING_MAY_PASS)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        beside = self.beside if self.settings.quality.compares else ()
        return tuple(dict.fromkeys(("content", "start", "end", *self.template.asks, *beside)))

    @property
    def holds(self) -> int:  # type: ignore[override]
        return self.settings.ahead // 2

    def identity(self) -> dict[str, Any]:
        span = self.settings.frames.identity(self.context.sampling)
        return {**super().identity(), "span": span}

    def setup(self) -> Engine:
        frames = self.settings.frames
        media = {"video": 1} if frames.form == "video" else {"image": frames.count}
        return open_engine(self.settings, self.name, media)

    def questions(
        self, rows: Iterable[Row], model: Engine
    ) -> Generator[tuple[int, Question | Outcome]]:
        asked: dict[int, tuple[Row, str]] = {}

        def noted() -> Iterator[tuple[Row, str | Rejected]]:
            for number, row in enumerate(rows):
                prompt = self.template.render(row)
                if isinstance(prompt, str):
                    asked[number] = row, prompt
                yield row, prompt

        def seen(one: tuple[Row, str | Rejected]) -> Generator[Seen]:
            row, prompt = one
            yield self.look(row, model) if isinstance(prompt, str) else prompt

        threads = self.settings.threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
        frames = ahead(
            noted(),
            seen,
            lambda seen: seen[0].nbytes if isinstance(seen, tuple) else 0,
            threads=threads,
            depth=4 * threads,
            most=self.settings.ahead - self.holds,
            ordered=False,
        )
        with closing(frames):
            for number, one in frames:
                if isinstance(one, tuple):
                    shown, times = one
                    yield number, Question(*asked.pop(number), shown, {"description_times": times})
                elif one is not None:
                    asked.pop(number, None)
                    yield number, one

    def look(self, row: Row, model: Engine) -> Seen:
        """The frames of a row as the engine takes them, and their times, or why there are none."""
        frames = self.settings.frames
        budget = Budget(self.settings, self.name)
        try:
            with clip_file(row, self.context) as path:
                found = spread(
                    path,
                    frames,
                    self.context.sampling,
                    row["start"],
                    row["end"],
                    clip=row["clip_id"],
                    budget=budget,
                )
            pictures = Pictures(found.frames, found.fps, frames.form == "video")
            return model.prepared(pictures), found.times
        except Unsuited as error:
            return Rejected(error.reason, str(error))
        except VideoError as error:
            return Failed(error.error, str(error))
        finally:
            alive()
