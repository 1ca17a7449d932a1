"""Where the bytes of a batch lie: read to their places, never shared with another batch."""

from __future__ import annotations

import gc
import time
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from manifests.shards import Latent
from trainer.data import Loader
from trainer.order import Position
from trainer.posterior import Pool, Stack


def latent(values: np.ndarray[Any, Any], dtype: str = "float32") -> Latent:
    return Latent("clip", values.reshape(-1).view(np.uint8).data, values.shape, dtype)


def test_memory_comes_back_when_nobody_has_a_part_of_it() -> None:
    pool = Pool(most=200)
    first = pool.take(100)
    where, part = first.data_ptr(), first.view(10, 10)[3].numpy()[2:4]
    del first
    gc.collect()
    other = pool.take(100)
    assert other.data_ptr() != where, "a view is still there"
    del part
    gc.collect()
    assert pool.take(100).data_ptr() == where
    many = [pool.take(100) for _ in range(4)]
    del many
    gc.collect()
    assert pool._waiting == 200 == sum(len(free) * 100 for free in pool._free.values())


def test_clips_of_another_type_or_place_are_copied() -> None:
    draw = np.random.default_rng(0)
    a, b = (draw.random((2, 1, 2, 2), np.float32) for _ in range(2))
    half = b.astype(np.float16)
    pool = Pool(1 << 20)
    stack = Stack(2, pool)
    room = stack.room(0, 32)
    assert room is not None and stack.room(1, 16) is None
    room[:] = a.reshape(-1).view(np.uint8).data
    # Read to its place, in another type to memory of its own: float32 holds both.
    rows = [Latent("a", room, a.shape, "float32"), latent(half, "float16")]
    mixed = stack.values(rows, ["a", "b"])
    assert mixed.dtype == torch.float32
    assert np.array_equal(mixed.numpy(), np.stack([a, half.astype(np.float32)]))
    # Nothing was read to its place.
    apart = Stack(2, pool).values([latent(a), latent(b)], ["a", "b"])
    assert np.array_equal(apart.numpy(), np.stack([a, b]))


def test_who_writes_into_a_batch_changes_no_other(make_index: Any, settings_of: Any) -> None:
    """All of it fits into memory, so that a row serves several epochs; a batch is larger than the
    index, so that it has clips twice."""
    made = make_index(sizes=(3, 2))
    loader = Loader(made.open(), settings_of(made, batch_size=8))
    visits = 0
    with closing(loader.batches(loader.start())) as batches:
        for batch in islice(batches, 6):
            for clip, stored in zip(batch.clip_ids, batch.stored):
                want = np.concatenate(made.clips[clip]).reshape(stored.shape)
                assert np.array_equal(stored.numpy(), want)
                stored.fill_(7)
                visits += 1
    assert visits == 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_batches_that_are_ready_are_pinned(
    dtype: str, make_index: Any, settings_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch rounds such memory up: what is held ahead is not to be in it."""
    made = make_index(sizes=(20, 20), dtype=dtype, first_frame=True)
    settings = settings_of(made, batch_size=2, read_ahead=3)
    with closing(Loader(made.open(), settings).batches(Position(0, (0,), 0, ""))) as batches:
        want = [batch.stored for batch in islice(batches, 6)]
    plain, asked = torch.empty_like, []

    def locked(values: torch.Tensor, pin_memory: bool) -> torch.Tensor:
        """As where there is a GPU."""
        assert pin_memory
        asked.append(values.nbytes)
        return plain(values)

    monkeypatch.setattr(torch, "empty_like", locked)
    loader = Loader(made.open(), settings, pin=True)
    assert loader.memory > 20 * want[0].nbytes, "all is held ahead"
    with closing(loader.batches(Position(0, (0,), 0, ""))) as batches:
        found = []
        for number in range(1, 7):
            found.append(next(batches).stored)
            deadline = time.monotonic() + 60
            while len(asked) < number + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert asked == [want[0].nbytes] * (number + 3)
    assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))
