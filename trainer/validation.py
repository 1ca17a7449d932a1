"""Clips that are held back from training, and the model's loss on them.

Which ones follows from the hash of the source's clip alone: the same in every run, however the
index grows, and all windows of a video fall on the same side. The loss is that of the objective,
unweighted, at fixed times with fixed noise, captions kept: so it is comparable between steps and
between runs of one objective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from manifests.shards import Index
from trainer.config import SettingsError, TrainSettings
from trainer.data import Loader
from trainer.ema import Ema
from trainer.losses import Traits, losses_at

TIMES = 8  # at which each clip is looked at: the middles of as many equal parts of [0, 1]


def split(index: Index, settings: TrainSettings) -> tuple[Index, Index | None]:
    """The clips to train on, and those that are held back, at most `validation.clips` of them.

    Raises SettingsError where one of the two would be empty.
    """
    share, most = settings.validation.share, settings.validation.clips
    if not share:
        return index, None
    draws = drawn(_sources(index.table))
    held = draws < share
    train, kept = (index.table.filter(pa.array(mask)) for mask in (~held, held))
    if not len(train) or not len(kept):
        raise SettingsError(
            f"train.validation.share is {share:g}, which holds back {len(kept)} of "
            f"{len(index.table)} clips: set it so that some are left on both sides, or to 0"
        )
    # The first by the draw, and not by their places: those are of a few shards.
    looked_at = np.sort(np.argsort(draws[held], kind="stable")[:most])
    return replace(index, table=train), replace(index, table=kept.take(looked_at))


def by_draw(table: pa.Table) -> np.ndarray:
    """The rows of a table of clips in the order of their draw."""
    return np.argsort(drawn(_sources(table)), kind="stable")


def drawn(sources: Iterable[str]) -> np.ndarray:
    """A number in [0, 1) of each, by its hash: those below the share are held back."""
    draws = (hashlib.blake2b(s.encode(), digest_size=8, person=b"validation") for s in sources)
    return np.array([int.from_bytes(draw.digest()) / 2**64 for draw in draws], np.float64)


def _sources(table: pa.Table) -> list[str]:
    whole = "source_id" in table.column_names and not table.column("source_id").null_count
    ids: list[str] = table.column("source_id" if whole else "clip_id").to_pylist()  # an older index
    return ids


class Validation:
    """The clips of `index`, a part for each process. Raises as `Loader` does."""

    def __init__(self, index: Index, settings: TrainSettings, accelerator: Accelerator) -> None:
        rank, world = accelerator.process_index, accelerator.num_processes
        # One clip a batch: it comes at all times together. The seed is none of the run's.
        self._settings = settings.model_copy(
            update={"batch_size": 1, "caption_dropout": 0.0, "captions": {}, "seed": 0, "lanes": 1}
        )
        # As many for each, as the model may be spread over processes, which then all take part.
        each, self._accelerator = len(index.table) // world, accelerator
        if not each:
            raise SettingsError(
                f"train.validation holds back {len(index.table)} clips, which are too few for "
                f"{world} processes: raise train.validation.share"
            )
        mine = index.table[rank * each : (rank + 1) * each]
        self._loader = Loader(replace(index, table=mine), self._settings)
        self.clips = each * world

    def losses(self, model: nn.Module, traits: Traits, ema: Ema | None = None) -> dict[str, float]:
        """`val_loss`, and that at each time: `val_loss_at/0.06`; the same of the average of the
        weights, where there is one: `val_loss_ema`. All processes call it."""
        values = self._losses(model, traits, "val_loss")
        if ema is not None:
            with ema.applied():
                values |= self._losses(model, traits, "val_loss_ema")
        return values

    @torch.no_grad()
    def _losses(self, model: nn.Module, traits: Traits, name: str) -> dict[str, float]:
        device = self._accelerator.device
        total = torch.zeros(TIMES, device=device)
        training = model.training
        model.eval()
        with closing(self._loader.batches(self._loader.start())) as batches:
            for batch in islice(batches, len(self._loader)):
                total += losses_at(model, batch, self._settings, device, traits, times())
        model.train(training)
        means = (self._accelerator.reduce(total, "sum") / self.clips).tolist()
        at = {f"{name}_at/{t:.2f}": mean for t, mean in zip(times().tolist(), means)}
        return {name: sum(means) / TIMES, **at}


def told(losses: dict[str, float]) -> str:
    """For the console."""
    average = losses.get("val_loss_ema")
    return f"validation loss {losses['val_loss']:.4f}" + (
        f", of the averaged weights {average:.4f}" if average is not None else ""
    )


def times() -> Tensor:
    """From data at 0 to noise at 1: (TIMES,)."""
    return (torch.arange(TIMES) + 0.5) / TIMES
