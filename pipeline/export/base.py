"""What the layouts have in common: a clip with all that is stored of it, and what a trainer needs.

A layout is a list of files, each made of one clip's latents, text or video (or of many clips'), and
a way to write one. Which of them are written, and when, is `pipeline.export.exporting`.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from manifests.schema import digest
from manifests.shards import Embedding, Index, Latent, LatentSpec
from pipeline.config import ConfigError

if TYPE_CHECKING:
    import torch

Kind = Literal["latents", "first_frame", "text", "video"]
WAN, COGVIDEOX = "AutoencoderKLWan", "AutoencoderKLCogVideoX"
LTX, HUNYUAN = "AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo"
UMT5, T5 = "UMT5EncoderModel", "T5EncoderModel"


class ExportError(ConfigError):
    """What is stored does not suit the trainer; the message says why and what to do."""


@dataclass(frozen=True)
class Options:
    """What the command line has of each export."""

    dtype: str | None = None  # of tensors, where the trainer takes any; None: as stored
    copy: bool = False  # copy videos rather than link them
    model: str | None = None  # cogvideo: the trainer's own name of the model


@dataclass(frozen=True)
class Wants:
    """What a trainer wants with latents of one VAE."""

    encoder: str | None  # class of the text encoder; None: the trainer embeds captions itself
    padding: tuple[str, ...] = ()
    moments: bool = True  # the posterior is needed; False: its mean is enough


@dataclass(frozen=True)
class Video:
    """The file that a clip is shown by, or a section of."""

    path: str
    content: str  # sha256
    section: bool


@dataclass(frozen=True)
class Entry:
    """A clip of the index. `number` is its own for as long as it stays in the export, and below the
    number of clips; `video` only where the layout has videos."""

    clip_id: str
    caption: str  # without secrets
    shard: str
    row: int
    shape: tuple[int, ...]
    text_key: str | None
    text_shard: str | None
    text_row: int | None
    number: int = 0
    video: Video | None = None

    @property
    def line(self) -> str:
        """The caption on one line, as files of prompts have it."""
        return " ".join(self.caption.split())


@dataclass(frozen=True)
class Item:
    """A file of a layout, by its name under the export's folder. It has to be written anew when
    `state` changes: what of its clips is in it."""

    name: str
    kinds: tuple[Kind, ...]
    entries: tuple[Entry, ...]
    state: str


@dataclass(frozen=True)
class Clip:
    """An entry with what is stored of it."""

    entry: Entry
    spec: LatentSpec
    fps: float  # of the frames that were encoded
    latent: Latent | None = None
    text: Embedding | None = None
    first: Latent | None = None  # of the first frame alone

    @property
    def moments(self) -> torch.Tensor:
        """As stored: (2C, F, H, W), or (C, F, H, W) where the mean alone is kept."""
        return self._tensor(self.latent)

    @property
    def first_frame(self) -> torch.Tensor:
        """The same of the first frame alone: one latent frame."""
        return self._tensor(self.first)

    def _tensor(self, stored: Latent | None) -> torch.Tensor:
        if stored is None:
            raise ExportError(f"latents of clip {self.entry.clip_id} were not read")
        return tensor(stored.data, stored.dtype, stored.shape)

    @property
    def mean(self) -> torch.Tensor:
        """The posterior's mean (C, F, H, W), in float32."""
        return self.moments[: self.spec.channels].float()

    @property
    def sample(self) -> torch.Tensor:
        """A sample (C, F, H, W) of the posterior, float32, unscaled: the same each time, drawn by
        the clip's id."""
        import torch

        mean, logvar = self.moments.float().chunk(2)
        key = hashlib.blake2b(f"export/{self.entry.clip_id}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
        noise = torch.randn(mean.shape, generator=generator)
        return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise  # diffusers' bounds

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """As a model of this VAE trains on them: (latents - shift) x scale, per channel."""
        import torch

        shift, scale = (
            torch.tensor(v).view(-1, 1, 1, 1) for v in (self.spec.shift, self.spec.scale)
        )
        return (latents - shift) * scale

    @property
    def embedding(self) -> torch.Tensor:
        """The caption's, as stored: (tokens, width)."""
        if self.text is None:
            raise ExportError(f"the embedding of clip {self.entry.clip_id} was not read")
        return tensor(self.text.data, self.text.dtype, self.text.shape)

    @property
    def own_tokens(self) -> int:
        """How many rows of the embedding are no padding."""
        return 0 if self.text is None else self.text.tokens

    @property
    def pixels(self) -> tuple[int, int, int]:
        """Frames, height and width of the video that the latents stand for."""
        return pixels(self.entry.shape, self.spec)


class Target(ABC):
    """The layout of one trainer, over one index."""

    name: ClassVar[str]
    about: ClassVar[str]  # one line, with the trainer's repository
    version: ClassVar[int] = 1  # bump when the same data gives other files
    vaes: ClassVar[Mapping[str, Wants]] = {}  # by class; empty: it makes its own latents
    one_shape: ClassVar[bool] = False
    videos: ClassVar[bool] = False
    numbered: ClassVar[bool] = False  # files are named by `Entry.number`
    dtypes: ClassVar[bool] = True  # tensors may be of any dtype

    def __init__(self, index: Index, options: Options, folder: Path) -> None:
        self.index, self.options, self.spec = index, options, index.spec
        self.folder = folder

    @property
    def wants(self) -> Wants:
        return self.vaes[self.spec.vae_class]

    @cached_property
    def layout(self) -> str:
        """Names all that decides the files beside the clips."""
        text = self.index.text.to_json() if self.index.text else None
        parts = [self.name, self.version, vars(self.options), self.spec.to_json(), text]
        return digest(parts)

    def check(self) -> None:
        """Raises ExportError where what is stored does not suit."""
        if self.options.dtype and not self.dtypes:
            raise ExportError(f"{self.name} reads one type of tensors only: leave --dtype out")
        if not self.vaes:
            return
        if self.spec.vae_class not in self.vaes:
            raise ExportError(
                f"{self.name} trains on latents of {' or '.join(self.vaes)}, and these are of an "
                f"{self.spec.vae_class} ({self.spec.vae}): name such a VAE in encode.vae and "
                "`vidpipe run encode`"
            )
        if self.wants.moments and not self.spec.moments:
            raise ExportError(
                f"{self.name} needs the posterior, and only its mean was kept: set encode.moments "
                "to true and `vidpipe run encode`"
            )
        shapes = self.shapes()
        if self.one_shape and len(shapes) > 1:
            raise ExportError(
                f"{self.name} trains on clips of one shape, and the latents have {len(shapes)}: "
                f"{list(shapes[0])} and {list(shapes[1])} among them. Export each from a sampling "
                "of its own"
            )
        self._check_text()

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all latents, as stored."""
        return sorted({tuple(s) for s in self.index.table.column("shape").to_pylist()})

    def _check_text(self) -> None:
        wants, text = self.wants, self.index.text
        if wants.encoder is None:
            return
        remedy = f"set `embed: {{encoder: ..., padding: {wants.padding[0]}}}`, `vidpipe run embed`"
        if text is None:
            raise ExportError(
                f"{self.name} needs text embeddings of a {wants.encoder}, and none are stored: "
                f"{remedy}"
            )
        if text.encoder_class != wants.encoder:
            raise ExportError(
                f"{self.name} needs embeddings of a {wants.encoder} with latents of this VAE, and "
                f"these are of a {text.encoder_class} ({text.encoder}): {remedy}"
            )
        if text.padding not in wants.padding:
            raise ExportError(
                f"{self.name} needs embeddings with embed.padding {' or '.join(wants.padding)}, and"
                f" these are with {text.padding}: {remedy}"
            )

    @abstractmethod
    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        """The files of these clips, which are all clips of one latent shard."""

    @abstractmethod
    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        """Writes the file of `item` to `path`, which is another name at first."""

    def accepts(self, entry: Entry) -> str | None:
        """Why a clip can't be in the layout, in a few words; None: it can."""
        return None

    def lists(self, entries: Iterable[Entry]) -> Mapping[str, Iterable[str]]:
        """Files over all clips, by name: their text in pieces."""
        return {}

    def item(self, name: str, entry: Entry, *kinds: Kind) -> Item:
        """A file of one clip."""
        return Item(name, kinds, (entry,), self.state([entry], kinds))

    def state(self, entries: Sequence[Entry], kinds: Sequence[Kind]) -> str:
        """Changes with whatever a file of `kinds` has of these clips."""
        parts: list[Any] = [self.layout]
        for entry in entries:
            own: dict[Kind, list[Any]] = {
                "latents": [entry.clip_id, entry.shard, entry.row],
                "first_frame": [entry.clip_id, entry.shard, entry.row],
                "text": [entry.clip_id, entry.caption, entry.text_key],
                "video": [entry.clip_id, entry.video and [entry.video.path, entry.video.content]],
            }
            parts += [own[kind] for kind in kinds]
        return digest(parts)

    def cast(self, values: torch.Tensor, stored: str) -> torch.Tensor:
        """In the dtype asked for, or as what it was made of is stored; a tensor of its own."""
        import torch

        dtype: torch.dtype = getattr(torch, self.options.dtype or stored)
        return values.to(dtype).contiguous().clone()

    def latents(self, clip: Clip, values: torch.Tensor) -> torch.Tensor:
        stored = clip.latent or clip.first
        return self.cast(values, stored.dtype if stored else "float32")

    def text(self, clip: Clip, values: torch.Tensor) -> torch.Tensor:
        return self.cast(values, clip.text.dtype if clip.text else "float32")


def pixels(shape: Sequence[int], spec: LatentSpec) -> tuple[int, int, int]:
    """Frames, height and width of a video whose latents have this shape (C, F, H, W)."""
    _, latent, height, width = shape
    frames = (latent - 1) * spec.temporal + 1
    if spec.vae_class == COGVIDEOX and latent % 2 == 0:
        frames = latent * spec.temporal  # it takes 8 frames at once, with or without a first one
    return frames, height * spec.spatial, width * spec.spatial


def tensor(data: memoryview, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(tuple(shape))


def save(value: Any, path: Path) -> None:
    """What `torch.load(weights_only=True)` reads: tensors, numbers, dictionaries."""
    import torch

    # In memory first: torch has no word for a disk that is full.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A file of safetensors."""
    from safetensors.torch import save as as_bytes

    # Not by its own `save_file`, which makes files that nobody else may read.
    path.write_bytes(as_bytes(tensors, metadata))


def bring(source: str, path: Path, copy: bool) -> None:
    """The video as `path`: a hard link, a symbolic one where that can't be, or a copy."""
    source = os.path.realpath(source)  # a link of a relative link would lead nowhere
    if not copy:
        for link in (os.link, os.symlink):
            try:
                link(source, path)
                return
            except OSError:
                continue  # another file system, or one without links
    shutil.copyfile(source, path)
