"""The loader: batches of one shape, in an order that no number of processes changes.

order.py      which clip comes when, and which process takes it
reader.py     rows of shards, read ahead in large pieces
posterior.py  stored latents to a normalised sample
captions.py   which caption, dropped or not, and its embedding
expected.py   are the shards what the index, and the index what the settings say?
keys.py       randomness keyed on (seed, epoch, clip)
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from manifests.pages import Into
from manifests.shards import Index, Latent, LatentSpec, ShardError, ShardFile
from trainer.captions import Captions, Embeddings, padded
from trainer.config import FamilySettings, SettingsError, TrainSettings
from trainer.expected import check_expected, check_latents, check_shapes, check_text
from trainer.keys import keyed
from trainer.order import Order, Position, Shape, Step
from trainer.posterior import Pool, Stack, pinned, posterior_sample
from trainer.reader import Place, Row, Shards, Wanted, read_ahead, read_rows

# Of the memory an eighth may be shuffled together: `read_rows` reads each row group once if all
# that is wanted of it lies within half of what it knows of the plan, and that may be as far apart
# as two windows and a row group of each lane are long.
SHUFFLED = 8
ROW_GROUP = 16 << 20  # bytes, as vidpipe writes them
SOME = 1 << 14  # clips whose ids are Python's strings at a time


FIRST = "#first_frame"  # ends the name of a shard where its first frames are meant


class FirstFrames(ShardFile):
    """A shard of which the first frames are read."""


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one forward pass: B clips of one shape, on the CPU."""

    stored: Tensor  # (B, C or 2C, F, H, W) as stored
    spec: LatentSpec
    captions: list[str]  # "" where there is none, or it was dropped at this visit
    embeddings: tuple[Tensor, Tensor] | None  # stored ones (B, L, D) and which tokens are there
    clip_ids: list[str]
    epochs: list[int]  # of each visit
    position: Position  # of the streams after this batch of all processes
    stored_first: Tensor | None = None  # (B, C or 2C, 1, H, W): their first frames alone

    def latents(self, device: torch.device | str = "cpu") -> Tensor:
        """A sample of the posterior, normalised: (B, C, F, H, W) float32 on `device`. Each clip's
        is keyed on its visit: the same, on a device of this type, whenever it is asked for."""
        return self._sample(self.stored, "posterior", device)

    def first_frames(self, device: torch.device | str = "cpu") -> Tensor | None:
        """The same of the first frames: (B, C, 1, H, W); None where they were not asked for."""
        if self.stored_first is None:
            return None
        return self._sample(self.stored_first, "first frame", device)

    def _sample(self, stored: Tensor, purpose: str, device: torch.device | str) -> Tensor:
        generators = [
            keyed(purpose, self.position.seed, epoch, clip, str(device))
            for epoch, clip in zip(self.epochs, self.clip_ids)
        ]
        return posterior_sample(stored.to(device, non_blocking=True), self.spec, generators)


@dataclass(frozen=True)
class Made:
    """A batch that is being read."""

    step: Step
    stacks: list[Stack]  # of its latents and, where they are asked for, of first frames

    def room(self, number: int, size: int) -> memoryview | None:
        which, clip = divmod(number, len(self.step.visits))
        return self.stacks[which].room(clip, size)


class Loader:
    """The batches of one process. Raises ShardError and SettingsError where the index cannot be
    trained on, or is not what the settings expect."""

    def __init__(
        self,
        index: Index,
        settings: TrainSettings,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        if index.table.num_rows == 0:
            raise ShardError(
                f"the index {settings.index} has no clips: `vidpipe status` says where they are, "
                "`vidpipe run` makes the index anew"
            )
        check_expected(settings.expect, index.spec, index.text)
        check_shapes(index.table.column("shape"), index.spec)
        table = _sorted(index.table)
        self.index, self.settings = index, settings
        self.rank, self.world, self.pin = rank, world, pin
        self.clips = table.column("clip_id")
        self.captions = Captions(table, settings)
        self.embeddings = (
            Embeddings(index, table, settings.caption_dropout)
            if settings.text.kind == "stored"
            else None
        )
        model = settings.model
        self.first_frames = isinstance(model, FamilySettings) and model.first_frame > 0
        if self.first_frames and not index.facts.get("first_frame"):
            raise SettingsError(
                "train.model.first_frame is set, but the shards have no latents of first frames: "
                "set encode.first_frame and `vidpipe run`, or leave train.model.first_frame out"
            )
        shards = pc.dictionary_encode(table.column("shard")).combine_chunks()
        self.shards: list[str] = shards.dictionary.to_pylist()
        self.shard_of = shards.indices.to_numpy().astype(np.int64)
        self.rows = table.column("row").to_numpy()
        self.order = Order(
            chain(self.shards, _texts(self.clips)),
            self.shard_of,
            table.column("shape"),
            settings.shuffle_window,
            settings.memory // SHUFFLED,
            settings.lanes,
        )
        self.pool = Pool(self.memory // 4)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def shape(self) -> Shape:
        """(C, F, H, W) of most clips."""
        most = max(range(len(self.order.sizes)), key=self.order.sizes.__getitem__)
        return (self.index.spec.channels, *self.order.shapes[most][1:])

    @property
    def shapes(self) -> str:
        """`[4, 16, 8, 8]`, or of several: `3 shapes, mostly [4, 16, 8, 8]`"""
        several = len(self.order.shapes)
        return f"{several} shapes, mostly " * (several > 1) + f"{list(self.shape)}"

    def start(self) -> Position:
        return self.order.start(self.settings.seed)

    def resume(self, position: Position) -> tuple[Position, str]:
        """Where to go on after `position`, and a sentence where that is not just behind it."""
        return self.order.resume(position, self.settings.seed)

    def batches(self, start: Position) -> Generator[Batch]:
        """Batches without end from `start` on, made ready in the background."""
        return read_ahead(self._batches(start), self.settings.read_ahead)

    @property
    def memory(self) -> int:
        """Bytes to hold ahead: no more than helps."""
        once = 2 * self.order.window_bytes + self.order.lanes * ROW_GROUP
        texts = self.embeddings.most_bytes * len(self) if self.embeddings is not None else 0
        return min(self.settings.memory, 2 * once, 2 * (self.order.all_bytes + texts))

    # What follows runs in a background thread.

    def _batches(self, start: Position) -> Iterator[Batch]:
        steps = self.order.steps(start, self.settings.batch_size, self.rank, self.world)
        shards = Shards(self._open, self._rows)
        with closing(read_rows(map(self._wanted, steps), shards, self.memory)) as read:
            for made, rows in read:
                yield self._batch(made, rows)

    def _wanted(self, step: Step) -> Wanted[Made]:
        """The rows of a step's clips: their latents, then their first frames, then embeddings."""
        clips = [clip for _, clip in step.visits]
        places = [Place(self.shards[self.shard_of[clip]], int(self.rows[clip])) for clip in clips]
        made = Made(step, [Stack(len(clips), self.pool)])
        size = self.order.bytes[step.bucket]
        if self.first_frames:
            places += [place._replace(shard=place.shard + FIRST) for place in places]
            made.stacks.append(Stack(len(clips), self.pool))
            size += size // self.order.shapes[step.bucket][1]
        if (texts := self.embeddings) is not None:
            places += [texts.place(clip) for clip in clips]
            size += texts.most_bytes
        return Wanted(made, places, len(clips) * size, made.room)

    def _open(self, name: str) -> ShardFile:
        kind = FirstFrames if name.endswith(FIRST) else ShardFile
        name = name.removesuffix(FIRST)
        file = kind(self.index.workdir, name)
        if self.embeddings is not None and name in self.embeddings.shards:
            check_text(name, file.facts, self.embeddings.spec)
        else:
            check_latents(name, file.facts, self.index.spec)
        return file

    def _rows(self, file: ShardFile, rows: list[int], into: Into) -> Iterator[Row]:
        if self.embeddings is not None and file.name in self.embeddings.shards:
            return file.embeddings(rows)
        return file.latents(rows, isinstance(file, FirstFrames), into)

    def _batch(self, made: Made, rows: list[Row]) -> Batch:
        step = made.step
        seed, count = step.position.seed, len(step.visits)
        ids = [self.clips[clip].as_py() for _, clip in step.visits]
        epochs = [epoch for epoch, _ in step.visits]
        captions, texts, stored = [], [], []
        for (epoch, clip), clip_id in zip(step.visits, ids):
            captions.append(self.captions.at(clip, clip_id, seed, epoch))
        if self.embeddings is not None:
            for (epoch, clip), clip_id, row in zip(step.visits, ids, rows[-count:]):
                texts.append(self.embeddings.at(clip, clip_id, seed, epoch, row))
        shape = self.order.shapes[step.bucket]
        kinds = (("latents", shape), ("the first frame", (shape[0], 1, *shape[2:])))
        for number, (stack, (kind, shape)) in enumerate(zip(made.stacks, kinds)):
            of = zip(step.visits, ids, rows[number * count :])
            latents = [self._checked(clip, name, row, shape) for (_, clip), name, row in of]
            values = stack.values(latents, [f"{kind} of clip {name}" for name in ids])
            stored.append(pinned(values) if self.pin else values)
        embeddings = padded(texts, self.pin) if texts else None
        spec = self.index.spec
        return Batch(stored[0], spec, captions, embeddings, ids, epochs, step.position, *stored[1:])

    def _checked(self, clip: int, clip_id: str, row: Row, shape: Shape) -> Latent:
        """What was read for a clip. Raises ShardError where it is of another, or another shape."""
        name, number = self.shards[self.shard_of[clip]], self.rows[clip]
        assert isinstance(row, Latent)
        if row.clip_id != clip_id:
            raise ShardError(
                f"shard {name} holds clip {row.clip_id} in row {number}, where the index says "
                f"clip {clip_id}: the two do not belong together; run `vidpipe run encode`"
            )
        if row.shape != shape:
            raise ShardError(
                f"shard {name} holds latents of shape {list(row.shape)} for clip {clip_id}, "
                f"where the index says {list(shape)}: run `vidpipe run encode`"
            )
        return row


def _sorted(table: pa.Table) -> pa.Table:
    """By shard and row; itself, and no copy of it, where it is, as the pipeline writes it."""
    order = pc.sort_indices(table, [("shard", "ascending"), ("row", "ascending")])
    in_order = np.array_equal(order.to_numpy(), np.arange(len(table), dtype=np.uint64))
    return table if in_order else table.take(order)


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    """Its values, some thousands at a time."""
    for begin in range(0, len(column), SOME):
        yield from column.slice(begin, SOME).to_pylist()
