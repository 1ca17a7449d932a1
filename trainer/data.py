"""The loader: which clip comes when, and its latents as the model wants them.

The order is an endless stream of *visits*. Epoch after epoch follows without a gap, so a batch may
hold the end of one epoch and the beginning of the next, every batch is full on every process, and
nothing is padded, dropped or seen twice in an epoch, whatever the number of clips. An epoch's
order depends on the seed, the epoch and the index alone. Of every global batch, process r of w
takes the visits r, r + w, r + 2w, ... Where the stream stands is therefore one number, and all
randomness of a visit is keyed on (seed, epoch, clip): a run that resumes, on any number of
processes, goes on with exactly the next visit, noised as it would have been.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifests.shards import Index, Latent, LatentSpec, ShardError, read_latents
from trainer.config import Expect, SettingsError, TrainSettings

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ----------------------------------------------------------------------------- order and keys


def keyed(purpose: str, seed: int, epoch: int, clip: str, device: str = "cpu") -> torch.Generator:
    """The generator of one purpose at one visit: the same wherever and whenever it is asked for."""
    name = f"{purpose}/{seed}/{epoch}/{clip}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
    return torch.Generator(device).manual_seed(key & (2**63 - 1))


def epoch_order(shards: NDArray[np.int64], seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """The order of an epoch over clips sorted by shard: a permutation of 0..n-1.

    `shards` is the number of each clip's shard. Shards are permuted, and within that sequence each
    window of clips: shards are read one after the other, and a window never spans more of them
    than its clips fill.
    """
    generator = keyed("order", seed, epoch, "")
    places = torch.randperm(int(shards.max()) + 1, generator=generator).numpy()
    order: NDArray[np.int64] = np.argsort(places[shards], kind="stable")
    for first in range(0, len(order), window):
        part = order[first : first + window]
        order[first : first + window] = part[torch.randperm(len(part), generator=generator).numpy()]
    return order


@dataclass(frozen=True)
class Position:
    """Where the stream of visits stands: what a checkpoint keeps of the loader."""

    epoch: int
    consumed: int  # clips of this epoch that all processes together have been given
    seed: int
    order: str  # digest of what the order is made of beside the seed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ----------------------------------------------------------------------------- one clip


def posterior_sample(latent: Latent, spec: LatentSpec, generator: torch.Generator) -> Tensor:
    """Normalised latents (C, F, H, W) float32: (mean + std x noise - shift) x scale, per channel.

    Where the spec says that no moments are stored, the stored latents take the sample's place.
    Raises ShardError where the stored bytes are not what their shape and dtype say.
    """
    if latent.dtype not in DTYPES:
        raise ShardError(
            f"latents of clip {latent.clip_id} are of type {latent.dtype}: "
            f"{', '.join(DTYPES)} can be read"
        )
    dtype = DTYPES[latent.dtype]
    stated = int(np.prod(latent.shape)) * dtype.itemsize
    if latent.data.nbytes != stated or latent.shape[0] != stored_channels(spec):
        raise ShardError(
            f"latents of clip {latent.clip_id} are damaged: {latent.data.nbytes} bytes stored, "
            f"while {latent.dtype} of shape {list(latent.shape)} takes {stated} and the index "
            f"says {stored_channels(spec)} channels: run `vidpipe run encode`"
        )
    values = torch.frombuffer(bytearray(latent.data), dtype=dtype).view(latent.shape).float()
    if spec.moments:
        mean, logvar = values.chunk(2)
        noise = torch.randn(mean.shape, generator=generator)
        values = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise  # diffusers' bounds
    shift, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (spec.shift, spec.scale))
    return (values - shift) * scale


def draw_caption(
    own: str, others: Mapping[str, str], weights: Mapping[str, float], generator: torch.Generator
) -> str:
    """One of a clip's captions by the weights of their kinds; `caption` is its `own`. What it has
    none of leaves its share to the rest, and without any the own one stands."""
    texts = {"caption": own, **others}
    kinds = [kind for kind, weight in weights.items() if weight > 0 and kind in texts]
    if not kinds:
        return own
    shares = torch.tensor([weights[kind] for kind in kinds], dtype=torch.float64)
    return texts[kinds[int(torch.multinomial(shares, 1, generator=generator))]]


def stored_channels(spec: LatentSpec) -> int:
    return spec.channels * (2 if spec.moments else 1)


# ----------------------------------------------------------------------------- the loader


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one forward pass."""

    latents: Tensor  # (B, C, F, H, W) float32, normalised, on the CPU
    captions: list[str]  # "" where there is none, or it was dropped at this visit
    clip_ids: list[str]
    epochs: list[int]  # of each visit
    position: Position  # of the stream after this batch of all processes


class Loader:
    """The batches of one process. Raises ShardError where the index cannot be trained on."""

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
        table = index.table.sort_by([("shard", "ascending"), ("row", "ascending")])
        self.index, self.settings = index, settings
        self.rank, self.world, self.pin = rank, world, pin
        self.clips = table.column("clip_id")
        self.captions = table.column("caption")
        named = "captions" in table.column_names  # not in an index of before there were several
        self.several = table.column("captions") if named else None
        check_captions(settings.captions, self.several)
        self.rows = table.column("row").to_numpy()
        self.shapes = table.column("shape")
        shards = pc.dictionary_encode(table.column("shard")).combine_chunks()
        self.shard_names: list[str] = shards.dictionary.to_pylist()
        self.shards = shards.indices.to_numpy().astype(np.int64)
        self.shape = one_shape(self.shapes, index.spec, settings.batch_size)
        self.digest = _digest(table, settings.shuffle_window)

    def __len__(self) -> int:
        return len(self.clips)

    def start(self) -> Position:
        return Position(0, 0, self.settings.seed, self.digest)

    def resume(self, position: Position) -> tuple[Position, str]:
        """Where to go on after `position`, and a sentence where that is not just behind it."""
        if (position.order, position.seed) == (self.digest, self.settings.seed):
            return position, ""
        epoch = position.epoch + 1
        return Position(epoch, 0, self.settings.seed, self.digest), (
            "the index, train.seed or train.shuffle_window is another than at the checkpoint, "
            f"so the order is another: epoch {epoch} begins"
        )

    def batches(self, start: Position) -> Generator[Batch]:
        """Batches without end from `start` on, made ready by background threads.

        One thread reads the next window from the shards while this one is used up, another draws
        samples: in memory are two windows (this process's share) and `read_ahead` batches.
        """
        windows = read_ahead(self._windows(start), 1)
        return read_ahead(self._batches(start, windows), self.settings.read_ahead)

    # What follows runs in the background threads. Visits are numbered over all epochs.

    def _visits(self, start: Position) -> Iterator[list[tuple[int, int]]]:
        """This process's visits (epoch, clip number), window by window, from `start` on."""
        total, window = len(self), self.settings.shuffle_window
        first = start.epoch * total + start.consumed
        for epoch in itertools.count(start.epoch):
            order = epoch_order(self.shards, start.seed, epoch, window)
            skipped = start.consumed // window * window if epoch == start.epoch else 0
            since = epoch * total - first  # visits from `first` to this epoch's beginning
            for begin in range(skipped, total, window):
                yield [
                    (epoch, int(order[number]))
                    for number in range(begin, min(begin + window, total))
                    if since + number >= 0 and (since + number) % self.world == self.rank
                ]

    def _windows(self, start: Position) -> Iterator[list[tuple[int, int, Latent]]]:
        for visits in self._visits(start):
            places: dict[int, list[int]] = defaultdict(list)
            for _, clip in visits:
                places[int(self.shards[clip])].append(clip)
            read = {clip: latent for shard in places for clip, latent in self._read(places[shard])}
            yield [(epoch, clip, read[clip]) for epoch, clip in visits]

    def _read(self, clips: list[int]) -> Iterator[tuple[int, Latent]]:
        """The latents of clips of one shard, read in the order of its rows."""
        clips = sorted(clips)
        name = self.shard_names[self.shards[clips[0]]]
        rows = [int(self.rows[clip]) for clip in clips]
        for clip, row, latent in zip(clips, rows, read_latents(self.index.workdir, name, rows)):
            wanted = self.clips[clip].as_py()
            if latent.clip_id != wanted:
                raise ShardError(
                    f"shard {name} holds clip {latent.clip_id} in row {row}, where the index says "
                    f"clip {wanted}: the two do not belong together; run `vidpipe run encode`"
                )
            if latent.shape != (shape := tuple(self.shapes[clip].as_py())):
                raise ShardError(
                    f"shard {name} holds latents of shape {list(latent.shape)} for clip {wanted}, "
                    f"where the index says {list(shape)}: run `vidpipe run encode`"
                )
            # A copy, so that the rest of the row group does not stay in memory with it.
            data = memoryview(bytes(latent.data))
            yield clip, Latent(latent.clip_id, data, latent.shape, latent.dtype)

    def _batches(
        self, start: Position, windows: Generator[list[tuple[int, int, Latent]]]
    ) -> Iterator[Batch]:
        size, done = self.settings.batch_size, start.epoch * len(self) + start.consumed
        waiting: list[tuple[int, int, Latent]] = []
        with closing(windows):
            for window in windows:
                waiting += window
                while len(waiting) >= size:
                    visits, waiting = waiting[:size], waiting[size:]
                    done += size * self.world
                    epoch, consumed = divmod(done, len(self))
                    yield self._batch(visits, Position(epoch, consumed, start.seed, start.order))

    def _batch(self, visits: Sequence[tuple[int, int, Latent]], position: Position) -> Batch:
        seed, ids = position.seed, [latent.clip_id for _, _, latent in visits]
        samples, captions = [], []
        for (epoch, clip, latent), clip_id in zip(visits, ids):
            generator = keyed("posterior", seed, epoch, clip_id)
            samples.append(posterior_sample(latent, self.index.spec, generator))
            chance = torch.rand((), generator=keyed("caption", seed, epoch, clip_id))
            dropped = bool(chance < self.settings.caption_dropout)
            captions.append("" if dropped else self._caption(clip, seed, epoch, clip_id))
        latents = torch.stack(samples)
        return Batch(
            latents.pin_memory() if self.pin else latents,
            captions,
            ids,
            [epoch for epoch, _, _ in visits],
            position,
        )

    def _caption(self, clip: int, seed: int, epoch: int, clip_id: str) -> str:
        own, weights = self.captions[clip].as_py() or "", self.settings.captions
        if self.several is None or not weights:
            return own
        others = {c["kind"]: c["text"] for c in self.several[clip].as_py() or ()}
        generator = keyed("which caption", seed, epoch, clip_id)
        return draw_caption(own, others, weights, generator)


def read_ahead(source: Iterator[T], depth: int) -> Generator[T]:
    """The items of `source`, made by a thread that is at most `depth` items ahead.

    What `source` raises is raised here; closing this generator ends the thread.
    """
    slots, stop = threading.Semaphore(depth), threading.Event()
    items: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def work() -> None:
        try:
            while slots.acquire() and not stop.is_set():
                items.put((next(source), None))
        except BaseException as error:  # noqa: BLE001  a thread's error belongs to its reader
            items.put((None, error))
        finally:
            if close := getattr(source, "close", None):
                close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            slots.release()
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        slots.release()
        thread.join()


# ----------------------------------------------------------------------------- checks


def one_shape(shapes: pa.ChunkedArray, spec: LatentSpec, batch_size: int) -> tuple[int, ...]:
    """The first clip's (C, F, H, W). Raises ShardError where batches could not be stacked."""
    distinct = sorted(set(map(tuple, shapes.to_pylist())))
    if len(distinct) > 1 and batch_size > 1:
        raise ShardError(
            f"the index holds latents of {len(distinct)} shapes, {list(distinct[0])} and "
            f"{list(distinct[1])} among them: set train.batch_size to 1, or one sampling for all"
        )
    if wrong := [s for s in distinct if len(s) != 4 or s[0] != stored_channels(spec)]:
        raise ShardError(
            f"the index holds latents of shape {list(wrong[0])}, but its VAE {spec.vae} gives "
            f"{stored_channels(spec)} x frames x height x width: run `vidpipe run`"
        )
    return (spec.channels, *distinct[0][1:])


def check_captions(weights: Mapping[str, float], several: pa.ChunkedArray | None) -> None:
    """Raises SettingsError where weights name a kind of caption that no clip has."""
    kinds = {"caption"}
    if weights and several is not None:
        kinds |= set(pc.struct_field(pc.list_flatten(several), "kind").unique().to_pylist())
    if unknown := [kind for kind in weights if kind not in kinds]:
        raise SettingsError(
            f"train.captions has a weight for {unknown[0]}, and no clip has such a caption: there "
            f"are {', '.join(sorted(kinds))} (a preset of recaption makes several)"
        )


def check_expected(expect: Expect, spec: LatentSpec) -> None:
    """Raises SettingsError where the latents were made otherwise than `expect` says."""
    size = spec.sampling.get("size")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    found = {
        "fps": spec.sampling.get("fps"),
        "frames": spec.sampling.get("frames"),
        "height": height,
        "width": width,
        "vae": spec.vae_sha256 if expect.vae == spec.vae_sha256 else spec.vae,
    }
    wrong = [
        f"train.expect.{key} is {wanted}, but the latents were made with {found[key]}"
        for key, wanted in expect
        if wanted is not None and wanted != found[key]
    ]
    if wrong:
        raise SettingsError(
            "\n".join(
                [*wrong, "Change train.expect, or the sampling and `vidpipe run encode` again"]
            )
        )


def _digest(table: pa.Table, window: int) -> str:
    """Of all that the order depends on: the clips, their places in shards, the window."""
    digest = hashlib.blake2b(str(window).encode(), digest_size=8)
    for batch in table.select(["shard", "clip_id"]).to_batches():
        for shard, clip in zip(*(column.to_pylist() for column in batch.columns)):
            digest.update(f"{shard}\0{clip}\n".encode())
    return digest.hexdigest()
