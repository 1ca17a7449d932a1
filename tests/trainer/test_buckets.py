"""Several shapes in one index, through shards."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from safetensors.torch import load_file

from trainer.data import Batch, Loader
from trainer.order import Position
from trainer.train import train

SHAPES = ((4, 4, 2, 2), (4, 4, 2, 4), (4, 2, 4, 2))


def mixed(number: int) -> tuple[int, int, int, int]:
    """Of ten clips six, three and one."""
    return SHAPES[0 if number % 10 < 6 else 1 if number % 10 < 9 else 2]


def take(loader: Loader, count: int, start: Position | None = None) -> list[Batch]:
    with closing(loader.batches(start or loader.start())) as batches:
        return list(islice(batches, count))


def test_a_batch_is_of_one_shape_and_shapes_keep_their_shares(
    make_index: Any, settings_of: Any
) -> None:
    made = make_index(sizes=(40, 25, 35), shape=mixed)
    batches = take(Loader(made.open(), settings_of(made)), 75)  # 300 visits
    counts: Counter[tuple[int, ...]] = Counter()
    seen = defaultdict(list)
    for batch in batches:
        x = batch.latents()
        counts[tuple(x.shape[1:])] += len(x)
        shares = {SHAPES[0]: 0.6, SHAPES[1]: 0.3, SHAPES[2]: 0.1}
        for shape, share in shares.items():
            assert abs(counts[shape] - share * counts.total()) < 4
        for clip, epoch, one in zip(batch.clip_ids, batch.epochs, x, strict=True):
            assert one.shape == mixed(int(clip[4:]))
            seen[one.shape].append((epoch, clip))
    for shape, visits in seen.items():
        clips = {clip for clip in made.clips if mixed(int(clip[4:])) == shape}
        for first in range(0, len(visits) - len(clips) + 1, len(clips)):
            epoch = visits[first : first + len(clips)]
            assert {clip for _, clip in epoch} == clips
            assert {number for number, _ in epoch} == {first // len(clips)}


def test_a_clip_is_the_same_in_any_company(make_index: Any, settings_of: Any) -> None:
    """Whatever batch and process: latents and captions of a visit."""
    made = make_index(sizes=(20, 10), shape=mixed)
    found: dict[tuple[int, str], list[tuple[torch.Tensor, str]]] = defaultdict(list)
    for batch_size, world in ((1, 1), (3, 1), (2, 3)):
        settings = settings_of(made, batch_size=batch_size, caption_dropout=0.4)
        steps = math.ceil(60 / batch_size / world)
        for rank in range(world):
            for batch in take(Loader(made.open(), settings, rank, world), steps):
                visits = zip(batch.epochs, batch.clip_ids)
                for visit, one, caption in zip(visits, batch.latents(), batch.captions):
                    found[visit].append((one, caption))
    same = [draws for draws in found.values() if len(draws) == 3]
    assert len(same) > 50
    for (one, caption), *others in same:
        assert all(torch.equal(one, x) and caption == text for x, text in others)


def test_training_on_several_shapes_goes_on_bit_for_bit(
    make_index: Any, settings_of: Any, tmp_path: Any, capsys: Any
) -> None:
    made = make_index(sizes=(20, 10), shape=mixed)
    whole = train(settings_of(made, output=str(tmp_path / "whole")))
    assert "30 clips of 3 shapes, mostly [4, 4, 2, 2]" in capsys.readouterr().err
    train(settings_of(made, steps=3))
    parts = train(settings_of(made, steps=6))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert one["unembed.weight"].any()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_ten_thousand_visits(make_index: Any, settings_of: Any) -> None:
    """Three epochs at batch 1: each clip once an epoch, and as many captions dropped as told."""
    sizes = (900, 1500, 3, 931)
    made = make_index(sizes=sizes, shape=(4, 1, 1, 1), group=200)
    total = sum(sizes)
    settings = settings_of(made, batch_size=1, caption_dropout=0.1, shuffle_window=256)
    visits, gone = [], 0
    for batch in take(Loader(made.open(), settings), 3 * total):
        visits += zip(batch.epochs, batch.clip_ids)
        gone += batch.captions == [""]
    assert len(visits) == 10_002
    for epoch in range(3):
        part = visits[epoch * total : (epoch + 1) * total]
        assert {number for number, _ in part} == {epoch}
        assert {clip for _, clip in part} == set(made.clips)
    assert abs(gone - 0.1 * len(visits)) < 3 * math.sqrt(len(visits) * 0.1 * 0.9)
