"""The pipeline's own call without its denoisers: conditions at any level, and draws that go on from a given sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from pipeline.core.tensors import PackedTensor, pack
from pipeline.core.types import Begin, GroupWork, PromptItem, SamplingSpec
from pipeline.generators.policy import Policy
from pipeline.generators.replay.chain import DenoisingChain

PROMPTS = tuple(PromptItem(index=i, text=text) for i, text in enumerate(("a red circle", "b blue square", "c dog")))
SAMPLING = SamplingSpec(
    kind="flow_sde",
    noise_level=0.7,
    num_steps=4,
    stochastic_steps=(0, 1, 2),
    trained_steps=(0, 1, 2, 3),
    guidance_scale=3.0,
)
WORK = GroupWork(group=3, attempt=1, purpose="train", step=0, prompts=PROMPTS, seeds=(5, 6, 7), sampling=SAMPLING)


@pytest.fixture(scope="module", params=["sd3", "wan"])
def policy(request, tiny_sd3, tiny_wan) -> Policy:
    folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
    policy = Policy.load(tiny.config(folder, rollout={"batch": 2}, generator={"guidance_scale": 3.0}), "cpu", threads=1)
    policy.probe(list(PROMPTS))
    return policy


@pytest.fixture(scope="module")
def whole(policy):
    """(media, chain) of a group drawn from the start."""
    media, trajectory, _ = policy.rollout(WORK)
    return media, DenoisingChain(trajectory, policy.modules, torch.device("cpu"))


class Calls:
    """Counts the denoiser's own computations, which stand-ins do not make."""

    def __init__(self, policy: Policy) -> None:
        self.count = 0
        block = next(m for m in policy.modules["transformer"].modules() if "Block" in type(m).__name__)
        self.hook = block.register_forward_hook(self)

    def __call__(self, *_) -> None:
        self.count += 1


@pytest.mark.parametrize("step", [1, 3])
def test_a_draw_goes_on_from_a_state_to_the_same_takes(policy, whole, step):
    media, chain = whole
    states = pack(chain.state(step, slice(None)))
    rest = replace(SAMPLING, trained_steps=tuple(range(step, 4)))
    work = replace(WORK, sampling=rest, begin=Begin(step=step, states=states))
    policy.rollout(work)  # the stand-ins have seen every shape
    calls = Calls(policy)
    policy.rollout(WORK)
    of_all_steps, calls.count = calls.count, 0
    again, trajectory, _ = policy.rollout(work)
    calls.hook.remove()
    assert calls.count == of_all_steps * (4 - step) / 4
    assert np.array_equal(again.frames, media.frames)
    resumed = DenoisingChain(trajectory, policy.modules, torch.device("cpu"))
    assert torch.equal(resumed.clean(slice(None)), chain.clean(slice(None)))
    assert torch.equal(resumed.state(0, slice(None)), chain.state(step, slice(None)))
    if step == 1:
        shifted = Begin(step=step, states=PackedTensor(states.data + 1, states.dtype))
        other = policy.rollout(replace(work, begin=shifted)).media
        assert not np.array_equal(other.frames, media.frames)


def test_finished_latents_are_noised_to_the_level_where_takes_begin(policy, whole):
    _, chain = whole
    clean = chain.clean(slice(None))
    work = replace(
        WORK, sampling=replace(SAMPLING, trained_steps=(2, 3)), begin=Begin(step=2, states=pack(clean), clean=True)
    )
    _, trajectory, _ = policy.rollout(work)
    begun = DenoisingChain(trajectory, policy.modules, torch.device("cpu"))
    eps = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in WORK.seeds])
    assert torch.allclose(begun.state(0, slice(None)), chain.noised(2, clean, eps), atol=1e-6)


@torch.no_grad()
def test_conditions_need_no_denoising_and_are_the_rollouts(policy, whole):
    _, chain = whole
    policy.conditions(WORK)
    calls = Calls(policy)
    trajectory = policy.conditions(WORK, pack(chain.clean(slice(None))))
    calls.hook.remove()
    assert calls.count == 0
    conditions = DenoisingChain(trajectory, policy.modules, torch.device("cpu"))
    assert conditions.levels == chain.levels and len(conditions.parts) == 2
    takes = [2, 0, 1]
    for j in range(4):
        x = chain.state(j, takes)
        ours, theirs = conditions.output(j, x, takes), chain.output(j, x, takes)
        assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
    assert torch.equal(conditions.clean(takes), chain.clean(takes))
    with pytest.raises(RuntimeError, match="not drawn"):
        conditions.state(0, [0])
    with pytest.raises(RuntimeError, match="no finished latents"):
        DenoisingChain(policy.conditions(WORK), policy.modules, torch.device("cpu")).clean([0])


def test_the_grid_is_the_one_that_takes_are_drawn_on(policy, whole):
    grid = policy.condition_pass(4).grid(SAMPLING)
    assert list(grid) == [level.noise for level in whole[1].levels] and grid[0].sigma > grid[-1].sigma > 0
    assert len(policy.condition_pass(7).grid(replace(SAMPLING, num_steps=7, trained_steps=()))) == 7


@pytest.mark.parametrize(("step", "kept"), [(0, ()), (4, ()), (2, (1, 2))])
def test_a_beginning_leaves_steps_to_take(policy, whole, step, kept):
    states = pack(whole[1].state(1, slice(None)))
    work = replace(WORK, sampling=replace(SAMPLING, trained_steps=kept), begin=Begin(step=step, states=states))
    with pytest.raises(ValueError, match=f"begin at step {step} of 4"):
        policy.rollout(work)
