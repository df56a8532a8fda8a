"""A diffusers pipeline as an RL policy: what a rollout worker holds.

Loads any checkpoint, probes how it works, draws takes with their trajectory, and takes in new weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline import weights as weights_lib
from pipeline.config import Config
from pipeline.errors import CannotRun, RushesError, UnsupportedPolicyError
from pipeline.generators import probe as probing
from pipeline.generators.calling import (
    Form,
    call_arguments,
    condition_arguments,
    condition_key,
    conditions_of,
    forms,
    parameters_of,
    to_floats,
    to_uint8,
)
from pipeline.generators.embedding_cache import EmbeddingStore
from pipeline.generators.hints import hint_for
from pipeline.generators.joint import cut_part, joint_sampling
from pipeline.generators.live_text import LiveText, asked_of, same_inputs
from pipeline.generators.loading import (
    cache_prompts,
    denoisers_of,
    forget_prompts,
    load_pipeline,
    resolve_device,
    trained_modules,
)
from pipeline.generators.offload import Offload
from pipeline.generators.recorder import RawStep, Recording, record
from pipeline.generators.replay import Replayer, branches_of, to_part
from pipeline.generators.schedule import first_order_scheduler, kinds_for
from pipeline.generators.spec import PolicySpec
from pipeline.plan import ode_sampling
from pipeline.samplers import log_prob
from pipeline.types import GroupWork, Media, PromptItem, SamplingSpec, Trajectory, TrajectoryPart, WeightSet

_POLICY_NOISE = 0x5DEECE66D  # separates the policy's noise stream from the initial noise of the same seed
_PROBE_STEPS = 3
_PROBE_TEXTS = ("a red circle on a table", "a dog", "the blue sea")  # the longest first: padding is then the same


class Policy:
    """See the module docstring. Not thread-safe: one call at a time."""

    def __init__(self, cfg: Config, pipe: Any, device: torch.device) -> None:
        self.cfg, self.pipe, self.device = cfg, pipe, device
        self.name = type(pipe).__name__
        hint = hint_for(pipe)
        if hint.refuse:
            raise UnsupportedPolicyError(f"{self.name}: {hint.refuse}")
        if hint.prepare is not None:
            hint.prepare(pipe)
        self.modules = denoisers_of(pipe)
        self.trained = trained_modules(pipe, cfg.trainable)
        self.prediction = first_order_scheduler(pipe)
        kinds = kinds_for(pipe.scheduler, self.prediction)
        if cfg.sampler.kind not in kinds:
            raise UnsupportedPolicyError(
                f"sampler.kind: {cfg.sampler.kind} does not fit {self.name}, which predicts {self.prediction} "
                f"({type(pipe.scheduler).__name__}); use {' or '.join(kinds)}"
            )
        self.spec: PolicySpec | None = None
        self.version = 0
        self._form = Form()
        self._fill: list[str] = []
        self._asked: dict[int, int] = {}  # sampler steps -> num_inference_steps, where `strength` is rounded otherwise
        self._scales = self._known_scales()
        self._merged: weights_lib.MergedLora | None = None
        self.embeddings: EmbeddingStore | None = None
        self.offload: Offload | None = None
        self._text = LiveText(pipe, cfg.generator) if cfg.trainable.modules != "denoiser" else None
        self._keep_mean = cfg.algorithm.objective in ("grpo_guard", "flow_dppo")
        cache_prompts(pipe)

    @classmethod
    def load(cls, cfg: Config, device: str = "auto", threads: int = 0) -> Policy:
        """Loads the checkpoint named in the config. `threads`: torch compute threads (0: leave as is)."""
        if threads:
            torch.set_num_threads(threads)
        where, generator = resolve_device(device), cfg.generator
        store = EmbeddingStore(generator, where) if generator.embedding_cache is not None else None
        skip = store.skippable() if store is not None else []
        offloaded = generator.offload != "none" and where.type != "cpu"  # else there is nothing to offload from
        pipe = load_pipeline(generator, where, skip, place=not offloaded)
        if store is not None:
            store.install(pipe)
        policy = cls(cfg, pipe, where)
        policy.embeddings = store
        if offloaded:
            policy.offload = Offload(generator.offload, pipe, policy.modules, where)
            if store is not None:
                store.loaded = policy.offload.adopt
        return policy

    def _known_scales(self) -> list[float]:
        """Numbers the call itself knows that may be a guidance scale or a rescale factor."""
        given = {name: p.default for name, p in parameters_of(self.pipe).items()} | dict(self.cfg.generator.call)
        found = [self.cfg.generator.guidance_scale]
        for name, value in given.items():
            wanted = any(word in name for word in ("guidance", "cfg", "scale"))
            if wanted and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append(float(value))
        return list(dict.fromkeys([*found, 1.0]))

    # -- weights ------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Adds what is trained (LoRA layers, or nothing for full weights), so that weights can be loaded."""
        weights_lib.attach(self.trained, self.cfg.trainable, self.cfg.run.seed)
        if self.offload is not None:
            self.offload.layers_changed(self.trained)
        if self.cfg.rollout.merge_lora and self.cfg.trainable.kind == "lora":
            self._merged = weights_lib.MergedLora(self.trained)

    def load_weights(self, weights: WeightSet) -> str:
        """Puts a version in place; returns the checksum of what this policy now holds."""
        found = weights_lib.apply(self.trained, weights)
        if self._merged is not None:
            self._merged.merge()
        if self._text is not None:
            forget_prompts(self.pipe)
        return found

    # -- sampling -----------------------------------------------------------------------------------------------

    def rollout(self, work: GroupWork) -> tuple[Media, Trajectory | None, dict[str, float]]:
        """Draws the takes of one group.

        Returns uint8 media of all takes, the trajectory (None where `sampling.trained_steps` is empty), and seconds
        per phase. Raises RushesError when the pipeline's output is not finite.
        """
        started = time.perf_counter()
        frames: list[np.ndarray] = []
        parts: list[TrajectoryPart] = []
        seconds = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        if work.sampling.trained_steps and self.spec is None:
            raise RuntimeError("probe() must run before trajectories are recorded")
        for start, stop in self._calls(work):
            began = time.perf_counter()
            values, recording = self._sample(
                work.prompts[start:stop],
                work.seeds[start:stop],
                work.noise_seeds[start:stop],
                work.sampling,
                keep_steps=set(work.sampling.trained_steps),
            )
            ended = time.perf_counter()
            seconds["encode"] += recording.denoise_started - began
            seconds["denoise"] += recording.denoise_ended - recording.denoise_started
            seconds["decode"] += ended - recording.denoise_ended
            frames.append(to_uint8(values))
            if work.sampling.trained_steps:
                asked = None
                if self._text is not None:
                    asked = asked_of(work.prompts[start:stop], work.noise_seeds[start:stop], self._form, self._fill)
                parts.append(to_part(recording, start, stop, self._keep_mean, asked))
        trajectory = None
        if parts:
            trajectory = Trajectory(
                group=work.group,
                version=self.version,
                sampling=work.sampling,
                parts=tuple(parts),
                spec=self.spec.to_dict(),
            )
        seconds["total"] = time.perf_counter() - started
        return Media(frames=np.concatenate(frames), fps=self.cfg.generator.fps), trajectory, seconds

    def rollouts(self, works: Sequence[GroupWork]) -> list[tuple[Media, Trajectory | None, dict[str, float]]]:
        """As `rollout`, for several groups that train; in one pipeline call where the pipeline and the groups allow it.

        Its seconds are divided among the groups by their takes.
        """
        prompts = tuple(prompt for work in works for prompt in work.prompts)
        sampling = joint_sampling(works)
        apart = self.spec is None or self.spec.layouts is None or self._text is not None or not self._form.batched
        differ = self._form.shared and len({condition_key(prompt) for prompt in prompts}) > 1
        if len(works) == 1 or sampling is None or apart or differ:
            return [self.rollout(work) for work in works]
        joint = replace(
            works[0],
            prompts=prompts,
            seeds=tuple(seed for work in works for seed in work.seeds),
            initial=tuple(seed for work in works for seed in work.noise_seeds),
            sampling=sampling,
        )
        media, whole, seconds = self.rollout(joint)
        found, start = [], 0
        for work in works:
            takes = slice(start, start + work.takes)
            part = cut_part(whole.parts[0], self.spec, takes, work.sampling.trained_steps)
            trajectory = replace(whole, group=work.group, sampling=work.sampling, parts=(part,))
            share = {name: value * work.takes / joint.takes for name, value in seconds.items()}
            found.append((Media(frames=media.frames[takes], fps=media.fps), trajectory, share))
            start = takes.stop
        return found

    def _calls(self, work: GroupWork) -> Iterator[tuple[int, int]]:
        """Takes [start, stop) of each pipeline call: a batch at most, and one condition where the form shares it."""
        size = (self.cfg.rollout.batch or work.takes) if self._form.batched else 1
        start = 0
        while start < work.takes:
            stop = min(start + size, work.takes)
            if self._form.shared:
                keys = [condition_key(prompt) for prompt in work.prompts[start:stop]]
                stop = start + next((i for i, key in enumerate(keys) if key != keys[0]), len(keys))
            yield start, stop
            start = stop

    @torch.no_grad()
    def _sample(
        self,
        prompts: Sequence[PromptItem],
        seeds: Sequence[int],
        noise_seeds: Sequence[int] | None,
        sampling: SamplingSpec,
        *,
        keep_steps: set[int],
        **options: Any,
    ) -> tuple[np.ndarray, Recording]:
        """One pipeline call. Returns float32 [K, F, H, W, 3] and the recording. `noise_seeds`: of the initial noise, if
        other than `seeds`; `options`: see `record`."""
        noise = [_generator(seed ^ _POLICY_NOISE) for seed in seeds]
        kwargs = self._call_arguments(prompts, sampling)
        first = [_generator(seed) for seed in noise_seeds or seeds]
        kwargs["generator"] = first if self._form.batched else first[0]
        if self.spec is not None:
            options.setdefault("on_step", self._fit_step)
        output = None
        with record(
            self.pipe, self.modules, self.prediction, sampling, noise, keep_steps=keep_steps, **options
        ) as recording:
            output = self.pipe(**kwargs)
        if recording.stopped:
            return np.zeros(0, np.float32), recording
        if recording.num_steps != sampling.num_steps:
            if self._ask_again(kwargs.get("num_inference_steps", 0), recording.num_steps, sampling.num_steps):
                return self._sample(prompts, seeds, noise_seeds, sampling, keep_steps=keep_steps, **options)
            raise UnsupportedPolicyError(_wrong_steps(self.name, recording.num_steps, sampling.num_steps))
        return to_floats(output, len(prompts)), recording

    def _call_arguments(self, prompts: Sequence[PromptItem], sampling: SamplingSpec) -> dict[str, Any]:
        kwargs = call_arguments(self.pipe, self.cfg.generator, prompts, sampling, self._form, self._fill)
        if sampling.num_steps in self._asked:
            kwargs["num_inference_steps"] = self._asked[sampling.num_steps]
        return kwargs

    def _ask_again(self, asked: int, took: int, wanted: int) -> bool:
        """Whether another num_inference_steps may give `wanted` steps: pipelines round steps x strength in their own
        ways. Notes the number to ask for."""
        if not 0 < took <= asked or "strength" not in parameters_of(self.pipe) or wanted in self._asked:
            return False
        self._asked[wanted] = asked + wanted - took
        return True

    def _fit_step(self, step: RawStep) -> None:
        """Checks at every recorded step that replay will give what the scheduler received; notes the numbers."""
        outputs = [call.output for call in step.calls]
        if not all(f"{len(outputs)}.{i}" in self.spec.outputs for i in range(len(outputs))) or not outputs:
            raise UnsupportedPolicyError(
                f"{self.name} makes {len(outputs)} denoiser calls at step {step.index}, which the probe did not see"
            )
        branches = branches_of(self.spec, outputs, step.sample.shape)
        rule = self.spec.rules.get(str(len(branches)))
        if rule is None:
            raise UnsupportedPolicyError(
                f"{self.name} has {len(branches)} guidance branches at step {step.index}, which the probe did not see"
            )
        found = probing.fit_step(branches, step, rule, self.spec.sign, self._scales)
        step.guidance_scale, step.rule, step.rule_extra = found.scale, found.rule, found.extra

    # -- probing ------------------------------------------------------------------------------------------------

    def probe(self, prompts: list[PromptItem] | None = None) -> dict[str, Any]:
        """Finds the policy spec and checks that replay repeats the rollout. Call before weights are attached or after.

        `prompts`: some to probe with; what they bring besides text decides which conditions are given. None: made-up
        texts, and made-up conditions where the pipeline takes any. Returns a plain-data report.
        Raises UnsupportedPolicyError with the numbers.
        """
        if prompts:
            trio = [replace((prompts * 3)[i], image=prompts[0].image, metadata=prompts[0].metadata) for i in range(3)]
            trio.sort(key=lambda prompt: -len(prompt.text))  # the longest first: padding is then the same for 2 and 3
            fills: list[list[str]] = [[]]
        else:
            trio = [PromptItem(index=i, text=text) for i, text in enumerate(_PROBE_TEXTS)]
            fills = condition_arguments(self.pipe)
        failures: dict[str, Exception] = {}
        for fill in fills:
            guided = "negative_prompt" in parameters_of(self.pipe)
            options = forms(bool(fill) or bool(conditions_of(trio[0])), guided)
            for form in self.embeddings.in_order(options) if self.embeddings is not None else options:
                self._form, self._fill, self._asked, self.spec = form, fill, {}, None
                try:
                    return self._probe(trio)
                except Exception as error:  # a pipeline may refuse a form in any way; all are reported below
                    failures[f"{form.words()}{' with ' + ', '.join(fill) if fill else ''}"] = error
        refusals = [error for error in failures.values() if isinstance(error, RushesError)]
        if refusals:
            raise refusals[0]
        causes: dict[str, str] = {}  # the same cause is told once
        for words, error in failures.items():
            causes.setdefault(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", words)
        told = "; ".join(f"{words}: {cause}" for cause, words in list(causes.items())[:3])
        raise CannotRun(
            f"{self.name} could not be run ({told}); arguments of its __call__ can be set in generator.call"
        ) from next(iter(failures.values()))

    def _probe(self, trio: list[PromptItem]) -> dict[str, Any]:
        sampling = SamplingSpec(
            kind=self.cfg.sampler.kind,
            noise_level=self.cfg.sampler.noise_level,
            num_steps=_PROBE_STEPS,
            stochastic_steps=(0, 1),
            trained_steps=(0, 1),
            guidance_scale=self.cfg.generator.guidance_scale,
        )

        def run(first: int, stop: int, **options: Any) -> Recording:
            seeds = tuple(range(11 + first, 11 + stop))
            return self._sample(
                trio[first:stop], seeds, None, sampling, keep_steps={0, 1}, check_first=True, **options
            )[1]

        if self._form.batched:
            couple = (0, 2)
            small, large = run(*couple), run(0, 3, stop_early=True)
            outputs = probing.find_outputs(small.steps, large.steps)
            layouts, note = probing.find_layouts(small.steps, large.steps)
        else:
            couple = (0, 1)
            small, large = run(*couple), run(1, 2, stop_early=True)
            outputs, layouts, note = probing.single_outputs(small.steps), {}, ""
        takes = small.steps[0].sample.shape[0]
        spec = replace(probing.bare_spec(small.steps[0], outputs, self.name, self.prediction), layouts=layouts)
        try:
            if spec.cut == "gather":
                raise UnsupportedPolicyError("shapes differ")
            rules, sign, error = probing.fit_steps(spec, small.steps + large.steps, self._scales)
        except UnsupportedPolicyError as by_shape:
            if "equal" in str(by_shape):
                raise
            try:
                places = probing.trace_output(
                    lambda send: self._sample(
                        trio[:takes], (11, 12)[:takes], None, sampling, keep_steps={0}, on_output=send, stop_early=True
                    )[1],
                    outputs,
                    takes,
                )
            except UnsupportedPolicyError as by_trace:
                raise (by_trace if spec.cut == "gather" else by_shape) from by_trace
            spec = replace(spec, cut="gather", gather=places)
            rules, sign, error = probing.fit_steps(spec, small.steps + large.steps, self._scales)
        self.spec = replace(spec, rules=rules, sign=sign)
        probing.check_linear_weights(self.spec, small.steps, large.steps)
        for step in large.steps:
            self._fit_step(step)
        report = probing.report(self.spec, small, large, error)
        report["form"] = self._form.words()
        report["conditions"] = sorted({*self._fill, *conditions_of(trio[0])})
        report["takes_note"] = note
        report.update(self._check_replay(large, sampling))
        if getattr(self.pipe, "guider", None) is not None:
            self._check_later_steps(trio[:takes])
        if self._text is not None:
            first, stop = (0, 3) if self._form.batched else (1, 2)
            asked = asked_of(trio[first:stop], range(11 + first, 11 + stop), self._form, self._fill)
            report["text_inputs"] = self._text.check(large.steps, asked, sampling)
        if self.embeddings is not None:
            forget_prompts(self.pipe)
            self.embeddings.settle(self.pipe, self._form, lambda: same_inputs(small.steps, run(*couple).steps))
        return report

    def _check_later_steps(self, prompts: Sequence[PromptItem]) -> None:
        """Guiders choose their rule by the number of the step, so all steps that a run may train are looked at.

        Raises UnsupportedPolicyError, with the window that can be trained where there is one.
        """
        sampler = self.cfg.sampler
        steps = tuple(range(sampler.window.stop or sampler.steps - 1))
        sampling = replace(ode_sampling(self.cfg, sampler.steps), stochastic_steps=steps, trained_steps=steps)
        fitted: list[int] = []

        def fit(step: RawStep) -> None:
            self._fit_step(step)
            fitted.append(step.index)

        try:
            self._sample(
                prompts,
                range(11, 11 + len(prompts)),
                None,
                sampling,
                keep_steps=set(steps),
                on_step=fit,
                stop_early=len(steps) < sampler.steps,
            )
        except UnsupportedPolicyError as error:
            cause = f"{self.name}: its guider {type(self.pipe.guider).__name__} changes its rule; {error}"
            if len(fitted) > 1:
                cause += f". Earlier steps can be trained: sampler.window.stop={len(fitted)}"
            raise UnsupportedPolicyError(cause) from error

    @torch.no_grad()
    def _check_replay(self, recording: Recording, sampling: SamplingSpec) -> dict[str, float]:
        """Replays steps out of order, whole and take by take; the log-ratio must be 0 to rounding."""
        takes = recording.steps[0].sample.shape[0]
        part = to_part(recording, 0, takes, keep_mean=False)
        replayer = Replayer(part, self.spec, self.modules, self.device)
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
        exact = all(p.dtype == torch.float32 for m in self.modules.values() for p in m.parameters())
        bound = probing.RATIO_TOLERANCE if exact else 1e-2
        # Single takes run through other kernels; over few latent values their rounding shows more.
        if not (worst["replay_whole"] < bound and worst["replay_single"] < 10 * bound):
            raise UnsupportedPolicyError(
                f"{self.name}: replaying a rollout gives log-ratios of up to {max(worst.values()):.1e} "
                f"(allowed {bound:.0e}); does it keep state between calls, or change its model while sampling "
                "(caching, a stateful guider, attention processors of its own, dropout)?"
            )
        return worst


def _wrong_steps(name: str, took: int, wanted: int) -> str:
    """Why a run of `took` steps cannot stand for one of `wanted`, and what to do."""
    if took == 0:
        return (
            f"{name} took none of its steps through pipe.scheduler: it drives copies of it, one per frame or modality, "
            "and such a chain of steps has no log-prob here"
        )
    way = "a model distilled to a fixed number of steps"
    if took > wanted:
        way += ", or one that takes a step per view, stage or segment of a clip (generator.call may set how many)"
    return (
        f"{name} took {took} scheduler steps where {wanted} were asked for: {way}. A policy needs steps to draw noise "
        "at: use a checkpoint that takes as many as it is asked for, two or more"
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**63)
