from __future__ import annotations

import math

import pytest
import torch

from trainer import objectives
from trainer.objectives import Density, Kind, Schedule, Weighting

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


@pytest.mark.parametrize(
    ("kind", "weighting", "wanted"),
    [  # of SNR 1/9 and 9, gamma 5
        ("epsilon", "min_snr", [1.0, 5 / 9]),  # min(SNR, gamma) / SNR
        ("v_prediction", "min_snr", [(1 / 9) / (10 / 9), 5 / 10]),  # min(SNR, gamma) / (SNR + 1)
        ("epsilon", "snr", [1.0, 1.0]),
        ("v_prediction", "snr", [0.1, 0.9]),  # SNR / (SNR + 1) = a^2
        ("epsilon", "none", [1.0, 1.0]),
        ("v_prediction", "none", [1.0, 1.0]),
    ],
)
def test_weights(kind: Kind, weighting: Weighting, wanted: list[float]) -> None:
    a, s = torch.tensor([0.1, 0.9]).sqrt(), torch.tensor([0.9, 0.1]).sqrt()
    torch.testing.assert_close(objectives.weight(kind, a, s, weighting, 5.0), torch.tensor(wanted))


@pytest.mark.parametrize("weighting", ["none", "snr", "min_snr"])
def test_a_weight_is_the_same_of_either_target(
    weighting: Weighting, x0: torch.Tensor, eps: torch.Tensor
) -> None:
    """A wrong guess of x0 costs the same, whichever target it is told as."""
    a, s = torch.tensor([0.1, 0.5, 0.9]).sqrt(), torch.tensor([0.9, 0.5, 0.1]).sqrt()
    x, guess = objectives.add_noise(x0, eps, a, s), x0 + 0.1
    costs = {}
    for kind in ("epsilon", "v_prediction"):
        noise = (x - a.view(-1, 1, 1, 1, 1) * guess) / s.view(-1, 1, 1, 1, 1)
        said = objectives.target(kind, guess, noise, a, s)
        wanted = objectives.target(kind, x0, eps, a, s)
        weights = objectives.weight(kind, a, s, weighting)
        costs[kind] = objectives.losses(said, wanted, weights)
    snr = torch.tensor([1 / 9, 1.0, 9.0])
    if weighting == "none":
        torch.testing.assert_close(costs["epsilon"], 0.01 * snr, rtol=1e-3, atol=0)
        torch.testing.assert_close(costs["v_prediction"], 0.01 * (snr + 1), rtol=1e-3, atol=0)
    else:
        cut = snr.clamp(max=5) if weighting == "min_snr" else snr
        for cost in costs.values():
            torch.testing.assert_close(cost, 0.01 * cut, rtol=1e-3, atol=0)


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine"])
def test_zero_terminal_snr_follows_algorithm_1(schedule: Schedule) -> None:
    before = objectives.alphas_cumprod(schedule).sqrt()
    after = objectives.alphas_cumprod(schedule, True).sqrt()
    assert after[-1] == 0 and after[0].item() == pytest.approx(before[0].item(), rel=1e-12)
    wanted = (before - before[-1]) * before[0] / (before[0] - before[-1])
    torch.testing.assert_close(after, wanted, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_is_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    ).alphas_cumprod
    ours = objectives.alphas_cumprod("scaled_linear", True).float()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("zero", [False, True])
def test_shifted_schedules_are_cogvideoxs(shift: float, zero: bool) -> None:
    from diffusers import CogVideoXDDIMScheduler

    theirs = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", snr_shift_scale=shift, rescale_betas_zero_snr=zero
    ).alphas_cumprod
    ours = objectives.alphas_cumprod("scaled_linear", zero, shift)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-4, atol=1e-7)
    plain = objectives.alphas_cumprod("scaled_linear")
    if not zero:
        torch.testing.assert_close(ours / (1 - ours), plain / (1 - plain) / shift)


def test_v_without_signal_asks_for_the_clip(x0: torch.Tensor, eps: torch.Tensor) -> None:
    a, s = objectives.path("v_prediction", "cosine", torch.full((3,), 0.999), True)
    assert (a.tolist(), s.tolist()) == ([0.0] * 3, [1.0] * 3)
    assert torch.equal(objectives.target("v_prediction", x0, eps, a, s), -x0)
    assert torch.equal(objectives.resolve("v_prediction", eps, -x0, a, s)[0], x0)
    assert objectives.weight("v_prediction", a, s, "min_snr").tolist() == [0.0] * 3


def test_losses_are_weighted_means_of_each_clip() -> None:
    output, wanted = torch.zeros(2, 1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2)
    wanted[1] = 3
    found = objectives.losses(output, wanted, torch.tensor([1.0, 0.5]))
    assert found.tolist() == [1.0, 4.5]


def test_what_does_not_count_is_left_out_of_the_mean() -> None:
    output, wanted = torch.zeros(2, 3, 4, 1, 1), torch.ones(2, 3, 4, 1, 1)
    wanted[0, :, 0] = 100
    counted = torch.ones(2, 1, 4, 1, 1)
    counted[0, :, 0] = 0
    assert objectives.losses(output, wanted, torch.ones(2), counted).tolist() == [1.0, 1.0]


def draw(density: Density, *normal: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([objectives.draw_time(density, generator, *normal) for _ in range(4000)])


def test_densities() -> None:
    uniform = draw("uniform")
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert uniform.min() >= 0 and uniform.max() < 1
    for mean, std in ((0.0, 1.0), (0.7, 0.5)):
        normal = torch.logit(draw("logit_normal", mean, std).double())
        assert normal.mean().item() == pytest.approx(mean, abs=0.05)
        assert normal.std().item() == pytest.approx(std, abs=0.04)


def test_times_stay_below_1_in_float32() -> None:
    assert draw("logit_normal", 40.0, 1.0).max() < 1


def test_shift_adds_to_the_logit() -> None:
    time = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    assert torch.equal(objectives.shifted(time, 1.0), time)
    moved = objectives.shifted(time, 3.0)
    assert moved[2].item() == pytest.approx(0.75) and (moved[0], moved[-1]) == (0, 1)
    torch.testing.assert_close(
        torch.logit(moved[1:4]), torch.logit(time[1:4]) + math.log(3.0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825), (64, 0.5), (32760, 1.15)]
)
def test_shift_by_tokens_is_flux(tokens: int, mu: float) -> None:
    shift = objectives.token_shift(tokens, (256, 0.5), (4096, 1.15))
    assert shift == pytest.approx(math.exp(mu))


def test_times_of_a_schedule_are_its_steps() -> None:
    times = objectives.on_schedule(torch.tensor([0.0, 0.0004, 0.5, 0.99999, 1.0]))
    torch.testing.assert_close(times * 1000, torch.tensor([0.0, 0.0, 500.0, 999.0, 999.0]))
