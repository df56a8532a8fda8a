"""A toy that must learn: a 2-D Gaussian flow with a trainable velocity, reward = closeness to a point.

Same transitions, log-probs, advantages and objectives as the real learner; a flipped sign must make it worse.
"""

from __future__ import annotations

import pytest
import torch
from objective_terms import objective
from toy_flow import GRID, Flow, ode_reward, reward

from pipeline.rl.objectives.transitions import TransitionTerms
from pipeline.rl.samplers import gaussian_kl, log_prob, transition
from pipeline.rl.signals.advantages import Advantages
from pipeline.rl.signals.group_relative import compute_advantages


def train(kind: str, level: float, name: str, *, noisy: range, sign: float = 1.0, kl_beta: float = 0.0) -> Flow:
    chosen = objective(name, **({"threshold": 0.2} if name == "flow_dppo" else {"clip_low": 0.2, "clip_high": 0.2}))
    torch.manual_seed(0)
    model, start = Flow(), Flow()
    start.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        steps = []
        with torch.no_grad():
            x = torch.randn(64, 2)
            for i, (t, t_next) in enumerate(zip(GRID, GRID[1:], strict=False)):
                times = (t, t_next, GRID[1])
                if i in noisy:
                    moved = transition(kind, level, "flow", x, model(x, t), *times)
                    x_next = moved.mean + moved.std * torch.randn_like(x)
                    steps.append((x, x_next, log_prob(x_next, moved), moved.mean, times))
                else:
                    x_next = transition("ode", 0.0, "flow", x, model(x, t), *times).mean
                x = x_next
        scores = [{"r": sign * reward(x)}]
        advantages = torch.from_numpy(compute_advantages(scores, {"r": 1.0}, Advantages()).advantages[0])
        optimizer.zero_grad()
        for x, x_next, old, old_mean, times in steps:
            moved = transition(kind, level, "flow", x, model(x, times[0]), *times)
            terms = TransitionTerms(log_prob(x_next, moved), old, advantages, moved, old_mean)
            loss = chosen.policy_loss(terms).loss
            if kl_beta:
                with torch.no_grad():
                    reference = transition(kind, level, "flow", x, start(x, times[0]), *times).mean
                loss = loss + kl_beta * gaussian_kl(moved, reference)
            (loss.mean() / len(steps)).backward()
        optimizer.step()
    return model


CASES = {
    "flow_sde": ("flow_sde", 0.7, "grpo", range(6)),
    "dance_sde": ("dance_sde", 0.5, "grpo", range(6)),
    "cps": ("cps", 0.6, "grpo", range(6)),
    "window": ("flow_sde", 0.7, "grpo", range(1, 3)),
    "guard": ("flow_sde", 0.7, "grpo_guard", range(6)),
    "dppo": ("flow_sde", 0.7, "flow_dppo", range(6)),
}


@pytest.mark.parametrize("case", CASES)
def test_reward_rises_and_a_flipped_sign_lowers_it(case):
    kind, level, objective, noisy = CASES[case]
    before = ode_reward(Flow())
    after = ode_reward(train(kind, level, objective, noisy=noisy))
    assert after > before + 0.3, (before, after)
    assert ode_reward(train(kind, level, objective, noisy=noisy, sign=-1.0)) < before - 0.3


def test_kl_holds_back():
    free = ode_reward(train("flow_sde", 0.7, "grpo", noisy=range(6)))
    held = ode_reward(train("flow_sde", 0.7, "grpo", noisy=range(6), kl_beta=10.0))
    assert held < free - 0.2
