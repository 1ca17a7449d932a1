"""The batch size is found by trial: on made-up devices, and on a real VAE short of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_halving import short
from tiny import tiny

from stages.encode import Encode, EncodeSettings
from stages.vae.trial import MOST, best_batch
from stages.vae.vae import Options, Vae


class Device:
    """Takes `start` seconds for a batch and `each` for a clip; `room` clips fit its memory."""

    def __init__(self, start: float, each: float, room: int = 10_000) -> None:
        self.start, self.each, self.room = start, each, room
        self.now, self.tried = 0.0, set[int]()

    def run(self, clips: int) -> bool:
        self.tried.add(clips)
        self.now += self.start + self.each * clips
        return clips <= self.room

    def best(self, most: int = MOST) -> int:
        return best_batch(self.run, most, lambda: self.now)


def test_doubled_as_long_as_it_pays() -> None:
    """Of 1 s a batch and 0.1 s a clip, 32 clips take 4.2 s, 64 take 7.4 s: 14% faster."""
    assert Device(start=1.0, each=0.1).best() == MOST
    assert Device(start=1.0, each=0.1).best(most=11) == 8
    assert Device(start=1.0, each=0.1).best(most=0) == 1
    full = Device(start=0.0, each=1.0)
    assert full.best() == 1 and full.tried == {1, 2}, "the device is busy with a single clip"
    # 2 clips: 0.51 s each, 4: 0.505 s each, 1% faster.
    assert Device(start=0.02, each=0.5).best() == 1
    # From 8 to 16 clips 5% faster, from 16 to 32 2.7%.
    assert Device(start=0.09, each=0.1).best() == 16


def test_what_does_not_fit_ends_the_trial() -> None:
    device = Device(start=1.0, each=0.1, room=11)
    assert device.best() == 8 and device.tried == {1, 2, 4, 8, 16}
    assert Device(start=1.0, each=0.1, room=0).best() == 1


@pytest.fixture
def vae(tmp_path: Path) -> Vae:
    tiny("wan").save_pretrained(tmp_path / "vae")
    return Vae(str(tmp_path / "vae"))


def test_a_vae_is_tried_once_for_each_shape_and_short_of_memory_for_good(
    vae: Vae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes: list[int] = []
    whole = vae.module.encode

    def counted(batch: torch.Tensor) -> object:
        sizes.append(len(batch))
        return short(whole, 2)(batch)

    vae.module.encode = counted
    found = vae.tried_batch((1, 32, 32, 3))
    assert found in (1, 2) and max(sizes) == (4 if found == 2 else 2)
    assert not vae._halving.most, "what a trial meets does not halve the batches of the run"
    sizes.clear()
    assert vae.tried_batch((1, 32, 32, 3)) == found and not sizes, "remembered"
    vae.tried_batch((1, 16, 16, 3))
    assert sizes, "another shape"
    sizes.clear()
    vae.options = Options(slicing=True)
    vae.tried_batch((1, 16, 16, 3))
    assert sizes, "other options"


def test_auto_is_one_on_a_cpu(vae: Vae) -> None:
    assert vae.best_batch((9, 32, 32, 3)) == 1
    assert EncodeSettings.model_validate({"batch_size": "auto"}).batch_size is None
    assert EncodeSettings.model_validate({"batch_size": 3}).batch_size == 3
    with pytest.raises(ValueError, match="batch_size"):
        EncodeSettings.model_validate({"batch_size": "many"})
    assert Encode.Settings is EncodeSettings
