"""A search step on tiny pipelines of many kinds: particles stop, look ahead, fork and go on as in a plain rollout."""

from __future__ import annotations

from dataclasses import replace

import families
import numpy as np
import pytest

from pipeline.core.types import GroupWork
from pipeline.rewards.runner import build_reward
from pipeline.search.base import SEARCHES, Particle, Task
from pipeline.search.run import run_searches
from pipeline.search.walk import PolicyWalk, Steering, sampling_of

# Flow, epsilon, v, LCM; several guidance rules; inpainting, a ControlNet, an edit, image to video, two experts.
SEARCHED = (
    "StableDiffusion", "StableDiffusion 2 (v)", "StableDiffusionInpaint", "LatentConsistencyModel", "StableDiffusion3",
    "Flux", "FluxControlNet", "FluxKontext", "Sana", "CogVideoX", "Wan 2.1 ImageToVideo", "Wan 2.2 (two experts)",
    "LTXImageToVideo", "Mochi",
)  # fmt: skip
STEPS = 4


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_step(name, tmp_path):
    folder = families.make(name, tmp_path)
    prompts = families.prompts(name, folder)
    policy = families.policy(name, folder, rewards={"r": {"scorer": "jpeg_compressibility"}})
    policy.probe(prompts)
    search = SEARCHES.get("fk")(passes=3, strength=50.0, at=[1])
    steering = Steering({"r": build_reward("r", policy.cfg.rewards["r"])}, {"r": 1.0})
    sampling = sampling_of(search, policy, STEPS)
    assert 1 in sampling.stochastic_steps
    walk = PolicyWalk(policy, sampling, steering, prompts[:1], batch=4)

    task = Task(steps=STEPS, noisy=sampling.stochastic_steps, seed=5)
    search.check(task)
    (found,) = run_searches(search, [task], walk, pictures=True)
    nodes = task.trace.nodes
    assert [node.level for node in nodes] == [1, 1, 1, 4, 4, 4] and task.trace.calls == 3 * STEPS
    assert np.isfinite([node.score for node in nodes]).all() and found.score == max(n.score for n in nodes[3:])
    assert all(node.picture.shape == found.best.frames.shape[1:] for node in nodes)

    begun = [Particle(level=-1, lineage=((0, seed),)) for seed in (5, 6)]
    pair = walk.advance(begun, [0, 0], 1)
    done = walk.advance([pair[0], pair[1].fork(7)], [0, 0], STEPS)
    work = GroupWork(
        group=0, attempt=1, purpose="eval", step=0, prompts=(prompts[0],) * 2, seeds=(5, 6), sampling=sampling
    )
    plain = policy.rollout(replace(work, forks=((), ((1, 7),)))).media.frames
    assert all(np.array_equal(particle.frames, take) for particle, take in zip(done, plain, strict=True))
    assert not np.array_equal(policy.rollout(work).media.frames[1], plain[1])
