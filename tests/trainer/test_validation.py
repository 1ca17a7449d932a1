"""Clips that are held back, and the loss on them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator

from trainer.config import SettingsError
from trainer.ema import Ema
from trainer.losses import Traits
from trainer.models import build, load
from trainer.train import train
from trainer.validation import TIMES, Validation, drawn, split


def model_of(made: Any, settings: Any) -> Any:
    from trainer.config import ModelConfig

    torch.manual_seed(0)
    model = build(
        ModelConfig(
            model=settings.model,
            text=settings.text,
            objective=settings.objective,
            schedule=settings.schedule,
            shape=(4, 4, 4, 4),
            latents=made.spec.to_json(),
        )
    )
    torch.nn.init.normal_(model.unembed.weight, std=0.1)
    return model


def test_a_share_is_held_back_and_stays_held_back() -> None:
    sources = [f"clip {i}" for i in range(5000)]
    draws = drawn(sources)
    assert 0.08 < (draws < 0.1).mean() < 0.12
    assert draws.min() >= 0 and draws.max() < 1
    assert (drawn(sources[::-1])[::-1] == draws).all(), "whatever stands beside it"


def test_windows_of_a_video_fall_on_one_side(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(40,))
    index = made.open()
    sources = pa.array([f"video {row // 4}" for row in range(40)])
    at = index.table.column_names.index("source_id")
    table = index.table.set_column(at, "source_id", sources)
    settings = settings_of(made, validation={"share": 0.4})
    train_, held = split(type(index)(index.workdir, table, index.spec, index.facts), settings)
    assert held is not None and 0 < len(held.table) < 40
    assert len(train_.table) + len(held.table) == 40
    few = settings_of(made, validation={"share": 0.4, "clips": 3})
    assert len(split(made.open(), few)[0].table) < 40 and len(split(made.open(), few)[1].table) == 3
    sides = [set(each.table.column("source_id").to_pylist()) for each in (train_, held)]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("objective", ["flow", "epsilon", "v_prediction"])
def test_the_loss_is_the_same_whenever_it_is_asked_for(
    make_index: Any, settings_of: Any, objective: str
) -> None:
    made = make_index(sizes=(30, 10), shape=lambda n: (4, 4, 2, 2) if n % 3 else (4, 4, 4, 4))
    settings = settings_of(
        made, objective=objective, caption_dropout=0.9, validation={"share": 0.3, "clips": 8}
    )
    _, held = split(made.open(), settings)
    assert held is not None
    model = model_of(made, settings).train()
    validation = Validation(held, settings, Accelerator(cpu=True))
    first = validation.losses(model, Traits.of(model))
    torch.randn(7)  # chance elsewhere is nothing to it
    again = Validation(held, settings_of(made, objective=objective, seed=9), Accelerator(cpu=True))
    assert again.losses(model, Traits.of(model)) == first, "nor is the run's seed"
    assert len(first) == 1 + TIMES and validation.clips == min(8, len(held.table))
    assert sum(v for k, v in first.items() if "_at/" in k) / TIMES == pytest.approx(
        first["val_loss"]
    )
    assert model.training, "it is left as it was"
    with torch.no_grad():
        model.unembed.weight.mul_(3)
    assert validation.losses(model, Traits.of(model)) != first


def test_a_run_tells_it_and_never_trains_on_them(
    make_index: Any, settings_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(sizes=(30, 10))
    train(settings_of(made, validation={"share": 0.3, "every": 2}))
    told = capsys.readouterr().err
    held = int((drawn(made.clips) < 0.3).sum())
    assert f"{held} clips are looked at that are held back" in told
    assert f"{40 - held} clips of" in told
    losses = [line for line in told.splitlines() if "validation loss" in line]
    assert [line.split()[1] for line in losses] == ["2/6", "4/6", "6/6"]


def test_the_average_of_the_weights_is_looked_at_too(
    make_index: Any, settings_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(sizes=(30, 10))
    common = {"validation": {"share": 0.3, "every": 6}, "learning_rate": 1e-2}
    settings = settings_of(made, ema_decay=0.5, **common)
    folder = train(settings)
    (told,) = [x for x in capsys.readouterr().err.splitlines() if "validation loss" in x]
    _, held = split(made.open(), settings)
    assert held is not None
    validation = Validation(held, settings, Accelerator(cpu=True))
    for name, expected in (("val_loss_ema", told.split()[-1]), ("val_loss", told.split()[4][:-1])):
        model, _ = load(folder)  # of the average, while there is one
        values = validation.losses(model, Traits.of(model))
        assert f"{values['val_loss']:.4f}" == expected, name
        (folder / "ema.safetensors").unlink(missing_ok=True)
    ema = Ema(model, 0.5, 2 / 3)
    found = validation.losses(model, Traits.of(model), ema)
    assert found["val_loss_ema"] == found["val_loss"] and len(found) == 2 * (1 + TIMES)


def test_looking_changes_nothing_of_the_training(
    make_index: Any, settings_of: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(sizes=(30, 10))
    for name, every in (("often", 1), ("never", 1000)):
        train(
            settings_of(
                made, output=str(tmp_path / name), validation={"share": 0.3, "every": every}
            )
        )
    lines = [x for x in capsys.readouterr().err.splitlines() if "  loss " in x]
    losses = [line.split()[3] for line in lines]
    assert losses[:6] == losses[6:]


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_a_side_without_clips_is_told(make_index: Any, settings_of: Any, share: float) -> None:
    made = make_index(sizes=(10,))
    with pytest.raises(SettingsError, match=r"holds back (0|10) of 10 clips"):
        split(made.open(), settings_of(made, validation={"share": share}))
