from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from trainer import models, optimizers
from trainer.config import SettingsError, parse_settings
from trainer.ema import Ema
from trainer.train import train

CPU = torch.device("cpu")


def settings(**values: Any) -> Any:
    return parse_settings({"index": "i", "output": "o", **values})


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))


# ----------------------------------------------------------------------------- optimisers


def test_biases_and_norms_do_not_decay(model: Any) -> None:
    matrices, vectors = optimizers.decayed(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["params"] == [model[0].weight]
    assert len(vectors["params"]) == 3


def test_what_is_frozen_is_no_part_of_it(model: Any) -> None:
    model.requires_grad_(False)
    model[0].weight.requires_grad_(True)
    (group,) = optimizers.decayed(model, 0.1)
    assert group["params"] == [model[0].weight]


def test_adamw_takes_its_settings(model: Any) -> None:
    made = optimizers.build(model, settings(learning_rate=0.3, betas=[0.8, 0.7]), CPU)
    assert isinstance(made, torch.optim.AdamW)
    assert (made.defaults["lr"], made.defaults["betas"]) == (0.3, (0.8, 0.7))


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"optimizer": "adamw_8bit"}, "bitsandbytes"),
        ({"optimizer": "adamw_offload", "grad_clip": None}, "torchao"),
        ({"optimizer": "prodigy", "learning_rate": 1}, "prodigyopt"),
    ],
)
def test_a_missing_package_is_told(
    values: dict[str, Any], package: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.optim"):
        monkeypatch.setitem(__import__("sys").modules, name, None)  # as if it were not there
    with pytest.raises(SettingsError, match=f"pip install {package}, or set it to adamw"):
        optimizers.build(model, settings(**values), CPU)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optimizer": "lion"}, "'adamw', 'adamw_8bit', 'adamw_offload' or 'prodigy'"),
        ({"optimizer": "prodigy"}, "set it to 1"),
        ({"optimizer": "adamw_offload"}, "set grad_clip to null"),
        (
            {"optimizer": "adamw_offload", "grad_clip": None, "mixed_precision": "fp16"},
            "set mixed_precision to bf16",
        ),
    ],
)
def test_what_does_not_go_together_is_told(values: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        settings(**values)


def test_offload_is_for_one_process(model: Any) -> None:
    with pytest.raises(SettingsError, match=r"there are 2 processes.*adamw_8bit"):
        optimizers.build(model, settings(optimizer="adamw_offload", grad_clip=None), CPU, 2)


@pytest.mark.parametrize(
    ("values", "spread", "told"),
    [
        ({"optimizer": "adamw_8bit"}, "fsdp2", r"FSDP2 spreads: set it to adamw, .* zero2"),
        ({"optimizer": "prodigy", "learning_rate": 1}, "fsdp2", r"set it to adamw, or leave"),
        ({"optimizer": "prodigy", "learning_rate": 1}, "zero", r"set it to adamw, or leave"),
    ],
)
def test_what_cannot_be_spread_is_told(values: dict[str, Any], spread: str, told: str) -> None:
    spreads = {"fsdp2": False, "zero": False}
    optimizers.check_spread(settings(**values), **spreads)
    optimizers.check_spread(settings(), **{**spreads, spread: True})
    with pytest.raises(SettingsError, match=told):
        optimizers.check_spread(settings(**values), **{**spreads, spread: True})


def test_8_bits_go_with_zero() -> None:
    optimizers.check_spread(settings(optimizer="adamw_8bit"), fsdp2=False, zero=True)


@pytest.mark.skipif(not has("torchao") or torch.cuda.is_available(), reason="of no GPU")
def test_offload_is_for_a_gpu(model: Any) -> None:
    with pytest.raises(SettingsError, match="this machine has none"):
        optimizers.build(model, settings(optimizer="adamw_offload", grad_clip=None), CPU)


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"optimizer": "adamw_8bit", "learning_rate": 0.01}, "bitsandbytes"),
        ({"optimizer": "prodigy", "learning_rate": 1}, "prodigyopt"),
    ],
)
def test_a_run_with_another_optimiser_in_two_parts_is_one(
    values: dict[str, Any], package: str, make_index: Any, settings_of: Any, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    made = make_index()
    # Large enough matrices for 8 bits; smaller ones it keeps in 32.
    values = {**values, "model": {"width": 96, "depth": 1, "heads": 2, "patch": [2, 2, 2]}}
    whole = train(settings_of(made, output=str(tmp_path / "whole"), **values))
    train(settings_of(made, steps=3, **values))
    parts = train(settings_of(made, **values))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert one["unembed.weight"].any()


# ----------------------------------------------------------------------------- the learning rate


def test_the_rate_rises_and_stays() -> None:
    of = settings(warmup=4, learning_rate=0.8)
    rates = [optimizers.learning_rate(of, step) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert optimizers.learning_rate(settings(warmup=0, learning_rate=0.8), 0) == 0.8


def test_the_rate_falls_as_a_cosine() -> None:
    of = settings(warmup=2, learning_rate=0.8, lr_schedule="cosine", steps=10)
    rates = [optimizers.learning_rate(of, step) for step in range(11)]
    wanted = [0.4 * (1 + math.cos(math.pi * n / 8)) for n in range(9)]
    assert rates == pytest.approx([0.4, 0.8, *wanted], abs=1e-12)
    assert rates[10] == pytest.approx(0) and rates[6] == pytest.approx(0.4)


# ----------------------------------------------------------------------------- the average


def test_the_average_follows_the_power_schedule() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema, wanted = Ema(model, 0.9, 2 / 3), 1.0
    for n in range(12):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
        decay = min(0.9, 1 - (1 + n) ** (-2 / 3)) if n else 0.0
        wanted += (1 - decay) * (model.weight.item() - wanted)
        assert ema.state()["weight"].item() == pytest.approx(wanted, rel=1e-5)


def test_power_1_is_the_plain_mean() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    ema, seen = Ema(model, 0.9999, 1.0), []
    for n in range(7):
        with torch.no_grad():
            model.weight.fill_(float(n * n))
        seen.append(float(n * n))
        ema.update()
    assert ema.state()["weight"].item() == pytest.approx(sum(seen) / len(seen), rel=1e-4)
    assert EMAModel([model.weight]).inv_gamma == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_stands_in_for_the_weights_for_a_while(dtype: torch.dtype) -> None:
    model = torch.nn.Linear(2, 1).to(dtype)
    ema = Ema(model, 0.9, 2 / 3)
    ema.update()
    model.weight.data += 1
    ema.update()
    trained, average = model.weight.clone(), ema.state()["weight"].clone()
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(model.weight, average.to(dtype))
        assert not torch.equal(model.weight, trained)
        raise KeyError
    assert torch.equal(model.weight, trained)
    assert torch.equal(ema.state()["weight"], average)


def test_a_saved_average_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    one = Ema(model, 0.9, 2 / 3)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1.0)
        one.update()
    one.save(tmp_path)
    two = Ema(model, 0.9, 2 / 3)
    two.load(tmp_path)
    assert set(one.state()) == {"weight"}
    for ema in (one, two):
        with torch.no_grad():
            model.weight.fill_(9.0)
        ema.update()
    assert torch.equal(one.state()["weight"], two.state()["weight"])


def test_a_run_keeps_the_average(make_index: Any, settings_of: Any, tmp_path: Path) -> None:
    made, values = make_index(), {"ema_decay": 0.9, "learning_rate": 0.01}
    whole = train(settings_of(made, output=str(tmp_path / "whole"), **values))
    train(settings_of(made, steps=3, **values))
    parts = train(settings_of(made, **values))
    one, two = (load_file(folder / "ema.safetensors") for folder in (whole, parts))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    raw = load_file(parts / "model.safetensors")
    assert any(not torch.equal(value, raw[name]) for name, value in two.items())
    plain = train(settings_of(made, output=str(tmp_path / "plain"), learning_rate=0.01))
    assert all(
        torch.equal(value, raw[name])
        for name, value in load_file(plain / "model.safetensors").items()
    )
    for folder in (parts, parts.parent / "model"):
        loaded, _ = models.load(folder)
        for name, value in two.items():
            assert torch.equal(loaded.state_dict()[name], value)
