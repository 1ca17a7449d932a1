"""`vidpipe decode`: stored latents as pictures again, beside the frames that they were made of."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow.compute as pc

from manifests.schema import KEPT
from manifests.shards import LatentSpec, read_latents
from manifests.view import UnitView
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.index import told
from pipeline.plan import views
from stages.encode import Encode
from stages.media.frames import Clip
from stages.vae.likeness import decoded_again, likeness

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stages.vae.vae import Vae

SHEET = 8  # frames of a PNG


@dataclass(frozen=True)
class Found:
    """An encoded clip, and where its latents are."""

    clip: str
    shard: str
    row: int
    source: dict[str, Any]  # its row, as the encode stage was given it


@dataclass(frozen=True)
class Shown:
    """What a clip's latents came to."""

    clip: str
    psnr: float | None  # dB
    file: str | None
    message: str | None  # what seems to be wrong, or why there is no picture

    def to_json(self) -> dict[str, Any]:
        return {"clip_id": self.clip, "psnr": self.psnr, "file": self.file, "message": self.message}


def decode(
    pipeline: Pipeline, clips: Sequence[str], out: Path, png: bool = False, n: int = 1
) -> Iterator[Shown]:
    """Writes `out`/<clip>.mp4 (or .png) of each clip, its source on the left and its latents on the
    right. `clips`: ids or beginnings of ids; for none, `n` random ones.

    Raises ConfigError for an id that no encoded clip has, StageError where the VAE can't be loaded.
    """
    if "encode" not in pipeline.stages:
        raise ConfigError("there is no encode stage: `encode.enabled` is false")
    found = find(pipeline, clips, n)
    stage = cast(Encode, pipeline.stages["encode"])
    vae = stage.setup()
    out.mkdir(parents=True, exist_ok=True)
    for clip in found:
        yield _shown(pipeline, stage, vae, clip, out / f"{clip.clip}.{'png' if png else 'mp4'}")


def find(pipeline: Pipeline, clips: Sequence[str], n: int) -> list[Found]:
    """The encoded clips asked for, in that order, or `n` random ones. Raises ConfigError."""
    fits: dict[str, list[Found]] = {clip: [] for clip in clips}
    drawn: list[Found] = []
    seen = 0
    for view in views(pipeline):
        ids, rows = _encoded(view)
        for place, clip in enumerate(ids):
            for asked, there in fits.items():
                if clip.startswith(asked):
                    there += [_found(pipeline, view, clip, rows[place].as_py())]
            if not fits:
                # Reservoir sampling: each clip stays with the same chance, however many there are.
                seen += 1
                at = len(drawn) if len(drawn) < n else random.randrange(seen)
                if at < n:
                    drawn[at : at + 1] = [_found(pipeline, view, clip, rows[place].as_py())]
    if not fits and not drawn:
        raise ConfigError("no clip is encoded yet: `vidpipe run encode` first")
    return [_only(asked, there) for asked, there in fits.items()] or drawn


def _encoded(view: UnitView) -> tuple[list[str], Any]:
    """The ids of the unit's clips that have latents, and their rows in the view."""
    settled = view.settled("encode")
    rows = pc.indices_nonzero(pc.fill_null(pc.equal(settled.outcome, KEPT), False))
    return view.table.column("clip_id").take(rows).to_pylist(), rows


def _found(pipeline: Pipeline, view: UnitView, clip: str, row: int) -> Found:
    import pyarrow as pa

    stage = pipeline.stages["encode"]
    at = pa.array([row])
    place = view.settled("encode").take(at)
    columns = [*dict.fromkeys((*stage.reads, *stage.carries))]
    source = view.inputs("encode", at, columns).to_pylist()[0]
    return Found(clip, place.file.cast(pa.string())[0].as_py(), place.row[0].as_py(), source)


def _only(asked: str, there: list[Found]) -> Found:
    exact = [found for found in there if found.clip == asked]
    if len(exact or there) == 1:
        return (exact or there)[0]
    if there:
        some = ", ".join(found.clip for found in there[:3])
        raise ConfigError(f"{asked!r} begins the ids of {len(there)} clips ({some}, ...): say more")
    raise ConfigError(
        f"no encoded clip has an id that begins with {asked!r}: `vidpipe show encode` lists them, "
        "and says what became of the others"
    )


def _shown(pipeline: Pipeline, stage: Encode, vae: Vae, found: Found, file: Path) -> Shown:
    import torch

    spec = LatentSpec.from_json(told(pipeline, found.shard))
    (stored,) = read_latents(pipeline.config.workdir, found.shard, [found.row])
    kind: torch.dtype = getattr(torch, stored.dtype)
    latents = torch.frombuffer(bytearray(stored.data), dtype=kind).reshape(stored.shape)
    again = decoded_again(vae, latents, spec)
    if not isinstance(again, np.ndarray):
        return Shown(found.clip, None, None, again.message)
    source = _source(stage, found)
    if isinstance(source, str):
        write(file, again, _fps(spec))
        return Shown(found.clip, None, str(file), f"the source can't be read again: {source}")
    write(file, np.concatenate([source.frames, again], axis=2), source.fps)
    like = likeness(source.frames, again)
    return Shown(found.clip, like.psnr, str(file), _doubt(spec, vae) or like.fault)


def _source(stage: Encode, found: Found) -> Clip | str:
    """The clip's frames, read again, or why they can't be."""
    last = "it has other windows now"
    for clip in stage.read(found.source):
        if not isinstance(clip, Clip):
            last = clip.message
        elif stage.clip_id(found.source["clip_id"], clip) == found.clip:
            return clip
    return last


def _doubt(spec: LatentSpec, vae: Vae) -> str | None:
    if spec.vae_sha256 == vae.sha256:
        return None
    return f"its latents were made by other weights of {spec.vae} than those that are there now"


def _fps(spec: LatentSpec) -> float:
    return float(spec.sampling.get("fps") or 16.0)


def write(file: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Frames [n, height, width, 3] as a video, or as a .png of some, one below the other."""
    if file.suffix == ".png":
        from PIL import Image

        some = np.linspace(0, len(frames) - 1, min(SHEET, len(frames))).round().astype(int)
        Image.fromarray(np.concatenate(list(frames[some]))).save(file)
        return
    import av

    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    even = np.pad(frames, odd, mode="edge")  # as yuv420p wants it
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12"}
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
