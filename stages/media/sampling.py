"""Which frames stand for a clip, and at what size, as vidpipe.yaml says it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Pixels = Annotated[int, Field(ge=1, le=16384)]


class Sampling(BaseModel):
    """Which frames stand for a clip, and at what size: the section `sampling` of vidpipe.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fps: float = Field(16.0, gt=0, le=1000, description="frames a second, by presentation time")
    frames: int = Field(64, ge=1, le=100_000, description="frames of a clip")
    size: Pixels | tuple[Pixels, Pixels] = Field(
        256, description="pixels: a square side or [height, width]"
    )
    fit: Literal["crop", "pad", "squash"] = Field(
        "crop", description="to the size asked: cut the sides, add black bars, or distort"
    )
    policy: Literal["time", "seed"] = Field(
        "time", description="time: what is shown at k/fps; seed: the indices that vid_gen takes"
    )
    short: Literal["reject", "pad", "repeat"] = Field(
        "reject", description="a clip with fewer frames: pad is black, repeat the last frame"
    )

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    def times(self) -> dict[str, Any]:
        """The part that decides which frames are picked, apart from what is made of them."""
        return {"fps": self.fps, "frames": self.frames, "policy": self.policy}
