"""Which frames stand for a clip, and at what size, as vidpipe.yaml says it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Frames = Annotated[int, Field(ge=1, le=100_000)]
Pixels = Annotated[int, Field(ge=1, le=16384)]


class Bucket(BaseModel):
    """One shape that a clip may take. In vidpipe.yaml also as [frames, height, width]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frames: Frames
    height: Pixels
    width: Pixels

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if len(value) != 3:
            raise ValueError("a bucket is [frames, height, width]")
        return dict(zip(("frames", "height", "width"), value, strict=True))

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}"


class Sampling(BaseModel):
    """Which frames stand for a clip, and at what size: the section `sampling` of vidpipe.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fps: float = Field(16.0, gt=0, le=1000, description="frames a second, by presentation time")
    frames: Frames = Field(64, description="frames of a clip")
    size: Pixels | tuple[Pixels, Pixels] = Field(
        256, description="pixels: a square side or [height, width]"
    )
    fit: Literal["crop", "pad", "squash"] = Field(
        "crop", description="to the size asked: cut the sides, add black bars, or distort"
    )
    policy: Literal["time", "seed", "interval"] = Field(
        "time",
        description="time: what is shown at k/fps; seed: the indices that vid_gen takes; interval: "
        "every `interval`-th frame, whatever the fps (InternVid: 4)",
    )
    interval: int = Field(
        4, ge=1, le=1000, description="policy interval: from one frame picked to the next"
    )
    start: Literal["first", "center", "random"] = Field(
        "first",
        description="of a longer clip: its beginning, its middle, or a place drawn by its id",
    )
    windows: int | Literal["all"] = Field(
        1,
        description="clips made of a clip: n: one in each of n equal parts, fewer where fewer fit; "
        "all: as many as fit, side by side. Unless 1, each is a row with its own id",
    )
    short: Literal["reject", "pad", "repeat"] = Field(
        "reject", description="a clip with fewer frames: pad is black, repeat the last frame"
    )
    buckets: tuple[Bucket, ...] = Field(
        (),
        description="in place of `frames` and `size`: [frames, height, width] each; a clip goes to "
        "the one nearest in shape that it fills without being enlarged",
    )

    @field_validator("windows", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if value != "all" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{value!r} is neither a number from 1 on nor `all`")
        return value

    @model_validator(mode="after")
    def _filled(self) -> Self:
        if self.buckets and self.short != "reject":
            raise ValueError(
                f"`buckets` take only clips that fill them, and `short: {self.short}` fills up "
                "others: leave one of them out"
            )
        return self

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The shapes that clips may come to."""
        own = Bucket(frames=self.frames, height=self.height, width=self.width)
        return self.buckets or (own,)

    @property
    def most(self) -> int:
        """Frames of the longest clips."""
        return max(shape.frames for shape in self.shapes)

    @property
    def splits(self) -> bool:
        """Whether a clip becomes clips with ids of their own."""
        return self.windows != 1

    def of(self, shape: Bucket) -> Sampling:
        """The sampling of a clip that comes to this shape."""
        size = (shape.height, shape.width)
        return self.model_copy(update={"frames": shape.frames, "size": size, "buckets": ()})

    def times(self) -> dict[str, Any]:
        """The part that decides how many frames a clip has."""
        pace = {"interval": self.interval} if self.policy == "interval" else {"fps": self.fps}
        return {**pace, "frames": self.most, "policy": self.policy}

    def identity(self) -> dict[str, Any]:
        """All that decides what a clip becomes, JSON-able: settings without effect left out."""
        idle = {"interval"} if self.policy != "interval" else {"fps"}
        idle |= {"frames", "size"} if self.buckets else {"buckets"}
        return self.model_dump(mode="json", exclude=idle)
