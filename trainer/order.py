"""Which clip comes when: an order that knows nothing of processes, and every process's part of it.

Clips of one shape are a *bucket*. Each bucket has an endless stream of *visits*: epoch after epoch,
each a permutation of its clips, without a gap. So a batch may hold the end of one epoch and the
beginning of the next: every batch is full on every process, all take the same number of steps, and
nothing is padded, dropped or seen twice in an epoch, whatever the number of clips.

A step of w processes takes batch_size x w visits of one bucket, whichever is most behind its share
of the clips; process r takes those whose number is r modulo w. Where the streams stand is therefore
one number a bucket, and a run that resumes, on any number of processes and with any batch size,
goes on with exactly the next visit of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from trainer.keys import keyed

Shape = tuple[int, ...]
BYTES = 4  # of a value: latents are counted as float32, as the index does not tell their type


@dataclass(frozen=True)
class Position:
    """Where the streams of visits stand: what a checkpoint keeps of the loader."""

    epoch: int  # the latest that any bucket has begun
    given: tuple[int, ...]  # visits of each bucket that all processes together have been given
    seed: int
    order: str  # digest of what the order is made of beside the seed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Position:
        """Raises TypeError and KeyError where it is none."""
        if "consumed" in values:  # of the order before this one, which cannot be gone on with
            return cls(values["epoch"], (), values["seed"], "")
        return cls(**{**values, "given": tuple(values["given"])})


@dataclass(frozen=True)
class Step:
    """What one process takes in one step."""

    bucket: int
    visits: list[tuple[int, int]]  # epoch, and the clip's row in the index sorted by shard and row
    position: Position  # of the streams after this step of all processes


class Order:
    """The order over an index' clips, sorted by shard and row.

    `names` are all by which clips are known, `shards` numbers the shard of each. `window` clips are
    shuffled together, or as many as `window_bytes` hold; `lanes` stretches of the shards are read
    side by side.
    """

    def __init__(
        self,
        names: Iterable[str],
        shards: NDArray[np.int64],
        shapes: pa.ChunkedArray,
        window: int,
        window_bytes: int,
        lanes: int,
    ) -> None:
        self.shapes, member = distinct_shapes(shapes)
        self._clips = [np.flatnonzero(member == bucket) for bucket in range(len(self.shapes))]
        self.sizes = [len(clips) for clips in self._clips]
        self._shards = shards
        self.total = len(shards)
        self.bytes = [BYTES * int(np.prod(shape)) for shape in self.shapes]  # of a clip
        self.all_bytes = sum(n * b for n, b in zip(self.sizes, self.bytes))
        mean = self.all_bytes / self.total
        self.window = max(1, min(window, int(window_bytes // mean)))
        self.window_bytes = int(self.window * mean)
        # Where all fits into a window they are shuffled as one, and read by all.
        self.lanes = lanes if self.total > self.window else 1
        self.digest = self._digest(names)
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}  # a bucket's latest

    def start(self, seed: int, epoch: int = 0) -> Position:
        return Position(epoch, tuple(epoch * n for n in self.sizes), seed, self.digest)

    def resume(self, position: Position, seed: int) -> tuple[Position, str]:
        """Where to go on after `position`, and a sentence where that is not just behind it."""
        if (position.order, position.seed) == (self.digest, seed):
            return position, ""
        epoch = position.epoch + 1
        return self.start(seed, epoch), (
            "the index, train.seed or the shuffling is another than at the checkpoint, "
            f"so the order is another: epoch {epoch} begins"
        )

    def steps(self, position: Position, batch_size: int, rank: int, world: int) -> Iterator[Step]:
        """The steps of process `rank` of `world` from `position` on, without end."""
        size = batch_size * world
        given = list(position.given)
        while True:
            bucket = due(given, self.sizes, size)
            first = given[bucket]
            visits = [
                self._visit(bucket, number, position.seed)
                for number in range(first + (rank - first) % world, first + size, world)
            ]
            given[bucket] += size
            epoch = max(position.epoch, (given[bucket] - 1) // self.sizes[bucket])
            position = replace(position, epoch=epoch, given=tuple(given))
            yield Step(bucket, visits, position)

    def _visit(self, bucket: int, number: int, seed: int) -> tuple[int, int]:
        """Epoch and clip of a visit by its number in the bucket's stream."""
        epoch, place = divmod(number, self.sizes[bucket])
        if bucket not in self._epochs or self._epochs[bucket][0] != epoch:
            self._epochs[bucket] = (epoch, self._epoch(bucket, epoch, seed))
        return epoch, int(self._epochs[bucket][1][place])

    def _epoch(self, bucket: int, epoch: int, seed: int) -> NDArray[np.int64]:
        clips, size = self._clips[bucket], self.sizes[bucket]
        order = epoch_order(
            self._shards[clips],
            seed,
            epoch,
            # All buckets keep step, so together they shuffle a window.
            max(1, round(self.window * size / self.total)),
            self.lanes,
            first=epoch * size,
            count=int(self._shards.max()) + 1,
            bucket=str(self.shapes[bucket]),
        )
        return clips[order]

    def _digest(self, names: Iterable[str]) -> str:
        """Of all that the order depends on: the clips, their places and shapes, how they are
        shuffled."""
        digest = hashlib.blake2b(f"{self.window}/{self.lanes}".encode(), digest_size=8)
        for shape, clips in zip(self.shapes, self._clips):
            digest.update(f"{shape}".encode())
            digest.update(np.ascontiguousarray(clips).tobytes())
        digest.update(self._shards.tobytes())
        for name in names:
            digest.update(f"{name}\n".encode())
        return digest.hexdigest()


def epoch_order(
    shards: NDArray[np.int64],
    seed: int,
    epoch: int,
    window: int,
    lanes: int = 1,
    *,
    first: int = 0,
    count: int | None = None,
    bucket: str = "",
) -> NDArray[np.int64]:
    """The order of an epoch over a bucket's clips sorted by shard: a permutation of 0..n-1.

    `shards` numbers each clip's shard, of `count` in the index. Shards are permuted, for all
    buckets alike. Their clips, one after the other, are cut into `lanes` equal stretches; within
    each, windows of `window / lanes` clips are shuffled; visit v of the stream, of which the
    epoch's first is `first`, comes from lane v modulo `lanes`. So where the number of processes
    divides `lanes`, each has shards of its own.
    """
    count = count or int(shards.max()) + 1
    places = torch.randperm(count, generator=keyed("order", seed, epoch, "")).numpy()
    order = np.argsort(places[shards], kind="stable")
    draws = torch.rand(
        len(order), generator=keyed("shuffle", seed, epoch, bucket), dtype=torch.float64
    ).numpy()
    woven = np.empty_like(order)
    begin, window = 0, max(1, window // lanes)
    for lane in range(lanes):
        slots = woven[(lane - first) % lanes :: lanes]
        stretch = slice(begin, begin + len(slots))
        windows = np.arange(len(slots)) // window
        slots[:] = order[stretch][np.lexsort((draws[stretch], windows))]
        begin += len(slots)
    return woven


def due(given: Sequence[int], sizes: Sequence[int], step: int) -> int:
    """The bucket whose turn it is to give a step of `step` visits.

    By Tijdeman's rule (The chairman assignment problem, 1980): after any number of steps no bucket
    is a whole step away from its share of the clips, and no rule does better.
    """
    if len(sizes) == 1:
        return 0
    least = Fraction(1, 2 * len(sizes) - 2)
    total, visits = sum(sizes), sum(given) + step
    behind = [Fraction(n * visits, total) - g for n, g in zip(sizes, given)]  # visits
    owed = [b for b in range(len(sizes)) if behind[b] >= least * step]
    # The one that could wait for the shortest time.
    return min(owed, key=lambda b: (((1 - least) * step - behind[b]) / sizes[b], b))


def distinct_shapes(shapes: pa.ChunkedArray) -> tuple[list[Shape], NDArray[np.int64]]:
    """The distinct (channels, F, H, W), and of each clip the number of its own among them."""
    rows = shapes.combine_chunks().flatten().to_numpy().reshape(len(shapes), -1)
    keys = np.ravel_multi_index(
        tuple(rows.T), tuple(rows.max(0) + 1)
    )  # one number each: sorts fast
    _, firsts, member = np.unique(keys, return_index=True, return_inverse=True)
    return [tuple(map(int, rows[first])) for first in firsts], member
