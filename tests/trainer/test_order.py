"""The order apart from shards and latents: what every process is given, whatever their number."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.order import Order, Position, due, epoch_order

SHAPES = ([8, 4, 2, 2], [8, 4, 2, 4], [8, 8, 2, 2])
Visits = dict[int, list[tuple[int, int]]]  # of each bucket


def order(sizes: list[int], kinds: list[int], window: int = 16, lanes: int = 4) -> Order:
    """Over shards of the sizes given; clips take the shapes of `kinds` in turn."""
    shards = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    shapes = [SHAPES[kind] for kind, _ in zip(itertools.cycle(kinds), shards)]
    column = pa.chunked_array([pa.array(shapes, pa.list_(pa.int32()))])
    return Order(map(str, range(len(shards))), shards, column, window, 1 << 40, lanes)


def walk(
    made: Order, start: Position, steps: int, batch: int, world: int, seen: Visits
) -> Position:
    """Takes steps on all processes, adds their visits to `seen` in the streams' order."""
    ranks = [
        list(itertools.islice(made.steps(start, batch, r, world), steps)) for r in range(world)
    ]
    position = start
    for together in zip(*ranks):
        (bucket,) = {step.bucket for step in together}
        assert {len(step.visits) for step in together} == {batch}
        assert len({step.position for step in together}) == 1
        first = position.given[bucket]
        numbered = {}
        for rank, step in enumerate(together):
            numbers = [n for n in range(first, first + batch * world) if n % world == rank]
            numbered |= dict(zip(numbers, step.visits, strict=True))
        seen[bucket] += [numbered[n] for n in sorted(numbered)]
        position = together[0].position
    return position


shards = st.lists(st.integers(1, 12), min_size=1, max_size=8)
kinds = st.lists(st.integers(0, 2), min_size=1, max_size=5)
phases = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12)), min_size=1, max_size=4
)


@settings(deadline=None)
@given(shards, kinds, phases, st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
def test_stopped_anywhere_and_gone_on_with_any_number_of_processes(
    sizes: list[int],
    kinds: list[int],
    phases: list[tuple[int, int, int]],
    window: int,
    lanes: int,
    seed: int,
) -> None:
    """Phases of (processes, batch, steps): each goes on where the last one stopped. What comes is
    what one process alone gets with batch 1, and every clip comes once an epoch."""
    made = order(sizes, kinds, window, lanes)
    seen: Visits = defaultdict(list)
    position = made.start(seed)
    for world, batch, steps in phases:
        kept = Position.from_json(position.to_json())
        fresh = order(sizes, kinds, window, lanes)
        position, note = fresh.resume(kept, seed)
        assert note == ""
        position = walk(fresh, position, steps, batch, world, seen)
    alone: Visits = defaultdict(list)
    start = made.start(seed)
    while any(len(alone[bucket]) < len(visits) for bucket, visits in seen.items()):
        start = walk(made, start, 1, 1, 1, alone)
    for bucket, visits in seen.items():
        assert visits == alone[bucket][: len(visits)]
        assert position.given[bucket] == len(visits)
        size = made.sizes[bucket]
        for first in range(0, len(visits), size):
            epoch = visits[first : first + size]
            assert {e for e, _ in epoch} == {first // size}
            assert len(set(epoch)) == len(epoch)
        whole = visits[: len(visits) // size * size]
        assert all(n == len(whole) // size for n in Counter(clip for _, clip in whole).values())
    clips = {clip for visits in alone.values() for _, clip in visits}
    assert clips <= set(range(made.total))
    assert position.epoch == max((v[-1][0] for v in seen.values() if v), default=0)


@given(sizes=shards, world=st.integers(1, 4), lanes=st.integers(1, 8))
def test_with_one_shape_the_order_is_the_same_as_a_whole(
    sizes: list[int], world: int, lanes: int
) -> None:
    one, other = order(sizes, [0], lanes=lanes), order(sizes, [0], lanes=lanes)
    alone: Visits = defaultdict(list)
    shared: Visits = defaultdict(list)
    walk(one, one.start(7), 6 * world, 2, 1, alone)
    walk(other, other.start(7), 6, 2, world, shared)
    assert alone == shared


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=7),
    steps=st.lists(st.integers(1, 64), min_size=1, max_size=3),
)
def test_every_bucket_keeps_its_share_at_every_moment(sizes: list[int], steps: list[int]) -> None:
    given = [0] * len(sizes)
    for step, _ in zip(itertools.cycle(steps[:1]), range(300)):
        given[due(given, sizes, step)] += step
        shares = [size * sum(given) / sum(sizes) for size in sizes]
        assert all(abs(g - share) < step for g, share in zip(given, shares))
    for step, _ in zip(itertools.cycle(steps), range(300)):  # after a change of batch or processes
        given[due(given, sizes, step)] += step
    shares = [size * sum(given) / sum(sizes) for size in sizes]
    assert all(abs(g - share) < 2 * max(steps) for g, share in zip(given, shares))


def test_an_epoch_of_one_shape_begins_with_the_others() -> None:
    made = order([40, 40, 40], [0, 0, 1, 2])
    epochs = []
    for step in itertools.islice(made.steps(made.start(0), 2, 0, 1), 600):
        epochs.append({epoch for epoch, _ in step.visits})
    for number, found in enumerate(epochs):
        assert all(abs(epoch - 2 * number / 120) < 1.1 for epoch in found)


def test_processes_have_shards_of_their_own() -> None:
    sizes = [30] * 32
    made = order(sizes, [0, 1], window=64, lanes=8)
    shard_of = np.repeat(np.arange(32), sizes)
    for world in (2, 4, 8):
        owners = defaultdict(set)
        for rank in range(world):
            steps = made.steps(made.start(3), 4, rank, world)
            for step in itertools.islice(steps, 960 // 4 // world - 8):
                for epoch, clip in step.visits:
                    if epoch == 0:
                        owners[shard_of[clip]].add(rank)
        assert sum(len(ranks) for ranks in owners.values()) <= 32 + world - 1 + 2


def test_shards_of_an_epoch_are_permuted_and_their_clips_too() -> None:
    made = order([50] * 20, [0], window=100, lanes=4)
    shard_of = np.repeat(np.arange(20), 50)
    steps = itertools.islice(made.steps(made.start(1), 100, 0, 1), 20)
    visits = [[clip for _, clip in step.visits] for step in steps]
    begins = [set(shard_of[part]) for part in (visits[0], visits[10])]
    assert begins[0] != begins[1] and all(4 <= len(shards) <= 12 for shards in begins)
    assert visits[0] != sorted(visits[0])


def test_a_window_takes_no_more_than_its_bytes() -> None:
    shards = np.zeros(50, dtype=np.int64)
    shapes = pa.chunked_array([pa.array([SHAPES[0]] * 50, pa.list_(pa.int32()))])
    clip = 4 * 8 * 4 * 2 * 2  # bytes
    assert Order([], shards, shapes, 1024, 10 * clip, 4).window == 10
    assert Order([], shards, shapes, 7, 10 * clip, 4).window == 7
    assert Order([], shards, shapes, 7, 1, 4).window == 1


@pytest.mark.parametrize(
    "other",
    [
        order([5, 5], [0]),
        order([4, 6], [0, 1]),
        order([4, 6], [0], window=5),
        order([4, 6], [0], window=5, lanes=2),
    ],
)
def test_another_order_is_known_as_such(other: Order) -> None:
    made = order([4, 6], [0])
    position, note = other.resume(Position(3, (37,), 0, made.digest), 0)
    assert position == other.start(0, 4) and "epoch 4 begins" in note
    assert made.resume(Position(3, (37,), 0, made.digest), 1)[0].seed == 1


@given(first=st.integers(0, 100), lanes=st.integers(1, 9), window=st.integers(1, 50))
def test_an_epoch_is_a_permutation_wherever_its_lanes_begin(
    first: int, lanes: int, window: int
) -> None:
    numbers = np.repeat(np.arange(5), [7, 1, 9, 3, 2]).astype(np.int64)
    found = epoch_order(numbers, 3, 1, window, lanes, first=first)
    assert sorted(found) == list(range(22))
