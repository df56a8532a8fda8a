"""The config's `sampler` section: how training rollouts are sampled, and which of their steps are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from pipeline.config.sections.base import Count, Natural, Positive, Section, Share


class WindowConfig(Section):
    """The sampler steps that draw noise and can be trained."""

    kind: Literal["all", "random", "sliding", "growing"] = Field(
        "all",
        description="Steps that draw noise and train: all of the range; a random window; MixGRPO's sliding one; or the "
        "last steps of the range and, in time, the ones before them (B2-DiffuRL).",
    )
    size: Count = Field(2, description="Steps in a random, sliding or (at first) growing window.")
    range: Annotated[list[Natural], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="[first, end) of the steps that the window may cover. Default: the steps that end at a noise level "
        "of 0.05 or more, as the noise of later ones stays in the picture (rushes inspect lists them); with objectives "
        "that draw no noise, all but the last.",
    )
    every: Count = Field(
        25, description="Optimisation steps before a sliding window moves, or a growing one grows, by one."
    )

    def bounds(self, default_end: int) -> tuple[int, int]:
        """[first, end) of the steps that the window may cover. Without a range, it may cover [0, `default_end`)."""
        return (0, default_end) if self.range is None else (self.range[0], self.range[1])


class SamplerConfig(Section):
    """How training rollouts are sampled."""

    kind: str = Field(  # the names are registered in pipeline.rl.samplers; preflight checks it
        "flow_sde",
        description="Stochastic sampler of the rollouts (ddim: for epsilon, v or sample prediction; lcm: for latent "
        "consistency models).",
    )
    noise_level: Positive = Field(0.7, description="Noise: a of flow-SDE, eta of dance-SDE, CPS and DDIM.")
    steps: Count = Field(10, description="Sampler steps in training rollouts.")
    window: WindowConfig = Field(default_factory=WindowConfig)
    timestep_fraction: Share = Field(
        1.0, description="Share of a take's stochastic steps that is trained, drawn per group (DanceGRPO: 0.6)."
    )
    same_initial_noise: Annotated[bool, Strict()] | Annotated[int, Field(ge=2)] = Field(
        False,
        description="All takes of a group start from the same initial noise; a number: each so many takes, which then "
        "are branches of one beginning (B2-DiffuRL).",
    )

    @model_validator(mode="after")
    def _window_fits(self) -> SamplerConfig:
        last = self.steps - 1  # the last transition is never stochastic (its std is ~0)
        if self.steps < 2:
            raise ValueError("sampler.steps: 1 leaves nothing to train (the last step is deterministic); use 2 or more")
        start, end = self.window.bounds(last)
        if not 0 < end <= last:
            raise ValueError(
                f"sampler.window.range: the end, {end}, is outside 1..{last} (the last step never draws noise)"
            )
        if start >= end:
            raise ValueError(f"sampler.window.range: the first step, {start}, must be below the end, {end}")
        if self.window.kind != "all" and self.window.size > end - start:
            raise ValueError(f"sampler.window.size: {self.window.size} does not fit between steps {start} and {end}")
        return self
