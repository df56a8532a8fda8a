"""Objective reward_gradient: what its loss and its gradient are, on made-up takes; what its options allow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from objective_terms import objective

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.rl.objectives.micro_batch import Finished
from pipeline.rl.recipe import check_recipe

TAKES, PIXELS = 3, 8


class Tail(SimpleNamespace):
    """Takes x0 = start + leaf; the pictures are 2 x0, and the rewards linear or quadratic in them."""

    def finish(self, jump=False, detach=False):
        self.finished_with = (jump, detach)
        return Finished(self.start + self.leaf, torch.tensor([1e-7]))

    def reference_finish(self, jump=False):
        return self.start

    def denoise_again(self, x0, number):
        return x0.detach() + (number + 1) * self.leaf

    def pixels(self, x0):
        return (2.0 * x0).reshape(TAKES, 1, 1, 1, PIXELS)

    def rewards(self, pixels):
        flat = pixels.flatten(1)
        values = {"a": flat @ self.direction, "b": (flat**2).sum(1)}
        if self.only_first:
            values["b"] = values["b"].where(torch.tensor([True, False, False]), torch.tensor(torch.nan))
        return {name: values[name] for name in self.reward_weights}


def tail(weights: dict[str, float], only_first: bool = False) -> Tail:
    torch.manual_seed(0)
    return Tail(
        start=torch.randn(TAKES, PIXELS),
        leaf=torch.zeros(TAKES, PIXELS, requires_grad=True),
        direction=torch.randn(PIXELS),
        reward_weights=weights,
        only_first=only_first,
    )


def gradient(loss, micro: Tail) -> torch.Tensor:
    loss.total.sum().backward()
    assert micro.leaf.grad is not None
    return micro.leaf.grad


def test_the_loss_is_minus_the_weighted_rewards():
    micro = tail({"a": 0.5, "b": 2.0})
    loss = objective("reward_gradient").loss(micro)
    a, b = 2 * micro.start @ micro.direction, (4 * micro.start**2).sum(1)
    assert torch.allclose(loss.total, -(0.5 * a + 2 * b), rtol=1e-5)
    assert torch.allclose(loss.logs["reward/mean"], 0.5 * a + 2 * b, rtol=1e-5)
    assert torch.allclose(loss.logs["reward/b"], b) and torch.allclose(loss.logs["reward_loss"], loss.total)
    assert torch.allclose(gradient(loss, micro), -(0.5 * 2 * micro.direction + 2 * 8 * micro.start), rtol=1e-4)
    assert float(loss.replay_error) == pytest.approx(1e-7)


def test_hinge_stops_at_the_target_and_distance_turns_round_there():
    micro = tail({"b": 1.0})
    b = (4 * micro.start**2).sum(1)
    target = float(b.median())
    hinge = objective("reward_gradient", shape="hinge", target=target).loss(micro)
    assert torch.allclose(hinge.total, (target - b).clamp(min=0), atol=1e-4)
    moved = gradient(hinge, micro)
    below, above = b < target, b > target
    assert below.any() and above.any() and not moved[above].any()
    assert torch.allclose(moved[below], -8 * micro.start[below], rtol=1e-4)
    micro.leaf.grad = None
    distance = gradient(objective("reward_gradient", shape="distance", target=target).loss(micro), micro)
    assert torch.allclose(distance[below], moved[below]) and torch.allclose(distance[above], 8 * micro.start[above])


def test_copies_average_the_loss_over_takes_that_were_noised_again():
    """DRaFT-LV: with reward a, linear in the takes, copy n moves n + 1 times as far in the mock."""
    micro = tail({"a": 1.0})
    moved = gradient(objective("reward_gradient", copies=2).loss(micro), micro)
    assert torch.allclose(moved, -(1 + 1 + 2) / 3 * 2 * micro.direction.expand(TAKES, -1), rtol=1e-5)


def test_balanced_rewards_pull_each_take_equally_far_whatever_their_scale():
    micro = tail({"a": 1e-4, "b": 1e-4})
    loss = objective("reward_gradient", balance=True).loss(micro)
    moved = gradient(loss, micro)
    unit = torch.nn.functional.normalize
    pull = -unit(micro.direction.expand(TAKES, -1)) - unit(micro.start)
    assert torch.allclose(moved, 2 * 1e-4 * pull, rtol=1e-4)
    a, b = 2 * micro.start @ micro.direction, (4 * micro.start**2).sum(1)
    assert torch.allclose(loss.logs["reward_loss"], -1e-4 * (a + b), rtol=1e-5), (
        "the value is the rewards', not the pull's"
    )


def test_a_reward_that_does_not_apply_teaches_its_takes_nothing():
    for balance in (False, True):
        micro = tail({"b": 1.0}, only_first=True)
        loss = objective("reward_gradient", balance=balance).loss(micro)
        moved = gradient(loss, micro)
        assert moved[0].any() and not moved[1:].any() and bool(moved.isfinite().all())
        assert loss.logs["reward/b"][0] > 0 and not loss.logs["reward/b"][1:].any()


def test_the_starting_policy_holds_takes_back():
    micro = tail({"a": 1.0})
    micro.leaf.data += 0.5
    loss = objective("reward_gradient", kl_beta=3.0).loss(micro)
    assert torch.allclose(loss.logs["kl"], torch.full((TAKES,), 0.25))
    held, free = gradient(loss, micro), -2 * micro.direction.expand(TAKES, -1)
    assert torch.allclose(held - free, torch.full_like(free, 3.0 * 2 * 0.5 / PIXELS), atol=1e-5)


def test_a_tail_says_how_it_is_run():
    for options, expected in (({}, (False, False)), ({"jump": 2}, (True, False)), ({"detach": True}, (False, True))):
        micro = tail({"a": 1.0})
        objective("reward_gradient", **options).loss(micro)
        assert micro.finished_with == expected


def config(**sections) -> Config:
    base = {
        "objective": {"name": "reward_gradient"},
        "signal": {"name": "none"},
        "rewards": {"clip": {"scorer": "clip_score", "args": {"model": "x"}, "gradient": True}},
    }
    cfg = tiny.config(Path("sd3"), **{**base, **sections}).model_dump(mode="json")
    cfg["rewards"].pop("r")
    return Config.model_validate(cfg)


WATCHED = {"scorer": "scene", "weight": 0}
CLIP = {"scorer": "clip_score", "args": {"model": "x"}, "gradient": True}


def test_takes_need_no_companions():
    check_recipe(config(step={"takes": 1}))
    check_recipe(config(rewards={"clip": CLIP, "scene": WATCHED}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rewards": {"clip": {**CLIP, "gradient": False}}}, "learns through a reward, and none has gradient: true"),
        ({"rewards": {"clip": {**CLIP, "weight": 0}, "s": {**WATCHED, "weight": 1}}}, "none has gradient: true and a"),
        ({"rewards": {"clip": CLIP, "scene": {"scorer": "scene"}}}, "rewards.scene.weight: found 1, .* set weight 0"),
        ({"rewards": {"clip": {**CLIP, "normalize": "step"}}}, "rewards.clip.normalize: found step"),
        ({"rewards": {"clip": {**CLIP, "clip": [0, 1]}}}, "rewards.clip.clip: found .0.0, 1.0."),
        ({"signal": {"name": "advantages"}}, "signal.name: advantages compares scores.*; set none"),
        ({"objective": {"name": "grpo"}, "signal": {"name": "advantages"}}, "rewards.clip.gradient: objective grpo"),
        ({"objective": {"name": "grpo"}}, "signal.name: none gives none, and objective grpo needs advantages"),
        ({"objective": {"name": "reward_gradient", "tail": 5}}, "objective.tail: found 5; sampler.steps is 4"),
        ({"objective": {"name": "reward_gradient", "jump": 5}}, "objective.jump: found 5; sampler.steps is 4"),
        ({"sampler": {"timestep_fraction": 0.5}}, "sampler.timestep_fraction: is of no use"),
        ({"sampler": {"window": {"kind": "random", "size": 1}}}, "sampler.window: is of no use"),
    ],
)
def test_what_does_not_fit_is_one_line(sections, words):
    with pytest.raises(ConfigError, match=words) as error:
        check_recipe(config(**sections))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tail": [3, 1]}, "tail: found .3, 1."),
        ({"shape": "hinge"}, "target: hinge needs one"),
        ({"target": 2.0}, "target: found 2, which linear has no use for"),
        ({"jump": 2, "copies": 1}, "copies: 1 noise finished takes again"),
    ],
)
def test_options_that_contradict_each_other(options, words):
    with pytest.raises(ValueError, match=words):
        objective("reward_gradient", **options)
