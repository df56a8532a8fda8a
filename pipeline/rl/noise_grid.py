"""The noise levels of a run's sampler steps, and which of the steps they let draw noise.

Some schedulers end their grid just above 0 and then step to 0: diffusers' FlowMatchEuler (SD3, both shipped
generators) goes 0.446, 0.253, 0.004, 0 at 8 steps. Noise that is drawn on the way to 0.004 stays in the picture, since
the step from there to 0 hardly changes anything, and the log-prob of that one step makes most of the gradient
(docs/benchmarks.md). So by default a step draws noise only where enough of the chain is left to remove it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.core.errors import ConfigError
from pipeline.rl.samplers import get_sampler
from pipeline.rl.samplers.base import FLOW, NoiseLevels

LEAST_SIGMA_NEXT = 0.05  # flow time, below which a step must not end that draws noise by default


@dataclass(frozen=True, slots=True)
class NoiseGrid:
    """What the pipeline's scheduler made of a number of sampler steps."""

    prediction: str  # flow | epsilon | v_prediction | sample
    levels: tuple[NoiseLevels, ...]  # of the steps, noisiest first

    def sigma(self, level: float) -> float:
        """Flow time in [0, 1] of a noise level: t = s / (1 + s), s = sqrt((1 - abar) / abar) for diffusion models."""
        if self.prediction in FLOW:
            return level
        noise, signal = math.sqrt(max(1.0 - level, 0.0)), math.sqrt(max(level, 0.0))
        return noise / (noise + signal)

    @property
    def noisy_steps(self) -> int:
        """How many steps, from the first on, may draw noise by default: they end at `LEAST_SIGMA_NEXT` or above."""
        ends = [self.sigma(levels.sigma_next) for levels in self.levels[:-1]]  # the last one's noise stays in any case
        return next((i for i, end in enumerate(ends) if end < LEAST_SIGMA_NEXT), len(ends))

    def step_at(self, noise: float) -> int:
        """The step that begins at a noise level in (0, 1). Flow: where sigma is nearest to it; diffusion: the one from
        which on the share `noise` of all steps is left (InstructVideo, whose step d(tau D) is the (tau D)-th from the
        end)."""
        if self.prediction in FLOW:
            return min(range(len(self.levels)), key=lambda step: abs(self.levels[step].sigma - noise))
        return len(self.levels) - math.floor(noise * len(self.levels) + 0.5)

    def describe(self) -> str:
        """`1 -> 0.923 -> ... -> 0`."""
        sigmas = [self.sigma(levels.sigma) for levels in self.levels] + [self.sigma(self.levels[-1].sigma_next)]
        return " -> ".join(f"{sigma:.3g}" for sigma in sigmas)


@dataclass(frozen=True, slots=True)
class StepNoise:
    """What a stochastic sampler does at one step of the grid."""

    index: int
    sigma: float  # flow time
    sigma_next: float
    std: float  # of the noise it draws
    noisy: bool  # whether it draws noise by default
    share: float  # of the gradient's variance over the steps that draw noise by default; else what it would add to them


def noise_of_steps(grid: NoiseGrid, kind: str, noise_level: float) -> list[StepNoise]:
    """Std and share of the gradient of every step but the last, for the log-prob of the sampler `kind`.

    The share is that of E |d log p / d model output|^2 = (2 sharpness std c)^2, c = d mean / d output, divided by its
    sum over the steps that draw noise by default (all, where none does).
    """
    import torch

    sampler, zero, small = get_sampler(kind), torch.zeros(1, 1, dtype=torch.float64), 1e-3
    stds, powers = [], []
    for levels in grid.levels[:-1]:
        still = sampler.step(zero, zero, levels, grid.prediction, noise_level)
        moved = sampler.step(zero, zero + small, levels, grid.prediction, noise_level)
        slope = float(moved.mean - still.mean) / small
        sharpness = still.sharpness if still.sharpness is not None else 0.5 / max(still.std, 1e-12) ** 2
        stds.append(still.std)
        powers.append((2.0 * sharpness * still.std * slope) ** 2)
    total = sum(powers[: grid.noisy_steps] or powers)
    return [
        StepNoise(
            index=i,
            sigma=grid.sigma(levels.sigma),
            sigma_next=grid.sigma(levels.sigma_next),
            std=std,
            noisy=i < grid.noisy_steps,
            share=power / total,
        )
        for i, (levels, std, power) in enumerate(zip(grid.levels, stds, powers, strict=False))
    ]


def no_noisy_step(grid: NoiseGrid) -> ConfigError:
    """Raised where the default window is empty."""
    return ConfigError(
        f"sampler.steps: of {len(grid.levels)} steps ({grid.describe()}) none but the last ends at a noise level of "
        f"{LEAST_SIGMA_NEXT} or more, so none may draw noise; use more steps, or name them: sampler.window.range=[0,1]"
    )
