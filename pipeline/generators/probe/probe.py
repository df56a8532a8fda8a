"""Finds out how a pipeline works as a policy, by running it on small batches, before any weights are trained.

Each way to call the pipeline is tried until one works. A batch of 2 compared with a batch of 3 shows where the takes
are; the recorded outputs show the guidance rule; then a rollout is replayed, and must give the same log-probs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pipeline.core.errors import CannotRun, RushesError, UnsupportedPolicyError, one_line
from pipeline.core.types import PromptItem, SamplingSpec, StepGuidance
from pipeline.generators.call.arguments import CallMode, call_modes
from pipeline.generators.call.conditions import condition_arguments, conditions_of
from pipeline.generators.call.output import to_floats
from pipeline.generators.call.signature import parameters_of
from pipeline.generators.latent_map import LatentMap
from pipeline.generators.load.prompt_cache import forget_prompts
from pipeline.generators.policy_pipeline import CallPlan, PolicyPipeline
from pipeline.generators.probe.fit import (
    FittedRules,
    ReplaceOutput,
    bare_spec,
    branches_distinguishable,
    check_linear_weights,
    fit_rules,
    trace_output,
)
from pipeline.generators.probe.latent_map import Tail, find_latent_map, watched_decoder
from pipeline.generators.probe.layouts import find_layouts, find_outputs, single_outputs
from pipeline.generators.probe.replay_check import check_replay
from pipeline.generators.probe.result import ProbeResult
from pipeline.generators.probe.sample_slots import find_sample_slots
from pipeline.generators.record.first_order import is_consistency
from pipeline.generators.record.inputs import same_inputs
from pipeline.generators.record.recording import RawStep, Recording, RecordOptions
from pipeline.generators.replay.text_inputs import to_call_inputs
from pipeline.generators.spec import InputKey, PolicySpec, SampleSlots
from pipeline.rl.group_plan import ode_sampling
from pipeline.rl.noise_grid import NoiseGrid

_STEPS = 3
_FIRST_SEED = 11
_TEXTS = ("a red circle on a table", "a dog", "the blue sea")  # the longest first: padding is then the same


def probe(pipeline: PolicyPipeline, prompts: list[PromptItem] | None = None) -> ProbeResult:
    """Learns how to call the pipeline and checks that replay repeats a rollout.

    `prompts`: some to probe with; their images and other conditions decide which conditions are passed. None: made-up
    texts, and made-up conditions where the pipeline takes any.
    Raises UnsupportedPolicyError with the numbers, CannotRun where the pipeline cannot be called at all.
    """
    if prompts:
        trio = [replace((prompts * 3)[i], image=prompts[0].image, metadata=prompts[0].metadata) for i in range(3)]
        trio.sort(key=lambda prompt: -len(prompt.text))  # the longest first: padding is then the same for 2 and 3
        placeholder_options: list[list[str]] = [[]]
    else:
        trio = [PromptItem(index=i, text=text) for i, text in enumerate(_TEXTS)]
        placeholder_options = condition_arguments(pipeline.pipe)
    failures: dict[str, Exception] = {}  # description of a call -> why it failed
    for placeholders in placeholder_options:
        for mode in _modes(pipeline, conditioned=bool(placeholders) or bool(conditions_of(trio[0]))):
            try:
                return _Probe(pipeline, CallPlan(mode, tuple(placeholders)), trio).run()
            except Exception as error:  # a pipeline may refuse a mode in any way; all are reported below
                failures[mode.describe() + (f" with {', '.join(placeholders)}" if placeholders else "")] = error
    refusals = [error for error in failures.values() if isinstance(error, RushesError)]
    if refusals:
        raise refusals[0]
    raise _cannot_run(pipeline.name, failures) from next(iter(failures.values()))


def guidance_for(pipeline: PolicyPipeline, result: ProbeResult, num_steps: int) -> ProbeResult:
    """The result of a probe with the guidance numbers of a grid of `num_steps` steps, which may change with the step.

    Where outputs are alike, a step's own do not tell; the grid is then run with numbers that differ in their place.
    """
    if not result.alike_outputs or (num_steps, 0) in result.fixed_guidance:
        return result
    probing = _Probe(pipeline, result.plan, list(result.prompts))
    steps = probing.steps_with_random_outputs(2, probing.every_step(num_steps))
    return replace(result, fixed_guidance={**result.fixed_guidance, **read_guidance(result, steps)})


def _modes(pipeline: PolicyPipeline, conditioned: bool) -> list[CallMode]:
    modes = call_modes(conditioned, negative="negative_prompt" in parameters_of(pipeline.pipe))
    return modes if pipeline.embeddings is None else pipeline.embeddings.in_order(modes)


def _cannot_run(name: str, failures: dict[str, Exception]) -> CannotRun:
    calls: dict[str, str] = {}  # cause -> the first call that failed so
    for call, error in failures.items():
        calls.setdefault(f"{type(error).__name__}: {one_line(error)}", call)
    listed = "; ".join(f"{call}: {cause}" for cause, call in list(calls.items())[:3])
    return CannotRun(
        f"{name} could not be run ({listed}); arguments of its __call__ can be set in generator.call_kwargs"
    )


class _Probe:
    """One way to call the pipeline, tried on three prompts."""

    def __init__(self, pipeline: PolicyPipeline, plan: CallPlan, trio: list[PromptItem]) -> None:
        cfg = pipeline.cfg
        self.pipeline, self.plan, self.trio = pipeline, plan, trio
        self.sampling = SamplingSpec(
            kind=cfg.sampler.kind,
            noise_level=cfg.sampler.noise_level,
            num_steps=_STEPS,
            stochastic_steps=(0, 1),
            trained_steps=(0, 1),
            guidance_scale=cfg.generator.guidance_scale,
        )
        # Which of the prompts the two calls that are compared are given.
        self.small, self.large = (slice(0, 2), slice(0, 3)) if plan.mode.batched else (slice(0, 1), slice(1, 2))
        self.takes = self.small.stop

    def run(self) -> ProbeResult:
        pipeline, batched = self.pipeline, self.plan.mode.batched
        small, large = self._record(self.small), self._record(self.large, stop_early=True)
        outputs = find_outputs(small.steps, large.steps) if batched else single_outputs(small.steps)
        spec = bare_spec(small.steps[0], outputs, pipeline.name, pipeline.prediction)
        note = ""
        try:
            spec = replace(spec, layouts=find_layouts(small.steps, large.steps) if batched else {})
        except UnsupportedPolicyError as reason:
            note = str(reason)
        steps, others = small.steps, large.steps
        run_steps: list[RawStep] = []  # of a run's own sampler, whose guidance may change with the step
        distinguishable = branches_distinguishable(outputs, steps + others)
        if not distinguishable:
            steps, others = (self.steps_with_random_outputs(seed, self.sampling) for seed in (0, 1))
            run_steps = self.steps_with_random_outputs(2, self.every_step(pipeline.cfg.sampler.steps))
        spec, error = self._with_rules(spec, steps + others + run_steps)
        check_linear_weights(spec, steps, others)
        first = small.steps[0].sample
        slots, why_not, no_resume = self._sample_slots(spec, first)
        latents, no_map, not_pictures = self._latent_map(first)
        spec = replace(
            spec,
            latents=latents,
            latents_note=no_map,
            resume_note=no_resume,
            picture_note=not_pictures,
            sample_slots=slots,
            sample_note=why_not,
            pins_values=min(small.chosen_share, large.chosen_share) < 1.0,
            consistency=is_consistency(pipeline.pipe.scheduler),
        )
        result = ProbeResult(
            spec=spec,
            plan=self.plan,
            scales=pipeline.scales,
            prompts=tuple(self.trio),
            alike_outputs=not distinguishable,
        )
        checked = result if distinguishable else replace(result, fixed_guidance=read_guidance(result, steps))
        for step in large.steps:
            checked.fit_step(step)
        report = {
            **_report(spec, small, large, error),
            "call_mode": self.plan.mode.describe(),
            "conditions": sorted({*self.plan.placeholders, *conditions_of(self.trio[0])}),
            "takes_note": note,
            "sample_note": why_not,
            "alike_outputs": not distinguishable,
            **check_replay(pipeline, spec, large, self.sampling),
        }
        if getattr(pipeline.pipe, "guider", None) is not None and distinguishable:
            self._check_later_steps(result)
        if pipeline.text is not None:
            inputs = to_call_inputs(
                self.trio[self.large], self._seeds(self.large), self.plan.mode, self.plan.placeholders
            )
            report["text_inputs"] = pipeline.text.check(large.steps, inputs, self.sampling)
        if pipeline.embeddings is not None:
            forget_prompts(pipeline.pipe)
            pipeline.embeddings.settle(
                pipeline.pipe, self.plan.mode, lambda: same_inputs(small.steps, self._record(self.small).steps)
            )
        grid = self._noise_grid()
        return replace(result, fixed_guidance=read_guidance(result, run_steps), grid=grid, report=report)

    # -- pipeline calls -------------------------------------------------------------------------------------------

    @staticmethod
    def _seeds(takes: slice) -> range:
        return range(_FIRST_SEED + takes.start, _FIRST_SEED + takes.stop)

    def _record(self, takes: slice, stop_early: bool = False) -> Recording:
        """The probe's sampler on some of the prompts."""
        options = RecordOptions(keep_steps=frozenset({0, 1}), check_first=True, stop_early=stop_early)
        return self._sample(takes, self.sampling, options)

    def _sample(self, takes: slice, sampling: SamplingSpec, options: RecordOptions) -> Recording:
        seeds = self._seeds(takes)
        return self.pipeline.sample(self.plan, self.trio[takes], seeds, None, sampling, options).recording

    def _sample_slots(self, spec: PolicySpec, like: torch.Tensor) -> tuple[dict[InputKey, SampleSlots], str, str]:
        """(slots, why no other sample can be put there, why a draw cannot go on from a given sample); `like`: a sample
        [takes, ...]."""
        try:
            slots, why_not = find_sample_slots(self._with_sample, like.shape, like.dtype, spec.layouts)
            steps, others = self._with_sample(like), self._with_sample(like, denoise_from=0)
        except Exception as error:  # a pipeline may read anything of its denoiser's, which a stand-in lacks
            cannot = f"it does not run without its denoiser ({type(error).__name__}: {one_line(error)})"
            return {}, cannot, cannot
        state = "" if same_inputs(steps, others) else "it keeps more than the sample from one step to the next"
        return slots, why_not, state

    def _with_sample(self, sample: torch.Tensor, denoise_from: int = _STEPS) -> list[RawStep]:
        """The steps after the first, each started from `sample` [takes, ...], with stand-ins for the denoisers."""
        later = range(1, _STEPS)
        options = RecordOptions(
            keep_steps=frozenset(later), samples=dict.fromkeys(later, sample.to(self.pipeline.device)), stop_early=True
        )
        seeds = self._seeds(slice(0, self.takes))
        return self.pipeline.sample(
            self.plan, self.trio[: self.takes], seeds, None, self.sampling, options, denoise_from
        ).recording.steps

    def _latent_map(self, like: torch.Tensor) -> tuple[LatentMap | None, str, str]:
        """See `find_latent_map`; `like`: a sample [takes, ...]."""
        vae = getattr(self.pipeline.pipe, "vae", None)
        if not isinstance(vae, torch.nn.Module):
            return None, (why := "the pipeline has no component called vae"), why
        prompts, seeds = self.trio[: self.takes], self._seeds(slice(0, self.takes))

        @torch.no_grad()
        def run(x0: torch.Tensor) -> Tail:
            with watched_decoder(vae, self.pipeline.stand_ins) as calls:
                output = self.pipeline.run_tail(self.plan, x0.to(self.pipeline.device), prompts, seeds, "np")
            return Tail(calls, to_floats(output, self.takes))

        try:
            return find_latent_map(run, like.shape, like.dtype)
        except Exception as error:  # as above
            cannot = f"it does not run without its denoiser ({type(error).__name__}: {one_line(error)})"
            return None, cannot, cannot

    def every_step(self, num_steps: int) -> SamplingSpec:
        """A run's sampler with that many steps, all of which are kept."""
        return replace(ode_sampling(self.pipeline.cfg, num_steps), trained_steps=tuple(range(num_steps)))

    def _run_sampling(self) -> SamplingSpec:
        """A run's sampler, with every step that the run may train."""
        cfg = self.pipeline.cfg
        steps = tuple(range(cfg.sampler.window.bounds(cfg.sampler.steps - 1)[1]))
        return replace(ode_sampling(cfg, cfg.sampler.steps), stochastic_steps=steps, trained_steps=steps)

    def _noise_grid(self) -> NoiseGrid:
        """That of a run's sampler: the pipeline is stopped at its first step, when its scheduler has been set."""
        sampling = ode_sampling(self.pipeline.cfg, self.pipeline.cfg.sampler.steps)
        recording = self._sample(slice(0, 1), sampling, RecordOptions(stop_early=True))
        return NoiseGrid(self.pipeline.prediction, recording.levels)

    def steps_with_random_outputs(self, seed: int, sampling: SamplingSpec) -> list[RawStep]:
        """The trained steps of a rollout with random numbers in place of the denoiser's outputs.

        Weights that were never trained can answer prompt and negative prompt alike (modulations start at zero), so that
        any guidance rule would fit; these numbers differ.
        """
        source = torch.Generator().manual_seed(seed)

        options = RecordOptions(
            keep_steps=frozenset(sampling.trained_steps),
            replace_output=partial(_random_output, source),
            stop_early=True,
        )
        return self._sample(slice(0, self.takes), sampling, options).steps

    # -- what they show -------------------------------------------------------------------------------------------

    def _with_rules(self, spec: PolicySpec, steps: list[RawStep]) -> tuple[PolicySpec, float]:
        """(spec with its guidance rules, their error). Traces outputs value by value where shapes do not tell how they
        are sliced."""
        scales = self.pipeline.scales
        if spec.output_slice == "first tokens":  # the sample's tokens may also come after the text's
            last = replace(spec, output_slice="last tokens")
            try:
                fitted = fit_rules(last, steps, scales)
                return _ruled(last, fitted), fitted.error
            except UnsupportedPolicyError:
                pass  # they come first, as the shapes suggest
        try:
            if spec.output_slice == "gather":
                raise UnsupportedPolicyError("shapes differ")
            fitted = fit_rules(spec, steps, scales)
        except UnsupportedPolicyError as by_shape:
            try:
                gather = trace_output(self._traced, spec.outputs, self.takes)
            except UnsupportedPolicyError as by_trace:
                raise (by_trace if spec.output_slice == "gather" else by_shape) from by_trace
            spec = replace(spec, output_slice="gather", gather=gather)
            fitted = fit_rules(spec, steps, scales)
        return _ruled(spec, fitted), fitted.error

    def _traced(self, replace_output: ReplaceOutput) -> Recording:
        options = RecordOptions(keep_steps=frozenset({0}), replace_output=replace_output, stop_early=True)
        return self._sample(slice(0, self.takes), self.sampling, options)

    def _check_later_steps(self, result: ProbeResult) -> None:
        """Guiders choose their rule by the step number, so every step that a run may train is checked.

        Raises UnsupportedPolicyError, with the window that can be trained where there is one.
        """
        sampling = self._run_sampling()
        fitted: list[int] = []

        def fit(step: RawStep) -> None:
            result.fit_step(step)
            fitted.append(step.index)

        options = RecordOptions(
            keep_steps=frozenset(sampling.trained_steps),
            on_step=fit,
            stop_early=len(sampling.trained_steps) < sampling.num_steps,
        )
        try:
            self._sample(slice(0, self.takes), sampling, options)
        except UnsupportedPolicyError as error:
            guider = type(self.pipeline.pipe.guider).__name__
            cause = f"{self.pipeline.name}: its guider {guider} changes its rule; {error}"
            if len(fitted) > 1:
                cause += f". Earlier steps can be trained: sampler.window.range=[0,{len(fitted)}]"
            raise UnsupportedPolicyError(cause) from error


def _ruled(spec: PolicySpec, fitted: FittedRules) -> PolicySpec:
    return replace(spec, rules=fitted.rules, sign=fitted.sign, float_outputs=fitted.float_outputs)


def _random_output(source: torch.Generator, _step: int, _name: str, output: torch.Tensor) -> torch.Tensor:
    return torch.randn(output.shape, generator=source).to(output)


def read_guidance(result: ProbeResult, steps: list[RawStep]) -> dict[tuple[int, int], StepGuidance]:
    """(sampler steps, index) -> guidance, fitted to steps whose outputs differ enough to tell."""
    for step in steps:
        result.fit_step(step)
    return {(step.num_steps, step.index): step.guidance for step in steps}


def _report(spec: PolicySpec, small: Recording, large: Recording, error: float) -> dict[str, Any]:
    """What was measured, as plain data."""
    steps = small.steps + large.steps
    return {
        "pipeline": spec.pipeline,
        "prediction": spec.prediction,
        "guidance_rule": " / ".join(dict.fromkeys(spec.rules.values())) + (", negated" if spec.sign < 0 else ""),
        "guidance_scale": large.steps[0].guidance.scale,
        "guidance_weights": list(large.steps[0].guidance.extra),
        "guidance_error": error,
        "output_slice": spec.output_slice,
        "denoiser_calls_per_step": max(len(step.calls) for step in steps),
        "denoisers": sorted({call.module for step in steps for call in step.calls}),
        "takes_axis": {str(key): [v.axis, v.copies, v.order] for key, v in (spec.layouts or {}).items()},
        "chosen_share": min(small.chosen_share, large.chosen_share),
        "sample_shape": list(large.steps[0].sample.shape[1:]),
    }
