"""encode: frames by presentation time, then the VAE; moments into the shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
from pydantic import BeforeValidator, Field

from manifests.schema import child_id
from manifests.shards import FIRST_FRAME, LATENTS, LatentSpec
from stages.ahead import ahead
from stages.base import (
    Context,
    Failed,
    Named,
    Outcome,
    Rejected,
    Resources,
    Row,
    RowStage,
    Speed,
    StageError,
    alive,
    spent,
    tell,
)
from stages.devices import check_device
from stages.files import CARRIED, clip_file
from stages.media import backends
from stages.media.frames import Clip, Unsuited, read_clips
from stages.media.video import READING_MAY_PASS, Budget, DecodingSettings, VideoError
from stages.models import model_identity, resolve
from stages.vae.batches import Answer, Gathered, Waiting
from stages.vae.families import shape_of
from stages.vae.likeness import decoded_again, likeness
from stages.vae.trial import MOST
from stages.vae.vae import Encoded, Options, Vae

if TYPE_CHECKING:
    import torch

    from stages.media.picture import Pixels


Decoded = Clip | Rejected | Failed
BESIDE = "See it beside its source: `vidpipe decode"


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


class EncodeSettings(DecodingSettings):
    vae: Named[str] = Field("demo://vae", description="diffusers folder, hub id or demo://vae")
    revision: Named[str | None] = Field(None, description="of a hub id: branch, tag or commit")
    subfolder: Named[str | None] = Field(
        None, description="of the folder or hub id; a pipeline's own folder has it in `vae`"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the VAE and of the latents as stored"
    )
    backend: backends.Name = Field(
        "pyav", description="decoder; for where decord and torchcodec fail, see docs/stages.md"
    )
    batch_size: Annotated[Speed[int | None], BeforeValidator(_auto)] = Field(
        None,
        ge=1,
        description="clips given to the VAE at once; auto: 1 on a CPU, found by trial on a GPU",
    )
    moments: bool = Field(True, description="keep mean and log-variance; false: the mean alone")
    first_frame: bool = Field(
        False, description="also the first frame by itself, as image-to-video models take it"
    )
    device: Speed[str] = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    pictures: Speed[int] = Field(
        64, ge=1, description="frames that go through a picture VAE at once"
    )
    channels_last: Speed[bool | None] = Field(
        None, description="memory format on a GPU; default: for picture VAEs, not for video VAEs"
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
    threads: Speed[int | None] = Field(
        None,
        ge=1,
        description="decoding threads beside the VAE; default: the worker's cores, 1 on a CPU",
    )
    check_clips: Speed[int] = Field(
        2,
        ge=0,
        description="random clips of a run that are decoded again, to see that they are right",
    )
    ahead: Speed[int] = Field(
        1 << 30, ge=1, description="bytes of decoded frames that may wait for the VAE"
    )


class Encode(RowStage[EncodeSettings, Vae]):
    """Latents of each clip (`manifests.shards.LATENTS`), batched across clips."""

    name = "encode"
    version = 2  # 2: chroma as fine as luma; numbers in float32 before half precision
    Settings = EncodeSettings
    reads = ("content", "start", "end")
    carries = CARRIED
    adds = LATENTS
    after = ("filter",)
    default_time_limit = 900.0  # a video VAE takes minutes for a long clip on a CPU
    transient = READING_MAY_PASS
    default_resources = Resources(cpus=1)

    def __init__(self, settings: EncodeSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.splits = context.sampling.splits
        if settings.first_frame:
            self.adds = pa.schema([*LATENTS, *FIRST_FRAME])

    @property
    def accelerated(self) -> bool:
        return self.settings.device.startswith(("auto", "cuda"))

    def identity(self) -> dict[str, Any]:
        model = model_identity(self.settings.vae, self.settings.revision, self._subfolder)
        sampling = self.context.sampling.identity()
        return {**super().identity(), "model": model, "sampling": sampling}

    @property
    def _subfolder(self) -> str | None:
        whole = Path(self.settings.vae, "model_index.json").is_file()
        return self.settings.subfolder or ("vae" if whole else None)

    def folder(self) -> str:
        """Where the VAE lies, fetched first if it has to be. Raises StageError."""
        return resolve(self.settings.vae, self.settings.revision, self._subfolder)

    def check(self) -> None:
        vae = shape_of(self.folder())
        sampling = self.context.sampling
        for number, shape in enumerate(sampling.shapes):
            bucket = number if sampling.buckets else None
            vae.check(shape.frames, shape.height, shape.width, bucket)
        self._check_backend()

    def _check_backend(self) -> None:
        if lacking := backends.missing(self.settings.backend):
            raise StageError(f"encode.backend: {lacking}")

    def check_here(self) -> None:
        check_device(self.settings.device)

    def setup(self) -> Vae:
        self._check_backend()  # here too: a worker's machine may lack what the driver's has
        s = self.settings
        options = Options(s.pictures, s.channels_last, s.compile, s.slicing, s.tiling)
        return Vae(self.folder(), s.dtype, s.device, options)

    @property
    def checks(self) -> int:
        return self.settings.check_clips

    def check_rows(self, number: int, rows: int, model: Vae) -> None:
        model.checks.ask(number, rows)

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

    def answers(self, rows: Iterable[Row], model: Vae) -> Generator[tuple[int, Outcome]]:
        """The outcomes of rows by their numbers. Threads decode ahead of the VAE; batches are made
        in the rows' order, so they are the same each time."""
        size, most = self._batch(model)
        threads = self.settings.threads or model.decoding_threads
        answers: dict[int, Answer] = {}

        def noted() -> Iterator[Row]:
            for number, row in enumerate(rows):
                answers[number] = Answer(row["clip_id"])
                yield row

        decoded = ahead(
            noted(),
            self.read,
            lambda clip: clip.frames.nbytes if isinstance(clip, Clip) else 0,
            threads=threads,
            depth=threads + 2 * most,
            most=self.settings.ahead,
        )
        gathered, flight = Gathered(size, self.settings.ahead), Flight(self, model)
        with closing(decoded):
            for number, clip in self._awaited(decoded, model):
                answer = answers[number]
                if isinstance(clip, Clip):
                    for batch in gathered.add(answer.next(clip)):
                        flight.launch(batch)
                elif clip is None:
                    answer.ended = True
                else:
                    answer.verdict = clip
                    model.checks.passed()
                yield from self._whole(answers)
        for batch in gathered.rest():
            flight.launch(batch)
        flight.land()
        yield from self._whole(answers)

    def _batch(self, model: Vae) -> tuple[Callable[[tuple[int, ...]], int], int]:
        """How many clips of a shape the VAE gets at once, and the most that may be."""
        chosen = self.settings.batch_size
        if chosen is not None:
            return lambda shape: chosen, chosen

        def tried(shape: tuple[int, ...]) -> int:
            with _starting():
                return model.best_batch(shape)

        return tried, 1 if model.device.type == "cpu" else MOST

    def _whole(self, answers: dict[int, Answer]) -> Iterator[tuple[int, Outcome]]:
        """Takes the answers that are complete out of `answers`."""
        for number in [number for number, answer in answers.items() if answer.whole]:
            made = answers.pop(number).made()
            yield number, made[0] if isinstance(made, list) and not self.splits else made

    def clip_id(self, row: str, clip: Clip) -> str:
        """Of a clip that was decoded of a row."""
        return child_id(row, float(clip.start), float(clip.end)) if self.splits else row

    def _awaited(
        self, decoded: Iterator[tuple[int, Decoded | None]], model: Vae
    ) -> Iterator[tuple[int, Decoded | None]]:
        """What was decoded; the time for which the VAE has nothing to do meanwhile is told."""
        while True:
            began = time.perf_counter()
            item = next(decoded, None)
            if model.idle():
                spent("wait", time.perf_counter() - began)
            if item is None:
                return
            yield item

    def read(self, row: Row) -> Generator[Decoded]:
        """The clips that stand for a row, decoded, or why there are none."""
        budget = Budget(self.settings, self.name)
        try:
            with clip_file(row, self.context) as path:
                for clip in read_clips(
                    path,
                    self.context.sampling,
                    row["start"],
                    row["end"],
                    clip=row["clip_id"],
                    backend=backends.named(self.settings.backend),
                    budget=budget,
                ):
                    with budget.waiting():  # for the VAE, while several windows are ahead of it
                        yield clip
        except Unsuited as error:
            yield Rejected(error.reason, str(error))
        except VideoError as error:
            yield Failed(error.error, str(error))
        finally:
            alive()


@contextmanager
def _starting() -> Iterator[None]:
    """What a worker does once or twice, however many clips it gets."""
    began = time.perf_counter()
    yield
    spent("start", time.perf_counter() - began)


class Flight:
    """The batch that the VAE has: on a GPU it is fetched only when the next one is on its way, so
    that the device always has something to do."""

    def __init__(self, stage: Encode, model: Vae) -> None:
        self._stage, self._settings, self._model = stage, stage.settings, model
        self._flying: tuple[list[Waiting], list[Encoded]] | None = None

    def launch(self, batch: list[Waiting]) -> None:
        model, moments = self._model, self._settings.moments
        frames = model.batch([each.clip.frames for each in batch])
        launched = [model.encode(frames, moments)]
        if self._settings.first_frame:
            launched.append(model.encode(frames[:, :1], moments))
        self.land()
        self._flying = batch, launched

    def land(self) -> None:
        if self._flying is None:
            return
        batch, launched = self._flying
        self._flying = None
        fetched = (self._model.fetch(encoded) for encoded in launched)
        for waiting, *latents in zip(batch, *fetched, strict=True):
            failed = next((one for one in latents if isinstance(one, Failed)), None)
            if failed is not None:
                waiting.settle(failed)
                continue
            clip = self._stage.clip_id(waiting.answer.clip, waiting.clip)
            waiting.settle({"clip_id": clip, **columns(waiting.clip, *latents)})
            with _starting():
                self._look_at(clip, waiting.clip.frames, latents[0])

    def _look_at(self, clip: str, frames: Pixels, latents: torch.Tensor) -> None:
        """Decodes a few of a run's clips again, and tells how like their source they are."""
        model = self._model
        if not model.checks.due():
            return
        spec = LatentSpec.from_json(self._stage.metadata(model)["spec"])
        again = decoded_again(model, latents, spec)
        if isinstance(again, Failed):
            tell(f"encode: clip {clip} was not looked at: decoded again, {again.message}")
            return
        like = likeness(frames, again)
        tell(f"encode: clip {clip}, decoded again, has a PSNR of {like.psnr:.1f} dB")
        if like.fault:
            tell(
                f"warning: latents of clip {clip} do not look like it: {like.psnr:.1f} dB, and "
                f"{like.fault}. {BESIDE} {clip}`"
            )


def columns(clip: Clip, latents: torch.Tensor, first: torch.Tensor | None = None) -> Row:
    """What is stored of an encoded clip; `first`: the latents of its first frame alone."""
    made = {
        "latents": raw_bytes(latents),
        "latents_shape": list(latents.shape),
        "latents_dtype": str(latents.dtype).removeprefix("torch."),
        "frame_times": [float(t) for t in clip.times],
        "latents_fps": float(clip.fps),
        "window_start": float(clip.start),
        "window_end": float(clip.end),
    }
    if first is None:
        return made
    one = {
        "first_frame_latents": raw_bytes(first),
        "first_frame_latents_shape": list(first.shape),
    }
    return made | one


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The values in C order, little-endian; numpy has no bfloat16, so they pass as uint8."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
