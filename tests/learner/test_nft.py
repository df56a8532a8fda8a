"""DiffusionNFT: its gradient where both policies are equal, and the old policy's way through rollout and resume."""

from __future__ import annotations

import pytest
import tiny
import torch
from objective_terms import denoising_terms, objective
from scored_groups import group_batch

from pipeline.core.types import PromptItem
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work

PROMPT = PromptItem(index=0, text="a red circle")


@pytest.mark.parametrize("mix", [1.0, 0.1])
def test_at_the_old_policy_the_gradient_is_the_advantage_times_the_matching_gradient(mix):
    """grad L = A grad l with l = mean |x0' - x0|^2 / w (methods of the paper: max_advantage (2 r - 1) grad l)."""
    torch.manual_seed(0)
    level, velocity = 0.6, torch.randn(4, 6, requires_grad=True)
    target, advantages = torch.randn(4, 6), torch.tensor([2.0, -1.0, 0.0, 9.0])
    loss = objective("nft", mix=mix).policy_loss(
        denoising_terms(velocity, target, advantages, velocity.detach().clone(), level)
    )
    loss.sum().backward()
    error = level * (velocity - target).detach()
    size = error.abs().mean(1, keepdim=True)
    clipped = advantages.clamp(-5, 5)[:, None]
    assert torch.allclose(velocity.grad, clipped * 2 * error * level / 6 / size, atol=1e-5)
    value = 5.0 / mix * error.pow(2).mean(1) / size[:, 0]
    assert torch.allclose(loss.detach(), value, rtol=1e-5), "there the value does not depend on the advantage"


def test_a_take_that_is_neither_good_nor_bad_pulls_towards_the_old_policy():
    velocity = torch.full((1, 8), 2.0, requires_grad=True)
    old, target = torch.zeros(1, 8), torch.zeros(1, 8)
    objective("nft").policy_loss(denoising_terms(velocity, target, torch.zeros(1), old)).sum().backward()
    assert (velocity.grad > 0).all()


def make(folder, kind: str) -> tuple[Policy, Learner]:
    settings = {"name": "nft", "kl_beta": 0.01, "old_decay_ramp": 0.4, "old_decay_max": 0.8}
    cfg = tiny.config(folder, objective=settings, trainable={"kind": kind}, optimizer={"lr": 1e-2, "ema_decay": 0.9})
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    policy.probe()
    policy.add_adapters()
    return policy, learner


def step(policy: Policy, learner: Learner, number: int) -> dict[str, float]:
    policy.load_weights(learner.weights("old"))
    trajectory = policy.rollout(train_work(policy.cfg, number, number, PROMPT))[1]
    return learner.train_step([group_batch(trajectory, [1, -1, 0.5, -0.5])])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_takes_are_drawn_by_the_old_policy_and_a_resume_has_it(tiny_sd3, tiny_wan, kind):
    folder = {"lora": tiny_wan, "full": tiny_sd3}[kind]
    policy, learner = make(folder, kind)
    history = [step(policy, learner, number) for number in range(3)]
    assert all(metrics["onpolicy/max_abs_gap"] == 0.0 and metrics["grad_norm"] > 0 for metrics in history)
    assert history[0]["kl"] == 0.0 and history[2]["kl"] > 0
    checksums = {learner.weights(tag).checksum for tag in ("train", "old", "ema")}
    assert len(checksums) == 3, "the old policy lags behind, by another average than the EMA"
    policy.load_weights(learner.weights("train"))
    trajectory = policy.rollout(train_work(policy.cfg, 3, 3, PROMPT))[1]
    other = make(folder, kind)[1]
    other.load_state(*learner.state())
    assert other.weights("old").checksum == learner.weights("old").checksum
    assert other.train_step([group_batch(trajectory, [1, -1, 1, -1])])["onpolicy/max_abs_gap"] > 0, "not the old one's"
    other.load_state(*learner.state())
    assert step(policy, other, 4) == step(policy, learner, 4)
    assert other.weights("old").checksum == learner.weights("old").checksum
