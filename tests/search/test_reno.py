"""ReNO: the initial noise climbs the rewards' gradient through the sampler, and stays as long as Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
import torch

from jobs.common.searching import read_search_option
from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError, UnsupportedPolicyError
from pipeline.core.types import GroupWork, PromptItem
from pipeline.generators.policy import Policy
from pipeline.rewards.runner import build_reward
from pipeline.search.base import SEARCHES, Particle, Task
from pipeline.search.methods.reno import norm_slope
from pipeline.search.run import run_searches
from pipeline.search.walk import PolicyWalk, Steering, sampling_of

ROOT = Path(__file__).parents[2]
PROMPTS = [PromptItem(index=i, text=t) for i, t in enumerate(("a red circle", "b blue square"))]
BRIGHT = 'def bright(pixels, prompts):\n    return pixels.flatten(1).mean(1)\nbright.takes = "pixels"\n'
TARGET = torch.linspace(-1, 1, 50, dtype=torch.float64)


class Bowl:
    """A model that hands its initial noise through; the score is -|x - target|^2 / 2."""

    def advance(self, particles: Sequence[Particle], owners: Sequence[int], to: int) -> list[Particle]:
        noise = [torch.randn(50, generator=torch.Generator().manual_seed(p.lineage[0][1])) for p in particles]
        return [replace(p, level=to, x=x.double()) for p, x in zip(particles, noise, strict=True)]

    def score(self, particles: Sequence[Particle], owners: Sequence[int]):
        return np.array([-float((p.x - TARGET).square().sum()) / 2 for p in particles]), [np.zeros((1, 1, 1, 3))] * len(
            particles
        )

    def differentiate(self, particles: Sequence[Particle], owners: Sequence[int]):
        return [(replace(p, level=4), TARGET - p.x) for p in particles]


def found(**options):
    task = Task(steps=4, noisy=(), seed=3)
    (result,) = run_searches(SEARCHES.get("reno")(**options), [task], Bowl())
    return result, task


def test_it_is_sgd_with_nesterov_momentum_on_a_shortened_gradient():
    x = Bowl().advance([Particle(level=-1, lineage=((0, 3),))], [0], 0)[0].x.requires_grad_()
    sgd = torch.optim.SGD([x], lr=0.5, momentum=0.9, nesterov=True)
    scores = []
    for _ in range(6):
        loss = (x - TARGET).square().sum() / 2
        scores.append(-float(loss.detach()))
        sgd.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([x], 0.7)
        sgd.step()
    result, task = found(passes=6, rate=0.5, max_norm=0.7, norm_weight=0.0)
    np.testing.assert_allclose([node.score for node in task.trace.nodes[1:]], scores, rtol=1e-6)
    assert result.score == max(node.score for node in task.trace.nodes[1:]) > scores[0]
    assert task.trace.calls == 1 + 6 * 4


def test_the_best_take_of_all_is_kept():
    """With far too long steps the score falls: the plain take was the best one."""
    result, task = found(passes=4, rate=1e4, norm_weight=0.0)
    assert result.best.node == 1 and result.score == task.trace.nodes[1].score


def test_the_norm_penalty_is_the_negative_log_density_of_the_norm():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    own_length = 3.0
    z = x * 39**0.5 / own_length
    penalty = z.square().sum() / 2 - 39 * z.norm().log()
    (slope,) = torch.autograd.grad(penalty, z)
    assert torch.allclose(norm_slope(x.detach(), own_length), slope)
    assert not norm_slope(x.detach(), float(x.detach().norm())).any(), "no pull at the length it began with"
    far = {weight: found(passes=40, rate=0.5, norm_weight=weight)[0].best.x.norm() for weight in (0.0, 10.0)}
    start = found(passes=1)[0].best.x.norm()
    assert abs(far[10.0] - start) < 0.1 * abs(far[0.0] - start)


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "Wan 2.1"])
def test_gradients_through_the_whole_sampler(name, tmp_path):
    """Against a finite difference; and the first iteration's take is the plain one."""
    (tmp_path / "bright.py").write_text(BRIGHT)
    folder = families.make(name, tmp_path)
    rewards = {"bright": {"scorer": f"{tmp_path / 'bright.py'}:bright"}}
    policy = families.policy(name, folder, rewards=rewards)
    prompts = families.prompts(name, folder)
    policy.probe(prompts)
    search = SEARCHES.get("reno")(passes=5, rate=20.0)
    sampling = sampling_of(search, policy, 3)
    steering = Steering({"bright": build_reward("bright", policy.cfg.rewards["bright"])}, {"bright": 2.0})
    walk = PolicyWalk(policy, sampling, steering, prompts[:1], batch=4)
    begun = walk.advance([Particle(level=-1, lineage=((0, seed),)) for seed in (5, 6)], [0, 0], 0)
    (take, slope), (other, _) = walk.differentiate(begun, [0, 0])
    work = GroupWork(
        group=0, attempt=1, purpose="eval", step=0, prompts=(prompts[0],) * 2, seeds=(5, 6), sampling=sampling
    )
    plain = policy.rollout(work).media.frames
    assert max(np.abs(a.frames.astype(int) - b).max() for a, b in zip((take, other), plain, strict=True)) <= 1

    along = slope / slope.norm()
    chain = walk._chain((0, 0))
    step = 1e-2
    ends = []
    for away in (step, -step):
        with torch.no_grad():
            pictures = walk.codec.decode(chain.run((begun[0].x + away * along)[None], [0], 0, 3))
            ends.append(float(steering.gradient(pictures, prompts[:1], 8.0)))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope.norm()), rel=0.02)

    tasks = [Task(steps=3, noisy=(), seed=5)]
    (result,) = run_searches(search, tasks, walk)
    scores = [node.score for node in tasks[0].trace.nodes[1:]]
    assert result.score == max(scores) > scores[0]


def test_what_it_needs_is_said_before_anything_is_loaded_or_drawn(tiny_sd3, tmp_path):
    cfg = load_config(ROOT / "configs/quickstart-image.yaml")
    with pytest.raises(ConfigError, match=r"rewards.scene.gradient: scene has no gradient"):
        read_search_option(cfg, "reno")
    folder = families.make("LatentConsistencyModel", tmp_path)
    policy = families.policy("LatentConsistencyModel", folder)
    policy.probe(families.prompts("LatentConsistencyModel", folder))
    with pytest.raises(UnsupportedPolicyError, match="search reno: gradients do not reach the initial noise of Latent"):
        sampling_of(SEARCHES.get("reno")(), policy, 3)
    assert sampling_of(SEARCHES.get("reno")(), _probed(tiny_sd3), 3).kind == "ode"


def _probed(folder) -> Policy:
    policy = Policy.load(tiny.config(folder), "cpu", 1)
    policy.probe(PROMPTS)
    return policy
