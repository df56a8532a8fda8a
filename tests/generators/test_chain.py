"""The denoising chain of a group in the learner: any takes, samples, conditions and levels, and partial chains."""

from __future__ import annotations

from dataclasses import replace

import families
import numpy as np
import pytest
import tiny
import torch

from pipeline.core.types import GroupWork, PromptItem, SamplingSpec
from pipeline.generators import noising
from pipeline.generators.policy import Policy
from pipeline.generators.record.recording import RecordOptions
from pipeline.generators.replay.chain import DenoisingChain
from pipeline.generators.replay.replayer import Replayer
from pipeline.rl.samplers import NoiseLevels, log_prob

TEXTS = ("a red circle", "b blue square", "c green circle", "a red circle")
PROMPTS = tuple(PromptItem(index=i, text=text) for i, text in enumerate(TEXTS))
CPU = torch.device("cpu")


def drawn(policy: Policy, steps: int = 4, noisy: tuple[int, ...] = (0, 1, 2), prompts=PROMPTS) -> DenoisingChain:
    """A group with every step recorded, the last one too."""
    sampling = SamplingSpec(
        kind=policy.cfg.sampler.kind if noisy else "ode",
        noise_level=0.7 if noisy else 0.0,
        num_steps=steps,
        stochastic_steps=noisy,
        trained_steps=tuple(range(steps)),
        guidance_scale=3.0,
    )
    seeds = tuple(range(5, 5 + len(prompts)))
    work = GroupWork(group=0, attempt=1, purpose="train", step=0, prompts=prompts, seeds=seeds, sampling=sampling)
    trajectory = policy.rollout(work).trajectory
    assert trajectory is not None
    return DenoisingChain(trajectory, policy.modules, CPU)


@pytest.fixture(scope="module", params=["sd3", "wan"])
def policy(request, tiny_sd3, tiny_wan) -> Policy:
    folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
    policy = Policy.load(tiny.config(folder, rollout={"batch": 2}, generator={"guidance_scale": 3.0}), "cpu", threads=1)
    policy.probe(list(PROMPTS[:3]))
    return policy


@pytest.fixture(scope="module")
def chain(policy) -> DenoisingChain:
    """Of two parts with two takes each."""
    chain = drawn(policy)
    assert len(chain.parts) == 2 and chain.takes == 4 and not chain.why_not_any_sample
    return chain


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-6) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)


@torch.no_grad()
def test_takes_of_several_pipeline_calls_share_one_denoiser_call(chain):
    calls = []
    hook = chain.modules["transformer"].register_forward_hook(lambda *_: calls.append(1))
    takes = [3, 0, 2, 0]
    out = chain.output(1, chain.state(1, takes), takes)
    hook.remove()
    assert len(calls) == len(chain.parts[0].part.steps[1].calls)
    alone = [part.model_output(1, slice(0, 2), part.samples(1, slice(0, 2))[0]) for part in chain.parts]
    assert same(out, torch.cat(alone)[takes])
    whole = Replayer(chain.parts[0].part, chain.spec, chain.modules, CPU)
    first = DenoisingChain.output(chain, 2, chain.state(2, slice(0, 2)), slice(0, 2))
    assert torch.equal(first, whole.model_output(2, slice(0, 2), whole.samples(2, slice(0, 2))[0]))


@torch.no_grad()
def test_a_row_may_have_a_level_of_its_own(chain):
    levels, takes = [0, 2, 1, 2], [1, 3, 0, 1]
    x = chain.state(levels, takes)
    joined = chain.output(levels, x, takes)
    for row, (level, take) in enumerate(zip(levels, takes, strict=True)):
        assert torch.equal(x[row], chain.state(level, [take])[0])
        assert same(joined[row], chain.output(level, x[[row]], [take])[0])


@torch.no_grad()
def test_another_sample_and_another_prompt_are_what_the_pipeline_itself_would_give(policy, chain):
    x = torch.randn(chain.state(1, [0, 1]).shape, generator=torch.Generator().manual_seed(0))
    options = RecordOptions(keep_steps=frozenset({1}), samples={1: x}, stop_early=True)
    prompts = [PROMPTS[1], PROMPTS[2]]
    recording = policy.pipeline.sample(policy.plan, prompts, (1, 2), None, chain.sampling, options).recording
    out = chain.output(1, x, [0, 3], prompts=[1, 2])
    assert same(out, recording.steps[0].model_output)
    assert not same(chain.output(1, x, [0, 3]), out, 1e-4)


@torch.no_grad()
def test_drawn_steps_are_the_rollouts(chain):
    takes = [2, 1]
    for j in range(3):
        drawn = chain.drawn(j, takes)
        step = chain.move(j, drawn.x, chain.output(j, drawn.x, takes), takes)
        assert float((log_prob(drawn.x_next, step) - drawn.log_prob).abs().max()) < 1e-6
        assert same(chain.state(j + 1, takes), drawn.x_next)
    last = chain.drawn(3, takes)
    assert last.log_prob is None and chain.levels[3].last and not chain.levels[3].stochastic
    assert same(last.x_next, chain.clean(takes))
    with pytest.raises(ValueError, match="drew no noise"):
        chain.drawn_noise(3, takes)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 2, 3])
def test_a_chain_goes_on_from_any_state_to_the_rollouts_own_end(chain, start):
    takes = [3, 0]
    end = chain.run(chain.state(start, takes), takes, start, 4, noise=lambda j, x: chain.drawn_noise(j, takes))
    assert same(end, chain.clean(takes), 1e-5)
    if start < 3:
        assert not same(chain.run(chain.state(start, takes), takes, start, 4), chain.clean(takes), 1e-3)


def test_gradients_of_a_partial_chain_are_those_of_one_long_graph(chain):
    takes, gradients = [1, 2], []
    weight = next(chain.modules["transformer"].parameters()).requires_grad_(True)
    for checkpointed in (True, False):
        x = chain.state(2, takes).requires_grad_(True)
        if checkpointed:
            end = chain.run(x, takes, 2, 4, jump=True)
        else:
            middle = chain.move(2, x, chain.output(2, x, takes)).mean
            end = chain.clean_of(3, middle, chain.output(3, middle, takes))
        gradients.append(torch.autograd.grad(end.pow(2).mean(), [x, weight]))
    weight.requires_grad_(False)
    assert all(same(a, b) and float(b.abs().max()) > 0 for a, b in zip(*gradients, strict=True))


def test_steps_that_were_not_recorded_are_not_jumped_over(policy, chain):
    parts = [
        Replayer(replace(part.part, steps=(part.part.steps[0], part.part.steps[2])), chain.spec, chain.modules, CPU)
        for part in chain.parts
    ]
    gap = chain.with_modules(chain.modules)
    gap.parts, gap.levels = parts, (chain.levels[0], chain.levels[2])
    with torch.no_grad(), pytest.raises(ValueError, match="sampler step 1 was not recorded"):
        gap.run(chain.state(0, [0]), [0], 0, 2)


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
def test_a_perfect_model_finds_the_clean_sample(prediction):
    x0, eps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    level = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64)[:, None, None]
    x, out = noising.noised(prediction, level, x0, eps), noising.target(prediction, level, x0, eps)
    for row, sigma in enumerate((0.3, 0.8, 0.5)):
        clean = noising.clean_prediction(prediction, NoiseLevels(sigma, 0.1, 0.0), x[[row]], out[[row]])
        assert same(clean[0], x0[row], 1e-5)


def test_levels_are_noised_as_the_sampler_would(chain):
    x0, eps = torch.ones_like(chain.clean([0, 1])), torch.full_like(chain.clean([0, 1]), 2.0)
    sigmas = [chain.levels[j].noise.sigma for j in (1, 2)]
    noisy = chain.noised([1, 2], x0, eps)
    assert all(same(noisy[i], torch.full_like(noisy[i], 1 + sigma)) for i, sigma in enumerate(sigmas))
    assert torch.equal(chain.target(1, x0, eps), eps - x0)


@torch.no_grad()
def test_a_single_step_is_recorded(policy):
    chain = drawn(policy, steps=1, noisy=())
    assert len(chain.levels) == 1 and chain.levels[0].last
    assert same(chain.run(chain.state(0, [0, 3]), [0, 3], 0, 1), chain.clean([0, 3]))


@torch.no_grad()
def test_a_consistency_models_steps_are_its_own(tmp_path):
    name = "LatentConsistencyModel"
    folder = families.make(name, tmp_path)
    policy = families.policy(name, folder)
    policy.probe(families.prompts(name, folder))
    chain = drawn(policy, steps=3, noisy=(0, 1), prompts=tuple(families.prompts(name, folder)))
    takes = [1, 0]
    noise = {j: chain.drawn_noise(j, takes) for j in (0, 1)}
    end = chain.run(chain.state(0, takes), takes, 0, 3, noise=lambda j, x: noise[j])
    assert same(end, chain.clean(takes), 1e-4)
    with pytest.raises(ValueError, match="needs noise"):
        chain.run(chain.state(0, takes), takes, 0, 3)


@torch.no_grad()
@pytest.mark.slow
def test_guidance_is_found_for_another_number_of_steps(tmp_path):
    """Untrained experts answer prompt and negative prompt alike; the second one has a scale of its own, and at another
    number of steps begins elsewhere."""
    name = "Wan 2.2 (two experts)"
    folder = families.make(name, tmp_path)
    policy = families.policy(name, folder)
    policy.probe(families.prompts(name, folder))
    for steps in (5, 3):
        chain = drawn(policy, steps=steps, noisy=(), prompts=tuple(families.prompts(name, folder)[:2]))
        scales = [step.guidance.scale for step in chain.parts[0].part.steps]
        modules = [step.calls[0].module for step in chain.parts[0].part.steps]
        assert scales == [3.0 if module == "transformer" else 2.0 for module in modules] and len(set(scales)) == 2
        assert same(chain.run(chain.state(0, [1, 0]), [1, 0], 0, steps), chain.clean([1, 0]), 1e-5)


def test_a_reference_has_its_own_denoisers(chain):
    import copy

    other = {name: copy.deepcopy(module) for name, module in chain.modules.items()}
    for module in other.values():
        for parameter in module.parameters():
            parameter.data.mul_(1.01)
    with torch.no_grad():
        x = chain.state(1, [0])
        assert not same(chain.with_modules(other).output(1, x, [0]), chain.output(1, x, [0]), 1e-4)


def test_rows_and_takes_must_agree(chain):
    with pytest.raises(ValueError, match="2 samples for 3 takes"):
        chain.output(0, chain.state(0, [0, 1]), [0, 1, 2])
    assert np.array_equal(chain.state(0, slice(1, 3)), chain.state(0, np.array([1, 2])))
