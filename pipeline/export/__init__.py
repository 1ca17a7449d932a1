"""`vidpipe export`: stored latents and embeddings in the layouts of other trainers."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.export.base import Target
from pipeline.export.cogvideo import CogVideo
from pipeline.export.cogvideox_factory import CogVideoXFactory
from pipeline.export.diffusion_pipe import DiffusionPipe
from pipeline.export.fastvideo import FastVideo
from pipeline.export.finetrainers import Finetrainers
from pipeline.export.ltx import Ltx
from pipeline.export.musubi import Musubi

TARGETS: Mapping[str, type[Target]] = {
    cls.name: cls
    for cls in (
        Finetrainers,
        FastVideo,
        Musubi,
        CogVideoXFactory,
        CogVideo,
        Ltx,
        DiffusionPipe,
    )
}
