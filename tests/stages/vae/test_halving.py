from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered import make

from stages.base import Context, Failed
from stages.encode import Encode, EncodeSettings
from stages.media.sampling import Sampling
from stages.vae.halving import Halving, is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"


class Small:
    """Doubles numbers; more than `room` of them at once, or one of `heavy`, is too much."""

    def __init__(self, room: int, heavy: tuple[int, ...] = ()) -> None:
        self.room, self.heavy, self.sizes = room, heavy, list[int]()

    def __call__(self, items: list[int]) -> list[int]:
        self.sizes.append(len(items))
        if len(items) > self.room or set(items) & set(self.heavy):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore words")
        return [2 * i for i in items]


def test_what_does_not_fit_is_halved_and_the_size_that_fitted_is_kept() -> None:
    model, halving = Small(room=3), Halving()
    assert halving(model, list(range(16))) == [2 * i for i in range(16)]
    assert model.sizes == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    model.sizes.clear()
    assert halving(model, list(range(5)), size=4) == [0, 2, 4, 6, 8]
    assert model.sizes == [2, 2, 1], "nothing is tried that was too much before"


def test_each_shape_has_a_size_of_its_own() -> None:
    large, small, halving = Small(room=1), Small(room=8), Halving()
    halving(large, list(range(4)), shape=(81, 480, 832))
    assert halving(small, list(range(8)), shape=(17, 64, 64)) == [2 * i for i in range(8)]
    halving(large, list(range(2)), shape=(81, 480, 832))
    assert large.sizes == [4, 2, 1, 1, 1, 1, 1, 1] and small.sizes == [8]
    assert halving.most == {(81, 480, 832): 1}


def test_batches_are_no_larger_than_asked() -> None:
    model = Small(room=100)
    assert Halving()(model, list(range(7)), size=3) == [0, 2, 4, 6, 8, 10, 12]
    assert model.sizes == [3, 3, 1]
    assert Halving()(model, [], size=3) == []


def test_one_that_does_not_fit_alone_costs_itself_only() -> None:
    model, halving = Small(room=8, heavy=(0,)), Halving()
    first, *others = halving(model, list(range(9)))
    assert isinstance(first, Failed) and first.error == "out_of_memory"
    assert first.message == (
        "it does not fit the memory: CUDA out of memory. Tried to allocate 8 GiB"
    )
    assert others == [2 * i for i in range(1, 9)]
    assert not halving.most, "the others fitted together"
    everything = Halving()(Small(room=0), [1, 2, 3])
    assert [type(e) for e in everything] == [Failed] * 3


def test_other_errors_are_no_lack_of_memory() -> None:
    assert is_out_of_memory(RuntimeError(CPU))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match in memory format"))

    def broken(items: list[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving()(broken, [1, 2])


def test_tensors_of_the_batch_that_failed_are_let_go() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def run(part: torch.Tensor) -> torch.Tensor:
        assert not any(ref() is not None for ref in seen)
        made = part.clone()
        seen.append(weakref.ref(made))
        if len(part) > 2:
            raise RuntimeError(CPU)
        return part * 2

    gc.disable()  # reference counts alone must do
    try:
        got = Halving()(run, torch.arange(8))
    finally:
        gc.enable()
    assert torch.equal(torch.stack(got), torch.arange(8) * 2)
    assert len(seen) == 6


def short(encode: Callable[[torch.Tensor], Any], most: int) -> Callable[[torch.Tensor], Any]:
    def limited(batch: torch.Tensor) -> Any:
        if len(batch) > most:
            raise RuntimeError(CPU)
        return encode(batch)

    return limited


@pytest.mark.parametrize("vae", ["sd", "wan"])
def test_a_real_vae_short_of_memory_gives_the_same_latents(tmp_path: Path, vae: str) -> None:
    from tiny import tiny

    tiny(vae).save_pretrained(tmp_path / "vae")
    sampling = Sampling(fps=25, frames=5, size=64)
    settings = EncodeSettings(vae=str(tmp_path / "vae"), batch_size=4, device="cpu")
    stage = Encode(settings, Context(str(tmp_path), sampling=sampling))
    paths = [make(tmp_path / f"{n}.mp4", 10 + n, 25) for n in range(4)]
    rows = [
        {"clip_id": str(n), "path": str(path), "start": n / 25, "end": None}
        for n, path in enumerate(paths)
    ]
    roomy, tight, none = stage.setup(), stage.setup(), stage.setup()
    whole = stage.process(rows, roomy)
    tight.module.encode = short(tight.module.encode, 2)
    halved = stage.process(rows, tight)
    assert set(tight._halving.most.values()) == {2}
    for one, other in zip(whole, halved, strict=True):
        a, b = (np.frombuffer(row.pop("latents"), np.float32) for row in (one, other))
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
        assert one == other
    none.module.encode = short(none.module.encode, 0)
    assert [o.error for o in stage.process(rows, none)] == ["out_of_memory"] * 4


def test_clip_short_of_memory_gives_the_same_scores() -> None:
    from types import SimpleNamespace

    from stages.aesthetics import Aesthetics

    model = Aesthetics.__new__(Aesthetics)
    model.device, model.pictures, model._halving = "cpu", 64, Halving()
    model.weight, model.bias = torch.tensor([0.5, -1.0, 2.0]), torch.tensor(5.0)
    most = 100

    def features(pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(pooler_output=short(lambda x: x.mean((2, 3)), most)(pixel_values))

    model.clip = SimpleNamespace(get_image_features=features)
    clips = list(torch.rand(6, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    whole = model.scores(clips)
    most = 3
    assert model.scores(clips) == pytest.approx(whole, abs=1e-6)
    assert model._halving.most == {None: 2}
    most = 0
    assert {s.error for s in model.scores(clips)} == {"out_of_memory"}
