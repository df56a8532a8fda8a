"""Formulas of the stochastic steps against analytic Gaussians, torch.distributions and the deterministic limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gaussian_flow import M, S, exact_velocity, simulate

from pipeline.rl.samplers import gaussian_kl, log_prob, transition
from pipeline.rl.samplers.base import flow_step
from pipeline.rl.samplers.cps import cps_step
from pipeline.rl.samplers.ddim import ddim_step
from pipeline.rl.samplers.flow_sde import flow_sde_noise


def with_noise(noise):
    """The SDE step whose noise g is `noise(t, cap)`."""
    return lambda x, v, t, t_next, cap: flow_step(x, v, t, t_next, noise(t, cap))


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("ode", lambda t, cap: 0.0),
        ("flow_sde", lambda t, cap: flow_sde_noise(0.7, t, cap)),
        ("dance_sde", lambda t, cap: 1.0),
    ],
)
def test_sde_keeps_the_marginal(name, noise):
    x = simulate(with_noise(noise))
    assert abs(float(x.mean()) - M) < 0.006, name
    assert abs(float(x.std()) - S) < 0.01, name


def test_more_steps_come_closer_to_the_data():
    def error(steps: int) -> float:
        return abs(float(simulate(with_noise(lambda t, cap: 0.3), steps, 20_000).std()) - S)

    assert error(200) < error(10)


def test_marginal_test_notices_a_wrong_correction():
    """The same noise without the score correction in the mean misses the marginal: the test above can fail."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 1, generator=generator, dtype=torch.float64)
    for i in range(100):
        t, t_next = 1 - i / 100, 1 - (i + 1) / 100
        x = flow_step(x, exact_velocity(x, t), t, t_next, 0.0).mean
        if i < 99:
            x = x + math.sqrt(0.01) * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    assert abs(float(x.std()) - S) > 0.05


def test_flow_step_uses_the_exact_score():
    """mean - x = [v - g^2/2 * score] dt with the score of the true marginal, in float64."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    t, t_next, g = 0.7, 0.6, 0.9
    v = exact_velocity(x, t)
    variance = (1 - t) ** 2 * S**2 + t**2
    score = -(x - (1 - t) * M) / variance
    expected = x + (v - 0.5 * g * g * score) * (t_next - t)
    assert torch.allclose(flow_step(x, v, t, t_next, g).mean, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_zero_noise_is_euler(kind):
    x, v = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    step = transition(kind, 0.0, "flow", x, v, 0.7, 0.55, 0.9)
    assert step.std == 0.0
    assert torch.allclose(step.mean, x + (0.55 - 0.7) * v, atol=1e-6)


def test_flow_sde_std_on_the_sd3_grid():
    """g and std at the first and last usable transitions of diffusers' 10-step SD3 grid (a = 0.7)."""
    grid = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    x = torch.zeros(1, 1)
    std = [transition("flow_sde", 0.7, "flow", x, x, grid[i], grid[i + 1], grid[1]).std for i in range(10)]
    assert std[0] == pytest.approx(0.70, abs=5e-3)
    assert std[1] == pytest.approx(0.74, abs=5e-3)
    assert std[2] == pytest.approx(0.54, abs=5e-3)
    assert std[9] == pytest.approx(0.0063, abs=1e-4)


def test_cps_keeps_the_coefficients():
    """With an oracle (x0, eps), x' has mean coefficient 1 - t' and noise power t'^2 exactly."""
    x0, eps = torch.full((1, 1), 2.0, dtype=torch.float64), torch.full((1, 1), -3.0, dtype=torch.float64)
    t, t_next, eta = 0.8, 0.65, 0.5
    step = cps_step((1 - t) * x0 + t * eps, eps - x0, t, t_next, eta)
    noise_coefficient = float((step.mean - (1 - t_next) * x0) / eps)
    assert float(step.mean) == pytest.approx((1 - t_next) * 2.0 + noise_coefficient * -3.0, rel=1e-12)
    assert noise_coefficient**2 + step.std**2 == pytest.approx(t_next**2, rel=1e-12)
    assert step.std == pytest.approx(t_next * math.sin(eta * math.pi / 2))


def test_cps_has_the_published_log_prob():
    """-|x' - mean|^2, without 1 / (2 std^2), which at t' = 0.004 is 40,000; so has the KL, as the log-prob's weight."""
    torch.manual_seed(0)
    x, v = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
    mask = torch.rand(3, 4, 6, 6) > 0.5
    for t, t_next in ((1.0, 0.9), (0.253, 0.004)):
        step = cps_step(x, v, t, t_next, 0.7)
        x_next = step.mean + step.std * torch.randn_like(x)
        squares = (x_next - step.mean) ** 2
        assert torch.equal(log_prob(x_next, step), -squares.flatten(1).mean(1))
        assert torch.equal(gaussian_kl(step, x_next), squares.flatten(1).mean(1))
        chosen = torch.stack([s[m].mean() for s, m in zip(squares, mask, strict=True)])
        assert torch.allclose(log_prob(x_next, replace(step, mask=mask)), -chosen)


@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 4, 6, 6), (3, 4, 2, 5, 5)])
def test_log_prob_is_the_normal_density_averaged_over_dims(shape):
    x, v = torch.randn(shape), torch.randn(shape)
    step = transition("flow_sde", 0.7, "flow", x, v, 0.8, 0.7, 0.9)
    x_next = step.mean + step.std * torch.randn(shape)
    expected = torch.distributions.Normal(step.mean, step.std).log_prob(x_next).flatten(1).mean(1)
    assert torch.allclose(log_prob(x_next, step), expected, atol=1e-5)
    order = [2, 0, 1]
    permuted = transition("flow_sde", 0.7, "flow", x[order], v[order], 0.8, 0.7, 0.9)
    assert torch.equal(log_prob(x_next[order], permuted), log_prob(x_next, step)[order])


def test_log_prob_of_a_deterministic_step_is_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="deterministic"):
        log_prob(x, transition("ode", 0.0, "flow", x, x, 0.5, 0.4, 0.9))


def test_log_ratio_of_a_shifted_mean():
    """Shift the mean by u stds: E[log-ratio] = -u^2/2 and its spread is u/sqrt(D)."""
    torch.manual_seed(0)
    shape, u = (4000, 256), 0.1
    step = flow_step(torch.zeros(shape), torch.zeros(shape), 0.8, 0.7, 0.5)
    x_next = step.mean + step.std * torch.randn(shape)
    moved = flow_step(torch.zeros(shape), torch.zeros(shape), 0.8, 0.7, 0.5)
    moved.mean.add_(u * step.std)
    gap = log_prob(x_next, moved) - log_prob(x_next, step)
    assert float(gap.mean()) == pytest.approx(-(u**2) / 2, rel=0.05)
    assert float(gap.std()) == pytest.approx(u / 16, rel=0.05)


def test_kl_matches_monte_carlo_and_has_gradient():
    torch.manual_seed(0)
    v = torch.randn(1, 64, requires_grad=True)
    step = flow_step(torch.zeros(1, 64), v, 0.8, 0.7, 0.5)
    other = step.mean.detach() + 0.3 * step.std
    kl = gaussian_kl(step, other)
    p = torch.distributions.Normal(step.mean.detach(), step.std)
    q = torch.distributions.Normal(other, step.std)
    draws = p.sample((20_000,))
    assert float(kl.detach()) == pytest.approx(float((p.log_prob(draws) - q.log_prob(draws)).mean()), rel=0.05)
    kl.sum().backward()
    assert float(v.grad.abs().max()) > 0


def test_kl_in_velocity_form():
    """|mean gap|^2 / 2 std^2 = (1 + g^2 (1-t) / 2t)^2 h |v gap|^2 / 2 g^2."""
    x, v, w = torch.randn(2, 32).double(), torch.randn(2, 32).double(), torch.randn(2, 32).double()
    t, t_next, g = 0.7, 0.6, 0.8
    a, b = flow_step(x, v, t, t_next, g), flow_step(x, w, t, t_next, g)
    factor = (1 + g * g * (1 - t) / (2 * t)) ** 2 * (t - t_next) / (2 * g * g)
    assert torch.allclose(gaussian_kl(a, b.mean), factor * ((v - w) ** 2).mean(1))


def test_ddim_eta_one_is_ddpm_for_every_parametrisation():
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 8).double(), torch.randn(2, 8).double()
    abar, abar_next = 0.4, 0.55
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    x = a * x0 + b * eps
    outputs = {"epsilon": eps, "v_prediction": a * eps - b * x0, "sample": x0}
    # DDPM posterior (Ho et al. 2020, eq. 7) with alpha = abar / abar_next
    alpha = abar / abar_next
    mean = math.sqrt(abar_next) * (1 - alpha) / (1 - abar) * x0 + math.sqrt(alpha) * (1 - abar_next) / (1 - abar) * x
    variance = (1 - abar_next) / (1 - abar) * (1 - alpha)
    for prediction, output in outputs.items():
        step = ddim_step(x, output, abar, abar_next, 1.0, prediction)
        assert torch.allclose(step.mean, mean), prediction
        assert step.std**2 == pytest.approx(variance)


def test_kind_must_fit_the_prediction():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="use ddim"):
        transition("flow_sde", 0.7, "epsilon", x, x, 0.5, 0.6, 0.0)
    with pytest.raises(ValueError, match="predicts flow"):
        transition("ddim", 1.0, "flow", x, x, 0.5, 0.4, 0.9)
