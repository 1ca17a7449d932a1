from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.shards import Index, Latent, ShardError
from trainer.config import Expect, SettingsError
from trainer.data import Batch, Loader
from trainer.expected import check_expected
from trainer.order import Position, epoch_order
from trainer.posterior import stored
from trainer.reader import read_ahead

SHARDS = np.repeat(np.arange(6), [7, 1, 20, 3, 12, 7]).astype(np.int64)


def take(loader: Loader, count: int, start: Position | None = None) -> list[Batch]:
    with closing(loader.batches(start or loader.start())) as batches:
        return list(islice(batches, count))


def visits(batches: list[Batch]) -> list[tuple[int, str]]:
    return [visit for batch in batches for visit in zip(batch.epochs, batch.clip_ids)]


# ----------------------------------------------------------------------------- order


@given(seed=st.integers(0, 2**62), epoch=st.integers(0, 9), window=st.integers(1, 80))
def test_every_epoch_is_a_permutation(seed: int, epoch: int, window: int) -> None:
    order = epoch_order(SHARDS, seed, epoch, window)
    assert sorted(order) == list(range(len(SHARDS)))
    assert (order == epoch_order(SHARDS, seed, epoch, window)).all()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(epoch_order(SHARDS, seed, epoch, 16)) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_shards_are_read_one_after_the_other() -> None:
    order = epoch_order(SHARDS, 3, 0, 1)  # a window of one clip leaves the shards' order alone
    assert len(list(np.flatnonzero(np.diff(SHARDS[order])))) == 5
    assert len(set(SHARDS[epoch_order(SHARDS, 3, 0, 50)][:12])) > 3  # a window mixes them


def test_batches_go_over_the_end_of_an_epoch(make_index: Any, settings_of: Any) -> None:
    made = make_index()  # 21 clips
    loader = Loader(made.open(), settings_of(made, shuffle_window=8))
    batches = take(loader, 21)  # 84 visits, 4 epochs
    seen = visits(batches)
    assert [len(b.clip_ids) for b in batches] == [4] * 21
    for epoch in range(4):
        part = seen[21 * epoch : 21 * (epoch + 1)]
        assert {e for e, _ in part} == {epoch}
        assert {c for _, c in part} == set(made.clips)
    assert batches[5].position == Position(1, (24,), 0, loader.order.digest)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_order_and_nothing_else(
    world: int, make_index: Any, settings_of: Any
) -> None:
    made = make_index()
    settings = settings_of(made, batch_size=2, shuffle_window=8)
    whole = visits(take(Loader(made.open(), settings), 21))
    ranks = [
        visits(take(Loader(made.open(), settings, rank, world), 21 // world + 1))
        for rank in range(world)
    ]
    for rank, part in enumerate(ranks):
        wanted = whole[rank::world]
        assert part[: len(wanted)] == wanted
    assert not set(ranks[0]) & set(ranks[1])


def test_an_index_smaller_than_a_batch_fills_it_with_more_epochs(
    make_index: Any, settings_of: Any
) -> None:
    made = make_index(sizes=(3,))
    (batch,) = take(Loader(made.open(), settings_of(made, batch_size=8)), 1)
    assert batch.epochs == [0, 0, 0, 1, 1, 1, 2, 2]
    assert len(set(map(tuple, batch.latents().flatten(1).tolist()))) == 8


# ----------------------------------------------------------------------------- resume


@pytest.mark.parametrize("done", [1, 3, 7, 12])
@pytest.mark.parametrize("world", [1, 2])
def test_resume_goes_on_with_the_next_visit(
    done: int, world: int, make_index: Any, settings_of: Any
) -> None:
    made = make_index()
    settings = settings_of(made, shuffle_window=8, caption_dropout=0.5)
    whole = take(Loader(made.open(), settings, 0, world), done + 4)
    loader = Loader(made.open(), settings, 0, world)
    position, note = loader.resume(whole[done - 1].position)
    assert note == ""
    for one, other in zip(whole[done:], take(loader, 4, position), strict=True):
        assert torch.equal(one.latents(), other.latents())
        assert (one.clip_ids, one.captions, one.epochs) == (
            other.clip_ids,
            other.captions,
            other.epochs,
        )
        assert one.position == other.position


def test_resume_on_another_number_of_processes_loses_nothing(
    make_index: Any, settings_of: Any
) -> None:
    made = make_index()
    settings = settings_of(made, batch_size=2, shuffle_window=8)
    alone = take(Loader(made.open(), settings), 3)  # 6 visits, then 3 processes take 5 batches
    ranks = [
        visits(take(Loader(made.open(), settings, r, 3), 5, alone[-1].position)) for r in range(3)
    ]
    rest = [visit for step in zip(*ranks) for visit in step]
    assert visits(alone) + rest == visits(take(Loader(made.open(), settings), 18))


def test_another_index_begins_the_next_epoch(make_index: Any, settings_of: Any) -> None:
    made = make_index()
    loader = Loader(made.open(), settings_of(made))
    old = Position(2, (47,), 0, "another")
    position, note = loader.resume(old)
    assert (position.epoch, position.given, position.order) == (3, (63,), loader.order.digest)
    assert "epoch 3 begins" in note


# ----------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 2e-2)]
)
def test_latents_without_moments_are_normalised_by_the_rule(
    dtype: str, tolerance: float, make_index: Any, settings_of: Any
) -> None:
    made = make_index(sizes=(4,), dtype=dtype, moments=False, mean=lambda i: 0.0)
    (batch,) = take(Loader(made.open(), settings_of(made)), 1)
    shift, scale = (np.array(v).reshape(-1, 1, 1, 1) for v in (made.spec.shift, made.spec.scale))
    for clip, found in zip(batch.clip_ids, batch.latents()):
        wanted = (made.clips[clip][0] - shift) * scale
        np.testing.assert_allclose(found, wanted, atol=tolerance)


def test_the_posterior_is_drawn_anew_at_every_visit(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(4,), mean=lambda i: 0.0)
    seen = {}
    for batch in take(Loader(made.open(), settings_of(made)), 300):
        for epoch, clip, latents in zip(batch.epochs, batch.clip_ids, batch.latents()):
            seen[clip, epoch] = latents
    clip = next(iter(made.clips))
    draws = torch.stack([seen[clip, epoch] for epoch in range(300)])
    mean, logvar = made.clips[clip]
    shift, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (made.spec.shift, made.spec.scale))
    std = torch.tensor(logvar / 2).exp()
    normal = (draws / scale + shift - torch.tensor(mean)) / std  # standard normal, 300 x 256
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    again = take(Loader(made.open(), settings_of(made)), 1)[0]
    assert torch.equal(again.latents()[0], seen[again.clip_ids[0], 0])


def test_seeds_draw_apart(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(1,))
    one, other = (
        take(Loader(made.open(), settings_of(made, seed=seed, batch_size=1)), 1)[0].latents()
        for seed in (0, 1)
    )
    assert not torch.equal(one, other)


def test_captions_drop_at_batch_one_as_often_as_told(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(10,), captions=lambda i: None if i == 3 else f"caption {i}")
    loader = Loader(made.open(), settings_of(made, batch_size=1, caption_dropout=0.5))
    batches = [b for b in take(loader, 1100) if made.captions[b.clip_ids[0]] is not None]
    assert len(batches) == 990
    dropped = [b.captions[0] == "" for b in batches]
    assert abs(sum(dropped) - 495) < 3 * math.sqrt(990 / 4)
    by_clip = {b.clip_ids[0]: 0 for b in batches}
    for batch, gone in zip(batches, dropped):
        by_clip[batch.clip_ids[0]] += gone
        assert gone or batch.captions[0] == made.captions[batch.clip_ids[0]]
    assert all(30 < count < 80 for count in by_clip.values())  # not the same clips every epoch


def kinds_of(number: int) -> dict[str, str] | None:
    """Clip 0 has no others, clip 1 only a short one."""
    kinds = ("short",) if number == 1 else ("short", "medium", "long")
    return {kind: f"{kind} {number}" for kind in kinds} if number else None


WEIGHTS = {"short": 1, "medium": 2, "caption": 3, "long": 0}


def test_captions_are_drawn_by_their_weights(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(10,), captions=lambda i: f"caption {i}", several=kinds_of)
    batches = []
    for seed in range(4):
        how = {"batch_size": 10, "caption_dropout": 0.25, "captions": WEIGHTS, "seed": seed}
        batches += take(Loader(made.open(), settings_of(made, **how)), 300)
    drawn: dict[int, Counter[str]] = defaultdict(Counter)
    for batch in batches:
        for clip, text in zip(batch.clip_ids, batch.captions):
            number = int(clip[-2:])
            assert text in ("", f"{text.split(' ')[0]} {number}")
            drawn[number][text.split(" ")[0]] += 1
    assert set(drawn[0]) == {"", "caption"}, "of none its own"
    assert set(drawn[1]) == {"", "caption", "short"}
    whole = sum((drawn[n] for n in range(2, 10)), Counter())
    assert set(whole) == {"", "short", "medium", "caption"}

    def close(found: int, share: float, of: int) -> bool:
        return abs(found - share * of) <= 3 * math.sqrt(of * share * (1 - share))

    shares = {"": 0.25, "short": 0.75 / 6, "medium": 0.75 / 3, "caption": 0.75 / 2}
    assert all(close(whole[kind], share, 9600) for kind, share in shares.items()), whole
    assert close(drawn[1]["short"], 0.75 / 4, 1200), "the rest is shared out"


def test_the_draw_is_of_the_visit_alone(make_index: Any, settings_of: Any) -> None:
    made = make_index(captions=lambda i: f"caption {i}", several=kinds_of)
    settings = settings_of(made, captions=WEIGHTS)

    def told(batches: list[Batch]) -> dict[tuple[int, str], str]:
        return {v: t for b in batches for v, t in zip(zip(b.epochs, b.clip_ids), b.captions)}

    batches = take(Loader(made.open(), settings), 42)  # 8 epochs
    whole = told(batches)
    resumed = told(take(Loader(made.open(), settings), 12, batches[29].position))
    assert resumed.items() <= whole.items()
    assert len(resumed) == 48
    for rank in range(3):
        part = told(take(Loader(made.open(), settings, rank, 3), 14))
        assert part.items() <= whole.items()
    epochs = [tuple(whole[e, c] for c in sorted(made.clips)) for e in range(8)]
    assert len(set(epochs)) == 8, "another draw in each epoch"


def test_weights_leave_the_dropout_where_it_was(make_index: Any, settings_of: Any) -> None:
    made = make_index(several=kinds_of)
    plain, drawn = (
        take(Loader(made.open(), settings_of(made, caption_dropout=0.5, captions=weights)), 20)
        for weights in ({}, WEIGHTS)
    )
    gone = [
        [text == "" for batch in batches for text in batch.captions] for batches in (plain, drawn)
    ]
    assert gone[0] == gone[1]


def test_a_kind_that_no_clip_has_is_an_error(make_index: Any, settings_of: Any) -> None:
    made = make_index(several=kinds_of)
    with pytest.raises(SettingsError, match=r"a weight for shrt.*caption, long, medium, short"):
        Loader(made.open(), settings_of(made, captions={"shrt": 1}))
    with pytest.raises(SettingsError, match="above 0"):
        settings_of(made, captions={"short": 0})
    with pytest.raises(SettingsError, match=r"train\.captions\.short is -1"):
        settings_of(made, captions={"short": -1})


def test_an_index_of_before_there_were_several_is_read(make_index: Any, settings_of: Any) -> None:
    index = make_index().open()
    old = replace(index, table=index.table.drop_columns(["captions"]))
    settings = settings_of(make_index())
    assert (
        take(Loader(old, settings), 1)[0].captions == take(Loader(index, settings), 1)[0].captions
    )


# ----------------------------------------------------------------------------- what is refused


def test_an_empty_index(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(1,))
    index = made.open()
    empty = Index(index.workdir, index.table.slice(0, 0), index.spec, {})
    with pytest.raises(ShardError, match="has no clips: `vidpipe status`"):
        Loader(empty, settings_of(made))


def rewrite(made: Any, change: Callable[[pa.Table], pa.Table]) -> str:
    name, path = next(iter(made.shards.items()))
    pq.write_table(change(pq.read_table(path)), path, row_group_size=3)
    return str(name)


def test_a_shard_with_other_clips(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(4,))
    name = rewrite(made, lambda table: table.take([1, 0, 2, 3]))
    with pytest.raises(ShardError) as error:
        take(Loader(made.open(), settings_of(made)), 1)
    first, second = list(made.clips)[:2]
    for part in (name, first, second, "vidpipe run encode"):
        assert part in str(error.value)


def test_a_shard_with_cut_latents(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(4,))

    def cut(table: pa.Table) -> pa.Table:
        column = pa.array([value[:-4] for value in table.column("latents").to_pylist()])
        return table.set_column(table.column_names.index("latents"), "latents", column)

    rewrite(made, cut)
    with pytest.raises(ShardError, match=r"2044 bytes stored.*takes 2048"):
        take(Loader(made.open(), settings_of(made)), 1)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_missing_or_damaged_shard(damage: str, make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(4,))
    name, path = next(iter(made.shards.items()))
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    told = "missing" if damage == "missing" else "damaged"
    with pytest.raises(ShardError, match=f"{name} .*{told}"):
        take(Loader(made.open(), settings_of(made)), 1)


def test_an_unknown_dtype() -> None:
    latent = Latent("a" * 24, memoryview(b"1234"), (8, 1, 1, 1), "int4")
    with pytest.raises(ShardError, match="of type int4: float32"):
        stored(latent, f"latents of clip {latent.clip_id}")


def test_expectations(make_index: Any) -> None:
    spec = make_index(sizes=(1,)).spec
    check_expected(Expect(fps=16, frames=4, height=32, width=32, vae="vaes/tiny"), spec)
    check_expected(Expect(vae=spec.vae_sha256), spec)
    with pytest.raises(SettingsError) as error:
        check_expected(Expect(fps=24, width=64, vae="other"), spec)
    told = str(error.value)
    assert "train.expect.fps is 24.0, but the latents were made with 16.0" in told
    assert "train.expect.width is 64, but the latents were made with 32" in told
    assert "train.expect.vae is other, but the latents were made with vaes/tiny" in told
    assert "frames" not in told


# ----------------------------------------------------------------------------- reading ahead


def test_read_ahead_is_bounded_and_ends_its_thread() -> None:
    made: list[int] = []
    enough = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 4:
                enough.set()
            yield number

    before = threading.active_count()
    items = read_ahead(numbers(), 3)
    assert [next(items), next(items)] == [0, 1]
    assert enough.wait(10)  # three ahead of the two that were taken
    assert made == [0, 1, 2, 3, 4]
    items.close()
    assert threading.active_count() == before
    assert made == [0, 1, 2, 3, 4]


def test_read_ahead_raises_what_its_source_raised() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ShardError("damaged")

    items = read_ahead(broken(), 2)
    assert next(items) == 1
    with pytest.raises(ShardError, match="damaged"):
        next(items)
    assert list(read_ahead(iter("abc"), 2)) == ["a", "b", "c"]


def test_an_index_that_is_in_order_is_not_copied(make_index: Any, settings_of: Any) -> None:
    """Its clips may be millions; one that is not in order gives the same visits."""
    made = make_index()
    index = made.open()
    loader = Loader(index, settings_of(made))
    ids = (loader.clips, index.table["clip_id"])
    own, theirs = (column.chunk(0).buffers()[2] for column in ids)
    assert own.address == theirs.address
    upside = replace(index, table=index.table.take(list(range(20, -1, -1))))
    other = Loader(upside, settings_of(made))
    assert other.start() == loader.start() and other.shards == loader.shards
    one, two = ([b.clip_ids for b in take(source, 12)] for source in (loader, other))
    assert one == two and len({clip for ids in one for clip in ids}) == 21
