"""Advantage-weighted matching: its gradient, that it learns a toy, and the learner's side of it on real pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_learning import GRID, Flow, ode_reward, reward

from pipeline.advantages import compute_advantages
from pipeline.config import AdvantageConfig
from pipeline.errors import UnsupportedPolicyError
from pipeline.generators.policy import Policy
from pipeline.learner import Learner
from pipeline.objectives import matching
from pipeline.plan import train_work
from pipeline.samplers import transition
from pipeline.types import GroupBatch, PromptItem

PROMPT = PromptItem(index=0, text="a red circle")


def test_gradient_is_the_advantage_times_the_matching_gradient():
    torch.manual_seed(0)
    velocity = torch.randn(3, 4, 5, requires_grad=True)
    target, advantages = torch.randn(3, 4, 5), torch.tensor([1.5, -0.5, 0.0])
    matching(velocity, target, advantages)[0].sum().backward()
    expected = advantages[:, None, None] * 2 * (velocity - target).detach() / 20
    assert torch.allclose(velocity.grad, expected)


def train(sign: float) -> Flow:
    torch.manual_seed(0)
    model = Flow()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        with torch.no_grad():
            x = torch.randn(64, 2)
            for t, t_next in zip(GRID, GRID[1:], strict=False):
                x = transition("ode", 0.0, "flow", x, model(x, t), t, t_next, GRID[1]).mean
        scores = [{"r": sign * reward(x)}]
        advantages = torch.from_numpy(compute_advantages(scores, {"r": 1.0}, AdvantageConfig()).advantages[0])
        optimizer.zero_grad()
        for t in GRID[:-1]:
            eps = torch.randn(1, 2).expand_as(x)
            loss, _ = matching(model((1 - t) * x + t * eps, t), eps - x, advantages)
            (loss.mean() / (len(GRID) - 1)).backward()
        optimizer.step()
    return model


def test_reward_rises_and_a_flipped_sign_lowers_it():
    before = ode_reward(Flow())
    assert ode_reward(train(1.0)) > before + 0.3
    assert ode_reward(train(-1.0)) < before - 0.3


@pytest.fixture(scope="module", params=["sd3", "wan"])
def made(request, tiny_sd3, tiny_wan) -> tuple[Policy, Learner]:
    folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
    cfg = tiny.config(folder, algorithm={"objective": "awm", "kl_beta": 0.1}, optimizer={"lr": 1e-3})
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.attach()
    learner = Learner(cfg, "cpu")
    policy.load_weights(learner.weights())
    return policy, learner


def groups(policy: Policy, step: int, scale: float = 1.0) -> list[GroupBatch]:
    batch = []
    for i in range(2):
        _, trajectory, _ = policy.rollout(train_work(policy.cfg, 2 * step + i, step, PROMPT))
        advantages = scale * np.array([1, -1, 0.5, -0.5], np.float32)
        batch.append(GroupBatch(trajectory=trajectory, advantages=advantages))
    return batch


def test_takes_are_drawn_without_noise_and_replay_is_exact(made):
    policy, learner = made
    batch = groups(policy, 0)
    part = batch[0].trajectory.parts[0]
    assert all(step.log_prob is None for step in part.steps) and part.final.data.shape[0] == 4
    metrics = learner.train_step(batch)
    assert metrics["onpolicy/max_abs_gap"] == 0.0 and metrics["grad_norm"] > 0 and metrics["ratio/max"] == 1.0
    assert metrics["kl"] == 0.0
    stale = learner.train_step(groups(policy, 1))  # the policy still holds the weights from before
    assert stale["onpolicy/max_abs_gap"] > 0.0 and stale["kl"] > 0.0
    policy.load_weights(learner.weights())
    assert learner.train_step(groups(policy, 2))["onpolicy/max_abs_gap"] == 0.0


def test_equal_rewards_move_nothing(made):
    policy, learner = made
    cfg = policy.cfg.model_copy(update={"algorithm": policy.cfg.algorithm.model_copy(update={"kl_beta": 0.0})})
    still = Learner(cfg, "cpu")
    assert still.train_step(groups(policy, 3, scale=0.0))["grad_norm"] == 0.0


def test_a_denoiser_that_is_not_given_the_sample_is_refused(made):
    policy, learner = made
    batch = groups(policy, 4)
    step = batch[0].trajectory.parts[0].steps[0]
    for call in step.calls:
        call.kwargs["hidden_states"] = step.sample  # as where conditions are joined to the sample
    with pytest.raises(UnsupportedPolicyError, match="use grpo"):
        learner.train_step(batch)
