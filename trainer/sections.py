"""The sections within `train`: the model, what is expected of the index, validation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class SettingsError(Exception):
    """The settings cannot be used: the message names the key, its value and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DiTSettings(Section):
    """The small video DiT of `trainer.models`."""

    kind: Literal["dit"] = Field("dit", description="the model's family")
    width: int = Field(128, ge=16, le=8192, description="channels of a token")
    depth: int = Field(4, ge=1, le=128, description="transformer blocks")
    heads: int = Field(4, ge=1, le=128, description="attention heads; they divide width")
    patch: tuple[int, int, int] = Field(
        (4, 2, 2), description="latent frames, rows and columns that make one token"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 x heads = {2 * self.heads}"
            )
        if min(self.patch) < 1:
            raise ValueError(f"patch {list(self.patch)} must be three numbers of at least 1")
        return self


class LoraSettings(Section):
    """Adapters (LoRA) in place of all weights."""

    rank: int = Field(16, ge=1, le=1024, description="of each adapter")
    alpha: float | None = Field(
        None, gt=0, description="adapters are scaled by alpha / rank; default: the rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into an adapter")
    targets: tuple[str, ...] = Field(
        (), description="ends of the names of layers that get one; default: of all attention"
    )

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


class FamilySettings(Section):
    """A network of diffusers."""

    kind: Literal["unet3d", "cogvideox", "wan", "ltx"] = Field(
        description="the family: UNet3DConditionModel, CogVideoXTransformer3DModel, "
        "WanTransformer3DModel or LTXVideoTransformer3DModel of diffusers"
    )
    path: str | None = Field(
        None,
        description="folder or hub id of its weights, or of a pipeline with them; of unet3d also "
        "of Stable Diffusion 2.1, which is grown in time",
    )
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    subfolder: str | None = Field(
        None, description="folder of the weights in path; default: transformer or unet"
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="in place of path: sizes of a new network, as in config.json of its class",
    )
    first_frame: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of visits that are told the clip's first frame, to go on from a "
        "picture; encode.first_frame stores it",
    )
    lora: LoraSettings | None = Field(None, description="adapters in place of all weights")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.path is None and not self.config:
            raise ValueError(
                f"{self.kind} needs path (a folder or hub id) or config (sizes of a new network)"
            )
        if self.path is not None and self.config:
            raise ValueError("path and config are both given: weights in path have their own sizes")
        if self.path is None and self.lora is not None:
            raise ValueError("lora adapts trained weights, and there are none: set path")
        return self


class TextSettings(Section):
    """What the model is told of captions: by an encoder trained with it, or by stored ones."""

    kind: Literal["words", "bytes", "stored"] = Field(
        "words",
        description="what a text token is: a hashed word, or a byte (for languages that put no "
        "spaces between words), both encoded by a small encoder that is trained as well; stored: "
        "a token of the text embeddings that the stage embed made, with no encoder at all",
    )
    length: int = Field(48, ge=2, le=4096, description="tokens of a caption; the rest is cut off")
    layers: int = Field(2, ge=0, le=48, description="transformer layers over the text tokens")
    buckets: int = Field(8192, ge=256, le=2**22, description="rows of the table of hashed words")


def _kind(values: Any) -> str:
    kind = values.get("kind", "dit") if isinstance(values, dict) else values.kind
    return DIT if kind == "dit" else FAMILY


DIT, FAMILY = "<dit>", "<family>"  # which settings `model` has; no keys, and so never told
MODELS: dict[str, type[BaseModel]] = {DIT: DiTSettings, FAMILY: FamilySettings}
Model = Annotated[
    Annotated[DiTSettings, Tag(DIT)] | Annotated[FamilySettings, Tag(FAMILY)],
    Discriminator(_kind),
]


class Expect(Section):
    """What latents and text embeddings must have been made with; what is left out is not checked.
    `size`, a side or [height, width], stands for both."""

    policy: Literal["time", "seed", "interval"] | None = Field(
        None, description="which frames stand for a clip"
    )
    fps: float | None = Field(None, gt=0, description="frames a second of a clip")
    interval: int | None = Field(
        None, ge=1, description="of policy interval: from one frame to the next"
    )
    frames: int | None = Field(None, ge=1, description="frames of a clip")
    height: int | None = Field(None, ge=1, description="pixels")
    width: int | None = Field(None, ge=1, description="pixels")
    buckets: tuple[tuple[int, int, int], ...] | None = Field(
        None, description="all shapes of clips: [frames, height, width] each"
    )
    vae: str | None = Field(None, description="the VAE as configured, or its weights' sha256")
    encoder: str | None = Field(
        None, description="of text embeddings, as configured, or its files' sha256"
    )
    max_length: int | None = Field(None, ge=1, description="of text embeddings: tokens")

    @model_validator(mode="before")
    @classmethod
    def _sides(cls, values: Any) -> Any:
        match values:
            case {"size": [height, width], **rest}:
                return {"height": height, "width": width, **rest}
            case {"size": size, **rest}:
                return {"height": size, "width": size, **rest}
        return values


class ValidationSettings(Section):
    """Clips that are held back, and when the loss on them is told."""

    share: float = Field(
        0.0, ge=0, lt=1, description="of the source's clips, by their hash; 0: none, no validation"
    )
    every: int = Field(500, ge=1, description="steps between two looks")
    clips: int = Field(64, ge=1, description="that are looked at, at most")


class SamplesSettings(Section):
    """Videos of fixed prompts, to look at while it trains."""

    prompts: tuple[str, ...] | Annotated[int, Field(ge=0)] = Field(
        (),
        description="a list of them, or so many captions of clips that are held back; default: "
        "none, no samples",
    )
    every: int = Field(500, ge=1, description="steps between them; and at the end")
    format: Literal["gif", "mp4", "png"] = Field(
        "gif", description="of samples/step_000500.gif; png: some frames of each in a row"
    )
    steps: int = Field(30, ge=1, description="model calls of the sampler")
    guidance: float = Field(3.0, description="1: none")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise, the same for all prompts")
    first_frame: bool = Field(
        False,
        description="they go on from the first frames of the clips whose captions they are: of a "
        "model with `first_frame`, and a number of prompts",
    )
    vae: str | None = Field(None, description="the folder of the VAE that decodes them")
    text_encoder: str | None = Field(
        None, description="of stored embeddings: the folder of the encoder that made them"
    )
    tokenizer: str | None = Field(None, description="and its tokenizer's")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.first_frame and not isinstance(self.prompts, int):
            raise ValueError(
                "first_frame goes on from clips that are held back, and prompts are a list: set "
                "prompts to a number of such clips, or leave first_frame out"
            )
        if not isinstance(self.prompts, int) and not all(map(str.strip, self.prompts)):
            raise ValueError("prompts has one that is empty")
        return self
