"""Runs with networks of diffusers, whole and with adapters, from text and from a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from networks import CLASSES, CONFIGS, config, make
from safetensors.torch import load_file

from trainer import models, sample
from trainer.checkpoint import CheckpointError
from trainer.config import SettingsError
from trainer.data import Loader
from trainer.families import Family
from trainer.losses import Traits, clip_losses
from trainer.train import train


def family(kind: str, **values: Any) -> dict[str, Any]:
    return {"text": {"kind": "stored"}, "model": {"kind": kind, **values}}


@pytest.mark.parametrize("kind", ["wan", "ltx"])
def test_a_network_is_trained_in_two_parts_as_in_one(
    kind: str, make_index: Any, settings_of: Any, tmp_path: Path
) -> None:
    made = make_index(embedded=True)
    values = {**family(kind, path=str(make(kind, tmp_path / "net"))), "learning_rate": 0.01}
    whole = train(settings_of(made, output=str(tmp_path / "whole"), **values))
    train(settings_of(made, steps=3, **values))
    parts = train(settings_of(made, steps=6, **values))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    cls = getattr(diffusers, CLASSES[kind])
    read = cls.from_pretrained(parts.parent / "model", subfolder="transformer").state_dict()
    before = cls.from_pretrained(tmp_path / "net").state_dict()
    for name, value in read.items():
        assert torch.equal(value, one[f"net.{name}"])
    assert any(not torch.equal(value, before[name]) for name, value in read.items())


def test_adapters_alone_are_trained_and_saved(
    make_index: Any, settings_of: Any, tmp_path: Path
) -> None:
    made = make_index(embedded=True)
    lora = {"rank": 2, "dropout": 0.1}
    values = {
        **family("wan", path=str(make("wan", tmp_path / "net")), lora=lora),
        "learning_rate": 0.01,
        "gradient_checkpointing": True,
    }
    whole = train(settings_of(made, output=str(tmp_path / "whole"), **values))
    train(settings_of(made, steps=3, **values))
    parts = train(settings_of(made, steps=6, **values))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert one and all(".lora_" in name for name in one)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert all(value.any() for value in one.values())
    loaded, _ = models.load(parts)
    exported, _ = models.load(parts.parent / "model")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, exported.state_dict()[name])
    other = {**values, **family("wan", path=str(tmp_path / "net"), lora={"rank": 4})}
    with pytest.raises(CheckpointError, match=r"model\.lora\.rank is 4, not 2"):
        train(settings_of(made, **other))
    with pytest.raises(CheckpointError, match=r"model\.kind is ltx, not wan"):
        train(settings_of(made, **family("ltx", path=str(make("ltx", tmp_path / "ltx")))))


@pytest.mark.parametrize("kind", ["wan", "ltx"])
def test_a_first_frame_that_is_told_has_no_loss(
    kind: str, make_index: Any, settings_of: Any
) -> None:
    made = make_index(embedded=True, first_frame=True)
    torch.manual_seed(0)
    settings = settings_of(
        made, batch_size=21, **family(kind, config=CONFIGS[kind], first_frame=0.5)
    )
    loader = Loader(made.open(), settings)
    batch = next(loader.batches(loader.start()))
    first = batch.first_frames()
    assert first is not None and first.shape == (21, 4, 1, 4, 4)

    seen: dict[str, torch.Tensor] = {}

    def model(x: torch.Tensor, time: Any, text: Any, pictures: Any, told: Any) -> torch.Tensor:
        seen.update(told=told, pictures=pictures)
        out = torch.zeros_like(x)
        out[:, :, 0] = 1e6  # wrong, in the first frame alone
        return out

    losses = clip_losses(model, batch, settings, torch.device("cpu"), Traits(1, True))  # type: ignore[arg-type]
    assert torch.equal(seen["pictures"], first)
    told = seen["told"]
    assert 4 < told.sum() < 17
    assert (losses[told] < 1e6).all() and (losses[~told] > 1e9).all()
    again = clip_losses(model, batch, settings, torch.device("cpu"), Traits(1, True))  # type: ignore[arg-type]
    assert torch.equal(losses, again)


def test_first_frames_are_those_of_the_shards(make_index: Any, settings_of: Any) -> None:
    made = make_index(embedded=True, first_frame=True, moments=False)
    settings = settings_of(made, **family("wan", config=CONFIGS["wan"], first_frame=1.0))
    loader = Loader(made.open(), settings)
    batch = next(loader.batches(loader.start()))
    assert batch.stored_first is not None
    for clip, stored, alone in zip(batch.clip_ids, batch.stored, batch.stored_first):
        assert torch.equal(stored, torch.from_numpy(made.clips[clip][0]))
        assert torch.equal(alone, stored[:, :1] / 2)


def test_a_run_from_pictures_trains(make_index: Any, settings_of: Any, tmp_path: Path) -> None:
    made = make_index(embedded=True, first_frame=True)
    values = family("ltx", config=CONFIGS["ltx"], first_frame=0.5)
    folder = train(settings_of(made, steps=2, compile=False, **values))
    assert (folder.parent / "model" / "transformer" / "config.json").is_file()


@pytest.mark.parametrize(
    ("made_with", "values", "told"),
    [
        ({}, {"first_frame": 0.5}, "set encode.first_frame"),
        ({"shape": (4, 4, 3, 4)}, {}, "have 3 rows"),
    ],
)
def test_shards_that_do_not_suit_are_told(
    made_with: dict[str, Any], values: dict[str, Any], told: str, make_index: Any, settings_of: Any
) -> None:
    made = make_index(embedded=True, **made_with)
    with pytest.raises(SettingsError, match=told):
        train(settings_of(made, **family("wan", config=CONFIGS["wan"], **values)))


@pytest.mark.parametrize("kind", ["wan", "ltx"])
def test_what_adapters_leave_is_kept_in_half_precision(
    kind: str,
    precision_anew: None,
    make_index: Any,
    settings_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_index(embedded=True)
    seen: list[Family] = []
    halve = Family.halve
    monkeypatch.setattr(Family, "halve", lambda *a: (seen.append(a[0]), halve(*a)))
    values = family(kind, path=str(make(kind, tmp_path / "net")), lora={"rank": 2})
    folder = train(settings_of(made, steps=2, mixed_precision="bf16", **values))
    kept = getattr(seen[0].net, "_keep_in_fp32_modules", None) or ()
    dtypes = {name: parameter.dtype for name, parameter in seen[0].net.named_parameters()}
    for name, dtype in dtypes.items():
        whole = ".lora_" in name or any(part in kept for part in name.split("."))
        assert dtype == (torch.float32 if whole else torch.bfloat16), name
    assert all(v.isfinite().all() for v in load_file(folder / "model.safetensors").values())


def test_a_model_of_pictures_is_not_sampled_from_prompts(tmp_path: Path) -> None:
    described = config("cogvideox", model={"config": {"in_channels": 8}, "first_frame": 0.9})
    model = models.build(described)
    models.save(model, model.state_dict(), described, tmp_path)
    with pytest.raises(SettingsError, match="goes on from a picture"):
        sample.make(tmp_path, ["a"], None, tmp_path / "a.gif")
