"""Which steps of a scheduler's grid may draw noise, and how much of the gradient each of them makes."""

from __future__ import annotations

import pytest
import torch
from noise_grids import GRIDS

from pipeline.rl.noise_grid import LEAST_SIGMA_NEXT, noise_of_steps
from pipeline.rl.samplers import get_sampler, log_prob, samplers_for

FLOW = [name for name in GRIDS if name not in ("sd1.5", "sd3 in 2 steps", "sd3 in 4 steps")]  # enough steps to share
MOST_OF_THE_GRADIENT = 0.6  # that one step with default settings may have: the last of six on the shipped grid


@pytest.mark.parametrize(
    ("grid", "noisy"),
    [("shipped", 6), ("sd3", 8), ("sd3 in 2 steps", 0), ("sd3 in 4 steps", 2), ("sd3 in 40 steps", 38),
     ("linspace", 9), ("flux", 27), ("wan", 18), ("sd1.5", 48)],
)  # fmt: skip
def test_noisy_steps_are_chosen_by_where_they_end(grid, noisy):
    made = GRIDS[grid]
    assert made.noisy_steps == noisy
    ends = [made.sigma(levels.sigma_next) for levels in made.levels[:-1]]
    assert all(end >= LEAST_SIGMA_NEXT for end in ends[:noisy])
    assert all(end < LEAST_SIGMA_NEXT for end in ends[noisy:])


def test_a_diffusion_level_as_a_flow_time():
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps is, but for its scale, (1 - t) x0 + t eps."""
    grid, abar = GRIDS["sd1.5"], 0.64
    t = grid.sigma(abar)
    assert t / (1 - t) == pytest.approx((1 - abar) ** 0.5 / abar**0.5)
    assert grid.sigma(0.0) == 1.0 and grid.sigma(1.0) == 0.0


@pytest.mark.parametrize("grid", [*FLOW, "sd1.5"])
def test_no_step_has_most_of_the_gradient(grid):
    made = GRIDS[grid]
    for kind in samplers_for(made.prediction):
        steps = noise_of_steps(made, kind, get_sampler(kind).default_noise)
        shares = [step.share for step in steps if step.noisy]
        assert len(shares) == made.noisy_steps and sum(shares) == pytest.approx(1.0)
        assert max(shares) < MOST_OF_THE_GRADIENT, (kind, shares)


def test_the_step_that_was_left_out_would_have_most_of_it():
    """So the test above can fail: on the shipped grid, flow-SDE's seventh step alone outweighs the other six."""
    step = noise_of_steps(GRIDS["shipped"], "flow_sde", 0.7)[6]
    assert not step.noisy and step.sigma_next < 0.005 and step.share == pytest.approx(1.74, abs=0.01)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_the_share_is_that_of_the_measured_gradient(kind):
    """|d log p / d v|^2 by autograd, for noise that the sampler itself would draw."""
    made, level = GRIDS["shipped"], get_sampler(kind).default_noise
    generator = torch.Generator().manual_seed(0)
    measured = []
    for levels in made.levels[: made.noisy_steps]:
        x, noise = (torch.randn(8, 4096, generator=generator) for _ in range(2))
        v = torch.randn(8, 4096, generator=generator).requires_grad_()
        step = get_sampler(kind).step(x, v, levels, "flow", level)
        log_prob(step.mean + step.std * noise, step).sum().backward()
        measured.append(float(v.grad.pow(2).sum()))
    shares = [step.share for step in noise_of_steps(made, kind, level)[: made.noisy_steps]]
    assert shares == pytest.approx([value / sum(measured) for value in measured], rel=0.03)
