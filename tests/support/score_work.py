"""What a reward server is asked to score, without a run."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.types import GroupWork, PromptItem, SamplingSpec

ODE = SamplingSpec(kind="ode", noise_level=0.0, num_steps=1, stochastic_steps=(), trained_steps=(), guidance_scale=1.0)


def score_work(group: int, prompts: Sequence[PromptItem]) -> GroupWork:
    """A group of the evaluation, so with centre frame picks."""
    seeds = tuple(range(len(prompts)))
    return GroupWork(group=group, attempt=1, purpose="eval", step=0, prompts=tuple(prompts), seeds=seeds, sampling=ODE)
