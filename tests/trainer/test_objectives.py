from __future__ import annotations

import math

import pytest
import torch

from trainer import objectives
from trainer.objectives import Density, Kind, Schedule

KINDS: tuple[Kind, ...] = ("epsilon", "v_prediction", "flow")


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.randn(3, 2, 2, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def eps() -> torch.Tensor:
    return torch.randn(3, 2, 2, 2, 2, generator=torch.Generator().manual_seed(2))


def test_flow_goes_straight_from_data_to_noise(x0: torch.Tensor, eps: torch.Tensor) -> None:
    a, s = objectives.path("flow", "cosine", torch.tensor([0.0, 0.25, 1.0]))
    x = objectives.add_noise(x0, eps, a, s)
    torch.testing.assert_close(x[0], x0[0])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * eps[1])
    torch.testing.assert_close(x[2], eps[2])
    torch.testing.assert_close(objectives.target("flow", x0, eps, a, s), eps - x0)


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine"])
def test_schedules_keep_the_variance(schedule: Schedule) -> None:
    a, s = objectives.path("epsilon", schedule, torch.arange(1000) / 1000)
    torch.testing.assert_close(a**2 + s**2, torch.ones(1000))
    assert (a.diff() < 0).all()


def test_scaled_linear_is_stable_diffusions() -> None:
    level = objectives.alphas_cumprod("scaled_linear")
    assert level[0].item() == pytest.approx(1 - 0.00085, rel=1e-9)
    assert level[-1].item() == pytest.approx(0.0046601, rel=1e-4)  # diffusers' DDPMScheduler


def test_cosine_follows_its_closed_form() -> None:
    level = objectives.alphas_cumprod("cosine")
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    for step in (0, 250, 499, 900):
        wanted = math.cos(((step + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / start
        assert level[step].item() == pytest.approx(wanted, rel=1e-9)


def test_targets_of_the_schedules(x0: torch.Tensor, eps: torch.Tensor) -> None:
    a, s = torch.tensor([0.6, 0.8, 1.0]), torch.tensor([0.8, 0.6, 0.0])
    assert torch.equal(objectives.target("epsilon", x0, eps, a, s), eps)
    v = objectives.target("v_prediction", x0, eps, a, s)
    torch.testing.assert_close(v[0], 0.6 * eps[0] - 0.8 * x0[0])
    torch.testing.assert_close(v[2], eps[2])


@pytest.mark.parametrize("kind", KINDS)
def test_resolve_inverts_the_target(kind: Kind, x0: torch.Tensor, eps: torch.Tensor) -> None:
    a, s = objectives.path(kind, "cosine", torch.tensor([0.1, 0.5, 0.9]))
    x, wanted = objectives.add_noise(x0, eps, a, s), objectives.target(kind, x0, eps, a, s)
    found = objectives.resolve(kind, x, wanted, a, s)
    torch.testing.assert_close(found, (x0, eps), rtol=1e-4, atol=1e-4)


def test_min_snr_weights() -> None:
    a, s = torch.tensor([0.1, 0.9]).sqrt(), torch.tensor([0.9, 0.1]).sqrt()
    snr = torch.tensor([1 / 9, 9.0])
    epsilon = objectives.weight("epsilon", a, s, 5.0)
    torch.testing.assert_close(epsilon, torch.tensor([1.0, 5 / 9]))
    v = objectives.weight("v_prediction", a, s, 5.0)
    torch.testing.assert_close(v, torch.tensor([1 / 9, 5.0]) / (snr + 1))
    assert torch.equal(objectives.weight("epsilon", a, s), torch.ones(2))


def test_losses_are_weighted_means_of_each_clip() -> None:
    output, wanted = torch.zeros(2, 1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2)
    wanted[1] = 3
    found = objectives.losses(output, wanted, torch.tensor([1.0, 0.5]))
    assert found.tolist() == [1.0, 4.5]


def test_densities() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(density: Density, kind: Kind = "flow") -> torch.Tensor:
        times = [objectives.draw_time(density, kind, generator) for _ in range(4000)]
        return torch.stack(times)

    uniform, logit = draw("uniform"), draw("logit_normal")
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert uniform.min() >= 0 and uniform.max() < 1
    normal = torch.logit(logit.double())
    assert normal.mean().item() == pytest.approx(0, abs=0.05)
    assert normal.std().item() == pytest.approx(1, abs=0.04)
    steps = draw("uniform", "epsilon") * 1000
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.max() <= 999 and steps.min() >= 0
