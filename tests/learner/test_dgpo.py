"""DGPO: its gradient is that of one sigmoid over a group, and it needs the group in one call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from objective_terms import denoising_terms, objective
from scored_groups import group_batch

from pipeline.core.errors import ConfigError, UnsupportedPolicyError
from pipeline.core.types import PromptItem
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work
from pipeline.rl.recipe import check_recipe


def test_the_gradient_is_that_of_the_groups_log_sigmoid():
    torch.manual_seed(0)
    output = torch.randn(6, 5, requires_grad=True)
    target, reference = torch.randn(6, 5), torch.randn(6, 5)
    advantages, beta = torch.randn(6), 3.0
    terms = denoising_terms(output, target, advantages, reference=reference)
    objective("dgpo", beta=beta).policy_loss(terms).mean().backward()
    again = output.detach().requires_grad_()
    improvement = (again - target).pow(2).mean(1) - (reference - target).pow(2).mean(1)
    (-torch.nn.functional.logsigmoid(-beta * (advantages * improvement).mean()) / beta).backward()
    assert torch.allclose(output.grad, again.grad, atol=1e-6)


def test_it_trains_whole_groups(tiny_sd3):
    cfg = tiny.config(tiny_sd3, objective={"name": "dgpo", "kl_beta": 0.01}, optimizer={"lr": 1e-3})
    check_recipe(cfg)
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    policy.probe()
    policy.add_adapters()
    for step in range(2):
        policy.load_weights(learner.weights())
        trajectory = policy.rollout(train_work(cfg, step, step, PromptItem(index=0, text="a red circle")))[1]
        metrics = learner.train_step([group_batch(trajectory, [1, -1, 0.5, -0.5])])
        assert metrics["onpolicy/max_abs_gap"] == 0.0 and metrics["grad_norm"] > 0
    (part,) = trajectory.parts
    with pytest.raises(UnsupportedPolicyError, match="draws them in 2; use awm"):
        learner.train_step([group_batch(replace(trajectory, parts=(part, part)), [1, -1, 0.5, -0.5])])


@pytest.mark.parametrize("sections", [{"rollout": {"batch": 2}}, {"learner": {"micro_batch": 3}}])
def test_less_than_a_group_in_a_call_is_refused(sections):
    cfg = tiny.config(tiny.Path("unused"), objective={"name": "dgpo"}, **sections)
    with pytest.raises(ConfigError, match=r"compares all takes of a group in one call: set 0, or step.takes \(4\)"):
        check_recipe(cfg)
