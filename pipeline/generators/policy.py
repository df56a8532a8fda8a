"""A diffusers pipeline as an RL policy: what a rollout worker holds.

Draws takes together with their trajectory, and applies new weights. Built on `PolicyPipeline`, which calls the pipeline
and records it, and on `probe`, which finds out how that has to be done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.devices import resolve_device
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import PackedTensor, pack, unpack
from pipeline.core.types import (
    Begin,
    GroupWork,
    Lineage,
    Media,
    PromptItem,
    SamplingSpec,
    Trajectory,
    TrajectoryPart,
    WeightSet,
)
from pipeline.generators import adapters
from pipeline.generators.call.conditions import condition_key
from pipeline.generators.call.output import to_uint8
from pipeline.generators.clip_encoder import ClipEncoder, begin_noise, files_of
from pipeline.generators.condition_pass import ConditionPass
from pipeline.generators.load.compiling import compile_blocks
from pipeline.generators.load.pipeline import replayed_modules, trained_modules
from pipeline.generators.load.prompt_cache import forget_prompts
from pipeline.generators.noising import noised
from pipeline.generators.policy_pipeline import CallPlan, PolicyPipeline, Sampled, fork_generators
from pipeline.generators.probe.probe import guidance_for, probe
from pipeline.generators.probe.result import ProbeResult
from pipeline.generators.record.packing import pack_recording
from pipeline.generators.record.recording import RecordOptions
from pipeline.generators.record.shared_prefix import SharedPrefix, origins_by_step
from pipeline.generators.replay.split_groups import joint_sampling, split_part
from pipeline.generators.replay.text_inputs import to_call_inputs
from pipeline.generators.spec import PolicySpec
from pipeline.rl.group_plan import check_window, ode_sampling
from pipeline.rl.noise_grid import NoiseGrid
from pipeline.rl.objectives import objective_of
from pipeline.rl.sources import source_of


class Rollout(NamedTuple):
    """The takes of one group."""

    media: Media
    trajectory: Trajectory | None  # None where the group trains no step
    seconds: dict[str, float]  # per phase: encode, denoise, decode, total


class Policy:
    """See the module docstring. Not thread-safe: one call at a time.

    Without a probe's result it only samples, with the default call: evaluation and generation need no more.
    """

    def __init__(self, pipeline: PolicyPipeline, probed: ProbeResult | None = None) -> None:
        self.pipeline, self.probed = pipeline, probed
        self.cfg, self.pipe, self.device, self.name = pipeline.cfg, pipeline.pipe, pipeline.device, pipeline.name
        self.modules = replayed_modules(pipeline.pipe)
        self.embeddings = pipeline.embeddings
        self.trained = trained_modules(pipeline.pipe, pipeline.cfg.trainable)
        self.version = 0
        self._unprobed_plan = CallPlan()
        self._clips: ClipEncoder | None = None  # of a source that reads clips, once probed
        self._merged: adapters.MergedLora | None = None
        self._keep_mean = objective_of(pipeline.cfg).requirements.old_mean

    @classmethod
    def load(cls, cfg: Config, device: str = "auto", threads: int = 0) -> Policy:
        """Loads the checkpoint named in the config. `threads`: torch compute threads (0: leave as is)."""
        if threads:
            torch.set_num_threads(threads)
        return cls(PolicyPipeline.load(cfg, resolve_device(device)))

    def probe(self, prompts: list[PromptItem] | None = None) -> dict[str, Any]:
        """Probes the pipeline (see `probe`), which rollouts with trajectories need. Returns the report.

        Raises UnsupportedPolicyError where the pipeline, or the run's objective with it, cannot be trained, and
        ConfigError where the sampler's window does not fit its noise levels.
        """
        self.probed = probe(self.pipeline, prompts)
        objective = objective_of(self.cfg)
        if objective.requirements.any_sample and (why_not := self.probed.spec.why_not_noised_again(objective.name)):
            raise UnsupportedPolicyError(why_not)
        needs = objective.requirements
        if needs.reward_gradient and (
            why_not := self.probed.spec.why_no_reward_gradient(objective.name, needs.moved_sample)
        ):
            raise UnsupportedPolicyError(why_not)
        check_window(self.cfg, self.probed.grid)
        source = source_of(self.cfg)
        if self.probed.grid is not None:
            source.check_grid(self.cfg, self.probed.grid)
        if (data := source.data_clips(self.cfg)) is not None:
            self._clips = ClipEncoder(getattr(self.pipe, "vae", None), self.spec, self.device, data)
            if files := [path for prompt in prompts or () for path in files_of(prompt)]:
                self.probed.report["clip_error"] = self._clips.check(files)
        return self.probed.report

    @property
    def grid(self) -> NoiseGrid | None:
        """Noise levels of a run's sampler steps; None before `probe`."""
        return self.probed.grid if self.probed is not None else None

    @property
    def spec(self) -> PolicySpec:
        """What replay needs to know. Raises RuntimeError before `probe`."""
        if self.probed is None:
            raise RuntimeError("probe() must run before trajectories are recorded")
        return self.probed.spec

    @property
    def plan(self) -> CallPlan:
        """How the pipeline is called."""
        return self.probed.plan if self.probed is not None else self._unprobed_plan

    # -- weights --------------------------------------------------------------------------------------------------

    def add_adapters(self) -> None:
        """Adds what is trained (LoRA layers, or nothing for full weights), so that weights can be loaded."""
        adapters.add_adapters(self.trained, self.cfg.trainable, self.cfg.run.seed)
        if self.pipeline.offload is not None:
            self.pipeline.offload.layers_changed(self.trained)
        if self.cfg.rollout.merge_lora and self.cfg.trainable.kind == "lora":
            self._merged = adapters.MergedLora(self.trained)
        if self.cfg.generator.compile:
            compile_blocks(self.pipeline.denoisers, self.device)

    def load_weights(self, weights: WeightSet) -> str:
        """Applies a version's weights; returns the checksum of those that this policy then holds."""
        checksum = adapters.apply(self.trained, weights)
        if self._merged is not None:
            self._merged.merge()
        if self.pipeline.text is not None:
            forget_prompts(self.pipe)
        return checksum

    # -- sampling -------------------------------------------------------------------------------------------------

    def rollout(self, work: GroupWork) -> Rollout:
        """Draws the takes of one group, or encodes those that are given.

        Raises RushesError when the pipeline's output is not finite, RuntimeError when steps are to be trained before
        `probe`.
        """
        if not work.drawn:
            return self._given(work)
        started = time.perf_counter()
        frames: list[np.ndarray] = []
        parts: list[TrajectoryPart] = []
        seconds = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        trained_steps = work.sampling.trained_steps
        spec = self.spec if trained_steps else None
        for start, stop in self.calls(work):
            call_started = time.perf_counter()
            prompts, noise_seeds = work.prompts[start:stop], work.noise_seeds[start:stop]
            values, recording = self.sample(
                prompts,
                work.seeds[start:stop],
                noise_seeds,
                work.sampling,
                keep_steps=trained_steps,
                begin=self._begin(work, start, stop),
                forks=work.forks[start:stop],
            )
            call_ended = time.perf_counter()
            seconds["encode"] += recording.denoise_started - call_started
            seconds["denoise"] += recording.denoise_ended - recording.denoise_started
            seconds["decode"] += call_ended - recording.denoise_ended
            frames.append(to_uint8(values))
            if trained_steps:
                inputs = None
                if self.pipeline.text is not None:
                    inputs = to_call_inputs(prompts, noise_seeds, self.plan.mode, self.plan.placeholders)
                parts.append(pack_recording(recording, start, stop, self._keep_mean, inputs))
        trajectory = None
        if parts:
            trajectory = Trajectory(
                group=work.group, version=self.version, sampling=work.sampling, parts=tuple(parts), spec=spec
            )
        seconds["total"] = time.perf_counter() - started
        return Rollout(Media(frames=np.concatenate(frames), fps=self.cfg.generator.fps), trajectory, seconds)

    def _given(self, work: GroupWork) -> Rollout:
        """The clips that the prompts name, as a group's takes, with their conditions: nothing is denoised."""
        started = time.perf_counter()
        paths = [str(prompt.clip) for prompt in work.prompts]
        media, clean = self._data().read(paths), pack(self._data().encode(paths))
        trajectory = self.conditions(work, clean)
        total = time.perf_counter() - started
        return Rollout(media, trajectory, {"encode": total, "denoise": 0.0, "decode": 0.0, "total": total})

    def _data(self) -> ClipEncoder:
        if self._clips is None:
            raise RuntimeError("the config's source reads no clips, which these takes begin from")
        return self._clips

    def conditions(self, work: GroupWork, clean: PackedTensor | None = None) -> Trajectory:
        """The conditions of a group at `work.sampling.trained_steps`, which need no denoising.

        `clean`: the takes' finished latents [K, ...], of encoded data say. Raises RuntimeError before `probe`.
        """
        conditions = self.condition_pass(work.sampling.num_steps)
        parts = tuple(
            conditions.part(
                work.prompts[start:stop],
                work.noise_seeds[start:stop],
                work.sampling,
                None if clean is None else PackedTensor(clean.data[start:stop], clean.dtype),
                start,
            )
            for start, stop in self.calls(work)
        )
        return Trajectory(group=work.group, version=self.version, sampling=work.sampling, parts=parts, spec=self.spec)

    def condition_pass(self, num_steps: int) -> ConditionPass:
        """Calls of the pipeline without its denoisers, at a grid of that many steps. Raises RuntimeError before
        `probe`."""
        if self.probed is None:
            raise RuntimeError("probe() must run before conditions are recorded")
        self.probed = guidance_for(self.pipeline, self.probed, num_steps)
        return ConditionPass(self.pipeline, self.probed)

    def noise_grid(self, num_steps: int) -> NoiseGrid:
        """Noise levels of a grid of that many steps. Raises RuntimeError before `probe`."""
        return NoiseGrid(
            self.pipeline.prediction, self.condition_pass(num_steps).grid(ode_sampling(self.cfg, num_steps))
        )

    def _begin(self, work: GroupWork, start: int, stop: int) -> Begin | None:
        """Where the takes [start, stop) of a group begin, as samples x_t."""
        if work.begin is None:
            return None
        step, states, latents = work.begin.step, work.begin.states, self.spec.latents
        if states is None:
            x0 = self._data().encode([str(prompt.clip) for prompt in work.prompts[start:stop]])
        else:
            rows = PackedTensor(states.data[start:stop], states.dtype)
            if not work.begin.clean:
                return Begin(step=step, states=rows)
            x0 = unpack(rows)
        if work.begin.offset_noise > 0 and latents is None:
            raise UnsupportedPolicyError(f"{self.name}: offset noise needs the VAE's latents: {self.spec.latents_note}")
        eps = begin_noise(x0.shape[1:], work.noise_seeds[start:stop], latents, work.begin.offset_noise)
        x = noised(self.spec.prediction, torch.tensor(self._level(work, step), dtype=torch.float64), x0, eps)
        return Begin(step=step, states=pack(x.to(x0.dtype)))

    def _level(self, work: GroupWork, step: int) -> float:
        """The noise level that a sampler step of a group begins at."""
        if self.grid is not None and len(self.grid.levels) == work.sampling.num_steps:
            return self.grid.levels[step].sigma
        return self.condition_pass(work.sampling.num_steps).grid(work.sampling)[step].sigma

    def rollouts(self, works: Sequence[GroupWork]) -> list[Rollout]:
        """As `rollout`, for several groups that train; in one pipeline call where the pipeline and the groups allow it.

        The call's seconds are divided among the groups by their takes. Takes that are given stay out of it.
        """
        drawn = [work for work in works if work.drawn]
        if 0 < len(drawn) < len(works):
            rest = iter(self.rollouts(drawn))
            return [next(rest) if work.drawn else self.rollout(work) for work in works]
        sampling = joint_sampling(works)
        if len(works) == 1 or sampling is None or not self._can_join(works):
            return [self.rollout(work) for work in works]
        joint = replace(
            works[0],
            prompts=tuple(prompt for work in works for prompt in work.prompts),
            seeds=tuple(seed for work in works for seed in work.seeds),
            initial=tuple(seed for work in works for seed in work.noise_seeds),
            forks=tuple(lineage[1:] for work in works for lineage in work.lineages),
            sampling=sampling,
        )
        media, trajectory, seconds = self.rollout(joint)
        assert trajectory is not None  # every group trains a step
        rollouts, start = [], 0
        for work in works:
            takes = slice(start, start + work.takes)
            part = split_part(trajectory.parts[0], self.spec, takes, work.sampling.trained_steps)
            rollouts.append(
                Rollout(
                    Media(frames=media.frames[takes], fps=media.fps),
                    replace(trajectory, group=work.group, sampling=work.sampling, parts=(part,)),
                    {name: value * work.takes / joint.takes for name, value in seconds.items()},
                )
            )
            start = takes.stop
        return rollouts

    def _can_join(self, works: Sequence[GroupWork]) -> bool:
        """Whether one call can draw these groups, and its record can be split again."""
        if self.probed is None or self.spec.layouts is None or self.pipeline.text is not None:
            return False
        if not all(work.drawn for work in works):
            return False
        begins = [work.begin for work in works]
        if any(begin is not None and begin.states is not None for begin in begins) or begins.count(begins[0]) < len(
            begins
        ):
            return False
        conditions = {condition_key(prompt) for work in works for prompt in work.prompts}
        return self.plan.mode.batched and (not self.plan.mode.shared or len(conditions) == 1)

    def calls(self, work: GroupWork) -> Iterator[tuple[int, int]]:
        """Takes [start, stop) of each pipeline call: at most a batch, and one condition where the mode shares it."""
        mode = self.plan.mode
        size = (self.cfg.rollout.batch or work.takes) if mode.batched else 1
        start = 0
        while start < work.takes:
            stop = min(start + size, work.takes)
            if mode.shared:
                keys = [condition_key(prompt) for prompt in work.prompts[start:stop]]
                stop = start + next((i for i, key in enumerate(keys) if key != keys[0]), len(keys))
            yield start, stop
            start = stop

    def sample(
        self,
        prompts: Sequence[PromptItem],
        seeds: Sequence[int],
        noise_seeds: Sequence[int] | None,
        sampling: SamplingSpec,
        *,
        keep_steps: Sequence[int] = (),
        begin: Begin | None = None,
        forks: Sequence[Lineage] = (),
    ) -> Sampled:
        """One pipeline call (see `PolicyPipeline.sample`). `keep_steps`: steps whose denoiser inputs are recorded, and
        whose guidance is checked. `begin`: samples x_t to go on from at a later step. `forks`: see `GroupWork`.

        Raises ValueError where `begin` leaves no step to take, or a step before it is to be kept.
        """
        options = RecordOptions(keep_steps=frozenset(keep_steps))
        if begin is not None:
            if not 0 < begin.step < sampling.num_steps or any(step < begin.step for step in keep_steps):
                raise ValueError(f"takes begin at step {begin.step} of {sampling.num_steps}, steps {keep_steps} kept")
            if self.probed is not None and self.spec.resume_note:
                raise UnsupportedPolicyError(f"{self.name} cannot go on from a sample: {self.spec.resume_note}")
            options = replace(options, samples={begin.step: unpack(begin.states, self.device)})
        if self.probed is not None:
            if keep_steps:
                self.probed = guidance_for(self.pipeline, self.probed, sampling.num_steps)
            options = replace(options, on_step=self.probed.fit_step)
            if sampling.stochastic_steps:
                starts = zip(map(condition_key, prompts), noise_seeds or seeds, strict=True)
                lineages = [((0, seed), *rest) for seed, rest in zip(seeds, forks or [()] * len(seeds), strict=True)]
                origins = origins_by_step(list(starts), lineages, sampling)
                options = replace(options, shared_prefix=SharedPrefix(origins, self.spec) if origins else None)
        if forks:
            options = replace(options, forks=fork_generators(forks))
        denoise_from = begin.step if begin is not None else 0
        return self.pipeline.sample(self.plan, prompts, seeds, noise_seeds, sampling, options, denoise_from)

    def call_arguments(self, prompts: Sequence[PromptItem], sampling: SamplingSpec) -> dict[str, Any]:
        """Arguments of the pipeline's __call__, without `generator`."""
        return self.pipeline.call_arguments(self.plan, prompts, sampling)
