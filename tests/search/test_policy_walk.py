"""Particles of a real pipeline: a search that never interferes gives the takes of a plain rollout, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.types import GroupWork, Media, PromptItem
from pipeline.generators.policy import Policy
from pipeline.rewards.runner import build_reward
from pipeline.search.base import SEARCHES, Particle, Task
from pipeline.search.run import run_searches
from pipeline.search.walk import PolicyWalk, Steering, sampling_of

PROMPTS = [PromptItem(index=i, text=t) for i, t in enumerate(("a red circle", "b blue square"))]
STEPS = 6


@pytest.fixture(scope="module", params=[("sd3", 1.0), ("sd3", 3.0), ("wan", 3.0)], ids=["image", "guided", "video"])
def policy(request, tiny_sd3, tiny_wan):
    name, scale = request.param
    cfg = tiny.config(
        {"sd3": tiny_sd3, "wan": tiny_wan}[name],
        generator={"guidance_scale": scale},
        rewards={"r": {"scorer": "jpeg_compressibility"}},
    )
    policy = Policy.load(cfg, "cpu", 1)
    policy.probe(PROMPTS)
    return policy


@pytest.fixture
def calls(policy, monkeypatch):
    """Takes in each denoiser call from here on."""
    rows: list[int] = []
    module = policy.modules["transformer"]
    forward = module.forward

    def counted(*args, **kwargs):
        rows.append(kwargs["hidden_states"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return rows


def walk_of(policy, search, prompts=PROMPTS[:1]) -> PolicyWalk:
    runners = {name: build_reward(name, reward) for name, reward in policy.cfg.rewards.items()}
    steering = Steering(runners, policy.cfg.reward_weights)
    return PolicyWalk(policy, sampling_of(search, policy, STEPS), steering, prompts, batch=16)


def plain(policy, walk, seeds, forks=()) -> np.ndarray:
    prompts = (PROMPTS[0],) * len(seeds)
    work = GroupWork(
        group=0, attempt=1, purpose="eval", step=0, prompts=prompts, seeds=seeds, sampling=walk.sampling, forks=forks
    )
    return policy.rollout(work).media.frames


def searched(policy, search, seed=5, prompts=PROMPTS[:1], pictures=False):
    walk = walk_of(policy, search, prompts)
    tasks = [Task(steps=STEPS, noisy=walk.sampling.stochastic_steps, seed=seed + i) for i in range(len(prompts))]
    return run_searches(search, tasks, walk, pictures), tasks, walk


@pytest.mark.parametrize(
    ("name", "options", "takes"),
    [
        ("best-of-n", {"passes": 1}, 1),
        ("fk", {"passes": 3, "strength": 0.0}, 3),
        ("fk", {"passes": 3, "strength": 0.0, "at": [2]}, 3),
        ("dts", {"passes": 4, "children": 1}, 1),
        ("dts-star", {"passes": 1}, 1),
        ("stepwise", {"passes": 1}, 1),
    ],
)
def test_without_a_choice_takes_are_those_of_a_plain_rollout(policy, name, options, takes):
    (found,), (task,), walk = searched(policy, SEARCHES.get(name)(**options))
    seeds = tuple(Task(STEPS, (), 5).new_seed() if k == 0 else int(task.rng(k).integers(2**62)) for k in range(takes))
    frames = plain(policy, walk, seeds)
    assert any(np.array_equal(found.best.frames, take) for take in frames)
    finished = [node.score for node in task.trace.nodes if node.level == STEPS]
    media = Media(frames=frames, fps=policy.cfg.generator.fps)
    assert finished == walk.rewards.score(media, PROMPTS[:1] * takes).tolist()


def test_a_fork_stops_and_goes_on_like_a_take_with_its_lineage(policy, calls):
    search = SEARCHES.get("fk")()
    walk = walk_of(policy, search)
    begun = [Particle(level=-1, lineage=((0, seed),)) for seed in (5, 6)]
    walk.advance(walk.advance(begun, [0, 0], 0), [0, 0], STEPS)  # the shape's stand-in is a first output
    calls.clear()
    at_2 = walk.advance(begun, [0, 0], 2)
    step = sum(calls) // 3  # levels 0, 1 and 2
    calls.clear()
    pair = [at_2[0], at_2[1].fork(77)]
    done = walk.advance(walk.advance(pair, [0, 0], 4), [0, 0], STEPS)
    assert sum(calls) == (STEPS - 3) * step  # the output at level 2 was handed back
    expected = plain(policy, walk, (5, 6), forks=((), ((2, 77),)))
    for particle, take in zip(done, expected, strict=True):
        assert np.array_equal(particle.frames, take)
    assert not np.array_equal(done[1].frames, plain(policy, walk, (5, 6))[1])


def test_what_a_particle_will_become_is_the_models_prediction(policy):
    """At the last level the prediction is the finished take."""
    walk = walk_of(policy, SEARCHES.get("stepwise")())
    (last,) = walk.advance([Particle(level=-1, lineage=((0, 5),))], [0], STEPS - 1)
    (ahead,) = walk.score([last], [0])[1]
    (done,) = walk.advance([last], [0], STEPS)
    assert int(np.abs(ahead.astype(int) - done.frames).max()) <= 1
    (early,) = walk.advance([Particle(level=-1, lineage=((0, 5),))], [0], 1)
    assert int(np.abs(walk.score([early], [0])[1][0].astype(int) - done.frames).max()) > 1


def test_prompts_searched_together_and_alone(policy, calls):
    search = SEARCHES.get("fk")(passes=4)
    both, tasks, _ = searched(policy, search, prompts=PROMPTS, pictures=True)
    guided = policy.cfg.generator.guidance_scale > 1.0
    assert max(calls) == 8 * (1 + guided) or (max(calls) == 8 and len(calls) >= 2 * STEPS)  # one call for both prompts
    alone = searched(policy, search)[0][0]
    assert int(np.abs(both[0].best.frames.astype(int) - alone.best.frames).max()) <= 1
    for task in tasks:
        assert task.trace.calls == 4 * STEPS
        assert all(node.picture.shape == both[0].best.frames.shape[1:] for node in task.trace.nodes)
        assert len({node.parent for node in task.trace.nodes if node.level == STEPS}) == 4


def test_searches_repeat_themselves(policy):
    for name in ("fk", "dts-star"):
        search = SEARCHES.get(name)(passes=3)
        first, second = (searched(policy, search)[0][0] for _ in range(2))
        assert np.array_equal(first.best.frames, second.best.frames) and first.score == second.score


def test_what_cannot_be_searched_is_refused(policy, monkeypatch):
    runners = {"r": build_reward("r", policy.cfg.rewards["r"])}
    with pytest.raises(ConfigError, match="no reward has a weight"):
        Steering(runners, {"r": 0.0})
    fk = SEARCHES.get("fk")
    noisy = sampling_of(fk(), policy, 1).stochastic_steps
    with pytest.raises(ConfigError, match="none of the 1 sampler steps can draw noise"):
        fk().check(Task(steps=1, noisy=noisy, seed=0))
    noted = replace(policy.probed, spec=replace(policy.spec, resume_note="it keeps state"))
    monkeypatch.setattr(policy, "probed", noted)
    with pytest.raises(Exception, match=r"search fk: .* cannot go on from a sample .it keeps state.; use best-of-n"):
        sampling_of(fk(), policy, STEPS)


def test_particles_of_one_level_are_advanced_together(policy):
    walk = walk_of(policy, SEARCHES.get("fk")())
    start = Particle(level=-1, lineage=((0, 5),))
    (ahead,) = walk.advance([start], [0], 1)
    with pytest.raises(ValueError, match="several levels"):
        walk.advance([start, ahead], [0, 0], 3)
    assert torch.is_tensor(ahead.x) and ahead.x.shape == ahead.output.shape
