"""Advantage-weighted matching: its gradient, that it learns on a toy, and that it trains real pipelines."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
import torch
from objective_terms import denoising_terms, objective
from scored_groups import group_batch
from toy_flow import GRID, Flow, ode_reward, reward

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import GroupBatch, PromptItem, StepGuidance
from pipeline.generators.policy import Policy
from pipeline.generators.replay.merge_steps import merge_steps
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work
from pipeline.rl.samplers import transition
from pipeline.rl.signals.advantages import Advantages
from pipeline.rl.signals.group_relative import compute_advantages

PROMPT = PromptItem(index=0, text="a red circle")


def test_gradient_is_the_advantage_times_the_matching_gradient():
    torch.manual_seed(0)
    velocity = torch.randn(3, 4, 5, requires_grad=True)
    target, advantages = torch.randn(3, 4, 5), torch.tensor([1.5, -0.5, 0.0])
    objective("awm").policy_loss(denoising_terms(velocity, target, advantages)).sum().backward()
    expected = advantages[:, None, None] * 2 * (velocity - target).detach() / 20
    assert torch.allclose(velocity.grad, expected)


def train(sign: float, name: str) -> Flow:
    torch.manual_seed(0)
    model, old, start = Flow(), Flow(), Flow()
    chosen = objective(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        with torch.no_grad():
            decay = chosen.old_decay(step)
            for mine, theirs in zip(old.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 1 - decay)
            x = torch.randn(64, 2)
            for t, t_next in zip(GRID, GRID[1:], strict=False):
                x = transition("ode", 0.0, "flow", x, old(x, t), t, t_next, GRID[1]).mean
        scores = [{"r": sign * reward(x)}]
        advantages = torch.from_numpy(compute_advantages(scores, {"r": 1.0}, Advantages()).advantages[0])
        optimizer.zero_grad()
        for t in GRID[:-1]:
            eps = torch.randn(1, 2).expand_as(x)
            noised = (1 - t) * x + t * eps
            with torch.no_grad():
                before, reference = old(noised, t), start(noised, t)
            terms = denoising_terms(model(noised, t), eps - x, advantages, before, t, reference)
            (chosen.policy_loss(terms).mean() / (len(GRID) - 1)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["awm", "nft", "dgpo"])
def test_reward_rises_and_a_flipped_sign_lowers_it(name):
    before = ode_reward(Flow())
    assert ode_reward(train(1.0, name)) > before + 0.3
    assert ode_reward(train(-1.0, name)) < before - 0.3


@pytest.fixture(scope="module", params=["sd3", "wan"])
def made(request, tiny_sd3, tiny_wan) -> tuple[Policy, Learner]:
    folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
    cfg = tiny.config(folder, objective={"name": "awm", "kl_beta": 0.1}, optimizer={"lr": 1e-3})
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.add_adapters()
    learner = Learner(cfg, "cpu")
    policy.load_weights(learner.weights())
    return policy, learner


def groups(policy: Policy, step: int, scale: float = 1.0) -> list[GroupBatch]:
    batch = []
    for i in range(2):
        _, trajectory, _ = policy.rollout(train_work(policy.cfg, 2 * step + i, step, PROMPT))
        advantages = scale * np.array([1, -1, 0.5, -0.5], np.float32)
        batch.append(group_batch(trajectory, advantages))
    return batch


def test_takes_are_drawn_without_noise_and_replay_is_exact(made):
    policy, learner = made
    batch = groups(policy, 0)
    part = batch[0].trajectory.parts[0]
    assert all(step.log_prob is None for step in part.steps) and part.final.data.shape[0] == 4
    metrics = learner.train_step(batch)
    assert metrics["onpolicy/max_abs_gap"] == 0.0 and metrics["grad_norm"] > 0 and "ratio/max" not in metrics
    assert metrics["kl"] == 0.0
    stale = learner.train_step(groups(policy, 1))  # the policy still holds the weights from before
    assert stale["onpolicy/max_abs_gap"] > 0.0 and stale["kl"] > 0.0
    policy.load_weights(learner.weights())
    assert learner.train_step(groups(policy, 2))["onpolicy/max_abs_gap"] == 0.0


def test_replay_is_checked_on_one_group_of_a_step_in_turn(made):
    policy, learner = made
    policy.load_weights(learner.weights())
    calls = []
    hook = learner.modules["transformer"].register_forward_hook(lambda *_: calls.append(1))
    batch = groups(policy, 5)
    seen = learner.version % 2
    batch[1 - seen].trajectory.parts[0].steps[0].next_sample.data[:] += 1.0
    assert learner.train_step(batch)["onpolicy/max_abs_gap"] == 0.0
    hook.remove()
    assert len(calls) == 2 * 3 * 2 + 1  # groups x trained steps x (policy and reference), and the check
    policy.load_weights(learner.weights())
    batch = groups(policy, 6)
    batch[1 - seen].trajectory.parts[0].steps[0].next_sample.data[:] += 1.0
    assert learner.train_step(batch)["onpolicy/max_abs_gap"] > 0.5


@pytest.mark.parametrize("takes, calls", [(12, 1), (8, 2)])
def test_several_trained_steps_in_one_call_give_the_same_gradient(made, takes, calls):
    policy, learner = made
    batch = groups(policy, 7)
    results = {}
    for size in (0, takes):
        settings = policy.cfg.learner.model_copy(update={"micro_batch": size})
        other = Learner(policy.cfg.model_copy(update={"learner": settings}), "cpu")
        other.load_state(*learner.state())
        seen = []
        other.modules["transformer"].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        metrics = other.train_step(batch)
        results[size] = metrics, other.weights()
        assert len(seen) == 2 * 2 * (calls if size else 3) + 1
    part, spec = batch[0].trajectory.parts[0], batch[0].trajectory.spec
    odd = replace(part, steps=(part.steps[0], replace(part.steps[1], guidance=StepGuidance(scale=2.0))))
    assert merge_steps(part, spec, [0, 1]) is not None and merge_steps(odd, spec, [0, 1]) is None
    assert results[takes][0] == pytest.approx(results[0][0], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("takes", [4, 12], ids=["a step at a time", "all steps in a call"])
def test_the_kl_at_every_nth_level_of_a_group_is_the_whole_one_on_average(made, every, takes):
    """Six groups: each of the three trained levels has its turn equally often, and no other reference pass is made."""
    policy, learner = made
    sections = {"learner": {"micro_batch": takes}, "objective": {"name": "awm", "kl_beta": 0.1}}
    cfgs = [tiny.config(Path(policy.cfg.generator.pretrained), **sections)]
    cfgs.append(cfgs[0].model_copy(update={"objective": cfgs[0].objective.model_copy(update={"kl_every": every})}))
    seen: list[dict[tuple[int, int], float]] = []
    for cfg in cfgs:
        other = Learner(cfg, "cpu")
        other.load_state(*learner.state())
        replica, kl_of, calls = other.replicas[0], {}, []
        replica.frozen = copy.deepcopy(replica.modules)
        replica.frozen["transformer"].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        for parameter in replica.frozen["transformer"].parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for number in range(6):
            group = groups(policy, 0)[0]
            group = replace(group, trajectory=replace(group.trajectory, group=number))
            for micro in replica.micro_batches(group.held, 0):
                kl = replica.loss(group, micro, check_replay=False).logs["kl"].reshape(-1, 4).mean(1)
                first = micro.step if takes == 4 else 0
                kl_of |= {(number, first + i): float(value) for i, value in enumerate(kl)}
            assert len(calls) == len({key for key, value in kl_of.items() if value > 0}) or takes == 12
        seen.append(kl_of)
    whole, thinned = seen
    expected = {(g, j): every * kl * ((g + j) % every == 0) for (g, j), kl in whole.items()}
    assert thinned == pytest.approx(expected, rel=1e-4) and min(whole.values()) > 0


def test_equal_rewards_move_nothing(made):
    policy, learner = made
    cfg = policy.cfg.model_copy(update={"objective": policy.cfg.objective.model_copy(update={"kl_beta": 0.0})})
    still = Learner(cfg, "cpu")
    assert still.train_step(groups(policy, 3, scale=0.0))["grad_norm"] == 0.0


def test_a_denoiser_that_is_not_given_the_sample_is_refused(made):
    policy, learner = made
    trajectory = groups(policy, 4)[0].trajectory
    blind = replace(
        trajectory, spec=replace(policy.spec, sample_slots={}, sample_note="it is computed from the sample")
    )
    with pytest.raises(UnsupportedPolicyError, match="computed from the sample; use grpo"):
        learner.train_step([group_batch(blind, [1, -1, 0.5, -0.5])])


def test_residuals_of_another_sample_are_not_trained_on(tmp_path):
    """Residuals are functions of the sample, so they do not fit one that is noised anew: where the pipeline makes
    something else of a ControlNet's output, it is not known how to compute it again."""
    name, guess = "StableDiffusionControlNet", {"call_kwargs": {"guess_mode": True}}
    folder = families.make(name, tmp_path)
    policy = families.policy(name, folder, objective={"name": "awm"}, generator=guess)
    with pytest.raises(UnsupportedPolicyError, match=rf"awm .*{name}Pipeline .*residuals.* use grpo"):
        policy.probe(families.prompts(name, folder))
    other = families.policy(name, folder, generator=guess)
    other.probe(families.prompts(name, folder))
    assert not other.spec.any_sample and not other.spec.sample_slots


@pytest.mark.parametrize(
    "name",
    [
        "Wan 2.1 ImageToVideo",  # joined with channels of the condition
        "ZImage",  # a list with an entry per take
        "FluxControlNet",  # the residuals are computed from the new sample
        pytest.param("FluxKontext", marks=pytest.mark.slow),  # joined with the condition's tokens
        pytest.param("TextToVideoSD", marks=pytest.mark.slow),  # permuted; predicts noise
        pytest.param("CogVideoXImageToVideo", marks=pytest.mark.slow),  # predicts v
        pytest.param("StableDiffusionInstructPix2Pix", marks=pytest.mark.slow),
    ],
)
def test_samples_packed_with_other_things_are_trained_on(name, tmp_path):
    folder = families.make(name, tmp_path)
    policy = families.policy(name, folder, objective={"name": "awm", "kl_beta": 0.1}, trainable={"kind": "full"})
    policy.probe(families.prompts(name, folder))
    policy.add_adapters()
    learner = Learner(policy.cfg, "cpu")
    policy.load_weights(learner.weights())
    _, trajectory, _ = policy.rollout(train_work(policy.cfg, 0, 0, families.prompts(name, folder)[0]))
    metrics = learner.train_step([group_batch(trajectory, [1, -1])])
    assert metrics["onpolicy/max_abs_gap"] < 1e-6 and metrics["grad_norm"] > 0 and metrics["kl"] == 0.0


def test_a_scheduler_with_noise_of_its_own_is_refused(tmp_path):
    name = "LatentConsistencyModel"
    folder = families.make(name, tmp_path)
    policy = families.policy(name, folder, objective={"name": "awm"})
    with pytest.raises(UnsupportedPolicyError, match="noise of its own.* use grpo"):
        policy.probe(families.prompts(name, folder))
    assert policy.spec.consistency and policy.spec.any_sample
