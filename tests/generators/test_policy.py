"""A diffusers pipeline as a policy: parity with the untouched pipeline, seeds, recording and replay."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from pipeline.core.errors import ConfigError, InputError, UnsupportedPolicyError
from pipeline.core.tensors import SampleCopies, SharedSlot
from pipeline.core.types import GroupWork, PromptItem, StepGuidance
from pipeline.generators.guidance import RULES
from pipeline.generators.policy import Policy
from pipeline.generators.probe.fit import bare_spec, branches_distinguishable, fit_guidance, fit_rules
from pipeline.generators.record.policy_step import infer_mask
from pipeline.generators.record.recording import RawCall, RawStep, Recording
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.spec import CallKey, Layout, PolicySpec
from pipeline.rl.group_plan import ode_sampling, train_work
from pipeline.rl.samplers import log_prob, transition

PROMPTS = [PromptItem(index=i, text=t) for i, t in enumerate(("a red circle", "b blue square", "c green circle"))]


@pytest.fixture(scope="module", params=["sd3", "wan"])
def folder(request, tiny_sd3, tiny_wan):
    return {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]


def make(folder, **sections) -> Policy:
    policy = Policy.load(tiny.config(folder, **sections), "cpu", threads=1)
    policy.probe(PROMPTS)
    return policy


def ode_work(cfg, prompts, seeds) -> GroupWork:
    return GroupWork(
        group=0,
        attempt=1,
        purpose="eval",
        step=0,
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        sampling=ode_sampling(cfg, 4),
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_no_noise_is_the_untouched_pipeline(folder, scale):
    policy = make(folder, generator={"guidance_scale": scale})
    media, trajectory, _ = policy.rollout(ode_work(policy.cfg, PROMPTS, [1, 2, 3]))
    assert trajectory is None
    kwargs = policy.call_arguments(tuple(PROMPTS), ode_sampling(policy.cfg, 4))
    output = policy.pipe(**kwargs, generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)])
    values = np.asarray(getattr(output, "frames", None) if hasattr(output, "frames") else output.images)
    untouched = np.rint(values.reshape(media.frames.shape).clip(0, 1) * 255).astype(np.uint8)
    assert int(np.abs(untouched.astype(int) - media.frames).max()) <= 1  # rounding of 1e-7 at a half


def test_a_take_depends_on_its_seed_alone(folder):
    """Same seed, same take: alone, in a batch, or in parts of a group."""
    policy = make(folder)
    work = train_work(policy.cfg, 0, 0, PROMPTS[0])
    whole, trajectory, _ = policy.rollout(work)
    again, _, _ = policy.rollout(work)
    assert np.array_equal(whole.frames, again.frames)
    split = make(folder, rollout={"batch": 1})
    alone, parts, _ = split.rollout(work)
    assert len(parts.parts) == 4 and len(trajectory.parts) == 1
    assert int(np.abs(alone.frames.astype(int) - whole.frames).max()) <= 1
    last = [part.steps[-1].next_sample.data for part in parts.parts]
    np.testing.assert_allclose(np.concatenate(last), trajectory.parts[0].steps[-1].next_sample.data, atol=1e-5)
    assert np.ptp(whole.frames.astype(int).reshape(4, -1).mean(1)) > 0  # different seeds, different takes


def test_the_noise_levels_are_known_before_the_first_rollout(folder):
    """They are those of a run's own steps, and choose which of these draw noise."""
    policy = make(folder, sampler={"steps": 6})
    grid = policy.grid
    assert len(grid.levels) == 6 and grid.noisy_steps == 4  # the fifth step ends at 0.009, the sixth at 0
    _, trajectory, _ = policy.rollout(train_work(policy.cfg, 0, 0, PROMPTS[0], grid=grid))
    recorded = [(step.sigma, step.sigma_next, step.sigma_cap) for step in trajectory.parts[0].steps]
    assert recorded == [(levels.sigma, levels.sigma_next, levels.cap) for levels in grid.levels[:4]]


def test_a_window_that_does_not_fit_the_pipeline_is_refused(folder):
    with pytest.raises(ConfigError, match="sampler.steps: of 2 steps"):
        make(folder, sampler={"steps": 2})
    assert make(folder, sampler={"steps": 2, "window": {"range": [0, 1]}}).grid.noisy_steps == 0


def test_same_initial_noise_is_shared(folder):
    policy = make(
        folder, sampler={"same_initial_noise": True, "window": {"kind": "random", "size": 1, "range": [1, 3]}}
    )
    _, trajectory, _ = policy.rollout(train_work(policy.cfg, 0, 0, PROMPTS[0]))
    step = trajectory.parts[0].steps[0]
    first = step.sample.data
    assert np.allclose(first, first[:1], atol=1e-6)  # the shared ODE prefix
    assert np.abs(step.next_sample.data[0] - step.next_sample.data[1]).max() > 0.01


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_groups_drawn_in_one_call_are_the_groups_drawn_alone(folder, scale, monkeypatch):
    """Other prompts, trained steps and shared noises in one call; each trajectory replays as its own."""
    policy = make(
        folder,
        generator={"guidance_scale": scale},
        sampler={"steps": 6, "timestep_fraction": 0.4, "same_initial_noise": True},
        rollout={"batch": 12},
    )
    works = [train_work(policy.cfg, i, 0, prompt) for i, prompt in enumerate(PROMPTS)]
    assert len({work.sampling.trained_steps for work in works}) > 1
    calls, sample = [], policy.sample
    monkeypatch.setattr(policy, "sample", lambda *args, **kwargs: calls.append(args) or sample(*args, **kwargs))
    together = policy.rollouts(works)
    assert len(calls) == 1 and len(calls[0][1]) == 12
    for work, (media, trajectory, seconds) in zip(works, together, strict=True):
        alone, expected, _ = policy.rollout(work)
        assert trajectory.group == work.group and trajectory.sampling == expected.sampling and seconds["total"] > 0
        assert int(np.abs(alone.frames.astype(int) - media.frames).max()) <= 1
        part, whole = trajectory.parts[0], expected.parts[0]
        assert (part.start, part.stop, len(part.shared)) == (whole.start, whole.stop, len(whole.shared))
        np.testing.assert_allclose(part.final.data, whole.final.data, atol=1e-5)
        replayer = Replayer(part, policy.spec, policy.modules, torch.device("cpu"))
        for j, (step, other) in enumerate(zip(part.steps, whole.steps, strict=True)):
            assert step.index == other.index
            np.testing.assert_allclose(step.sample.data, other.sample.data, atol=1e-5)
            with torch.no_grad():
                x, x_next, old = replayer.step_tensors(j, slice(0, 4))
                moved = replayer.move(j, slice(0, 4), x, replayer.model_output(j, slice(0, 4), x), work.sampling)
            assert float((log_prob(x_next, moved) - old).abs().max()) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_replay_gives_the_rollout_log_probs(folder, kind, scale):
    policy = make(folder, generator={"guidance_scale": scale}, sampler={"kind": kind, "noise_level": 0.5})
    _, trajectory, _ = policy.rollout(train_work(policy.cfg, 0, 0, PROMPTS[1]))
    part = trajectory.parts[0]
    assert [step.index for step in part.steps] == [0, 1, 2]
    replayer = Replayer(part, policy.spec, policy.modules, torch.device("cpu"))
    for j, step in enumerate(part.steps):
        for takes, allowed in ((slice(0, 4), 0.0), (slice(1, 3), 1e-5), (slice(3, 4), 1e-5)):
            with torch.no_grad():
                x, x_next, old = replayer.step_tensors(j, takes)
                out = replayer.model_output(j, takes, x)
                times = (step.sigma, step.sigma_next, step.sigma_cap)
                moved = transition(kind, 0.5, "flow", x, out, *times)
            assert float((log_prob(x_next, moved) - old).abs().max()) <= allowed
    # the check notices a swapped guidance order, a shifted grid, a rounded sample and a moved weight
    x, x_next, old = replayer.step_tensors(1, slice(0, 4))
    wrong = transition(kind, 0.5, "flow", x, out, part.steps[0].sigma, part.steps[1].sigma, 0.9)
    assert float((log_prob(x_next, wrong) - old).abs().max()) > 1e-3
    with torch.no_grad():
        out = replayer.model_output(1, slice(0, 4), x)
        step = part.steps[1]
        right = transition(kind, 0.5, "flow", x, out, step.sigma, step.sigma_next, step.sigma_cap)
        assert float((log_prob(x_next.bfloat16(), right) - old).abs().max()) > 1e-5
        policy.modules["transformer"].proj_out.weight.mul_(1.001)
        moved = replayer.model_output(1, slice(0, 4), x)
        policy.modules["transformer"].proj_out.weight.div_(1.001)
    assert float((moved - out).abs().max()) > 1e-4


def test_step_invariant_inputs_and_samples_are_stored_once(folder):
    policy = make(folder)
    _, trajectory, _ = policy.rollout(train_work(policy.cfg, 0, 0, PROMPTS[0]))
    part = trajectory.parts[0]
    for step in part.steps:
        kwargs = step.calls[0].kwargs
        assert isinstance(kwargs["hidden_states"], SampleCopies)
        assert isinstance(kwargs["encoder_hidden_states"], SharedSlot)
    assert len({step.calls[0].kwargs["encoder_hidden_states"].index for step in part.steps}) == 1


def test_only_trained_steps_are_stored(folder):
    policy = make(folder, sampler={"window": {"kind": "random", "size": 1}})
    _, trajectory, _ = policy.rollout(train_work(policy.cfg, 0, 0, PROMPTS[0]))
    assert len(trajectory.parts[0].steps) == 1
    policy = make(folder, sampler={"steps": 5, "timestep_fraction": 0.5})  # four draw noise, two of them train
    work = train_work(policy.cfg, 0, 0, PROMPTS[0])
    part = policy.rollout(work)[1].parts[0]
    assert (
        len(work.sampling.stochastic_steps) == 4 and tuple(s.index for s in part.steps) == work.sampling.trained_steps
    )
    assert len(part.steps) == 2


def test_sampler_that_does_not_fit_the_model_is_refused(tiny_sd3):
    with pytest.raises(UnsupportedPolicyError, match="predicts flow"):
        make(tiny_sd3, sampler={"kind": "ddim", "noise_level": 1.0})


def test_missing_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="generator.pretrained"):
        Policy.load(tiny.config(tmp_path / "nothing"), "cpu")


def raw_step(rule: str, scale: float) -> RawStep:
    generator = torch.Generator().manual_seed(0)
    branches = [torch.randn(2, 4, 6, 6, generator=generator) for _ in range(RULES[rule].branches)]
    call = RawCall(module="transformer", args=(), kwargs={}, origin={}, output=torch.cat(branches))
    sample = torch.zeros(2, 4, 6, 6)
    received = RULES[rule].function(branches, scale)
    nominal = StepGuidance(scale=99.0)
    return RawStep(0, 1.0, 0.9, 0.9, nominal, sample, received, sample, sample, None, [call])


def fitted(step: RawStep, copies: int) -> tuple[PolicySpec, float, StepGuidance]:
    """(spec, error, guidance of the step) as a probe finds them."""
    spec = bare_spec(step, {CallKey(1, 0): Layout(axis=0, copies=copies, order="tile")}, "Pipeline", "flow")
    rules = fit_rules(spec, [step], [2.5])
    branches = spec.branches(step.outputs, step.sample.shape)
    return spec, rules.error, fit_guidance(branches, step, rules.rules[copies], rules.sign, [2.5])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_guidance_rule_is_found(rule):
    """Also when the pipeline's guidance_scale attribute says something else (99): the linear ones solve for it."""
    step, copies = raw_step(rule, 2.5), RULES[rule].branches
    spec, error, guidance = fitted(step, copies)
    remade = RULES[guidance.rule].function(step.outputs[0].chunk(copies), guidance.scale)
    assert torch.allclose(remade, step.model_output, atol=1e-5) and error < 1e-5 and spec.output_slice == "whole"


def test_unknown_guidance_is_refused_with_numbers():
    step = raw_step("cfg cond-first", 2.5)
    step.model_output = step.model_output.tanh()
    with pytest.raises(UnsupportedPolicyError, match=r"closest: .*\d"):
        fitted(step, 2)


@pytest.mark.parametrize(("share", "enough"), [(0.0, False), (1e-5, False), (0.1, True)])
def test_branches_that_are_alike_are_not_concluded_from(share, enough):
    step = raw_step("cfg cond-first", 2.5)
    first, second = step.calls[0].output.chunk(2)
    step.calls[0].output = torch.cat([first, first + share * second])
    assert branches_distinguishable({CallKey(1, 0): Layout(axis=0, copies=2, order="tile")}, [step]) is enough


def test_layouts_take_the_right_entries():
    tile = torch.tensor([0, 1, 2, 10, 11, 12])
    repeat = torch.tensor([0, 10, 1, 11, 2, 12])
    assert Layout(axis=0, copies=2, order="tile").select(tile, slice(1, 3), 3).tolist() == [1, 2, 11, 12]
    assert Layout(axis=0, copies=2, order="repeat").select(repeat, slice(1, 3), 3).tolist() == [1, 11, 2, 12]


def test_a_masked_step_keeps_its_sampler_s_likelihood():
    """Where the pipeline restores values, the log-prob is that of the others, still CPS's own."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    drawn = transition("cps", 0.7, "flow", x, v, 0.8, 0.7, 0.9)
    chosen = drawn.mean + drawn.std * torch.randn_like(x)
    step = RawStep(
        index=0, sigma=0.8, sigma_next=0.7, sigma_cap=0.9, guidance=StepGuidance(), sample=x, model_output=v,
        next_sample=chosen, mean=drawn.mean, log_prob=log_prob(chosen, drawn), calls=[], std=drawn.std,
        sharpness=drawn.sharpness,
    )  # fmt: skip
    restored = chosen.clone()
    restored[:, :2] = 0.0
    infer_mask(step, restored, Recording(), "a pipeline")
    assert torch.allclose(step.log_prob, -((chosen - drawn.mean)[:, 2:] ** 2).flatten(1).mean(1))
