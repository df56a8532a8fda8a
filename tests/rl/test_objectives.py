"""Policy losses: gradient at ratio 1, clipping, and what GRPO-Guard and Flow-DPPO change."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from objective_terms import D, moved_terms, objective, ratio_terms

from pipeline.config.parts import OBJECTIVES
from pipeline.rl.objectives.transitions import TransitionObjective, TransitionTerms
from pipeline.rl.samplers import Transition, log_prob
from pipeline.rl.samplers.base import flow_step


def test_gradient_at_ratio_one():
    """d loss / d v = -A (x' - mean) / (std^2 D) * d mean / d v."""
    made, leaf = moved_terms(1.7)
    result = objective("grpo").policy_loss(made)
    result.loss.sum().backward()
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(1, D, generator=generator).double(), torch.randn(1, D, generator=generator).double()
    step = flow_step(x, v, 0.8, 0.7, 0.6)
    z = torch.randn(1, D, generator=generator).double()
    slope = (1 + 0.36 * 0.2 / 1.6) * -0.1
    assert torch.allclose(leaf.grad, -1.7 * (step.std * z) / (step.std**2 * D) * slope, rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_small_step_raises_good_and_lowers_bad_takes(advantage):
    made, leaf = moved_terms(advantage)
    result = objective("grpo").policy_loss(made)
    result.loss.sum().backward()
    better = Transition(made.step.mean.detach(), made.step.std, made.step.dt)
    x_next_logp = made.log_prob.item()
    slope = (1 + 0.36 * 0.2 / 1.6) * -0.1
    moved = Transition(better.mean - 1e-2 * leaf.grad * slope, better.std, better.dt)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, D, generator=generator), torch.randn(1, D, generator=generator)
    x_next = better.mean + better.std * torch.randn(1, D, generator=generator)
    gain = log_prob(x_next.float(), Transition(moved.mean.float(), moved.std, moved.dt)) - log_prob(
        x_next.float(), Transition(better.mean.float(), better.std, better.dt)
    )
    assert (float(gain) > 0) == (advantage > 0), x_next_logp


@pytest.mark.parametrize(
    ("advantage", "ratio", "flows"),
    [(1, 1.2, False), (1, 0.8, True), (-1, 0.8, False), (-1, 1.2, True), (1, 1.05, True), (-1, 0.95, True)],
)
def test_clipping_stops_only_moves_further_away(advantage, ratio, flows):
    made, logp = ratio_terms(advantage, ratio)
    result = objective("grpo", clip_low=0.1, clip_high=0.1).policy_loss(made)
    result.loss.sum().backward()
    assert (float(logp.grad.abs()) > 0) == flows
    assert bool(result.clipped_low + result.clipped_high > 0) == (not flows)


@pytest.mark.parametrize("name", ["grpo", "grpo_guard"])
def test_a_stale_take_is_weighed_by_its_ratio_and_not_clipped(name):
    """Its gradient is that of a take whose ratio is 1, times min(ratio, max_weight)."""

    def gradient(is_stale: bool, **options: float | str) -> torch.Tensor:
        made, leaf = moved_terms(1.0, shift=0.5)
        objective(name, **options).policy_loss(replace(made, stale=is_stale)).loss.sum().backward()
        return leaf.grad

    made, _ = moved_terms(1.0, shift=0.5)
    ratio = float(objective(name).log_ratio(made).detach().exp())
    assert abs(ratio - 1) > 1e-3
    at_itself, leaf = moved_terms(1.0, shift=0.5)
    objective(name).policy_loss(at_itself.against_itself()).loss.sum().backward()
    assert torch.allclose(gradient(True), ratio * leaf.grad)
    assert torch.allclose(gradient(True, max_weight=0.9 * ratio), 0.9 * ratio * leaf.grad)
    assert not gradient(True, reject_above=0.5 * abs(math.log(ratio))).any()
    clipped, unclipped = gradient(True, stale="clip"), gradient(False)
    assert torch.equal(clipped, unclipped), "as on-policy: the clip may drop it"


def test_what_is_logged_of_stale_takes():
    rng = np.random.default_rng(0)
    advantage = rng.normal(size=500).astype(np.float32)
    fresh = {"ratio": np.ones(500, np.float32), "log_ratio": np.zeros(500, np.float32), "advantage": advantage}
    metrics = objective("grpo").summarise(fresh)
    assert metrics["ratio/mean"] == 1 and metrics["ratio/max_abs_log"] == 0
    assert not [name for name in metrics if name.startswith("offpolicy/")]
    log_ratio = (0.01 * advantage + rng.normal(scale=0.01, size=500)).astype(np.float32)
    metrics = objective("grpo").summarise({**fresh, "log_ratio": log_ratio})
    assert metrics["offpolicy/rms_log_ratio"] == pytest.approx(0.014, rel=0.1)
    assert metrics["offpolicy/advantage_correlation"] == pytest.approx(0.707, abs=0.06)


def test_weights_take_the_noise_out_of_a_step_s_gradient():
    """|d loss / d v| goes with dt / std; times std, with dt alone; with Guard's std / dt it is the same everywhere."""

    def norms(name: str, **options) -> list[float]:
        found = []
        for t, t_next, noise in ((0.9, 0.8, 2.0), (0.5, 0.3, 0.7)):
            x, v, z = torch.randn(3, 1, D, generator=torch.Generator().manual_seed(1)).double()
            v.requires_grad_()
            step = flow_step(x, v, t, t_next, noise)
            log_p = log_prob(step.mean + step.std * z, step)
            terms = TransitionTerms(log_p, log_p.detach(), torch.ones(1), step, step.mean.detach())
            objective(name, **options).policy_loss(terms).loss.sum().backward()
            slope = float((1 + noise**2 * (1 - t) / (2 * t)) * (t - t_next))
            found.append(float(v.grad.norm()) / slope * (t - t_next))
        return found

    steps = [flow_step(torch.zeros(1), torch.zeros(1), *times) for times in ((0.9, 0.8, 2.0), (0.5, 0.3, 0.7))]
    plain, weighted, guard = norms("grpo"), norms("grpo", step_weight="std"), norms("grpo_guard")
    assert [p * s.std for p, s in zip(plain, steps, strict=True)] == pytest.approx(weighted, rel=1e-5)
    assert [w / s.dt for w, s in zip(weighted, steps, strict=True)] == pytest.approx(guard, rel=1e-5)
    assert guard[0] == pytest.approx(guard[1], rel=1e-5)


def test_equal_rewards_give_zero_gradient():
    objectives = [objective(name) for name in OBJECTIVES.all()]
    for each in [each for each in objectives if isinstance(each, TransitionObjective)]:
        made, leaf = moved_terms(0.0)
        each.policy_loss(made).loss.sum().backward()
        assert torch.equal(leaf.grad, torch.zeros_like(leaf.grad)), each.name


def test_guard_recentres_the_ratio():
    """A moved mean pulls GRPO's ratio below 1 on average; with Guard's correction the mean log-ratio is 0."""
    plain, guard = [], []
    for seed in range(400):
        made, _ = moved_terms(1.0, shift=0.5, seed=seed)
        plain.append(objective("grpo").policy_loss(made).ratio.log())
        guard.append(objective("grpo_guard").policy_loss(made).ratio.log())
    assert float(torch.stack(plain).mean()) == pytest.approx(-0.125, abs=0.01)
    assert float(torch.stack(guard).mean()) == pytest.approx(0.0, abs=0.01 * made.step.std)


def test_dppo_drops_only_takes_beyond_the_threshold_that_move_away():
    near, near_leaf = moved_terms(1.0, shift=1e-3)
    objective("flow_dppo", threshold=1e-3).policy_loss(near).loss.sum().backward()
    assert float(near_leaf.grad.abs().max()) > 0
    outcomes = set()
    for seed in range(20):
        for advantage in (1.0, -1.0):
            far, leaf = moved_terms(advantage, shift=0.5, seed=seed)
            result = objective("flow_dppo", threshold=1e-3).policy_loss(far)
            result.loss.sum().backward()
            away = (float(result.ratio) > 1) == (advantage > 0)
            assert (float(leaf.grad.abs().max()) == 0) == away
            outcomes.add(away)
    assert outcomes == {True, False}
