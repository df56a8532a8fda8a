"""The step primitive of all searches: particles of a pipeline are advanced from level to level, decoded and scored.

A particle stops where the model has answered and the sampler has not stepped yet. Its x0 prediction there is what it
will become, as seen from here; the answer is handed back when it goes on, so looking ahead costs no denoiser call. The
pipeline's own loop does everything, so a search that never interferes gives the takes of a plain rollout, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from pipeline.core.errors import RewardError, UnsupportedPolicyError
from pipeline.core.types import GroupWork, Media, PromptItem, RewardScores, SamplingSpec
from pipeline.generators.call.output import to_uint8
from pipeline.generators.latent_codec import LatentCodec, PipelineTail
from pipeline.generators.noising import clean_prediction
from pipeline.generators.policy import Policy
from pipeline.generators.policy_pipeline import fork_generators
from pipeline.generators.record.recording import RecordOptions
from pipeline.generators.replay.chain import DenoisingChain
from pipeline.rewards.runner import RewardRunner
from pipeline.rl.group_plan import ode_sampling
from pipeline.rl.samplers.base import NoiseLevels
from pipeline.rl.signals.group_relative import weighted_rewards
from pipeline.search.base import START, Particle, Search, steering_weights
from pipeline.search.noisy import NoisySearch


class Walk(Protocol):
    """What searches run on. A particle's `owner` is the position of its prompt in what the searches are for."""

    def advance(self, particles: Sequence[Particle], owners: Sequence[int], to: int) -> list[Particle]: ...

    def score(self, particles: Sequence[Particle], owners: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """(scores [n], what was scored: uint8 [F, H, W, 3] each)."""
        ...

    def differentiate(
        self, particles: Sequence[Particle], owners: Sequence[int]
    ) -> list[tuple[Particle, torch.Tensor]]: ...


class PolicyWalk:
    """A `Walk` of a diffusers pipeline, for one search's sampler and some prompts."""

    def __init__(
        self, policy: Policy, sampling: SamplingSpec, rewards: Steering, prompts: Sequence[PromptItem], batch: int
    ) -> None:
        """`policy`: probed, where the search looks ahead. `batch`: most particles in a pipeline call."""
        self.policy, self.sampling, self.rewards, self.prompts, self.batch = policy, sampling, rewards, prompts, batch
        self.levels: tuple[NoiseLevels, ...] = ()  # of the sampler's steps, known from the first call on
        self._chains: dict[tuple[int, ...], DenoisingChain] = {}  # owners of a call -> their conditions

    @torch.no_grad()
    def advance(self, particles: Sequence[Particle], owners: Sequence[int], to: int) -> list[Particle]:
        """Particles of one level, at level `to`. Raises UnsupportedPolicyError."""
        if len({particle.level for particle in particles}) > 1:
            raise ValueError("particles of several levels cannot be advanced in one call")
        advanced: list[Particle] = []
        for start, stop in self._calls(owners, particles):
            advanced += self._one_call(particles[start:stop], [self.prompts[i] for i in owners[start:stop]], to)
        return advanced

    def differentiate(
        self, particles: Sequence[Particle], owners: Sequence[int]
    ) -> list[tuple[Particle, torch.Tensor]]:
        """Particles of level 0, finished without noise, and the gradients of their scores to where they began."""
        finished: list[tuple[Particle, torch.Tensor]] = []
        for start, stop in self._calls(owners, particles):
            chain = self._chain(tuple(owners[start:stop]))
            takes, steps = range(stop - start), self.sampling.num_steps
            x = torch.stack([particle.x for particle in particles[start:stop]]).to(self.policy.device).requires_grad_()
            with torch.enable_grad():
                pictures = self.codec.decode(chain.run(x, takes, 0, steps))
                scores = self.rewards.gradient(
                    pictures, [self.prompts[i] for i in owners[start:stop]], self.policy.cfg.generator.fps
                )
                (slopes,) = torch.autograd.grad(scores.sum(), x)
            for particle, of_take, slope in zip(particles[start:stop], _frames(pictures), slopes, strict=True):
                finished.append((replace(particle, level=steps, x=None, output=None, frames=of_take), slope))
        return finished

    def _chain(self, owners: tuple[int, ...]) -> DenoisingChain:
        """The denoising chain of takes of these prompts, for any samples."""
        if owners not in self._chains:
            every = replace(self.sampling, trained_steps=tuple(range(self.sampling.num_steps)))
            work = self._work(owners, range(len(owners)), every)
            self._chains[owners] = DenoisingChain(self.policy.conditions(work), self.policy.modules, self.policy.device)
        return self._chains[owners]

    def _calls(self, owners: Sequence[int], particles: Sequence[Particle]) -> Iterator[tuple[int, int]]:
        for first in range(0, len(particles), self.batch):
            rows = slice(first, first + self.batch)
            seeds = [particle.lineage[0][1] for particle in particles[rows]]
            work = self._work(owners[rows], seeds, self.sampling)
            for start, stop in self.policy.calls(work):
                yield first + start, first + stop

    def _one_call(self, particles: Sequence[Particle], prompts: Sequence[PromptItem], to: int) -> list[Particle]:
        level, device = particles[0].level, self.policy.device
        options = RecordOptions(
            forks=fork_generators([particle.lineage[1:] for particle in particles]),
            stop_at=to if to < self.sampling.num_steps else None,
        )
        if level > START:
            x = torch.stack([particle.x for particle in particles]).to(device)
            output = torch.stack([particle.output for particle in particles]).to(device)
            options = replace(options, samples={level: x} if level else {}, outputs={level: output})
        seeds = [particle.lineage[0][1] for particle in particles]
        pipeline, plan = self.policy.pipeline, self.policy.plan
        values, recording = pipeline.sample(plan, prompts, seeds, None, self.sampling, options, max(level, START) + 1)
        self.levels = recording.levels
        if to == self.sampling.num_steps:
            return [
                replace(particle, level=to, x=None, output=None, frames=frames)
                for particle, frames in zip(particles, to_uint8(values), strict=True)
            ]
        reached = recording.reached
        if reached is None:
            raise UnsupportedPolicyError(
                f"{self.policy.name} took {recording.num_steps} steps, so level {to} was not reached"
            )
        states = zip(particles, reached.sample, reached.output, strict=True)
        return [replace(particle, level=to, x=x, output=output) for particle, x, output in states]

    def score(self, particles: Sequence[Particle], owners: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        prompts = [self.prompts[i] for i in owners]
        ahead = [row for row, particle in enumerate(particles) if particle.frames is None]
        seen: dict[int, np.ndarray] = {}
        for first in range(0, len(ahead), self.batch):
            rows = ahead[first : first + self.batch]
            predicted = self._ahead([particles[row] for row in rows], [prompts[row] for row in rows])
            seen.update(zip(rows, predicted, strict=True))
        frames = [seen[row] if row in seen else _finished(particle) for row, particle in enumerate(particles)]
        media = Media(frames=np.stack(frames), fps=self.policy.cfg.generator.fps)
        if not self.rewards.relative:
            return self.rewards.score(media, prompts), frames
        scores = np.empty(len(frames))
        for owner in dict.fromkeys(owners):  # takes of other searches must not change a take's score
            shown = np.flatnonzero(np.asarray(owners) == owner)
            mine = Media(frames=media.frames[shown], fps=media.fps)
            scores[shown] = self.rewards.score(mine, [self.prompts[owner]] * len(shown))
        return scores, frames

    @torch.no_grad()
    def _ahead(self, particles: Sequence[Particle], prompts: Sequence[PromptItem]) -> np.ndarray:
        """What the model predicts that particles become, uint8 [n, F, H, W, 3]."""
        spec = self.policy.spec
        clean = []
        for particle in particles:
            x, levels = particle.x[None], self.levels[particle.level]
            clean.append(
                clean_prediction(spec.prediction, levels, x, particle.output[None], spec.consistency).to(x.dtype)
            )
        seeds = [particle.lineage[0][1] for particle in particles]
        pictures = self.codec.decode(torch.cat(clean), prompts=prompts, seeds=seeds, together=True)
        return _frames(pictures)

    @cached_property
    def codec(self) -> LatentCodec:
        """Between the policy's samples and pictures."""
        policy = self.policy
        tail = PipelineTail(policy.pipeline, policy.plan)
        return LatentCodec(getattr(policy.pipe, "vae", None), policy.spec, policy.device, tail)

    def _work(self, owners: Sequence[int], seeds: Sequence[int], sampling: SamplingSpec) -> GroupWork:
        return GroupWork(
            group=0,
            attempt=1,
            purpose="eval",
            step=0,
            prompts=tuple(self.prompts[i] for i in owners),
            seeds=tuple(seeds),
            sampling=sampling,
        )


def _frames(pictures: torch.Tensor) -> np.ndarray:
    """Decoded pictures [n, F, 3, H, W] in 0..1 -> uint8 [n, F, H, W, 3]."""
    return to_uint8(pictures.detach().permute(0, 1, 3, 4, 2).float().cpu().numpy())


def _finished(particle: Particle) -> np.ndarray:
    assert particle.frames is not None  # else it is looked ahead from
    return particle.frames


class Steering:
    """The rewards that steer a search: those of the config with a weight, summed as in training."""

    def __init__(self, runners: Mapping[str, RewardRunner], weights: Mapping[str, float]) -> None:
        """Raises `ConfigError` where no reward has a weight."""
        self.weights = steering_weights(weights)
        self.runners = {name: runners[name] for name in self.weights}
        self.relative = any(runner.scorer.relative for runner in self.runners.values())

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        """The weighted sum of each take, float64 [n]. Raises `RewardError` where none applies to a prompt."""
        scores = {name: runner.run(media, prompts, None).values for name, runner in self.runners.items()}
        try:
            return weighted_rewards(scores, self.weights).astype(np.float64)
        except ValueError as error:
            raise RewardError(f"search: {error}: {', '.join(self.weights)}") from error

    def gradient(self, pixels: torch.Tensor, prompts: Sequence[PromptItem], fps: float) -> torch.Tensor:
        """The same sum [n] with gradients to pictures float [n, F, 3, H, W] in 0..1; a reward that does not apply to a
        take's prompt is left out."""
        scores = [w * self.runners[name].gradient(pixels, prompts, None, fps=fps) for name, w in self.weights.items()]
        return torch.stack(scores).nan_to_num(0.0).sum(0)


def score_all(
    runners: Mapping[str, RewardRunner], media: Media, prompts: Sequence[PromptItem]
) -> dict[str, RewardScores]:
    """Every reward of a finished take, also those that do not steer."""
    return {name: runner.run(media, prompts, None) for name, runner in runners.items()}


def sampling_of(search: Search, policy: Policy, steps: int) -> SamplingSpec:
    """The sampler of a search's takes. Raises UnsupportedPolicyError where the pipeline cannot stop between levels."""
    sampling = ode_sampling(policy.cfg, steps)
    if search.looks_ahead and policy.spec.resume_note:
        raise UnsupportedPolicyError(
            f"search {search.name}: {policy.name} cannot go on from a sample ({policy.spec.resume_note}); use best-of-n"
        )
    if search.gradients and (why_not := _why_no_gradient(policy)):
        raise UnsupportedPolicyError(
            f"search {search.name}: gradients do not reach the initial noise of {policy.name}: {why_not}; use fk or "
            "best-of-n"
        )
    if not isinstance(search, NoisySearch):
        return sampling
    noise_level = search.noise_level or policy.cfg.sampler.noise_level
    noisy = tuple(range(min(policy.noise_grid(steps).noisy_steps, steps - 1)))
    return replace(sampling, kind=policy.cfg.sampler.kind, noise_level=noise_level, stochastic_steps=noisy)


def _why_no_gradient(policy: Policy) -> str:
    """Why the gradient of a finished take's score does not reach where it began, in one line; "": it does."""
    if policy.spec.consistency:
        return "its scheduler draws noise of its own at every step"
    return policy.spec.why_no_decode or policy.spec.sample_note
