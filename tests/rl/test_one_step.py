"""Objective one_step: what its loss and its gradient are, on made-up takes; which steps it trains; what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from objective_terms import objective

from pipeline.core.errors import ConfigError
from pipeline.rl.objectives.micro_batch import Denoised
from pipeline.rl.recipe import check_recipe

TAKES, PIXELS = 3, 8


class OneStepTakes(SimpleNamespace):
    """The predicted x0 is x0 + noise x level x weight; the error is the mean square of what the noise is multiplied by.

    `steps_left`: of the recorded levels; the level of noise at one is its steps_left / 10."""

    def clean(self):
        return self.x0

    def noise_of_takes(self):
        return self.noise

    def denoise(self, number, x0, noise, conditions=None):
        miss = noise * self.steps_left[number] / 10 * self.leaf
        return Denoised(miss.pow(2).mean(1), x0 + miss)

    def pixels(self, x0):
        return 2.0 * x0

    def rewards(self, pixels):
        values = {"a": pixels @ self.direction, "b": pixels.pow(2).mean(1)}
        if self.only_first:
            values["b"] = values["b"].where(torch.tensor([True, False, False]), torch.tensor(torch.nan))
        return {name: values[name] for name in self.reward_weights}


def takes(*steps_left: int, weights: dict[str, float], only_first: bool = False) -> OneStepTakes:
    torch.manual_seed(0)
    return OneStepTakes(
        x0=torch.randn(TAKES, PIXELS),
        noise=torch.randn(TAKES, PIXELS),
        leaf=torch.ones(PIXELS, requires_grad=True),
        direction=torch.randn(PIXELS),
        reward_weights=weights,
        only_first=only_first,
        steps_left=steps_left,
    )


def gradient(total: torch.Tensor, micro: OneStepTakes) -> torch.Tensor:
    (found,) = torch.autograd.grad(total.sum(), micro.leaf, retain_graph=True)
    return found


def by_hand(micro: OneStepTakes, level: int):
    """(error, rewards) at a level, written down again."""
    x0 = micro.x0 + micro.noise * level / 10 * micro.leaf
    return (x0 - micro.x0).pow(2).mean(1), {"a": 2 * x0 @ micro.direction, "b": (4 * x0.pow(2)).mean(1)}


def test_controlnetpp_is_the_denoising_loss_plus_the_rewards_loss_at_low_noise():
    micro = takes(2, weights={"a": 0.5, "b": 2.0})
    error, r = by_hand(micro, 2)
    expected = 0.7 * error + 0.5 * (9.0 - r["a"]).clamp(min=0) + 2.0 * (9.0 - r["b"]).clamp(min=0)
    loss = objective("one_step", reward_steps=2, denoising=0.7, shape="hinge", target=9.0).loss(micro)
    assert torch.allclose(loss.total, expected, rtol=1e-5)
    assert torch.allclose(gradient(loss.total, micro), gradient(expected, micro), rtol=1e-4)
    assert torch.allclose(loss.logs["denoising"], error) and torch.allclose(loss.logs["reward/b"], r["b"])
    assert torch.allclose(loss.logs["reward/mean"], 0.5 * r["a"] + 2 * r["b"], rtol=1e-5)
    assert not any(each.requires_grad for each in loss.logs.values()) and loss.replay_error is None


def test_at_high_noise_the_reward_is_not_asked():
    micro = takes(3, weights={"a": 1.0})
    micro.pixels = micro.rewards = None  # neither decoded nor judged
    loss = objective("one_step", reward_steps=2, uncertainty=1.0, shape="hinge", target=1.0).loss(micro)
    assert torch.allclose(loss.total, by_hand(micro, 3)[0])
    assert set(loss.logs) == {"denoising", "reward_loss", "uncertainty"} and not loss.logs["reward_loss"].any()


def test_ctrl_u_weighs_the_rewards_loss_by_exp_minus_u_and_adds_u_with_its_gradient():
    micro = takes(3, 2, weights={"a": 0.5, "b": 2.0})
    (error, near), (_, noisier) = by_hand(micro, 2), by_hand(micro, 3)
    u = {name: 0.3 * (near[name] - noisier[name]).abs() for name in near}
    loss_of = {name: (4.0 - near[name]).abs() for name in near}
    expected = error + sum(w * (-u[n]).exp() * loss_of[n] + u[n] for n, w in micro.reward_weights.items())
    options = {"reward_steps": 2, "shape": "distance", "target": 4.0}
    loss = objective("one_step", uncertainty=0.3, **options).loss(micro)
    assert torch.allclose(loss.total, expected, rtol=1e-5)
    mine = gradient(loss.total, micro)
    assert torch.allclose(mine, gradient(expected, micro), rtol=1e-4)
    without = sum(w * (-u[n].detach()).exp() * loss_of[n] for n, w in micro.reward_weights.items())
    assert not torch.allclose(mine, gradient(error + without, micro), rtol=1e-2)  # u is no constant
    assert torch.allclose(loss.logs["uncertainty"], u["a"] + u["b"], rtol=1e-5)
    assert torch.allclose(loss.logs["reward_loss"], expected - error - u["a"] - u["b"], rtol=1e-4)


def test_a_reward_that_does_not_apply_teaches_nothing_and_stays_out_of_the_mean():
    micro = takes(2, 1, weights={"b": 1.0}, only_first=True)
    loss = objective("one_step", denoising=0.0, uncertainty=1.0, shape="hinge", target=9.0).loss(micro)
    assert loss.total[0] and not loss.total[1:].any() and loss.logs["reward/b"].isnan().tolist() == [False, True, True]


def test_the_step_is_drawn_for_each_group_and_its_noisier_neighbour_comes_along():
    def steps(**options):
        rng = np.random.default_rng(0)
        chosen = objective("one_step", **options)
        return {tuple(chosen.tail_steps(6, rng, rng)) for _ in range(200)}

    unsure = {"uncertainty": 1.0, "shape": "hinge", "target": 1.0}
    assert steps(reward_steps=2) == {(j,) for j in range(6)}
    assert steps(reward_steps=2, denoising=0.0) == {(4,), (5,)}
    assert steps(reward_steps=2, **unsure) == {(0,), (1,), (2,), (3,), (3, 4), (4, 5)}
    assert (0,) in steps(reward_steps=6, **unsure) and (0, 1) in steps(reward_steps=6, **unsure)


CLIP = {"r": {"scorer": "clip_score", "gradient": True}}


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    parts = {"signal": {"name": "none"}, "rewards": CLIP}
    check_recipe(tiny.config(tmp_path, objective={"name": "one_step"}, step={"takes": 1}, **parts))
    with pytest.raises(ConfigError, match="objective.reward_steps: found 5; sampler.steps is 4"):
        check_recipe(tiny.config(tmp_path, objective={"name": "one_step", "reward_steps": 5}, **parts))
    with pytest.raises(ConfigError, match="sampler.window: is of no use with objective one_step"):
        window = {"sampler": {"window": {"kind": "random"}}}
        check_recipe(tiny.config(tmp_path, objective={"name": "one_step"}, **window, **parts))
    with pytest.raises(ValueError, match="linear has a loss below 0"):
        objective("one_step", uncertainty=0.5)
