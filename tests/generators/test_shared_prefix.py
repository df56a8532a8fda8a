"""Steps before a group's first noise are computed once for takes that share their initial noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from pipeline.core.types import PromptItem
from pipeline.generators.policy import Policy
from pipeline.generators.record.shared_prefix import SharedPrefix
from pipeline.generators.spec import CallKey, InputKey
from pipeline.rl.group_plan import train_work

PROMPTS = [PromptItem(index=i, text=t) for i, t in enumerate(("a red circle", "b blue square"))]
WINDOW = {"steps": 6, "same_initial_noise": True, "window": {"kind": "random", "size": 1, "range": [3, 4]}}


@pytest.fixture(scope="module", params=["sd3", "wan"])
def folder(request, tiny_sd3, tiny_wan):
    return {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]


@pytest.fixture(params=[1.0, 3.0], ids=["alone", "guided"])
def policy(folder, request):
    policy = Policy.load(
        tiny.config(folder, sampler=WINDOW, generator={"guidance_scale": request.param}, rollout={"batch": 8}), "cpu", 1
    )
    policy.probe(PROMPTS)
    return policy


@pytest.fixture
def rows(policy, monkeypatch):
    """Rows of every denoiser call from here on."""
    counts: list[int] = []
    module = policy.modules["transformer"]
    forward = module.forward

    def counted(*args, **kwargs):
        counts.append((kwargs.get("hidden_states") if not args else args[0]).shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return counts


def test_one_row_until_the_first_noise_and_the_same_takes(policy, rows, monkeypatch):
    work = train_work(policy.cfg, 0, 0, PROMPTS[0])
    media, trajectory, _ = policy.rollout(work)
    shared = rows.copy()
    rows.clear()
    monkeypatch.setattr(SharedPrefix, "distinct_inputs", lambda *_: None)
    whole, expected, _ = policy.rollout(work)
    ahead = len(rows) // 2  # three of six steps come before the noise
    assert sum(shared[:ahead]) * work.takes == sum(rows[:ahead]) and shared[ahead:] == rows[ahead:]
    assert int(np.abs(media.frames.astype(int) - whole.frames).max()) <= 1
    np.testing.assert_allclose(trajectory.parts[0].final.data, expected.parts[0].final.data, atol=1e-5)
    step, other = trajectory.parts[0].steps[0], expected.parts[0].steps[0]
    assert step.index == other.index == 3
    np.testing.assert_allclose(step.sample.data, other.sample.data, atol=1e-5)
    np.testing.assert_allclose(step.log_prob, other.log_prob, atol=1e-4)


def test_one_row_for_each_group_of_a_call(policy, rows):
    works = [train_work(policy.cfg, i, 0, prompt) for i, prompt in enumerate(PROMPTS)]
    works = [replace(work, sampling=works[0].sampling) for work in works]
    together = policy.rollouts(works)
    ahead = len(rows) // 2
    assert sum(rows[ahead:]) == 4 * sum(rows[:ahead])  # 8 takes of 2 groups
    for work, (media, _, _) in zip(works, together, strict=True):
        assert int(np.abs(policy.rollout(work)[0].frames.astype(int) - media.frames).max()) <= 1


def test_takes_with_their_own_noise_are_computed_apart(policy, rows):
    work = replace(train_work(policy.cfg, 0, 0, PROMPTS[0]), initial=(1, 2, 1, 3))
    media, _, _ = policy.rollout(work)
    ahead = len(rows) // 2
    assert 4 * sum(rows[:ahead]) == 3 * sum(rows[ahead:])  # takes 0 and 2 are one until the noise
    alone = policy.rollout(replace(work, prompts=work.prompts[1:2], seeds=work.seeds[1:2], initial=(2,)))[0]
    assert int(np.abs(alone.frames[0].astype(int) - media.frames[1]).max()) <= 1


def test_a_fork_is_its_parent_until_its_own_noise(policy, rows):
    """Noise that parent and fork both drew is the same, and computed once; every step is trained."""
    steps = {"stochastic_steps": (1, 2, 4), "trained_steps": (1, 2, 3, 4, 5)}
    work = train_work(policy.cfg, 0, 0, PROMPTS[0])
    work = replace(work, sampling=replace(work.sampling, **steps), initial=(), seeds=(11, 11, 11, 12))
    work = replace(work, forks=((), ((2, 7),), ((2, 7), (4, 8)), ()))
    media, trajectory, _ = policy.rollout(work)
    calls = len(rows) // 6
    taken = [sum(rows[step * calls : (step + 1) * calls]) for step in range(6)]
    one = taken[5] // 4  # a take's rows
    assert [count // one for count in taken] == [2, 2, 3, 3, 4, 4]
    states = {step.index: step.sample.data for step in trajectory.parts[0].steps}

    def equal(step: int, a: int, b: int) -> bool:
        return bool(np.array_equal(states[step][a], states[step][b]))

    assert equal(1, 0, 1) and equal(2, 0, 1) and not equal(3, 0, 1)  # the noise of step 1 is the parent's
    assert equal(3, 1, 2) and equal(4, 1, 2) and not equal(5, 1, 2)
    assert not equal(1, 0, 3)
    alone = replace(work, prompts=work.prompts[:1], seeds=(11,), forks=())
    assert int(np.abs(policy.rollout(alone).media.frames[0].astype(int) - media.frames[0]).max()) <= 1
    forked = replace(alone, prompts=work.prompts[1:2], forks=(((2, 7),),))
    assert int(np.abs(policy.rollout(forked).media.frames[0].astype(int) - media.frames[1]).max()) <= 1


def test_a_call_whose_rows_differ_is_left_whole(policy):
    """Even if their origins are equal."""
    prefix = SharedPrefix([["same"] * 4] * 3, policy.spec)
    assert prefix.active and prefix.distinct == [[0]] * 3
    layout = policy.spec.layouts[InputKey(CallKey(prefix.calls, 0), "kwargs.hidden_states")]
    equal = torch.ones(4 * layout.copies, 2)
    distinct = prefix.distinct_inputs(2, 0, (), {"hidden_states": equal})
    assert distinct is not None and distinct[1]["hidden_states"].shape == (layout.copies, 2)
    equal[1] = 0.5
    assert prefix.distinct_inputs(2, 0, (), {"hidden_states": equal}) is None
    assert prefix.distinct_inputs(2, prefix.calls, (), {"hidden_states": torch.ones(4, 2)}) is None


def test_a_denoiser_with_further_outputs_is_called_whole(policy, rows, monkeypatch):
    """Where the takes are in its other outputs is unknown, so the distinct takes cannot be expanded."""
    module, work = policy.modules["transformer"], train_work(policy.cfg, 0, 0, PROMPTS[0])
    expected = policy.rollout(work)[0]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: (*forward(*args, **kwargs), torch.ones(2)))
    rows.clear()
    media = policy.rollout(work)[0]
    calls = policy.cfg.sampler.steps * len(policy.spec.outputs)
    assert len(rows) == calls + 1  # the first call again, for all takes
    assert int(np.abs(expected.frames.astype(int) - media.frames).max()) <= 1
