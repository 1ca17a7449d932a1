"""`encode.first_frame`: the first frame by itself, beside the clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numbered import make
from tiny import KINDS, tiny

from manifests.shards import FIRST_FRAME, LATENTS
from stages.base import Context, Failed
from stages.encode import Encode, EncodeSettings
from stages.media.frames import read_clip
from stages.media.sampling import Sampling
from stages.vae.families import FAMILIES


@pytest.mark.parametrize("kind", ["sd", "wan", "ltx"])
def test_the_first_frame_is_encoded_as_a_clip_of_one(tmp_path: Path, kind: str) -> None:
    module = tiny(kind)
    module.save_pretrained(tmp_path / "vae")
    sampling = Sampling(fps=25, frames=9, size=64)
    settings = EncodeSettings(
        vae=str(tmp_path / "vae"), first_frame=True, batch_size=2, device="cpu"
    )
    stage = Encode(settings, Context(str(tmp_path), sampling=sampling))
    assert stage.adds.names == [*LATENTS.names, *FIRST_FRAME.names]
    paths = [make(tmp_path / f"{n}.mp4", 12 + n, 25) for n in range(3)]
    rows = [{"clip_id": str(path), "path": str(path), "start": 0.08, "end": None} for path in paths]
    model = stage.setup()
    made = stage.process(rows, model)
    for path, row in zip(paths, made, strict=True):
        assert isinstance(row, dict)
        shape = row["first_frame_latents_shape"]
        got = np.frombuffer(row["first_frame_latents"], np.float32).reshape(shape)
        picture = read_clip(str(path), sampling, 0.08, None).frames[0]
        x = torch.from_numpy(picture).float().permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            if FAMILIES[KINDS[kind][0]].video:
                wanted = module.encode(x[None, :, None]).latent_dist.parameters[0]
            else:
                wanted = module.encode(x[None]).latent_dist.parameters.transpose(0, 1)
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5, rtol=0)
        assert shape[1] == 1

    # Too little memory for it fails the clip, too.
    whole = model.module.encode

    def no_single(batch: torch.Tensor) -> object:
        if batch.dim() == 5 and batch.shape[2] == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(batch)

    model.module.encode = no_single
    failed = [isinstance(row, Failed) for row in stage.process(rows, model)]
    assert failed == [FAMILIES[KINDS[kind][0]].video] * 3


def test_without_it_nothing_is_added(tmp_path: Path) -> None:
    plain = Encode(EncodeSettings(), Context(str(tmp_path)))
    asked = Encode(EncodeSettings(first_frame=True), Context(str(tmp_path)))
    assert plain.adds is LATENTS and plain.fingerprint != asked.fingerprint
