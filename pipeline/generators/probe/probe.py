"""Puts a policy's pipeline through its probe: how it can be called, what `probe` finds in two batches, and that replay
repeats the rollout. What is found is left in the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pipeline.core.errors import CannotRun, RushesError, UnsupportedPolicyError
from pipeline.core.types import PromptItem, SamplingSpec
from pipeline.generators.call.arguments import call_modes, condition_arguments, conditions_of, parameters_of
from pipeline.generators.load.pipeline import forget_prompts
from pipeline.generators.probe import fit as probing
from pipeline.generators.record.attention import reset_processors
from pipeline.generators.record.recorder import RawStep, Recording
from pipeline.generators.replay.replayer import Replayer, to_part
from pipeline.generators.replay.text_inputs import same_inputs, to_call_inputs
from pipeline.generators.spec import PolicySpec
from pipeline.rl.group_plan import ode_sampling
from pipeline.rl.samplers import log_prob

if TYPE_CHECKING:
    from pipeline.generators.policy import Policy

_STEPS = 3
_TEXTS = ("a red circle on a table", "a dog", "the blue sea")  # the longest first: padding is then the same


def probe(policy: Policy, prompts: list[PromptItem] | None = None) -> dict[str, Any]:
    """Finds the policy spec and checks that replay repeats the rollout, before weights are attached or after.

    `prompts`: some to probe with; what they bring besides text decides which conditions are given. None: made-up
    texts, and made-up conditions where the pipeline takes any. Returns a plain-data report.
    Raises UnsupportedPolicyError with the numbers.
    """
    if prompts:
        trio = [replace((prompts * 3)[i], image=prompts[0].image, metadata=prompts[0].metadata) for i in range(3)]
        trio.sort(key=lambda prompt: -len(prompt.text))  # the longest first: padding is then the same for 2 and 3
        placeholder_options: list[list[str]] = [[]]
    else:
        trio = [PromptItem(index=i, text=text) for i, text in enumerate(_TEXTS)]
        placeholder_options = condition_arguments(policy.pipe)
    failures: dict[str, Exception] = {}
    for placeholders in placeholder_options:
        guided = "negative_prompt" in parameters_of(policy.pipe)
        options = call_modes(bool(placeholders) or bool(conditions_of(trio[0])), guided)
        for mode in policy.embeddings.in_order(options) if policy.embeddings is not None else options:
            policy.reset(mode, placeholders)
            try:
                return _probe(policy, trio)
            except Exception as error:  # a pipeline may refuse a mode in any way; all are reported below
                failures[f"{mode.describe()}{' with ' + ', '.join(placeholders) if placeholders else ''}"] = error
    refusals = [error for error in failures.values() if isinstance(error, RushesError)]
    if refusals:
        raise refusals[0]
    causes: dict[str, str] = {}  # the same cause is told once
    for words, error in failures.items():
        causes.setdefault(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", words)
    told = "; ".join(f"{words}: {cause}" for cause, words in list(causes.items())[:3])
    raise CannotRun(
        f"{policy.name} could not be run ({told}); arguments of its __call__ can be set in generator.call_kwargs"
    ) from next(iter(failures.values()))


def _probe(policy: Policy, trio: list[PromptItem]) -> dict[str, Any]:
    cfg = policy.cfg
    sampling = SamplingSpec(
        kind=cfg.sampler.kind,
        noise_level=cfg.sampler.noise_level,
        num_steps=_STEPS,
        stochastic_steps=(0, 1),
        trained_steps=(0, 1),
        guidance_scale=cfg.generator.guidance_scale,
    )

    def run(first: int, stop: int, **options: Any) -> Recording:
        seeds = tuple(range(11 + first, 11 + stop))
        return policy.sample(trio[first:stop], seeds, None, sampling, keep_steps={0, 1}, check_first=True, **options)[1]

    batched = policy.mode.batched
    couple, others = ((0, 2), (0, 3)) if batched else ((0, 1), (1, 2))
    small, large = run(*couple), run(*others, stop_early=True)
    if batched:
        outputs = probing.find_outputs(small.steps, large.steps)
        layouts, note = probing.find_layouts(small.steps, large.steps)
    else:
        outputs, layouts, note = probing.single_outputs(small.steps), {}, ""
    takes = small.steps[0].sample.shape[0]
    one, other = small.steps, large.steps
    alike = not probing.branches_distinguishable(outputs, one + other)
    run_steps: list[RawStep] = []  # of a run's own sampler, whose guidance may change with the step
    if alike:
        one, other = (_made_up_steps(policy, trio[:takes], seed, sampling) for seed in (0, 1))
        run_steps = _made_up_steps(policy, trio[:takes], 2, _whole_run(policy))
    spec = replace(probing.bare_spec(small.steps[0], outputs, policy.name, policy.prediction), layouts=layouts)
    spec, error = _with_rules(policy, spec, one + other + run_steps, trio[:takes], sampling)
    probing.check_linear_weights(spec, one, other)
    policy.spec = spec
    policy.fixed_guidance = _numbers(policy, one) if alike else {}
    for step in large.steps:
        policy.fit_step(step)
    report = probing.report(spec, small, large, error)
    report["call_mode"] = policy.mode.describe()
    report["conditions"] = sorted({*policy.placeholders, *conditions_of(trio[0])})
    report["takes_note"] = note
    report["alike_outputs"] = alike
    report.update(check_replay(policy, large, sampling))
    if getattr(policy.pipe, "guider", None) is not None and not alike:
        _check_later_steps(policy, trio[:takes])
    if policy.text is not None:
        inputs = to_call_inputs(
            trio[slice(*others)], [11 + i for i in range(*others)], policy.mode, policy.placeholders
        )
        report["text_inputs"] = policy.text.check(large.steps, inputs, sampling)
    if policy.embeddings is not None:
        forget_prompts(policy.pipe)
        policy.embeddings.settle(policy.pipe, policy.mode, lambda: same_inputs(small.steps, run(*couple).steps))
    policy.fixed_guidance = _numbers(policy, run_steps)
    return report


def _with_rules(
    policy: Policy, spec: PolicySpec, steps: list[RawStep], prompts: Sequence[PromptItem], sampling: SamplingSpec
) -> tuple[PolicySpec, float]:
    """The spec with its guidance rules, its outputs traced value by value where shapes do not say how they are cut."""
    if spec.output_slice == "first tokens":  # the sample's tokens may also come behind the text's
        last = replace(spec, output_slice="last tokens")
        try:
            rules, sign, error = probing.fit_steps(last, steps, policy.scales)
            return replace(last, rules=rules, sign=sign), error
        except UnsupportedPolicyError:
            pass  # so they come first, as the shapes suggest
    try:
        if spec.output_slice == "gather":
            raise UnsupportedPolicyError("shapes differ")
        rules, sign, error = probing.fit_steps(spec, steps, policy.scales)
    except UnsupportedPolicyError as by_shape:
        seeds = tuple(range(11, 11 + len(prompts)))
        try:
            places = probing.trace_output(
                lambda send: policy.sample(
                    prompts, seeds, None, sampling, keep_steps={0}, on_output=send, stop_early=True
                )[1],
                spec.outputs,
                len(prompts),
            )
        except UnsupportedPolicyError as by_trace:
            raise (by_trace if spec.output_slice == "gather" else by_shape) from by_trace
        spec = replace(spec, output_slice="gather", gather=places)
        rules, sign, error = probing.fit_steps(spec, steps, policy.scales)
    return replace(spec, rules=rules, sign=sign), error


def _whole_run(policy: Policy) -> SamplingSpec:
    """A run's sampler, with every step that the run may train."""
    sampler = policy.cfg.sampler
    steps = tuple(range(sampler.window.bounds(sampler.steps)[1]))
    return replace(ode_sampling(policy.cfg, sampler.steps), stochastic_steps=steps, trained_steps=steps)


def _made_up_steps(policy: Policy, prompts: Sequence[PromptItem], seed: int, sampling: SamplingSpec) -> list[RawStep]:
    """The trained steps of a rollout with random numbers in place of the denoiser's outputs.

    Weights that were never trained can answer prompt and negative prompt alike (modulations start at zero), so that
    any guidance rule would fit; these numbers differ.
    """
    source = torch.Generator().manual_seed(seed)

    def send(_step: int, _name: str, output: torch.Tensor) -> torch.Tensor:
        return torch.randn(output.shape, generator=source).to(output)

    return policy.sample(
        prompts,
        tuple(range(11, 11 + len(prompts))),
        None,
        sampling,
        keep_steps=set(sampling.trained_steps),
        on_output=send,
        on_step=None,
        stop_early=len(sampling.trained_steps) < sampling.num_steps,
    )[1].steps


def _numbers(policy: Policy, steps: list[RawStep]) -> dict[int, tuple[str, float, tuple[float, ...]]]:
    """Sampler step -> (rule, scale, extra), read from steps whose outputs tell them."""
    policy.fixed_guidance = {}
    for step in steps:
        policy.fit_step(step)
    return {step.index: (step.rule, step.guidance_scale, step.rule_extra) for step in steps}


def _check_later_steps(policy: Policy, prompts: Sequence[PromptItem]) -> None:
    """Guiders choose their rule by the number of the step, so all steps that a run may train are looked at.

    Raises UnsupportedPolicyError, with the window that can be trained where there is one.
    """
    sampling = _whole_run(policy)
    fitted: list[int] = []

    def fit(step: RawStep) -> None:
        policy.fit_step(step)
        fitted.append(step.index)

    try:
        policy.sample(
            prompts,
            range(11, 11 + len(prompts)),
            None,
            sampling,
            keep_steps=set(sampling.trained_steps),
            on_step=fit,
            stop_early=len(sampling.trained_steps) < sampling.num_steps,
        )
    except UnsupportedPolicyError as error:
        cause = f"{policy.name}: its guider {type(policy.pipe.guider).__name__} changes its rule; {error}"
        if len(fitted) > 1:
            cause += f". Earlier steps can be trained: sampler.window.range=[0,{len(fitted)}]"
        raise UnsupportedPolicyError(cause) from error


@torch.no_grad()
def check_replay(policy: Policy, recording: Recording, sampling: SamplingSpec) -> dict[str, float]:
    """Replays steps out of order, whole and take by take; the log-ratio must be 0 to rounding."""
    takes = recording.steps[0].sample.shape[0]
    part = to_part(recording, 0, takes, keep_mean=False)
    replayer = Replayer(part, policy.spec, policy.modules, policy.device)
    worst = {"replay_whole": 0.0, "replay_single": 0.0}
    for j in (1, 0, 1):
        singles = [slice(i, i + 1) for i in range(takes)]
        for key, cuts in (("replay_whole", [slice(0, takes)]), ("replay_single", singles)):
            for cut in cuts:
                sample, next_sample, old = replayer.step_tensors(j, cut)
                out = replayer.model_output(j, cut, sample)
                moved = replayer.move(j, cut, sample, out, sampling)
                gap = float((log_prob(next_sample, moved) - old).abs().max())
                worst[key] = max(worst[key], gap)
    reset_processors(policy.modules.values())
    exact = all(p.dtype == torch.float32 for m in policy.modules.values() for p in m.parameters())
    bound = probing.RATIO_TOLERANCE if exact else 1e-2
    # Single takes run through other kernels; over few latent values their rounding shows more.
    if not (worst["replay_whole"] < bound and worst["replay_single"] < 10 * bound):
        raise UnsupportedPolicyError(
            f"{policy.name}: replaying a rollout gives log-ratios of up to {max(worst.values()):.1e} "
            f"(allowed {bound:.0e}); does it keep state between calls, or change its model while sampling "
            "(caching, a stateful guider, attention processors of its own, dropout)?"
        )
    return worst
