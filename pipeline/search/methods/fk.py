"""Feynman-Kac steering (arXiv 2501.06848): particles are resampled by potentials of look-ahead rewards.

The product of a particle's potentials is exp(lambda r(x0)) in the end, so that weighted particles stand for the tilted
model p(x0) exp(lambda r(x0)) whatever the potentials in between were; these only decide how well.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.config.sections.base import Share
from pipeline.core.errors import ConfigError
from pipeline.search.base import Advance, Found, Particle, Score, Searching, Task, register
from pipeline.search.noisy import NoisySearch


@register("fk")
class FkSteering(NoisySearch):
    """FK steering: as many particles as passes, resampled at several levels by the rewards of what they will become."""

    potential: Literal["max", "add", "diff", "rt"] = Field(
        "max",
        description="Log-potential at a level, times 1 / lambda: the best reward so far, the sum so far, the gain "
        "since the level before, or the reward itself.",
    )
    ess: Share = Field(
        1.0, description="Resample where the effective sample size is below this share of the particles; 1: always."
    )
    resampling: Literal["systematic", "multinomial"] = Field(
        "systematic", description="How offspring are drawn; systematic has less variance."
    )

    def check(self, task: Task) -> None:
        super().check(task)
        self.levels(self.at, task, first=1)
        if self.passes > 1 and task.last_noisy < 1:
            raise ConfigError("search fk: only step 0 draws noise, so nothing can be resampled; use more sampler steps")

    def search(self, task: Task) -> Searching:
        rng = task.rng()
        particles: list[Particle] = [task.new_particle() for _ in range(self.passes)]
        weights = Potentials(self.potential, self.strength, self.passes)
        for level in self.levels(self.at, task, first=1):
            particles = yield Advance(particles, level)
            weights.add((yield Score(particles)))
            if weights.effective_size < self.ess * self.passes:
                rows = resample(weights.shares, rng, self.resampling)
                weights.select(rows)
                particles = _offspring(particles, rows, task)
        particles = yield Advance(particles, task.steps)
        scores = yield Score(particles)
        weights.finish(scores)
        row = int(scores.argmax()) if self.pick == "best" else int(rng.choice(self.passes, p=weights.shares))
        return Found(particles[row], float(scores[row]))


def _offspring(particles: list[Particle], rows: np.ndarray, task: Task) -> list[Particle]:
    """The first offspring of a particle goes on with its noise, the others with noise of their own."""
    taken: set[int] = set()
    chosen = []
    for row in rows.tolist():
        chosen.append(particles[row].fork(task.new_seed()) if row in taken else particles[row])
        taken.add(row)
    return chosen


class Potentials:
    """The log-weights of k particles, whose potentials multiply to exp(strength x final reward)."""

    def __init__(self, kind: str, strength: float, particles: int) -> None:
        self.kind, self.strength = kind, strength
        self.log_weights = np.zeros(particles)  # since they were last resampled
        self.applied = np.zeros(particles)  # log of the product of all potentials on the particle's path
        self.running = np.full(particles, -np.inf if kind == "max" else 0.0)  # max, sum or last of its rewards

    def add(self, rewards: np.ndarray) -> None:
        """The potential of a level at which the particles look ahead to `rewards` [k]."""
        before = self.running
        self.running = {"max": np.maximum(before, rewards), "add": before + rewards}.get(self.kind, rewards)
        log_potential = self.strength * (rewards - before if self.kind == "diff" else self.running)
        self.applied = self.applied + log_potential
        self.log_weights = self.log_weights + log_potential

    def finish(self, rewards: np.ndarray) -> None:
        """The last potential, of the finished takes' `rewards` [k]."""
        self.log_weights = self.log_weights + self.strength * rewards - self.applied

    def select(self, rows: np.ndarray) -> None:
        """The particles are now those of these rows, with equal weights."""
        self.applied, self.running = self.applied[rows], self.running[rows]
        self.log_weights = np.zeros(len(rows))

    @property
    def shares(self) -> np.ndarray:
        """The weights, normalised [k]."""
        weights = np.exp(self.log_weights - self.log_weights.max())
        return np.asarray(weights / weights.sum())

    @property
    def effective_size(self) -> float:
        """1 / sum of the squared shares; exactly k where all are equal."""
        if np.ptp(self.log_weights) == 0.0:
            return float(len(self.log_weights))
        return float(1.0 / (self.shares**2).sum())


def resample(shares: np.ndarray, rng: np.random.Generator, scheme: str) -> np.ndarray:
    """Rows of the offspring of particles with these weights, int [k], in order; unbiased: E[count] = k share."""
    k = len(shares)
    points = (np.arange(k) + rng.random()) / k if scheme == "systematic" else np.sort(rng.random(k))
    return np.minimum(np.searchsorted(np.cumsum(shares), points, side="right"), k - 1)
