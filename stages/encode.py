"""encode: frames by presentation time, then the VAE; moments into the shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from manifests.shards import LATENTS, LatentSpec
from stages.base import (
    Failed,
    Named,
    Outcome,
    Rejected,
    Resources,
    Row,
    Speed,
    Stage,
    alive,
)
from stages.files import CARRIED, clip_file
from stages.media.frames import Clip, TooShort, VideoError, read_clip
from stages.media.video import READING_MAY_PASS, Budget, DecodingSettings
from stages.models import model_identity, resolve
from stages.vae.families import shape_of
from stages.vae.vae import Encoded, Options, Vae

if TYPE_CHECKING:
    import torch

# Decoded clips that wait for the VAE, beside the batch that it has: bounds a worker's memory.
CLIPS_AHEAD = 4


class EncodeSettings(DecodingSettings):
    vae: Named[str] = Field("demo://vae", description="diffusers folder, hub id or demo://vae")
    revision: Named[str | None] = Field(None, description="of a hub id: branch, tag or commit")
    subfolder: Named[str | None] = Field(
        None, description="of the folder or hub id; a pipeline's own folder has it in `vae`"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the VAE and of the latents as stored"
    )
    moments: bool = Field(True, description="keep mean and log-variance; false: the mean alone")
    device: Speed[str] = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    pictures: Speed[int] = Field(
        64, ge=1, description="frames that go through a picture VAE at once"
    )
    channels_last: Speed[bool | None] = Field(
        None, description="memory format of the VAE; default: for picture VAEs, not for video VAEs"
    )
    compile: Speed[bool] = Field(
        False, description="torch.compile: a minute or more a worker at its start, then faster"
    )
    slicing: Speed[bool] = Field(
        False, description="a batch goes through the VAE clip by clip: less memory, slower"
    )
    tiling: bool = Field(
        False, description="large pictures in overlapping tiles: less memory, other latents"
    )
    threads: Speed[int] = Field(1, ge=1, description="decoding threads beside the VAE")


class Encode(Stage[EncodeSettings, Vae]):
    """Latents of each clip (`manifests.shards.LATENTS`), batched across clips."""

    name = "encode"
    Settings = EncodeSettings
    reads = ("content", "start", "end")
    carries = CARRIED
    adds = LATENTS
    after = ("filter",)
    default_batch = 1
    default_time_limit = 900.0  # a video VAE takes minutes for a long clip on a CPU
    transient = READING_MAY_PASS
    default_resources = Resources(cpus=1)

    @property
    def batch_size(self) -> int:
        """Rows given to process: several batches, so that decoding runs ahead of the VAE."""
        return max(16, 4 * self._vae_batch)

    @property
    def _vae_batch(self) -> int:
        return self.settings.batch_size or self.default_batch

    @property
    def accelerated(self) -> bool:
        return self.settings.device in ("auto", "cuda")

    def identity(self) -> dict[str, Any]:
        model = model_identity(self.settings.vae, self.settings.revision, self._subfolder)
        sampling = self.context.sampling.model_dump(mode="json")
        return {**super().identity(), "model": model, "sampling": sampling}

    @property
    def _subfolder(self) -> str | None:
        whole = Path(self.settings.vae, "model_index.json").is_file()
        return self.settings.subfolder or ("vae" if whole else None)

    def folder(self) -> str:
        """Where the VAE lies, fetched first if it has to be. Raises StageError."""
        return resolve(self.settings.vae, self.settings.revision, self._subfolder)

    def check(self) -> None:
        sampling = self.context.sampling
        shape_of(self.folder()).check(sampling.frames, sampling.height, sampling.width)

    def setup(self) -> Vae:
        s = self.settings
        options = Options(s.pictures, s.channels_last, s.compile, s.slicing, s.tiling)
        return Vae(self.folder(), s.dtype, s.device, options)

    def metadata(self, model: Vae) -> dict[str, Any]:
        spec = LatentSpec(
            vae=self.settings.vae,
            vae_class=model.shape.class_name,
            vae_sha256=model.sha256,
            fingerprint=self.fingerprint,
            moments=self.settings.moments and model.family.posterior,
            channels=model.channels,
            temporal=model.shape.temporal,
            spatial=model.shape.spatial,
            shift=model.shift,
            scale=model.scale,
            sampling=self.context.sampling.model_dump(mode="json"),
            constants=model.constants(),
        )
        return {"spec": spec.to_json()}

    def process(self, rows: list[Row], model: Vae) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(rows)
        ready: list[tuple[int, Clip]] = []
        for i, clip in enumerate(self._decoded(rows)):
            if isinstance(clip, Rejected | Failed):
                outcomes[i] = clip
                continue
            ready.append((i, clip))
            if len(ready) == self._vae_batch:
                self._encode(ready, model, outcomes)
                ready = []
        if ready:
            self._encode(ready, model, outcomes)
        return [outcome for outcome in outcomes if outcome is not None]

    def _decoded(self, rows: Sequence[Row]) -> Iterator[Clip | Rejected | Failed]:
        """The rows' frames in order, decoded by threads a few clips ahead of who takes them."""
        with ThreadPoolExecutor(self.settings.threads) as pool:
            waiting = iter(rows)
            futures = [
                pool.submit(self._read, r) for r in islice(waiting, CLIPS_AHEAD + self._vae_batch)
            ]
            while futures:
                yield futures.pop(0).result()
                futures += [pool.submit(self._read, row) for row in islice(waiting, 1)]

    def _read(self, row: Row) -> Clip | Rejected | Failed:
        budget = Budget(self.settings, self.name)
        try:
            with clip_file(row, self.context) as path:
                sampling = self.context.sampling
                return read_clip(path, sampling, row["start"], row["end"], budget=budget)
        except TooShort as error:
            return Rejected("too_short", str(error))
        except VideoError as error:
            return Failed(error.error, str(error))
        finally:
            alive()

    def _encode(
        self, ready: list[tuple[int, Clip]], model: Vae, outcomes: list[Outcome | None]
    ) -> None:
        clips = [clip for _, clip in ready]
        launched = self._launch(clips, model)
        for (i, _), outcome in zip(ready, self._fetch(clips, launched, model), strict=True):
            outcomes[i] = outcome

    def _launch(self, clips: Sequence[Clip], model: Vae) -> Encoded:
        """Has the VAE begin with clips of one shape. On CUDA it does not wait for it."""
        return model.encode(model.batch([clip.frames for clip in clips]), self.settings.moments)

    def _fetch(self, clips: Sequence[Clip], launched: Encoded, model: Vae) -> list[Row | Failed]:
        """The rows of these clips, once their latents are there."""
        return [
            one
            if isinstance(one, Failed)
            else {
                "latents": raw_bytes(one),
                "latents_shape": list(one.shape),
                "latents_dtype": str(one.dtype).removeprefix("torch."),
                "frame_times": [float(t) for t in clip.times],
            }
            for clip, one in zip(clips, model.fetch(launched), strict=True)
        ]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The values in C order, little-endian; numpy has no bfloat16, so they pass as uint8."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
