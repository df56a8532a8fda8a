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

from pipeline.config.schema import Config
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import GroupWork, Media, PromptItem, SamplingSpec, Trajectory, TrajectoryPart, WeightSet
from pipeline.generators import adapters
from pipeline.generators.call.arguments import (
    CallMode,
    call_arguments,
    condition_key,
    parameters_of,
    to_floats,
    to_uint8,
)
from pipeline.generators.call.quirks import quirk_for
from pipeline.generators.load.compiling import compile_blocks
from pipeline.generators.load.embedding_cache import EmbeddingStore
from pipeline.generators.load.offload import Offload
from pipeline.generators.load.pipeline import (
    cache_prompts,
    denoisers_of,
    forget_prompts,
    load_pipeline,
    resolve_device,
    trained_modules,
)
from pipeline.generators.probe import fit as probing
from pipeline.generators.probe import probe
from pipeline.generators.record.first_order import first_order_scheduler, kinds_for
from pipeline.generators.record.recorder import RawStep, Recording, record
from pipeline.generators.record.shared_prefix import SharedPrefix
from pipeline.generators.replay.replayer import branches_of, to_part
from pipeline.generators.replay.split_groups import cut_part, joint_sampling
from pipeline.generators.replay.text_inputs import TextReencoder, to_call_inputs
from pipeline.generators.spec import PolicySpec
from pipeline.rl.objectives import get_objective

_POLICY_NOISE = 0x5DEECE66D  # separates the policy's noise stream from the initial noise of the same seed


class Policy:
    """See the module docstring. Not thread-safe: one call at a time."""

    def __init__(self, cfg: Config, pipe: Any, device: torch.device) -> None:
        self.cfg, self.pipe, self.device = cfg, pipe, device
        self.name = type(pipe).__name__
        quirk = quirk_for(pipe)
        if quirk.refuse:
            raise UnsupportedPolicyError(f"{self.name}: {quirk.refuse}")
        if quirk.prepare is not None:
            quirk.prepare(pipe)
        self.modules = denoisers_of(pipe)
        self.trained = trained_modules(pipe, cfg.trainable)
        self.prediction = first_order_scheduler(pipe)
        kinds = kinds_for(pipe.scheduler, self.prediction)
        if cfg.sampler.kind not in kinds:
            raise UnsupportedPolicyError(
                f"sampler.kind: {cfg.sampler.kind} does not fit {self.name}, which predicts {self.prediction} "
                f"({type(pipe.scheduler).__name__}); use {' or '.join(kinds)}"
            )
        self.version = 0
        self.reset(CallMode(), [])
        self.scales = self._known_scales()
        self._merged: adapters.MergedLora | None = None
        self.embeddings: EmbeddingStore | None = None
        self.offload: Offload | None = None
        self.text = TextReencoder(pipe, cfg.generator) if cfg.trainable.modules != "denoiser" else None
        self._keep_mean = get_objective(cfg.algorithm.objective).needs_old_mean
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
        given = {name: p.default for name, p in parameters_of(self.pipe).items()} | dict(self.cfg.generator.call_kwargs)
        found = [self.cfg.generator.guidance_scale]
        for name, value in given.items():
            wanted = any(word in name for word in ("guidance", "cfg", "scale"))
            if wanted and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append(float(value))
        return list(dict.fromkeys([*found, 1.0]))

    def reset(self, mode: CallMode, placeholders: list[str]) -> None:
        """Forgets what a probe found. `mode`: how the pipeline is called; `placeholders`: the conditions made up
        where a prompt lacks them."""
        self.mode, self.placeholders = mode, placeholders
        self.spec: PolicySpec | None = None
        # sampler steps -> num_inference_steps, where `strength` is rounded otherwise
        self.steps_to_request: dict[int, int] = {}
        # sampler step -> (rule, scale, extra) where a step's own outputs are too much alike to tell
        self.fixed_guidance: dict[int, tuple[str, float, tuple[float, ...]]] = {}

    # -- weights ------------------------------------------------------------------------------------------------

    def add_adapters(self) -> None:
        """Adds what is trained (LoRA layers, or nothing for full weights), so that weights can be loaded."""
        adapters.add_adapters(self.trained, self.cfg.trainable, self.cfg.run.seed)
        if self.offload is not None:
            self.offload.layers_changed(self.trained)
        if self.cfg.rollout.merge_lora and self.cfg.trainable.kind == "lora":
            self._merged = adapters.MergedLora(self.trained)
        if self.cfg.generator.compile:
            compile_blocks(self.modules, self.device)

    def load_weights(self, weights: WeightSet) -> str:
        """Puts a version in place; returns the checksum of what this policy now holds."""
        found = adapters.apply(self.trained, weights)
        if self._merged is not None:
            self._merged.merge()
        if self.text is not None:
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
        for start, stop in self.calls(work):
            began = time.perf_counter()
            values, recording = self.sample(
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
                inputs = None
                if self.text is not None:
                    inputs = to_call_inputs(
                        work.prompts[start:stop], work.noise_seeds[start:stop], self.mode, self.placeholders
                    )
                parts.append(to_part(recording, start, stop, self._keep_mean, inputs))
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
        apart = self.spec is None or self.spec.layouts is None or self.text is not None or not self.mode.batched
        differ = self.mode.shared and len({condition_key(prompt) for prompt in prompts}) > 1
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

    def calls(self, work: GroupWork) -> Iterator[tuple[int, int]]:
        """Takes [start, stop) of each pipeline call: a batch at most, and one condition where the mode shares it."""
        size = (self.cfg.rollout.batch or work.takes) if self.mode.batched else 1
        start = 0
        while start < work.takes:
            stop = min(start + size, work.takes)
            if self.mode.shared:
                keys = [condition_key(prompt) for prompt in work.prompts[start:stop]]
                stop = start + next((i for i, key in enumerate(keys) if key != keys[0]), len(keys))
            yield start, stop
            start = stop

    @torch.no_grad()
    def sample(
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
        kwargs = self.call_arguments(prompts, sampling)
        first = [_generator(seed) for seed in noise_seeds or seeds]
        kwargs["generator"] = first if self.mode.batched else first[0]
        if self.spec is not None:
            options.setdefault("on_step", self.fit_step)
            if (until := min(sampling.stochastic_steps, default=0)) > 0:
                origins = [(condition_key(p), s) for p, s in zip(prompts, noise_seeds or seeds, strict=True)]
                options.setdefault("twins", SharedPrefix(origins, until, self.spec))
        output = None
        with record(
            self.pipe, self.modules, self.prediction, sampling, noise, keep_steps=keep_steps, **options
        ) as recording:
            output = self.pipe(**kwargs)
        if recording.stopped:
            return np.zeros(0, np.float32), recording
        if recording.num_steps != sampling.num_steps:
            if self._request_other_steps(kwargs.get("num_inference_steps", 0), recording.num_steps, sampling.num_steps):
                return self.sample(prompts, seeds, noise_seeds, sampling, keep_steps=keep_steps, **options)
            raise UnsupportedPolicyError(_wrong_steps(self.name, recording.num_steps, sampling.num_steps))
        return to_floats(output, len(prompts)), recording

    def call_arguments(self, prompts: Sequence[PromptItem], sampling: SamplingSpec) -> dict[str, Any]:
        kwargs = call_arguments(self.pipe, self.cfg.generator, prompts, sampling, self.mode, self.placeholders)
        if sampling.num_steps in self.steps_to_request:
            kwargs["num_inference_steps"] = self.steps_to_request[sampling.num_steps]
        return kwargs

    def _request_other_steps(self, requested: int, took: int, wanted: int) -> bool:
        """Whether another num_inference_steps may give `wanted` steps: pipelines round steps x strength in their own
        ways. Notes the number to ask for."""
        if not 0 < took <= requested or "strength" not in parameters_of(self.pipe) or wanted in self.steps_to_request:
            return False
        self.steps_to_request[wanted] = requested + wanted - took
        return True

    def fit_step(self, step: RawStep) -> None:
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
        known = self.fixed_guidance.get(step.index)
        if known is not None:
            probing.check_numbers(branches, step, *known, self.spec.sign)
            step.rule, step.guidance_scale, step.rule_extra = known
            return
        found = probing.fit_step(branches, step, rule, self.spec.sign, self.scales)
        step.guidance_scale, step.rule, step.rule_extra = found.scale, found.rule, found.extra

    def probe(self, prompts: list[PromptItem] | None = None) -> dict[str, Any]:
        """Finds out how the pipeline works as a policy and keeps it (`trial.probe`). Call it before a rollout."""
        return probe.probe(self, prompts)


def _wrong_steps(name: str, took: int, wanted: int) -> str:
    """Why a run of `took` steps cannot stand for one of `wanted`, and what to do."""
    if took == 0:
        return (
            f"{name} took none of its steps through pipe.scheduler: it drives copies of it, one per frame or modality, "
            "and such a chain of steps has no log-prob here"
        )
    way = "a model distilled to a fixed number of steps"
    if took > wanted:
        way += (
            ", or one that takes a step per view, stage or segment of a clip (generator.call_kwargs may set how many)"
        )
    return (
        f"{name} took {took} scheduler steps where {wanted} were asked for: {way}. A policy needs steps to draw noise "
        "at: use a checkpoint that takes as many as it is asked for, two or more"
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**63)
